"""The grid as a command: what it covers, that its sweeps are what its text says, that it can be stopped anywhere."""

import copy
import importlib
import json
import math
import shutil
import statistics as plain_statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import float64
import naive
import numpy as np
import pytest
import torch
from conftest import FEW_RESAMPLES

from iclgd_helpers import cli, storage
from iclgd_helpers.data import tasks
from iclgd_helpers.engine.finetune import METHODS
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import (
    clipping,
    experiment,
    learning_rates,
    parameters,
    plans,
    protocol,
    records,
    runner,
    runs,
    sweeps,
)
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.learning_rates import best
from iclgd_helpers.measures import intervals
from iclgd_helpers.pages import selection

REPRODUCTION = ["grid", "--plan", "reproduction", "--on", "here"]
COST_ONLY = ["--cost-only", "--tflops", "1"]
pytestmark = pytest.mark.usefixtures("few_resamples")


# ---------------------------------------------------------------------------------------------- what it consists of
def cells_of(items: list[plans.Item], stage: str) -> list[tuple[str, str, int]]:
    return [(i.given.model, i.given.task, i.given.seed) for i in items if i.stage == stage]


def test_the_grid_is_six_tasks_three_seeds_two_models():
    jobs = plans.items(protocol.MODELS, protocol.STAGES, tuple(protocol.SEEDS))
    expected = {
        (model, task, seed) for model in protocol.MODELS for task, seeds in protocol.SEEDS.items() for seed in seeds
    }
    assert len(expected) == 36 and Counter(cells_of(jobs, "runs")) == Counter(expected)
    firsts = {(model, task, seeds[0]) for model in protocol.MODELS for task, seeds in protocol.SEEDS.items()}
    assert Counter(cells_of(jobs, "rates")) == Counter(firsts)
    unequal = {key for key in firsts if key[0] == protocol.MODELS[0] and key[1] in ("cb", "agnews")}
    assert set(cells_of(jobs, "unequal")) == unequal


def test_what_is_asked_for_twice_is_one_job():
    once = plans.items(protocol.MODELS[:1], ["rates", "runs"], ["cb"])
    assert len(once) == 4 and plans.items(protocol.MODELS[:1] * 2, ["rates", "runs"] * 2, ["cb"] * 2) == once


def test_every_task_of_the_grid_has_its_place_in_the_tables():
    assert set(protocol.SEEDS) == set(selection.TASKS)


def test_orders_and_clips_are_of_the_first_model():
    jobs = plans.items(protocol.MODELS, protocol.STAGES, tuple(protocol.SEEDS))
    orders = [job for job in jobs if job.stage == "orders"]
    assert {job.given.model for job in orders} == {protocol.MODELS[0]}
    found = Counter((job.given.task, job.given.seed, job.given.order) for job in orders)
    first = {(task, protocol.SEEDS[task][0], order) for task in ("sst2", "subj") for order in (1, 2, 3, 4)}
    assert found == Counter(first | {(task, seed, 0) for task in ("sst2", "subj") for seed in (11, 12)})
    assert {key[:2] for key in cells_of(jobs, "clips")} == {(protocol.MODELS[0], task) for task in protocol.CLIP_TASKS}


def test_rates_come_before_the_cells_that_need_them():
    jobs = plans.items(protocol.MODELS, protocol.STAGES, tuple(protocol.SEEDS))
    compared = set()
    for job in jobs:
        key = job.given.model, job.given.task
        if job.stage == "rates":
            compared.add(key)
        assert job.stage == "clips" or key in compared


def test_conditioning_is_measured_with_each_tasks_first_seed():
    for job in plans.items(protocol.MODELS, ["runs"], tuple(protocol.SEEDS)):
        task, is_first_model = job.given.task, job.given.model == protocol.MODELS[0]
        is_first_seed = job.given.seed == protocol.SEEDS[task][0]
        assert job.given.conditioning == (is_first_seed and (is_first_model or task in ("sst2", "subj")))


def test_other_models_compare_rates_with_half_as_many_demonstrations():
    jobs = plans.items([*protocol.MODELS, "somebody/else"], ["rates", "clips"], ["mr"])
    found = [(job.stage, job.given.model, job.given.n_demonstrations) for job in jobs]
    first, second = protocol.MODELS
    assert found == [
        ("rates", first, 16),
        ("clips", first, 16),
        ("rates", second, 8),
        ("rates", "somebody/else", 8),
    ]


@pytest.mark.parametrize("task", protocol.SEEDS)
def test_cells_have_the_protocols_settings(task: str):
    usual = parameters.resolve({"preset": "quick", "task": task})
    differs = {"seed", "max_examples", "max_compared", "model", "chosen_rates", "conditioning", "n_calibration_rows"}
    for job in plans.items(protocol.MODELS, ["runs"], [task]):
        assert job.given.model_dump(exclude=differs) == usual.model_dump(exclude=differs)
        assert job.given.max_examples == protocol.N_ROWS


def test_less_can_be_asked_for():
    jobs = plans.items(["somebody/else"], ["runs"], ["mr"])
    assert cells_of(jobs, "runs") == [("somebody/else", "mr", seed) for seed in (5, 6, 7)] and len(jobs) == 3


# ------------------------------------------------------------------------------------------------------- rule of choice
def points(*log_probabilities: float | None) -> list[dict[str, Any]]:
    """One point a rate, from the smallest rate."""
    pairs = zip(protocol.LEARNING_RATES, log_probabilities, strict=False)
    return [{"learning_rate": r, "class_log_probability": v} for r, v in pairs]  # None: the arm has diverged


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ((-3.0, -1.0, -2.0), 1),
        ((-1.0, -1.0, -2.0), 0),
        ((-2.0, -1.0, -1.0), 1),
        ((-1.0, -1.0, -1.0), 0),
        ((None, -2.0, -1.0), 2),
        ((-1.0, None, None), 0),
    ],
)
def test_the_best_rate_wins_and_ties_go_to_the_smaller(values: tuple[float | None, ...], place: int):
    found = points(*values)
    assert best(found) == protocol.LEARNING_RATES[place]
    assert best(found[::-1]) == protocol.LEARNING_RATES[place], "the order of the points decides nothing"


def test_the_choice_follows_the_numbers():
    """Negative control: the same numbers turned round choose another rate; where there is none, a line says so."""
    values = (-3.0, -2.0, -1.0)
    assert best(points(*values)) != best(points(*values[::-1]))
    with pytest.raises(InputError, match="smaller ones"):
        best(points(None, None))


def test_accuracy_does_not_choose():
    found = points(-3.0, -1.0)
    found[0]["accuracy"], found[1]["accuracy"] = {"value": 1.0}, {"value": 0.0}
    assert best(found) == protocol.LEARNING_RATES[1]


# ------------------------------------------------------------------------------------- sweeps against the naive engine
WHOLE = 8


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rates, rows, bounds and demonstrations; the tasks' own number of them becomes 8."""
    values = {"LEARNING_RATES": (0.03, 0.3), "N_RATE_ROWS": 6, "N_GATE_ROWS": 9, "CLIP_FACTORS": (0.25, 1.0)}
    for name, value in values.items():
        monkeypatch.setattr(protocol, name, value)
    monkeypatch.setattr(protocol, "N_SWEEP_DEMONSTRATIONS_OF_OTHERS", 4)
    for task in protocol.SEEDS:
        monkeypatch.setitem(tasks.SETTINGS[task], "n_demonstrations", WHOLE)


class Naive:
    """What the naive engine finds on given rows, arm by arm."""

    def __init__(self, cell: runs.Run, examples: list) -> None:
        self.cell, self.examples, self.task = cell, examples, cell.layout.task
        self.labels = naive.label_tokens(cell.model.tokenizer, self.task)
        self.bare = naive.context(cell.model.tokenizer, self.task, [], "eos")
        self.plain = naive.stock(cell.model)
        shown = naive.context(cell.model.tokenizer, self.task, cell.demonstrations, "eos")
        self.zero_shot, self.in_context = self.observe(self.plain), self.observe(self.plain, shown)

    def observe(self, model: torch.nn.Module, before: list[int] | None = None, examples: list | None = None) -> list:
        prompts = [naive.encode(self.cell.model.tokenizer, e.prompt) for e in examples or self.examples]
        return [naive.observe(model, before or self.bare, prompt, self.labels) for prompt in prompts]

    def finetuned(self, method: str, rate: float, **options: Any) -> tuple[list, list]:
        """Observations after finetuning on the demonstrations, and the gradient norms `[step][layer]`."""
        encode, model = self.cell.model.tokenizer, naive.stock(self.cell.model)
        sequences = [naive.sequence(encode, self.task, example, self.bare) for example in self.cell.demonstrations]
        _losses, norms = naive.finetune(model, sequences, method, rate, **options)
        return self.observe(model), norms

    def summary(self, tuned: list) -> dict[str, Any]:
        """The numbers of a sweep's point."""
        labels = [example.label for example in self.examples]
        logs = [one["label_log_probabilities"] for one in tuned]
        arms = [[int(o["label_log_probabilities"].argmax()) for o in arm] for arm in self.triple(tuned)]
        delta = self.layerwise(naive.sim_am_delta, self.triple(tuned), "attention_scores")
        for of_example in delta:
            of_example[0] = math.nan  # rotary positions: undefined in the first layer
        direct = self.layerwise(naive.sim_am, (self.in_context, tuned), "attention_scores")
        return {
            "n": len(labels),
            "accuracy": sum(p == y for p, y in zip(arms[2], labels, strict=True)) / len(labels),
            "class_log_probability": sum(float(v[y] - v.logsumexp(0)) for v, y in zip(logs, labels, strict=True))
            / len(labels),
            "jaccard": naive.jaccard(*arms, labels),
            "sim_aou": over(self.layerwise(naive.sim_aou, self.triple(tuned), "attention_output")),
            "sim_am_direct": over(direct),
            "sim_am_delta": over(delta),
        }

    def triple(self, tuned: list) -> tuple[list, list, list]:
        return self.zero_shot, self.in_context, tuned

    @staticmethod
    def layerwise(metric: Any, arms: tuple, tensor: str) -> list[list[float]]:
        layers = range(len(arms[0][0][tensor]))
        return [[metric(*(arm[tensor][i] for arm in one)) for i in layers] for one in zip(*arms, strict=True)]


def over(values: list[list[float]]) -> float:
    """Mean over examples, then over layers."""
    return naive.mean([naive.mean(list(column)) for column in zip(*values, strict=True)])


def assert_same_point(point: dict[str, Any], expected: dict[str, Any]) -> None:
    assert point["n"] == expected["n"]
    for name, value in expected.items():
        found = point[name]["value"] if isinstance(point[name], dict) else point[name]
        assert found == pytest.approx(value, abs=1e-8, nan_ok=True), name


def tiny_cell(task: str = "subj", **given: Any) -> runs.Run:
    given = {"preset": "smoke", "task": task, "dtype": "float64", "n_demonstrations": 3, "max_examples": 5} | given
    return runs.prepare(parameters.resolve({**given, "controls": False, "conditioning": False}))


def test_a_point_of_the_rates_equals_an_independent_computation(small: None):
    with float64.uncast():
        cell = tiny_cell()
        found = learning_rates.compare(cell, task_data(cell.parameters), WHOLE)
        train, whole = task_data(cell.parameters).train, WHOLE
        order = np.random.default_rng(cell.parameters.seed).permutation(len(train))
        assert found["rows"] == [train[i].row for i in order[whole : whole + 6]]
        assert {train[i].row for i in order[:3]} == {example.row for example in cell.demonstrations}
        other = Naive(cell, [train[i] for i in order[whole : whole + 6]])
        for method in METHODS:
            (point,) = (p for p in found["points"] if p["method"] == method and p["learning_rate"] == 0.3)
            assert_same_point(point, other.summary(other.finetuned(method, 0.3)[0]))
    assert {(p["method"], p["learning_rate"]) for p in found["points"]} == {
        (m, r) for m in METHODS for r in protocol.LEARNING_RATES
    }
    own = {method: [p for p in found["points"] if p["method"] == method] for method in METHODS}
    assert found["chosen"] == {method: best(of_method) for method, of_method in own.items()}


def test_the_gate_equals_an_independent_computation(small: None):
    """In-context learning with all demonstrations of the seed, on training rows that follow them."""
    with float64.uncast():
        cell = tiny_cell("agnews", seed=3)
        gate = learning_rates.compare(cell, task_data(cell.parameters), WHOLE)["gate"]
        train = task_data(cell.parameters).train
        order = np.random.default_rng(3).permutation(len(train))
        other = Naive(cell, [train[i] for i in order[WHOLE : WHOLE + 9]])
        shown = naive.context(cell.model.tokenizer, other.task, [train[i] for i in order[:WHOLE]], "eos")
        assert len(shown) < 2048, "otherwise fewer are shown"
        seen = {"zero_shot": other.zero_shot, "in_context": other.observe(other.plain, shown)}
    labels = [example.label for example in other.examples]
    right = {
        arm: np.mean([int(o["label_log_probabilities"].argmax()) == y for o, y in zip(of_arm, labels, strict=True)])
        for arm, of_arm in seen.items()
    }
    assert gate["accuracy"] == pytest.approx(right)
    difference = gate["in_context_minus_zero_shot"]
    assert difference["n"] == 9 and difference["value"] == pytest.approx(right["in_context"] - right["zero_shot"])
    assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]


def test_points_of_the_clips_equal_an_independent_computation(small: None):
    with float64.uncast():
        cell = tiny_cell(learning_rate=0.3)
        found = clipping.compare(cell)
        evaluation = task_data(cell.parameters).evaluation
        other = Naive(cell, evaluation[:5])
        unclipped, norms = other.finetuned("joint", 0.3)
        by = {(p["method"], p["clip"], p.get("factor")): p for p in found["points"]}
        assert len(by) == len(found["points"]) == 3 * 2 + 2
        assert_same_point(by["joint", "none", None], other.summary(unclipped))
        assert_same_point(by["standard", "none", None], other.summary(other.finetuned("standard", 0.3)[0]))
        size = sum(p.numel() for _name, p in naive.key_values(other.plain, 0))
        median = plain_statistics.median
        of_layer = median([norm for step in norms for norm in step])
        typical = {"per_layer": of_layer, "elementwise": of_layer / math.sqrt(size)}
        typical["global"] = median([math.sqrt(sum(norm**2 for norm in step)) for step in norms])
        assert found["typical_norms"] == pytest.approx(typical)
        for kind in protocol.CLIP_KINDS:
            point = by["joint", kind, 0.25]
            assert point["clip_value"] == pytest.approx(typical[kind] / 4)
            clipped = other.finetuned("joint", 0.3, clip=kind, clip_value=typical[kind] / 4)[0]
            assert_same_point(point, other.summary(clipped))
            assert point["label_log_probability"] != by["joint", "none", None]["label_log_probability"]
    assert found["rows"] == [example.row for example in evaluation[:5]]


# ------------------------------------------------------------------------------------------------------ the command
ARGUMENTS = ["--model", "tiny-llama", "--task", "subj", "--stage", "rates", "--stage", "runs", "--tflops", "1"]


@pytest.fixture
def results(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results; few rows, and generated text in place of the task's."""
    monkeypatch.setattr(protocol, "N_ROWS", 4)
    monkeypatch.setattr(protocol, "RECORDS", str(tmp_path / "records"))
    monkeypatch.setattr(protocol, "SWEEPS", str(tmp_path / "sweeps"))
    monkeypatch.setattr(parameters, "_default_source", lambda *_arguments: "generated")
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path / "records"))
    return tmp_path


def stored(results: Path) -> dict[str, dict[str, Any]]:
    """The records by identity, without what two runs may differ in."""
    found = copy.deepcopy({record.json["id"]: record.json for record in records.load_all(results / "records")})
    for record in found.values():
        for name in records.VOLATILE:
            del record[name]
    return found


def test_nothing_is_computed_that_could_not_be_stored(results: Path, monkeypatch, capsys):
    (results / "file").touch()
    monkeypatch.setattr(protocol, "SWEEPS", str(results / "file"))
    monkeypatch.setattr(runner, "run", lambda *_, **__: pytest.fail("computed what cannot be stored"))
    assert cli.main([*REPRODUCTION, "--model", "tiny-llama", "--task", "mr", "--stage", "rates", "--tflops", "1"]) == 2
    said = capsys.readouterr().err
    assert f"cannot write to {results / 'file'}" in said and said.count("\n") == 1


def test_stop_resume_skip_and_make_again(results: Path, capsys, monkeypatch):
    """One run that is stopped in the middle, its continuation, a third that has nothing to do, and a lost record."""
    compute, n_computed = experiment.compute, []

    def stopped(run: runs.Run, progress: bool) -> records.Record:
        if len(n_computed) == 2:
            raise KeyboardInterrupt
        n_computed.append(run.parameters.seed)
        return compute(run, progress)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "compute", stopped)
        assert cli.main([*REPRODUCTION, *ARGUMENTS]) == 130
    said = capsys.readouterr()
    assert "0 of 4 jobs are stored" in said.out and "start it again to go on" in said.err
    before = stored(results)
    assert sorted(record["parameters"]["seed"] for record in before.values()) == [4, 5]

    assert cli.main([*REPRODUCTION, *ARGUMENTS]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 jobs are stored" in said and "runs: tiny-llama/subj/6" in said and "subj/5 " not in said
    complete = stored(results)
    assert len(complete) == 3 and all(complete[name] == record for name, record in before.items())
    sweep = json.loads((results / "sweeps" / "rates-tiny-llama-subj.json").read_text())
    for record in complete.values():
        assert record["parameters"]["chosen_rates"] == sweep["chosen"]
        for method in METHODS:
            assert record["finetuning"][f"{method}_chosen"]["learning_rate"] == sweep["chosen"][method]
            assert ("conditioning" in record["finetuning"][method]) == (record["parameters"]["seed"] == 4)

    times = {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()}
    assert cli.main([*REPRODUCTION, *ARGUMENTS]) == 0
    assert "4 of 4 jobs are stored" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*") if path.is_file()} == times

    lost = sorted(complete)[0]
    shutil.rmtree(results / "records" / lost)
    (results / "sweeps" / "rates-tiny-llama-subj.json").rename(results / "sweeps" / "kept")
    assert cli.main([*REPRODUCTION, *ARGUMENTS]) == 0
    assert stored(results) == complete, "the examples' checksum is part of what is compared"
    again = json.loads((results / "sweeps" / "rates-tiny-llama-subj.json").read_text())
    assert again == json.loads((results / "sweeps" / "kept").read_text())


def one(stage: str, model: str = "tiny-llama", task: str = "subj") -> plans.Planned:
    """The only job of one stage, as it stands now."""
    (planned,) = [planned for planned in plans.reproduction([model], [stage], [task])]
    return planned


def perform(planned: plans.Planned, **more: Any) -> tuple[str, Any]:
    module, _, name = planned.job.call.partition(":")
    return getattr(importlib.import_module(module), name)(**planned.job.arguments, **more)


def test_a_sweep_of_other_helpers_data_settings_or_rule_is_made_again(results: Path, monkeypatch):
    message, chosen = perform(one("rates"))
    path = sweeps.path("rates", "tiny-llama", "subj")
    sweep = storage.read_json(path)
    assert one("rates").is_stored and "chosen" in message and chosen == sweep["chosen"]
    assert perform(one("rates")) == (runner.STORED, chosen), "a job that is handed out twice computes once"
    points = [point | {"learning_rate": 2 * point["learning_rate"]} for point in sweep["points"]]
    changes = [{"engine": "0" * 16}, {"data_checksum": "x"}, {"model_content": "one/tiny-llama"}, {"rows": []}]
    changes += [{"chosen": chosen | {"joint": 0.5}}, {"points": points}]
    changes += [{"parameters": sweep["parameters"] | {"n_demonstrations": 3}}]
    for change in changes:
        storage.write_json(path, sweep | change)
        assert not one("rates").is_stored
        (cell, *_others) = plans.reproduction(["tiny-llama"], ["runs"], ["subj"])
        assert cell.job.after and not cell.job.arguments["given"]["chosen_rates"], "no rates that do not answer"
    storage.write_json(path, sweep)
    assert one("rates").is_stored
    monkeypatch.setattr(protocol, "LEARNING_RATES", protocol.LEARNING_RATES[1:])
    assert not one("rates").is_stored


def test_sweeps_of_clips_answer_for_their_bounds(results: Path, monkeypatch):
    monkeypatch.setattr(protocol, "MODELS", ("tiny-llama",))
    perform(one("clips", task="mr"))
    assert one("clips", task="mr").is_stored
    monkeypatch.setattr(protocol, "CLIP_FACTORS", (*protocol.CLIP_FACTORS, 64.0))
    assert not one("clips", task="mr").is_stored


def test_a_run_is_not_stored_before_its_rates_are_chosen(results: Path, capsys):
    (cell, *_others) = plans.reproduction(["tiny-llama"], ["runs"], ["subj"])
    assert not cell.is_stored and cell.job.after == ("rates: tiny-llama/subj/4",)
    asked = ["--model", "tiny-llama", "--task", "subj", "--stage", "runs", "--tflops", "1"]
    assert cli.main([*REPRODUCTION, *asked]) == 2
    said = capsys.readouterr().err
    assert "run --stage rates first" in said and said.count("\n") == 1 and not list(results.glob("records/*"))


def test_what_another_process_has_stored_meanwhile_is_not_computed(results: Path, monkeypatch):
    planned = one("rates")
    perform(planned)
    monkeypatch.setattr(learning_rates, "compare", lambda *_: pytest.fail("computed what is stored"))
    said: list[str] = []
    assert runner.run([planned.job], None, said.append) == [] and "stored already" in said[0]


def test_unequal_demonstrations_are_counted_as_such(results: Path, monkeypatch):
    monkeypatch.setattr(protocol, "MODELS", ("tiny-llama",))
    monkeypatch.setattr(protocol, "UNEQUAL_TASKS", ("agnews",))
    known = plans._Known.of(list(plans._of_task("tiny-llama", "agnews")))
    assert known.unequal is not None and not known.unequal.parameters.equal_demonstrations
    (item,) = plans.items(["tiny-llama"], ["unequal"], ["agnews"])
    given = item.given
    assert known.plan_of(given) is known.unequal
    assert known.plan_of(given.model_copy(update={"equal_demonstrations": True})) is known.plan


def test_cost_only_computes_nothing(results: Path, capsys, monkeypatch):
    def never(*_arguments: object) -> None:
        raise AssertionError("something was computed")

    monkeypatch.setattr(runner, "run", never)
    for module, name in ((runs, "prepare"), (experiment, "record_of"), (experiment, "compute")):
        monkeypatch.setattr(module, name, never)
    everything = [a for stage in protocol.STAGES for a in ("--stage", stage)]
    assert cli.main([*REPRODUCTION, "--model", "tiny-llama", "--task", "cb", *COST_ONLY, *everything]) == 0
    said = capsys.readouterr().out
    assert "0 of 4 jobs are stored" in said and "TFLOP" in said and "tiny-llama runs" in said
    assert not list(results.iterdir())


@pytest.mark.parametrize(("asked", "expected"), [([], 1), (["--threads", "2"], 2)])
def test_one_thread_computes_unless_more_are_asked_for(results: Path, asked: list[str], expected: int):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert cli.main([*REPRODUCTION, "--model", "tiny-llama", "--task", "mr", *COST_ONLY, *asked]) == 0
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------- chosen rates, order, conditioning in a cell
def record_of(**given: Any) -> records.Record:
    fixed = {"preset": "smoke", "task": "sst5", "dtype": "float64", "n_demonstrations": 4, "max_examples": 6}
    fixed |= {"learning_rate": 0.3, "controls": False}
    with float64.uncast():
        return experiment.compute(runs.prepare(parameters.resolve(fixed | given)), progress=False)


def log_probabilities(record: records.Record, arm: str) -> np.ndarray:
    return np.stack(record.examples[f"log_probability/{arm}"])


def same(one: Any, other: Any) -> bool:
    """Equal in form, and numbers to rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == (pytest.approx(other, rel=1e-7, abs=1e-9) if isinstance(other, float) else other)


@pytest.fixture(scope="module")
def reference() -> Iterator[records.Record]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", FEW_RESAMPLES)
        yield record_of()


def test_a_chosen_rate_equal_to_the_given_one_changes_nothing(reference: records.Record):
    found = record_of(chosen_rates=dict.fromkeys(METHODS, 0.3)).json
    for method in METHODS:
        assert same(found["arms"][f"{method}_chosen"], found["arms"][method])
        assert same(found["comparisons"][f"{method}_chosen"], found["comparisons"][method])
        tuned = dict(found["finetuning"][method])
        del tuned["conditioning"]
        assert same(found["finetuning"][f"{method}_chosen"], tuned)
    assert same({arm: found["arms"][arm] for arm in reference.json["arms"]}, reference.json["arms"])


def test_another_chosen_rate_is_another_arm_and_only_that(reference: records.Record):
    found = record_of(chosen_rates={"joint": 0.1})
    added = set(found.json["arms"]) - set(reference.json["arms"])
    assert added == {"joint_chosen"} == set(found.json["comparisons"]) - set(reference.json["comparisons"])
    assert found.json["finetuning"]["joint_chosen"]["learning_rate"] == 0.1
    assert not np.allclose(log_probabilities(found, "joint_chosen"), log_probabilities(found, "joint"))
    direct = record_of(learning_rate=0.1)
    assert same(found.json["arms"]["joint_chosen"], direct.json["arms"]["joint"])


def test_another_order_changes_in_context_learning_and_not_zero_shot(reference: records.Record):
    found = record_of(order=2)  # of four demonstrations, order 1 happens to be that drawn
    assert same(found.json["arms"]["zero_shot"], reference.json["arms"]["zero_shot"])
    assert not np.allclose(log_probabilities(found, "in_context"), log_probabilities(reference, "in_context"))
    plans = [runs.plan(parameters.resolve({"preset": "smoke", "task": "sst5", "order": i})) for i in (0, 1, 2)]
    drawn = [[example.row for example in plan.demonstrations] for plan in plans]
    assert sorted(drawn[0]) == sorted(drawn[1]) == sorted(drawn[2])
    assert len({tuple(rows) for rows in drawn}) == 3
    assert len({plan.identity for plan in plans}) == 3


def test_without_conditioning_nothing_else_changes(reference: records.Record):
    found = record_of(conditioning=False)
    expected = copy.deepcopy(reference.json)
    for method in METHODS:
        assert isinstance(expected["finetuning"][method].pop("conditioning"), float)
    for record in (expected, kept := dict(found.json)):
        for name in ("id", "parameters", *records.VOLATILE):
            record.pop(name)
    assert same(kept, expected)
    for column in reference.examples:
        ours, theirs = (np.stack(r.examples[column]).astype(float) for r in (found, reference))
        np.testing.assert_allclose(ours, theirs, atol=1e-3 if "sim" in column else 1e-6)
