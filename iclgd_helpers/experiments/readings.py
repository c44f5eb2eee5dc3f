"""
Two readings of every prediction: raw, as the paper reads it, and calibrated, with each arm's prior taken off.

A reading of a record is a record: whatever reads predictions, accuracies or indices reads both in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import calibration

RAW, CALIBRATED = "raw", "calibrated"
READINGS = (RAW, CALIBRATED)
SOURCES = ("training", "no content", "questions")  # of a prior
PREFIX = "log_probability/"  # of the columns that hold an arm's scores


def of(found: Iterable[Record], reading: str) -> list[Record]:
    """The records in a reading; calibrated, only those that have read priors."""
    return [read(record, reading) for record in found if reading == RAW or has_priors(record)]


def has_priors(record: Record) -> bool:
    """Whether a record can be read calibrated."""
    return "calibrated" in record.json


def read(record: Record, reading: str) -> Record:
    """
    The record with its predictions, and all that is made of them, in one of `READINGS`; KeyError without priors.

    Calibrated scores are log-probabilities among the labels. Similarities of attention are the same in both readings.
    """
    if reading == RAW:
        return record
    found = record.json["calibrated"]
    merged = {
        kind: {name: one | found[kind].get(name, {}) for name, one in record.json[kind].items()}
        for kind in ("arms", "comparisons")
    }
    priors = {arm: np.array(one["log_prior"], float) for arm, one in found["arms"].items()}
    return Record(record.json | merged | {"reading": reading}, _without_priors(record, priors), record.calibration)


def log_priors(record: Record, source: str = "training") -> dict[str, NDArray[np.float64]]:
    """
    The prior of each arm, `[class]`, nats, by what it is read on.

    Parameters
    ----------
    record : with priors.
    source : `training`: training rows that are no demonstrations, which the calibrated reading uses. `no content`:
        texts that say nothing (Zhao et al. 2021). `questions`: the test questions themselves, without their labels
        (Zhou et al. 2023).
    """
    table = record.calibration
    if table is None:
        raise KeyError("calibration")
    rows = {
        "training": table[table["row"] >= 0],
        "no content": table[table["row"] < 0],
        "questions": record.examples.iloc[: record.json["n_compared"]],
    }[source]
    return {arm: calibration.log_prior(scores(rows, arm)) for arm in record.json["arms"]}


def with_prior(record: Record, source: str) -> Record:
    """A record whose predictions are read with the priors of another source; it holds no summaries."""
    arms = {name: {"diverged": arm.get("diverged", False)} for name, arm in record.json["arms"].items()}
    examples = _without_priors(record, log_priors(record, source))
    return Record(record.json | {"arms": arms, "comparisons": {}}, examples, record.calibration)


def scores(table: pd.DataFrame, arm: str) -> NDArray[np.float64]:
    """An arm's scores in a table of examples, `[row, class]`, nats."""
    return np.stack([np.asarray(one, float) for one in table[PREFIX + arm]])


def _without_priors(record: Record, priors: Mapping[str, NDArray[np.float64]]) -> pd.DataFrame:
    """The examples with calibrated scores; rows that an arm has not seen stay empty."""
    columns: dict[str, Any] = {}
    for arm, prior in priors.items():
        seen = record.examples[PREFIX + arm].dropna()
        values = calibration.calibrated(np.stack([np.asarray(one, float) for one in seen]), prior)
        columns[PREFIX + arm] = pd.Series(list(values), index=seen.index)
    return record.examples.assign(**columns)
