"""The gate: statements about what in-context learning does are judged only on tasks where it helps."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from iclgd_helpers.experiments import readings
from iclgd_helpers.experiments.readings import RAW
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import calibration, hierarchical
from iclgd_helpers.measures.hierarchical import Estimate, OfMeans
from iclgd_helpers.pages import selection, tables
from iclgd_helpers.pages.selection import TASKS

CLOSED, NOT_MEASURED = "no in-context effect", "gate not measured"
COLUMNS = ("model", "task", "kind", "gate", "gain on training rows", "seeds × rows")


def state(seen: str, helps: bool | None) -> str:
    """
    What a task counts as behind the gate.

    Parameters
    ----------
    seen : its status by the rule.
    helps : whether in-context learning helps there (`selection.gate`); None where that was not measured.
    """
    if helps is None:
        return NOT_MEASURED
    return seen if helps else CLOSED


@dataclass(frozen=True)
class Gate:
    """Whether in-context learning beats zero-shot on training rows, and the estimate behind it."""

    is_open: bool
    estimate: Estimate | None


SHUT = Gate(False, None)


def gate(of_task: Sequence[Record], exploratory: bool | None = None) -> Gate:
    """
    The gate of a model and task, from the training rows that its records were calibrated on, in the records' reading.

    The same rows for all seeds: those that are a demonstration of none. Open: the 95 % interval is above 0. Records
    without priors have the `exploratory` gate, as `selection.gate` has it.
    """
    read = [record.calibration for record in of_task if record.calibration is not None]
    if not read:
        return Gate(bool(exploratory), None)
    if len(read) < 2:
        return SHUT
    rows = set.intersection(*(set(table["row"][table["row"] >= 0]) for table in read))
    effect = hierarchical.of_task([_gain(table, rows, of_task[0].json.get("reading", RAW)) for table in read])
    found = None if effect is None else hierarchical.estimate({"": effect})
    return Gate(found is not None and found.low > 0, found)


def _gain(table: pd.DataFrame, rows: Collection[int], reading: str) -> OfMeans:
    """In-context minus zero-shot accuracy on some of the training rows; priors are of all of them."""
    training, right = table[table["row"] >= 0], []
    asked, labels = training["row"].isin(rows), np.asarray(training["label"])
    for arm in ("in_context", "zero_shot"):
        scores = readings.scores(training, arm)
        if reading != RAW:
            scores = calibration.calibrated(scores, calibration.log_prior(scores))
        right.append((scores.argmax(-1) == labels)[asked])
    return OfMeans(lambda a, b: a - b, tuple(right))


def both(confirmatory: Sequence[Record], rates: Mapping[tuple[str, str], Mapping[str, Any]]) -> pd.DataFrame:
    """
    One row for each model, task and kind of gate that was measured, in `COLUMNS`.

    Parameters
    ----------
    confirmatory : records with priors; their gate is that of `gate`, raw and calibrated.
    rates : the comparisons of learning rates, which hold the exploratory gate.
    """
    rows: list[tuple[Any, ...]] = []
    for reading in readings.READINGS:
        for (model, task), of_task in selection.by_task(readings.of(confirmatory, reading)).items():
            found = gate(of_task)
            if (one := found.estimate) is not None:
                n = f"{len(of_task)} × {one.n_questions}"
                rows.append((model, task, f"confirmatory, {reading}", found.is_open, one.value, (one.low, one.high), n))
    for model, task in rates:
        if (helps := selection.gate(rates, model, task)) is not None:
            gain = rates[model, task]["gate"]["in_context_minus_zero_shot"]
            rows.append((model, task, "exploratory", helps, gain["value"], gain["interval"], f"1 × {gain['n']}"))
    places = {task: place for place, task in enumerate(TASKS)}
    rows.sort(key=lambda row: (row[0], row[2], places[row[1]]))
    lines = [
        (
            selection.short(model),
            TASKS[task],
            kind,
            "open" if helps else "closed",
            tables.with_interval(gain, ends, 2),
            n,
        )
        for model, task, kind, helps, gain, ends, n in rows
    ]
    return pd.DataFrame(lines, columns=list(COLUMNS))


def n_open(gates: pd.DataFrame) -> pd.Series:
    """Model and kind -> on how many of the tasks the gate is open, as `2 of 6`."""
    return gates.groupby(["model", "kind"])["gate"].agg(lambda words: f"{(words == 'open').sum()} of {len(words)}")
