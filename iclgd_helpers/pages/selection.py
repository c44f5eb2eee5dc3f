"""Which stored records and sweeps are the reproduction's grid, what they are evidence of, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from iclgd_helpers import storage
from iclgd_helpers.data import tasks
from iclgd_helpers.experiments import parameters, provenance, records
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.protocol import (
    COLUMNS,
    CONFIRMATION,
    CONFIRMATORY_SEEDS,
    MODELS,
    ORDERS,
    RECORDS,
    SEEDS,
    first_row,
)
from iclgd_helpers.experiments.records import Record, is_current
from iclgd_helpers.measures.resampling import Effect
from iclgd_helpers.paths import resolve_path

# The six tasks in the order of the paper's Table 2, as it prints them.
TASKS = {name: tasks.TASKS[name].title for name in COLUMNS}
# What may differ between runs of the grid. Any other parameter has to be the protocol's.
FREE = set("preset model task seed data_source data_folder max_examples max_compared device dtype".split()) | set(
    "controls chosen_rates conditioning n_calibration_rows arms".split()
)


def cell(record: Record) -> tuple[str, str, int]:
    """Model, task and seed of a record."""
    given = record.json["parameters"]
    return given["model"], given["task"], given["seed"]


def short(model: str) -> str:
    """A model's name: of a folder on this machine its last part, of any other id the whole."""
    return Path(model).name if Path(model).is_absolute() else model


@cache
def _protocol(task: str) -> dict[str, Any]:
    return parameters.resolve({"preset": "quick", "task": task, "data_source": "generated"}).model_dump(exclude=FREE)


def in_grid(record: Record, seeds: Mapping[str, Sequence[int]] = SEEDS, **variant: Any) -> bool:
    """Whether it is of one of the six tasks, at one of its seeds, with the protocol's settings or the given ones."""
    given = record.json["parameters"]
    if given["task"] not in TASKS or given["seed"] not in seeds[given["task"]]:
        return False
    fields = ExperimentParameters.model_fields  # a parameter that came later has its default in older records
    wanted = _protocol(given["task"]) | variant
    return all(given.get(name, fields[name].default) == value for name, value in wanted.items())


def grid() -> list[Record]:
    """The stored records of the grid: see `select`."""
    return select(records.load_all(RECORDS))


def of_cell(found: Iterable[Record], model: str, task: str) -> list[Record]:
    """The records of one model and task."""
    return [record for record in found if cell(record)[:2] == (model, task)]


def in_all_orders(as_drawn: Iterable[Record], reordered: Sequence[Record]) -> list[Record]:
    """Records in other orders, behind the one as drawn of the same draw; none where there are no others."""
    draws = {cell(record) for record in reordered}
    return [*(record for record in as_drawn if cell(record) in draws), *reordered]


def reordered(**variant: Any) -> list[Record]:
    """The stored records of the grid's demonstrations in other orders; `variant` as for `select`."""
    everything = records.load_all(RECORDS)
    return [record for order in ORDERS for record in select(everything, order=order, **variant)]


def confirmatory(**variant: Any) -> list[Record]:
    """
    The stored records of the confirmatory part: of each task the rows and seeds that the protocol names.

    `variant` is as for `select`.
    """
    everything = records.load_all(CONFIRMATION)
    of_task = {task: [record for record in everything if cell(record)[1] == task] for task in TASKS}
    found = (select(of_task[task], CONFIRMATORY_SEEDS, first_row=first_row(task), **variant) for task in TASKS)
    return sorted((record for several in found for record in several), key=lambda record: cell(record)[0])


def counts(found: Iterable[Record]) -> dict[str, tuple[int, int]]:
    """For each model with confirmatory runs, and each that is to have them: how many there are, and how many of all."""
    models = [short(cell(record)[0]) for record in found]
    wanted = sum(map(len, CONFIRMATORY_SEEDS.values()))
    return {model: (models.count(model), wanted) for model in dict.fromkeys([*MODELS, *models])}


def preferred(confirmatory: Sequence[Record], exploratory: Sequence[Record]) -> list[Record]:
    """The confirmatory records of each model whose grid is complete, and the exploratory ones of the others."""
    complete = {model for model, (there, wanted) in counts(confirmatory).items() if there == wanted}
    chosen = [record for record in confirmatory if short(cell(record)[0]) in complete]
    chosen += [record for record in exploratory if short(cell(record)[0]) not in complete]
    return sorted(chosen, key=lambda record: cell(record)[0])


def select(loaded: Iterable[Record], seeds: Mapping[str, Sequence[int]] = SEEDS, **variant: Any) -> list[Record]:
    """
    Of some records those of the grid, one for each (model, task, seed), whatever the model.

    Of several records of a run the present helpers' comes first, then the one with more rows. `variant` asks for
    runs that were made with other parameters than the protocol's (`n_demonstrations=16`, …).
    """
    chosen: dict[tuple[str, str, int], Record] = {}
    for record in (r for r in loaded if in_grid(r, seeds, **variant)):
        other = chosen.setdefault(cell(record), record)
        if _rank(record) > _rank(other):
            chosen[cell(record)] = record
    places = {task: place for place, task in enumerate(TASKS)}
    return [chosen[key] for key in sorted(chosen, key=lambda key: (key[0], places[key[1]], key[2]))]


def _rank(record: Record) -> tuple[Any, ...]:
    found = record.json
    chosen = bool(found["parameters"].get("chosen_rates"))
    return is_current(record), found["n_compared"], found["n_examples"], chosen, found["created"], found["id"]


def is_evidence(record: Record) -> bool:
    """Whether it tells something of a trained model on real text; only such records enter verdicts."""
    return mark(record) == short(record.json["parameters"]["model"])


def mark(record: Record) -> str:
    """The model's name as tables show it, with a warning where the record is no evidence."""
    name, given = short(record.json["parameters"]["model"]), record.json["parameters"]
    if name.startswith(("random-", "tiny-")):
        return f"{name} (random weights)"
    return f"{name} (generated text)" if given["data_source"] == "generated" else name


def notes(found: Sequence[Record], **sweeps: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """Lines that name runs that are missing, of older helpers, or of random weights; of `sweeps`, the older ones."""
    have = set(map(cell, found))
    wanted = [(model, task, seed) for model in MODELS for task in TASKS for seed in SEEDS[task]]
    missing = [key for key in wanted if key not in have]
    lines = [f"{len(wanted) - len(missing)} of {len(wanted)} runs of the grid are recorded."]
    if missing:
        lines.append("Missing: " + "; ".join(_grouped(missing)) + ".")
    older = [record for record in found if not is_current(record)]
    if older:
        names = "; ".join(_grouped((short(m), task, seed) for m, task, seed in map(cell, older)))
        lines.append(f"Computed by an older version of the helpers than this page's ({len(older)}): {names}.")
    if diverged := [record for record in found if record.diverged]:
        named = "; ".join(
            f"{mark(record)}, run {record.json['id']}: {', '.join(record.diverged)}" for record in diverged
        )
        lines.append(f"Diverged, so without values and without part in a verdict: {named}.")
    empty = [record for record in found if not is_evidence(record)]
    if empty:
        names = ", ".join(sorted({f"{mark(record)}, run {record.json['id']}" for record in empty}))
        lines.append(f"No evidence, shown but never part of a verdict: {names}.")
    stale = [
        f"{kind} of {model} on {TASKS[task]}"
        for kind, several in sweeps.items()
        for (model, task), sweep in several.items()
        if sweep["engine"] != provenance.engine_hash()
    ]
    if stale:
        lines.append(f"Sweeps by an older version of the helpers ({len(stale)}): {', '.join(stale)}.")
    return lines


def _grouped(keys: Iterable[tuple[str, str, int]]) -> list[str]:
    groups: dict[str, dict[str, list[str]]] = {}
    for model, task, seed in keys:
        groups.setdefault(model, {}).setdefault(TASKS[task], []).append(str(seed))
    return [f"{m}: " + ", ".join(f"{t} (seed {', '.join(s)})" for t, s in tasks.items()) for m, tasks in groups.items()]


def sweeps(kind: str, folder: str | Path = "results/sweeps") -> dict[tuple[str, str], dict[str, Any]]:
    """The sweeps of one kind (`rates`, `clips`) by (model, task)."""
    paths = sorted(resolve_path(folder).glob(f"{kind}-*.json"))
    found = [storage.read_json(path) for path in paths]
    return {(sweep["model"], sweep["task"]): sweep for sweep in found}


def point_effect(point: Mapping[str, Any], measure: str) -> Effect:
    """A measure at one point of a sweep, with the ends of its interval; NaN where it has diverged."""
    value, low, high = np.array([point[measure]["value"], *point[measure]["interval"]], float).tolist()
    return value, low, high


def gate(rates: Mapping[tuple[str, str], Mapping[str, Any]], model: str, task: str) -> bool | None:
    """
    Whether in-context learning beats zero-shot on training rows: the 95 % interval of the difference is above 0.

    None where it was not measured.
    """
    sweep = rates.get((model, task))
    if not sweep or not sweep.get("gate"):
        return None
    low = sweep["gate"]["in_context_minus_zero_shot"]["interval"][0]
    return None if low is None else low > 0


def first_seeds(found: Sequence[Record]) -> list[Record]:
    """Of each model and task the record with the lowest seed."""
    first: dict[tuple[str, str], Record] = {}
    for record in sorted(found, key=lambda record: cell(record)[2]):
        first.setdefault(cell(record)[:2], record)
    return [record for record in found if first[cell(record)[:2]] is record]


def title(record: Record) -> str:
    """Model, task and seed of a record as a line."""
    _model, task, seed = cell(record)
    return f"{mark(record)} on {TASKS[task]}, seed {seed}"


def by_task(found: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """(model, task) -> its records."""
    grid: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        grid.setdefault(cell(record)[:2], []).append(record)
    return grid
