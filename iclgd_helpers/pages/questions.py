"""
A record's values for each question: the answers of its arms, and similarities.

Everything is `[question]`, over the questions that all arms have seen. KeyError: an arm is not there, or has diverged.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from iclgd_helpers.experiments.arms import COMPARISONS
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import metrics


def truth(record: Record) -> NDArray[Any]:
    """The right class."""
    return np.asarray(record.examples["label"])[: record.json["n_compared"]]


def predicted(record: Record, arm: str) -> NDArray[Any]:
    """The predicted class."""
    record.arms[arm]  # KeyError
    return np.asarray(record.column(f"log_probability/{arm}").argmax(-1))


def right(record: Record, arm: str) -> NDArray[Any]:
    """Whether the predicted class is the right one."""
    return np.asarray(predicted(record, arm) == truth(record))


def moved(record: Record, arm: str, which: str = "all", base: str = "zero_shot") -> NDArray[Any]:
    """Whether the arm changes the prediction of `base` (to the `correct`, to an `incorrect` label)."""
    return metrics.changed(predicted(record, base), predicted(record, arm), truth(record), which)


def overlap(record: Record, comparison: str, which: str = "all") -> tuple[NDArray[Any], NDArray[Any]]:
    """Whether in the intersection, and in the union, of in-context and finetuned changes; as the code counts them."""
    base, shown, tuned = COMPARISONS[comparison]
    a, b = (moved(record, arm, which, base) for arm in (shown, tuned))
    shared = a & b & (predicted(record, shown) == predicted(record, tuned))
    return shared, a + 0 + b - shared


def similarity(record: Record, column: str) -> NDArray[np.float64]:
    """A column `<metric>/<comparison>`: mean over the layers in which it is defined, NaN if that is none."""
    record.comparisons[column.split("/")[1]]  # KeyError
    values = record.column(column).astype(float)
    defined = ~np.isnan(values)
    counts = np.where(defined.any(1), defined.sum(1), np.nan)
    return np.asarray(np.where(defined, values, 0).sum(1) / counts)
