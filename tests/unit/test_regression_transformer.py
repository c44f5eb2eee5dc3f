"""The small regression network does what page 11 says of it, and the committed record was computed by this code."""

import json

import pytest
import torch

from iclgd_helpers import storage
from iclgd_helpers.experiments import own_records, provenance
from iclgd_helpers.paths import repository_root
from iclgd_helpers.theory import regression_transformer as net

RECORD = storage.read_json(repository_root() / "results" / "theory" / "greedy_layers.json")


@pytest.fixture(autouse=True)
def single_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


def numbers(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_record_is_of_this_code_and_these_settings():
    assert RECORD["code"] == own_records.code_hash(net.CODE, net.SETTINGS), "run page 11 with recompute = True"
    assert RECORD["settings"] == json.loads(json.dumps(net.SETTINGS))
    assert list(RECORD["networks"]) == [str(seed) for seed in range(net.N_NETWORKS)]


@pytest.mark.parametrize("seed", range(2))
def test_an_untrained_network_of_the_record_comes_out_again(seed):
    found = net.likeness_experiment(net.make_model(seed), 12, numbers(25_000 + seed))
    kept = RECORD["networks"][str(seed)]["likeness, untrained"]
    assert found.keys() == kept.keys()
    for arm, values in kept.items():
        assert found[arm] == pytest.approx(values, abs=2e-4), arm
    other = net.likeness_experiment(net.make_model(seed + 1), 12, numbers(25_000 + seed))
    assert other["joint, true"]["plain"] != pytest.approx(kept["joint, true"]["plain"], abs=2e-4)


def test_annotations_and_docstrings_do_not_change_the_identity():
    bare = 'def f(a, b=1):\n    c = {"x": a}\n    return b\n'
    typed = 'def f(a: int, b: dict[str, int] = 1) -> tuple[int, ...]:\n    c: dict[str, int] = {"x": a}\n    return b\n'
    assert provenance.source_form(own_records.without_annotations(typed)) == provenance.source_form(bare)
    assert own_records.without_annotations(bare) == bare


def test_pretraining_lowers_the_error(monkeypatch):
    monkeypatch.setitem(net.PRETRAINING, "steps", 150)

    def error(weights):
        x, y = net.linear_tasks((1, 200), 16, numbers(1))
        given, asked = net.tokens(x[:, :, :12], y[:, :, :12]), net.tokens(x[:, :, 12:])
        return float(((net.forward(weights, given, asked)[0] - y[:, :, 12:]) ** 2).mean().detach())

    assert error(net.pretrain(3, 12)) < 0.9 < error(net.make_model(3))


def test_steps_to_threshold():
    curves = torch.tensor([[0.05, 0.9, 0.9], [0.05, 0.08, 0.9], [0.5, 0.2, 0.9]])
    assert net.steps_to_threshold(curves).tolist() == [0, 2, 6]


@pytest.mark.parametrize("name", ["joint", "greedy"])
def test_a_step_has_the_length_asked_for_and_lowers_the_loss(name):
    weights = net.make_model(3)
    x, y = net.linear_tasks((1, 1), 12, numbers())
    demos = net.tokens(x)

    def loss(weights):
        return float(((net.forward(weights, demos[:, :, :0], demos)[0] - y) ** 2).mean())

    after = net.STEPS[name](weights, demos, y, length=0.01)
    moved = sum(float((after[k] - weights[k]).square().sum()) for k in weights) ** 0.5
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert {k for k in weights if not torch.equal(after[k], weights[k])} <= set(net.ATTENTION)
    if name == "joint":
        assert loss(after) < loss(weights)


def test_a_greedy_step_does_not_look_ahead_and_a_joint_one_does():
    weights, other = net.make_model(3), net.make_model(4)
    changed = weights | {k: other[k] for k in weights if k.endswith(("1", "2"))}
    x, y = net.linear_tasks((1, 1), 12, numbers())
    first = {}
    for name, step in net.STEPS.items():
        pair = [step(w, net.tokens(x), y, rate=0.1)["V0"] for w in (weights, changed)]
        first[name] = torch.allclose(*pair, atol=1e-7)
    assert first == {"joint": False, "greedy": True}


def test_questions_see_demonstrations_and_themselves_only():
    weights = net.make_model(3)
    x, y = net.linear_tasks((1, 2), 9, numbers())
    demos, asked = net.tokens(x[:, :, :6], y[:, :, :6]), net.tokens(x[:, :, 6:])
    together, _ = net.forward(weights, demos, asked)
    alone = torch.cat([net.forward(weights, demos, asked[:, :, [i]])[0] for i in range(3)], 2)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, net.forward(weights, demos[:, :, :5], asked)[0], atol=1e-4)
