"""What pages 09 and 11 write out is right by independent means; page 11 finds the right record."""

from typing import Any

import pytest
import torch
from notebook_cells import run

from iclgd_helpers import paths, storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import own_records


def page_11(*more: str) -> dict[str, Any]:
    return run("11_greedy_layers_and_fixed_prompts", "parameters", "imports", "stamp", *more)


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
    page, seeds, read = page_11(), [], []
    record = {"parameters": {}, "networks": {}, "environment": {"torch": ""}, "code": ""}
    monkeypatch.setattr(own_records, "compute", lambda _one, of, _facts, path, _unfinished: seeds.append((of, path)))
    monkeypatch.setattr(own_records, "load", lambda path: read.append(path) or record)
    page["p"] = page["p"].model_copy(update={"seed": given[0], "n_demonstrations": given[1], "recompute": recompute})
    run("11_greedy_layers_and_fixed_prompts", "load", **page)
    code = own_records.code_hash(page["net"].CODE, page["net"].SETTINGS)
    expected = paths.resolve_path(shown.format(code=code))
    assert read == [expected] and seeds == ([(computed, expected)] if recompute else [])


def test_a_missing_record_is_one_line(tmp_path):
    with pytest.raises(InputError, match="recompute = True"):
        own_records.load(tmp_path / "record.json")


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
    exact = float(page["loss_of"](v[0], A[0], Lambda, page["moments"](Lambda, noise)))
    G, x, y = page["prompts"](Lambda, noise, 200_000, g)
    errors = (torch.einsum("a,sab,bc,sc->s", v[0], G, A[0], x) - y) ** 2
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
        ('"no mask, the question is no key": (False, 1.0)', '"no mask, the question is no key": (True, 1.0)'),
        ("values, keys = Y - W_0 @ X, X", "values, keys = Y, X"),
    ],
)
def test_page_09_notices(page_09, old, new):
    page_09(*SLOTS)
    with pytest.raises(AssertionError):
        page_09(*SLOTS, changes=((old, new),))


def test_verdict_rule():
    page = run("11_greedy_layers_and_fixed_prompts", "verdicts", DELTAS={})
    rule = page["verdict"]
    assert rule([(0.1, 0.2)]) == "survives"
    assert rule([(0.1, 0.2), (-0.1, 0.2)]) == "open"
    assert rule([(0.1, 0.2), (-0.2, -0.1), (-0.1, 0.2)]) == "refuted"
