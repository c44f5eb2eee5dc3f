"""What pages 09 and 11 write out is right by independent means, and the record of page 11 belongs to its code."""

import json
import types
from typing import Any

import pytest
import torch
from notebook_cells import run

from iclgd_helpers import paths, storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import own_records
from iclgd_helpers.paths import repository_root

RECORD = repository_root() / "results" / "theory" / "greedy_layers.json"
NETWORK = "model layers forward pretrain labels steps likeness-measures likeness passes passes-experiment".split()
NETWORK += "prompt-tasks prompt prompt-experiment".split()


def page_11(*more: str, changes: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    cells = ("parameters", "imports", "stamp", "claims", "claims-more", *NETWORK, *more)
    return run("11_greedy_layers_and_fixed_prompts", *cells, changes=changes)


@pytest.fixture
def page() -> dict[str, Any]:
    return page_11()


def test_record_belongs_to_the_code_of_the_page():
    page, record = page_11("one-seed"), storage.read_json(RECORD)
    assert record["code"] == page["code_hash"], "run page 11 with recompute = True"
    assert record["settings"] == json.loads(json.dumps(page["SETTINGS"]))
    assert list(record["networks"]) == [str(seed) for seed in range(page["N_NETWORKS"])]


def test_recording_resumes_and_replaces_as_a_whole(tmp_path):
    path, unfinished, calls = tmp_path / "record.json", tmp_path / "unfinished.json", []
    storage.write_json(path, {"code": "older"})

    def one_seed(seed):
        calls.append(seed)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"seed": seed, "threads": torch.get_num_threads()}

    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        own_records.compute(one_seed, range(6), {"code": "present"}, path, unfinished)
    assert own_records.load(path) == {"code": "older"} and torch.get_num_threads() == threads
    own_records.compute(one_seed, range(6), {"code": "present"}, path, unfinished)
    assert calls == [0, 1, 2, 2, 3, 4, 5]  # finished networks are not trained again
    written = own_records.load(path)
    assert written["networks"] == {str(seed): {"seed": seed, "threads": 1} for seed in range(6)}
    assert written["code"] == "present" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("given", "recompute", "computed", "shown"),
    [
        ((0, 12), False, None, "results/theory/greedy_layers.json"),
        ((7, 3), False, None, "results/theory/greedy_layers.json"),
        ((0, 12), True, range(6), "results/theory/greedy_layers.json"),
        ((7, 3), True, range(7, 13), "_runs/theory/greedy-{code}-complete.json"),
    ],
)
def test_page_11_stores_other_parameters_beside_the_committed_record(given, recompute, computed, shown, monkeypatch):
    page, seeds, read = page_11("one-seed"), [], []
    record = {"parameters": {}, "networks": {}, "environment": {"torch": ""}, "code": ""}
    monkeypatch.setattr(own_records, "compute", lambda _one, of, _facts, path, _unfinished: seeds.append((of, path)))
    monkeypatch.setattr(own_records, "load", lambda path: read.append(path) or record)
    page["p"] = page["p"].model_copy(update={"seed": given[0], "n_demonstrations": given[1], "recompute": recompute})
    run("11_greedy_layers_and_fixed_prompts", "load", **page)
    expected = paths.resolve_path(shown.format(code=page["code_hash"]))
    assert read == [expected] and seeds == ([(computed, expected)] if recompute else [])


def test_a_missing_record_is_one_line(tmp_path):
    with pytest.raises(InputError, match="recompute = True"):
        own_records.load(tmp_path / "record.json")


def test_steps_to_threshold(page):
    curves = torch.tensor([[0.05, 0.9, 0.9], [0.05, 0.08, 0.9], [0.5, 0.2, 0.9]])
    assert page["steps_to_threshold"](curves).tolist() == [0, 2, 6]


@pytest.mark.parametrize("name", ["joint", "greedy"])
def test_a_step_has_the_length_asked_for_and_lowers_the_loss(page, name):
    weights = page["make_model"](3)
    x, y = page["linear_tasks"]((1, 1), 12, torch.Generator().manual_seed(0))
    demos = page["tokens"](x)

    def loss(weights):
        return float(((page["forward"](weights, demos[:, :, :0], demos)[0] - y) ** 2).mean())

    after = page["STEPS"][name](weights, demos, y, length=0.01)
    moved = sum(float((after[k] - weights[k]).square().sum()) for k in weights) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert {k for k in weights if not torch.equal(after[k], weights[k])} <= set(page["ATTENTION"])
    if name == "joint":
        assert loss(after) < loss(weights)


def test_a_greedy_step_does_not_look_ahead_and_a_joint_one_does(page):
    weights, other = page["make_model"](3), page["make_model"](4)
    changed = weights | {k: other[k] for k in weights if k.endswith(("1", "2"))}
    x, y = page["linear_tasks"]((1, 1), 12, torch.Generator().manual_seed(0))
    first = {}
    for name, step in page["STEPS"].items():
        pair = [step(w, page["tokens"](x), y, rate=0.1)["V0"] for w in (weights, changed)]
        first[name] = torch.allclose(*pair, atol=1e-7)
    assert first == {"joint": False, "greedy": True}


def test_questions_see_demonstrations_and_themselves_only(page):
    weights, g = page["make_model"](3), torch.Generator().manual_seed(0)
    x, y = page["linear_tasks"]((1, 2), 9, g)
    demos, asked = page["tokens"](x[:, :, :6], y[:, :, :6]), page["tokens"](x[:, :, 6:])
    together, _ = page["forward"](weights, demos, asked)
    alone = torch.cat([page["forward"](weights, demos, asked[:, :, [i]])[0] for i in range(3)], 2)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, page["forward"](weights, demos[:, :, :5], asked)[0], atol=1e-4)


FORWARD = ("parameters", "imports", "forward-pass", "forward-check", "forward-verdict")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("loss = 0.5 *", "loss = 1.0 *"),
        (".sum(0).mean()", ".mean()"),
        ("+ start.detach() @ W_K @ demos", ""),
        ("start.detach() - step", "start.detach() + step"),
        ("if update_demos else demos", "if not update_demos else demos"),
        ("alone if zero_shot_base else query", "query if zero_shot_base else alone"),
    ],
)
def test_forward_verdict_notices(old, new):
    slug = "11_greedy_layers_and_fixed_prompts"
    run(slug, *FORWARD)
    with pytest.raises(AssertionError):
        run(slug, *FORWARD, changes=((old, new),))


@pytest.fixture
def page_09():
    before = torch.get_default_dtype()
    yield lambda *ids, **options: run("09_from_identity_to_learning", *ids, **options)
    torch.set_default_dtype(before)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_population_loss_is_the_mean_over_sampled_prompts(page_09, noise):
    page = page_09("parameters", "imports", "population", "sampling")
    g = torch.Generator().manual_seed(1)
    v, A = 0.4 * torch.randn(1, 6, generator=g), 0.4 * torch.randn(1, 6, 5, generator=g)
    Lambda = torch.diag(torch.tensor([1.5, 1.0, 0.8, 0.5, 0.2]))
    exact = float(page["population_loss"](v, A, Lambda, *page["moments"](Lambda, noise)))
    errors = page["sampled_errors"](v[0], A[0], Lambda, noise, 200_000, g)
    low, high = page["interval"](errors, z=4.5)
    assert low < exact < high and high - low < 0.2 * exact


SLOTS = (
    "parameters",
    "imports",
    "oswald",
    "slots",
    "slots-verdict",
    "tied",
    "tied-verdict",
    "labels",
    "labels-verdict",
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= W_0, -torch.eye(d_y)", "= W_0, torch.eye(d_y)"),
        ("E + eta / n *", "E + eta *"),
        ("(0.5 * ((W @ X - Y) ** 2)", "(((W @ X - Y) ** 2)"),
        ("lambda s: 2 * W_0 @ x_q - s", "lambda s: W_0 @ x_q - s"),
        ("weight = weight - eta * leaf.grad", "weight = weight - eta * W.grad"),
        ("tokens if question_is_key else tokens[:, :n]", "tokens"),
        ("values, keys = Y - W_0 @ X, X", "values, keys = Y, X"),
    ],
)
def test_page_09_notices(page_09, old, new):
    page_09(*SLOTS)
    with pytest.raises(AssertionError):
        page_09(*SLOTS, changes=((old, new),))


def test_verdict_rule():
    page = run("11_greedy_layers_and_fixed_prompts", "verdicts", DELTAS={}, MARGIN=0.05, net=types.SimpleNamespace())
    rule = page["verdict"]
    assert rule([(0.1, 0.2)]) == "survives"
    assert rule([(0.1, 0.2), (-0.1, 0.2)]) == "open"
    assert rule([(0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2)]) == "refuted"
