"""
The verdicts of the reproduction: one effect a statement, from all of its evidence, by the rule of `book/protocol.md`.

The rule itself is `measures.hierarchical`; here it meets the records.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from iclgd_helpers.experiments import readings
from iclgd_helpers.experiments.protocol import SEEDS, SEEN_TASKS
from iclgd_helpers.experiments.readings import RAW, READINGS
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import hierarchical
from iclgd_helpers.measures.hierarchical import Estimate, TaskEffect
from iclgd_helpers.pages import gates, selection
from iclgd_helpers.pages.gates import SHUT, Gate
from iclgd_helpers.pages.judging import SUFFIX, Stored
from iclgd_helpers.pages.selection import TASKS, cell
from iclgd_helpers.pages.statements import Statement

# Of `verdicts.json`; `n_examples` are the questions of all tasks together, `n_seeds` those of the task with the fewest.
COLUMNS = (
    "id statement reading model rate effect low high n_seeds n_examples verdict needed p adjusted_p n_tasks by_task "
    "new_seeds unseen_rows part without_the_gate"
).split()
CONFIRMATORY, EXPLORATORY = "confirmatory", "exploratory"
Grid = Mapping[tuple[str, str], Sequence[Record]]  # (model, task) -> records, one a seed, in one reading


class Asked(NamedTuple):
    """One question to the records: a statement for a model, at one learning rate, in one reading."""

    statement: Statement
    model: str
    rate: str
    reading: str


def decide(statements: Sequence[Statement], found: Sequence[Record], stored: Stored) -> list[dict[str, Any]]:
    """
    A verdict for each statement, model, learning rate and reading; in `COLUMNS`, as plain data.

    Parameters
    ----------
    found : records with trained weights and real text (others are left out), of each model one part of the protocol.
    stored : of it, what the exploratory statements are made of, and the gates of records without priors.
    """
    evidence = [record for record in found if selection.is_evidence(record)]
    grids = {reading: selection.by_task(readings.of(evidence, reading)) for reading in READINGS}
    opened = {
        (reading, *key): gates.gate(of_task, selection.gate(stored.rates, *key))
        for reading, grid in grids.items()
        for key, of_task in grid.items()
    }
    asked = list(_asked(statements, list(dict.fromkeys(cell(record)[0] for record in evidence))))
    estimates = [_estimate(one, grids[one.reading], opened, stored) for one in asked]
    judged = [place for place, one in enumerate(estimates) if one is not None]
    p_values = hierarchical.false_discovery([one.p for one in estimates if one is not None])
    adjusted = dict(zip(judged, p_values.tolist(), strict=True))
    parts = {cell(r)[0]: CONFIRMATORY if readings.has_priors(r) else EXPLORATORY for r in evidence}
    rows = []
    for place, (one, estimate) in enumerate(zip(asked, estimates, strict=True)):
        grid, part = grids[one.reading], EXPLORATORY if one.statement.exploratory else parts[one.model]
        row = _row(one, estimate, adjusted.get(place, np.nan)) | dict.fromkeys(("new_seeds", "unseen_rows"))
        if part == CONFIRMATORY and estimate is not None:
            row["new_seeds"] = _numbers(_estimate(one, _new_seeds(grid), opened, stored))
            row["unseen_rows"] = _numbers(_estimate(one, _unseen_rows(grid), opened, stored))
        row |= {"part": part, "without_the_gate": _numbers(_estimate(one, grid, None, stored))}
        rows.append({name: row[name] for name in COLUMNS})
    return rows


def _asked(statements: Sequence[Statement], models: Sequence[str]) -> Iterator[Asked]:
    """Both readings where they can differ: in the answers, or in the gate."""
    for statement, model in itertools.product(statements, models):
        both = statement.answers or statement.gated
        for rate, reading in itertools.product(statement.rates, READINGS if both else (RAW,)):
            yield Asked(statement, model, rate, reading)


def _new_seeds(grid: Grid) -> Grid:
    """The records of seeds that no exploratory run had."""
    return {(m, t): [r for r in of_task if cell(r)[2] not in SEEDS[t]] for (m, t), of_task in grid.items()}


def _unseen_rows(grid: Grid) -> Grid:
    """The records of tasks of which no older run had read a confirmatory row."""
    return {key: of_task for key, of_task in grid.items() if key[1] not in SEEN_TASKS}


# ------------------------------------------------------------------------------------------------------------ estimates
def _estimate(one: Asked, grid: Grid, opened: Mapping[Any, Gate] | None, stored: Stored) -> Estimate | None:
    """The estimate over the tasks that count (all of them without gates); None if the statement needs more of them."""
    found = {}
    for task in TASKS:
        if opened is not None and one.statement.gated and not opened.get((one.reading, one.model, task), SHUT).is_open:
            continue
        if (effect := task_effect(one, task, grid.get((one.model, task), []), stored)) is not None:
            found[task] = effect
    return hierarchical.estimate(found) if len(found) >= one.statement.fewest else None


def task_effect(one: Asked, task: str, of_task: Sequence[Record], stored: Stored) -> TaskEffect | None:
    """The effect in one task, from its records in one reading; sweeps and orders are the exploratory ones."""
    effect, key = one.statement.effect, (one.model, task)
    if one.statement.unit == "clips":
        sweep = stored.clips.get(key)
        return hierarchical.from_interval(effect(sweep), sweep["points"][0]["n"]) if sweep else None
    if one.statement.exploratory:
        of_task = selection.of_cell(stored.exploratory, *key)
    if one.statement.unit == "orders":
        orders = selection.in_all_orders(of_task, selection.of_cell(stored.reordered, *key))
        of_task = readings.of(orders, one.reading)
    n = min((record.json["n_compared"] for record in of_task), default=0)
    if one.statement.unit in ("draws", "orders"):
        without = [effect([*of_task[:left], *of_task[left + 1 :]])[0] for left in range(len(of_task))]
        return hierarchical.from_interval(effect(of_task), n, without) if len(of_task) > 2 else None
    if len({tuple(record.examples["row"][:n]) for record in of_task}) > 1:
        return None  # seeds are crossed with the same questions or not at all
    made = []
    for record in of_task:
        try:
            made.append(effect(record, SUFFIX[one.rate]))
        except KeyError:  # an arm is missing there, or has diverged
            continue
    return hierarchical.of_task([found for found in made if found is not None])


def _row(one: Asked, found: Estimate | None, adjusted_p: float) -> dict[str, Any]:
    statement, bound = one.statement, one.statement.bound
    row: dict[str, Any] = {
        "id": statement.id,
        "statement": statement.says,
        "reading": one.reading,
        "model": selection.short(one.model),
        "rate": one.rate,
        "verdict": hierarchical.verdict(found, adjusted_p, bound),
    }
    if found is None:
        empty = dict.fromkeys(("effect", "low", "high", "needed", "p", "adjusted_p"))
        return row | empty | {"n_seeds": 0, "n_examples": 0, "n_tasks": 0, "by_task": {}}
    is_open = row["verdict"] == hierarchical.UNDECIDED
    return row | {
        "effect": found.value,
        "low": found.low,
        "high": found.high,
        "n_seeds": found.n_seeds,
        "n_examples": found.n_questions,
        "needed": hierarchical.needed(found, bound) if is_open else None,
        "p": found.p,
        "adjusted_p": adjusted_p,
        "n_tasks": len(found.tasks),
        "by_task": {task: effect.value for task, effect in found.tasks.items()},
    }


def _numbers(found: Estimate | None) -> list[float] | None:
    return None if found is None else [found.value, found.low, found.high]
