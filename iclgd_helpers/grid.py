"""
The whole reproduction as one command: `python -m iclgd_helpers.grid`. It says what it costs, can be stopped at any
moment, and skips what is recorded.

What is run was written down here before any result of it was seen, but for the first seeds of SST-2 and Subj, which an
older version of these helpers had computed on more rows
----------------------------------------------------------------------------------------------------------------------
Cells: the six tasks, three protocol seeds each (`SEEDS`), the models of `MODELS`, the first `N_ROWS` rows of each
evaluation split in the protocol's order (CB has 56), the protocol's k and learning rate, every arm and control.
Conditioning (a second finetuning from perturbed weights) is measured with each task's first seed.
One thread computes, unless `--threads` says otherwise, so that a record made again has the same numbers on a machine
with more cores. Two cores are used best by two commands, each with a model or tasks of its own.

Rates: for each model and task, on rows of the *training* split that follow the first seed's demonstrations in the
protocol's order. Each method runs at each of `RATES` with the first `SWEEP_DEMONSTRATIONS` demonstrations; chosen is
the rate with the highest mean log-probability of the right label among the labels (renormalised over the classes) on
`RATE_ROWS` rows, ties going to the smaller rate. The cells run every method a second time at its chosen rate. (A first
rule took the log-probability over the whole vocabulary. On SST-2's training rows it preferred rates at which every
answer is the same word, so it was replaced before any other task was run; the two cells computed with it are gone.) The
gate says on `GATE_ROWS` training rows whether in-context learning with all demonstrations of the first seed beats
zero-shot; only where it does, results speak of its effect.

Orders: of the first seed's demonstrations, as drawn and `ORDERS` others; and `MORE_SEEDS` beside the grid's, in the
order drawn, so that order and seed can be told apart. Unequal: where fewer demonstrations fit the context than are
drawn (CB, AGNews), the original's variant that finetunes on all of them.

Clips: joint finetuning at the protocol's rate with each kind of clipping and bounds of `CLIP_FACTORS` times the median
norm of an unclipped run (global: of all layers together; per_layer: of a layer; elementwise: of a layer, divided by the
root of its number of entries), with the first `SWEEP_DEMONSTRATIONS` demonstrations, on `CLIP_ROWS` evaluation rows.

The second model's share is smaller, since a layer-causal step multiplies every layer's states with the whole
vocabulary, and its vocabulary is five times as large. Orders, unequal and clips are of the first model alone. Two more
cuts were made when the first model's cells of SST-2 were known, before any rate of the second was compared: models but
the first compare rates with half as many demonstrations, and measure conditioning on `ORDER_TASKS` alone. Rows were cut
before seeds, and no arm was.
"""

from __future__ import annotations

if __name__ == "__main__":
    from iclgd_helpers.start import start

    start("iclgd_helpers.commands", "grid")

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from iclgd_helpers import (
    checkpoints,
    commands,
    cost,
    experiment,
    finetune,
    identity,
    metrics,
    parameters,
    paths,
    records,
    statistics,
    storage,
)
from iclgd_helpers.arms import METHODS
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiment import Cell, Plan
from iclgd_helpers.finetune import Learner, Settings
from iclgd_helpers.models import KVUpdate
from iclgd_helpers.observe import Arm, observe
from iclgd_helpers.parameters import ExperimentParameters
from iclgd_helpers.plans import MODELS, SEEDS, STAGES
from iclgd_helpers.rates import best_rate, label_scores, score_summary
from iclgd_helpers.sequences import Query
from iclgd_helpers.sweep import device_rate, duration
from iclgd_helpers.tasks import select_demonstrations, task_data

N_ROWS = 100
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RATE_ROWS, GATE_ROWS, CLIP_ROWS = 64, 200, 64
SWEEP_DEMONSTRATIONS, SWEEP_DEMONSTRATIONS_OF_OTHERS = 16, 8
ORDER_TASKS, ORDERS, MORE_SEEDS = ("sst2", "subj"), (1, 2, 3, 4), (11, 12)
UNEQUAL_TASKS = ("cb", "agnews")
CLIP_TASKS = ("subj", "sst2", "sst5", "mr")
CLIP_FACTORS = tuple(2.0**exponent for exponent in range(-6, 3))
CLIP_KINDS = ("global", "per_layer", "elementwise")
RECORDS, SWEEPS = "results/records", "results/sweeps"

main = partial(commands.main, "grid")


@dataclass(frozen=True)
class Job:
    """One thing that is computed and stored at once: a sweep (`rates`, `clips`), or a cell with its record."""

    stage: str
    given: Mapping[str, Any]  # parameters of the cell
    changed: Mapping[str, Any]  # those that differ from the grid's cells

    @property
    def model(self) -> str:
        return self.given["model"]

    @property
    def sweep_file(self) -> Path:
        """Where a sweep's summary is stored."""
        return sweep_file(self.stage, self.model, self.given["task"])

    @property
    def parameters(self) -> ExperimentParameters:
        """Of its cell, at the chosen rates where they are known."""
        given = {**self.given, **self.changed}
        if self.stage not in ("rates", "clips"):
            given["chosen_rates"] = chosen_rates(self.model, self.given["task"])
        return parameters.resolve(given)

    @property
    def label(self) -> str:
        order = f", order {self.changed['order']}" if "order" in self.changed else ""
        return f"{self.stage}: {Path(self.model).name}/{self.given['task']}/{self.given['seed']}{order}"

    def is_done(self) -> bool:
        if self.stage in ("rates", "clips"):
            return self.sweep_file.is_file() and self.is_answered_by(storage.read_json(self.sweep_file))
        given = self.parameters
        content = checkpoints.content(given.model)
        wanted = records.run_id(given, _data_checksum(given.task, given.data_source), content)
        return given.chosen_rates is not None and records.find(wanted) is not None

    def is_answered_by(self, sweep: Mapping[str, Any]) -> bool:
        """Whether a stored sweep is of this model, these data and settings, and the present helpers and rule."""
        given = self.parameters
        wanted = {"data_checksum": _data_checksum(given.task, given.data_source), "parameters": _settings(given)}
        wanted |= {"engine": identity.engine_hash(), "model_content": checkpoints.content(given.model)}
        found = {"model_content": sweep.get("model")} | sweep  # a built-in model is its name
        if any(found.get(name) != storage.plain(value) for name, value in wanted.items()):
            return False
        points = sweep["points"]
        if self.stage == "rates":
            tried = {(point["method"], point["learning_rate"]) for point in points}
            gate = sweep["gate"]["in_context_minus_zero_shot"]["n"]
            enough = len(sweep["rows"]) == RATE_ROWS and gate <= GATE_ROWS
            every = {(method, rate) for method in METHODS for rate in RATES}
            return enough and tried == every and sweep["chosen"] == _choice(points)
        tried = {(point["clip"], point["factor"]) for point in points if point["clip"] != "none"}
        return tried == {(kind, factor) for kind in CLIP_KINDS for factor in CLIP_FACTORS}

    def flops(self) -> float:
        """Counted operations; every seed counts as the task's first."""
        given = self.parameters
        plan = _plan_of_first_seed(self.model, self.given["task"], given.equal_demonstrations)
        shape = cost.Shape.of(plan.config)
        lengths = [len(plan.layout.training_sequence(e)) for e in plan.training[: given.n_demonstrations]]
        queries = [len(query.tokens) for query in plan.queries]
        prefix = len(plan.layout.prefix(plan.demonstrations))
        one = sum(cost.forward(shape, n, 1, 1).total for n in queries) / len(queries)
        steps = {m: sum(step(shape, n, n - 1).total for n in lengths) for m, step in cost.STEPS.items()}
        if self.stage == "rates":
            return len(RATES) * (sum(steps.values()) + 3 * RATE_ROWS * one) + 2 * GATE_ROWS * one
        if self.stage == "clips":
            n_arms = len(CLIP_KINDS) * len(CLIP_FACTORS) + 2
            return n_arms * (steps["joint"] + CLIP_ROWS * one) + cost.forward(shape, prefix).total
        options = {"controls": given.controls, "conditioning": given.conditioning}
        return cost.cell_cost(shape, prefix, queries, lengths, chosen=METHODS, **options).flops

    def run(self) -> str:
        """Compute and store; what is worth saying of it."""
        if self.stage == "rates":
            content = compare_rates(experiment.prepare(self.parameters))
            storage.write_json(self.sweep_file, content)
            return f"chosen {content['chosen']}"
        if self.stage == "clips":
            storage.write_json(self.sweep_file, compare_clips(experiment.prepare(self.parameters)))
            return "stored"
        given = self.parameters
        if given.chosen_rates is None:
            raise InputError(f"{self.label}: its learning rates are not compared yet: run --stage rates first")
        record = experiment.run_cell(given)
        accuracies = (
            f"{arm} " + ("diverged" if found["diverged"] else f"{found['accuracy']:.2f}")
            for arm, found in list(record.json["arms"].items())[:5]
        )
        return f"{', '.join(accuracies)}, record {record.json['id']}"


@cache
def _data_checksum(task: str, data_source: str) -> str:
    return task_data(parameters.resolve({"task": task, "data_source": data_source})).checksum


@cache
def _plan_of_first_seed(model: str, task: str, equal: bool) -> Plan:
    given = {"preset": "quick", "model": model, "task": task, "seed": SEEDS[task][0], "max_examples": N_ROWS}
    return experiment.plan(parameters.resolve(given | {"equal_demonstrations": equal}))


def jobs(models: Sequence[str], stages: Sequence[str], tasks: Sequence[str]) -> list[Job]:
    """What the grid consists of, in the order in which it is computed: rates, then cells by seed, then the rest."""
    result, tasks = [], tuple(dict.fromkeys(tasks))  # twice the same: once
    for model in dict.fromkeys(models):
        base = [{"preset": "quick", "model": model, "task": task, "max_examples": N_ROWS} for task in tasks]
        plain = {"controls": False, "conditioning": False}
        is_first = model == MODELS[0]
        few = plain | {"n_demonstrations": SWEEP_DEMONSTRATIONS if is_first else SWEEP_DEMONSTRATIONS_OF_OTHERS}
        of_stage = {stage: [] for stage in STAGES}
        for given in base:
            task = given["task"]
            first = {**given, "seed": SEEDS[task][0]}
            of_stage["rates"].append(Job("rates", first, few))
            if task in CLIP_TASKS and is_first:
                of_stage["clips"].append(Job("clips", first, few | {"max_examples": CLIP_ROWS}))
            if task in UNEQUAL_TASKS and is_first:
                of_stage["unequal"].append(Job("unequal", first, plain | {"equal_demonstrations": False}))
            if task in ORDER_TASKS and is_first:
                of_stage["orders"] += [Job("orders", first, plain | {"order": order}) for order in ORDERS]
                of_stage["orders"] += [Job("orders", {**given, "seed": seed}, plain) for seed in MORE_SEEDS]
        for number in range(3):
            for given in base:
                cell = {**given, "seed": SEEDS[given["task"]][number]}
                is_conditioned = number == 0 and (is_first or given["task"] in ORDER_TASKS)
                of_stage["cells"].append(Job("cells", cell, {} if is_conditioned else {"conditioning": False}))
        result += [job for stage in STAGES if stage in stages for job in of_stage[stage]]
    return result


# ------------------------------------------------------------------------------------------------------------- sweeps
def sweep_file(kind: str, model: str, task: str) -> Path:
    """`results/sweeps/<kind>-<model>-<task>.json`."""
    return paths.resolve_path(SWEEPS) / f"{kind}-{checkpoints.file_name(model)}-{task}.json"


def chosen_rates(model: str, task: str) -> dict[str, float] | None:
    """Method -> rate chosen on training rows; None before they were compared, see `Job.is_answered_by`."""
    (job,) = jobs([model], ["rates"], [task])
    return storage.read_json(job.sweep_file)["chosen"] if job.is_done() else None


def _choice(points: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {method: best_rate([p for p in points if p["method"] == method]) for method in METHODS}


def _settings(given: ExperimentParameters) -> dict[str, Any]:
    return given.model_dump(exclude={"data_folder", "data_file"}) | {"model": checkpoints.label(given.model)}


def compare_rates(cell: Cell) -> dict[str, Any]:
    """Every method at every rate, read on training rows; the choice, and the gate."""
    given, labels = cell.parameters, cell.layout.labels
    whole = parameters.resolve({"preset": "quick", "task": given.task}).n_demonstrations
    train = task_data(given).train
    drawn = select_demonstrations(train, min(len(train), whole + GATE_ROWS), given.seed, given.balanced)
    queries = [cell.layout.query(example, given.token_read) for example in drawn[whole:]]
    examples = [cell.layout.training_sequence(example) for example in cell.training]
    settings = {(method, rate): Settings(rate, given.loss) for method in METHODS for rate in RATES}
    updates = {}
    for method in METHODS:
        keys = [key for key in settings if key[0] == method]
        learners = [Learner(examples, settings[key]) for key in keys]
        tuned = finetune.finetune_together(cell.model, learners, labels, method)
        updates |= {key: one.update for key, one in zip(keys, tuned, strict=True)}
    found = compare(cell, queries[:RATE_ROWS], updates)
    points = [
        {"method": m, "learning_rate": rate, "clip": "none", "clip_value": None} | found[m, rate] for m, rate in found
    ]
    shown = experiment.plan(given.model_copy(update={"n_demonstrations": whole})).demonstrations
    return _content("rates", cell, points) | {
        "rows": [query.row for query in queries[:RATE_ROWS]],
        "chosen": _choice(points),
        "gate": _gate(cell, queries, cell.layout.prefix(shown)),
    }


def _gate(cell: Cell, queries: Sequence[Query], prefix: tuple[int, ...]) -> dict[str, Any]:
    """By how much in-context learning beats zero-shot on training rows."""
    labels = np.array([query.label for query in queries])
    arms = {"zero_shot": Arm(cell.layout.prefix()), "in_context": Arm(prefix)}
    scores = label_scores(cell.model, cell.layout.labels, queries, arms)
    right = {arm: (values.argmax(-1) == labels).astype(float) for arm, values in scores.items()}
    difference = right["in_context"] - right["zero_shot"]
    interval = statistics.over_examples(np.mean, difference)
    accuracies = {arm: float(values.mean()) for arm, values in right.items()}
    found = {"value": float(difference.mean()), "interval": interval, "n": len(queries)}
    return {"in_context_minus_zero_shot": found, "accuracy": accuracies}


def compare_clips(cell: Cell) -> dict[str, Any]:
    """Joint finetuning under every kind and bound of clipping, read on evaluation rows; unclipped, and standard."""
    given, labels = cell.parameters, cell.layout.labels
    examples = [cell.layout.training_sequence(example) for example in cell.training]
    free = Settings(given.learning_rate, given.loss)
    unclipped, standard = (
        finetune.finetune_together(cell.model, [Learner(examples, free)], labels, method)[0]
        for method in ("joint", "standard")
    )
    if unclipped.diverged:
        raise InputError(f"joint finetuning diverges at learning_rate={given.learning_rate}: there is no typical norm")
    typical = _typical_norms(cell, unclipped.gradient_norms)
    settings = {
        (kind, factor): Settings(given.learning_rate, given.loss, kind, typical[kind] * factor)
        for kind in CLIP_KINDS
        for factor in CLIP_FACTORS
    }
    learners = [Learner(examples, one) for one in settings.values()]
    tuned = finetune.finetune_together(cell.model, learners, labels, "joint")
    updates = {key: one.update for key, one in zip(settings, tuned, strict=True)}
    found = compare(cell, cell.queries, updates | {"joint": unclipped.update, "standard": standard.update})
    points = [
        {"method": "joint", "learning_rate": given.learning_rate, "clip": kind, "factor": factor}
        | {"clip_value": settings[kind, factor].clip_value} | found[kind, factor]
        for kind, factor in settings
    ]  # fmt: skip
    for method in ("joint", "standard"):
        start = {"method": method, "learning_rate": given.learning_rate, "clip": "none", "clip_value": None}
        points.append(start | found[method])
    rows = [query.row for query in cell.queries]
    return _content("clips", cell, points) | {"rows": rows, "typical_norms": typical}


def _typical_norms(cell: Cell, norms: torch.Tensor) -> dict[str, float]:
    """Median of what each kind of clipping bounds; `norms` is `[step, layer]`."""
    n_entries = sum(t.masked(torch.ones_like(t.parameter)).sum() for t in cell.model.trainables) / cell.model.n_layers
    of_layer = float(norms.quantile(0.5))
    whole = float(norms.square().sum(1).sqrt().quantile(0.5))
    return {"global": whole, "per_layer": of_layer, "elementwise": of_layer / float(n_entries) ** 0.5}


def compare(cell: Cell, queries: Sequence[Query], updates: Mapping[Any, KVUpdate]) -> dict[Any, dict[str, Any]]:
    """For each update: accuracy, mean label log-probability, and its likeness to in-context learning."""
    bare, labels = cell.layout.prefix(), np.array([query.label for query in queries])
    arms = {"zero_shot": Arm(bare), "in_context": Arm(cell.layout.prefix(cell.demonstrations))}
    arms |= {key: Arm(bare, update) for key, update in updates.items()}
    seen_log_probabilities = {key: np.zeros((len(queries), len(cell.layout.labels))) for key in arms}
    likeness = {key: {m: np.zeros((len(queries), cell.model.n_layers)) for m in LIKENESS} for key in updates}
    for indices, seen in observe(cell.model, queries, arms, cell.layout.labels):
        rows = [queries[i].row for i in indices]
        for key, observation in seen.items():
            seen_log_probabilities[key][indices] = observation.label_log_probabilities.double().cpu().numpy()
        for key in updates:
            values = experiment.similarities(seen["zero_shot"], seen["in_context"], seen[key], cell, rows)
            for metric in LIKENESS:
                likeness[key][metric][indices] = values[metric].double().cpu().numpy()
    predicted = {key: values.argmax(-1) for key, values in seen_log_probabilities.items()}
    before, found = (predicted["zero_shot"], predicted["in_context"]), {}
    for key in updates:
        summary = score_summary(seen_log_probabilities[key], labels)
        alike = {"jaccard": _jaccard(*before, predicted[key], labels)}
        alike |= {metric: _mean(values) for metric, values in likeness[key].items()}
        found[key] = summary | ({name: {"value": None, "interval": (None, None)} for name in alike}
                                if summary["diverged"] else alike)  # fmt: skip
    return found


LIKENESS = ("sim_aou", "sim_am_direct", "sim_am_delta")


def _jaccard(*columns: np.ndarray) -> dict[str, Any]:
    return {"value": metrics.jaccard(*columns), "interval": statistics.over_examples(metrics.jaccard, *columns)}


def _mean(values: np.ndarray) -> dict[str, Any]:
    found = statistics.layer_means(values)
    return {"value": found["mean"], "interval": found["interval"]}


def _content(kind: str, cell: Cell, points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "kind": kind,
        "model": checkpoints.label(cell.parameters.model),
        "model_content": cell.model_content,
        "task": cell.parameters.task,
        "engine": identity.engine_hash(),
        "parameters": _settings(cell.parameters),
        "data_checksum": cell.data_checksum,
        "n_demonstrations": len(cell.demonstrations),
        "points": list(points),
    }


# ------------------------------------------------------------------------------------------------------------ command
def estimate(waiting: Sequence[tuple[Job, float]], rate: float) -> Iterator[str]:
    """Operations and time of what is to be computed, by model and stage."""
    yield f"{'model and stage':<44}{'jobs':>6}{'TFLOP':>9}{'time':>10}"
    for key in dict.fromkeys((job.model, job.stage) for job, _ in waiting):
        flops = [one for job, one in waiting if (job.model, job.stage) == key]
        yield f"{' '.join(key):<44}{len(flops):>6}{sum(flops) / 1e12:>9.0f}{duration(sum(flops) / rate):>10}"
    whole = sum(one for _, one in waiting)
    yield f"{'all':<44}{len(waiting):>6}{whole / 1e12:>9.0f}{duration(whole / rate):>10}"


def run(waiting: Sequence[tuple[Job, float]], say: Callable[[str], None]) -> None:
    """Compute one job after the other and say how long the rest will take."""
    remaining, done, spent = sum(flops for _, flops in waiting), 0.0, 0.0
    for job, flops in waiting:
        if job.is_done():  # by another process, since the start
            remaining -= flops
            continue
        start = time.perf_counter()
        message = job.run()
        seconds = time.perf_counter() - start
        remaining, done, spent = remaining - flops, done + flops, spent + seconds
        say(f"{job.label:<44} {duration(seconds)}, {message}; about {duration(remaining * spent / done)} left")


def work(
    models: Sequence[str],
    stages: Sequence[str],
    tasks: Sequence[str],
    rate: float | None,
    threads: int,
    cost_only: bool,
) -> None:
    """Say what is not yet recorded and what it costs at a rate in TFLOP/s, and compute it, into `results/`."""
    torch.set_num_threads(threads)
    os.environ["ICLGD_RECORDS"] = str(paths.resolve_path(RECORDS))
    everything = jobs(models, stages, tasks)
    waiting = [(job, job.flops()) for job in everything if not job.is_done()]
    flops = rate * 1e12 if rate else device_rate("auto", "float32") / 2
    print(f"{len(everything) - len(waiting)} of {len(everything)} jobs are stored.")
    print("\n".join(estimate(waiting, flops)), flush=True)
    if waiting and not cost_only:
        for folder in (RECORDS, SWEEPS):
            storage.require_writable(paths.resolve_path(folder))
        run(waiting, lambda line: print(line, flush=True))
