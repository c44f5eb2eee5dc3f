"""
Uncertainty over questions: a bootstrap for functions of several means, and a jackknife for a variance between runs.

`intervals` resamples what is recorded in a run; this is for what pages compute from records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iclgd_helpers.measures import intervals

Floats = NDArray[np.float64]
Effect = tuple[float, float, float]  # value, and ends of its 95 % interval
UNDEFINED: Effect = (float("nan"),) * 3


@lru_cache(maxsize=8)
def _shares(n: int, seed: int, n_resamples: int) -> Floats:
    """`[resample, question]`: share of each of n questions in samples of n with replacement."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), n_resamples) / n


def of_means(statistic: Callable[..., Any], *columns: ArrayLike, seed: int = 0) -> Effect:
    """
    Value and percentile bootstrap interval of a function of the columns' means.

    Parameters
    ----------
    statistic : takes one mean a column (numbers, or arrays with one entry a resample) and gives one value for each.
    *columns : `[question]` each. A question at which any of them is NaN is left out of all.
    seed : of the resamples, which are the same for all quantities of as many questions.

    Returns
    -------
    Value, low and high. All are NaN if no question is left; low and high are, if no resample defines the statistic.
    """
    data = np.array(columns, float)
    data = data[:, ~np.isnan(data).any(0)]
    if not (n := data.shape[1]):
        return UNDEFINED
    with np.errstate(invalid="ignore", divide="ignore"):
        value = statistic(*data.mean(1))
        draws = np.asarray(statistic(*(data @ _shares(n, seed, intervals.RESAMPLES).T)))
    draws = draws[~np.isnan(draws)].round(12)  # equal means may differ in the last bit: no effect is no sign
    if not len(draws):
        return float(value), *UNDEFINED[1:]
    low, high = np.quantile(draws, [(1 - intervals.LEVEL) / 2, (1 + intervals.LEVEL) / 2])
    return float(value), float(low), float(high)


def minus(a: Effect, b: Effect) -> Effect:
    """Difference of two independent effects, its ends as far apart as theirs allow."""
    return a[0] - b[0], a[1] - b[2], a[2] - b[1]


def variance_between(right: ArrayLike) -> tuple[float, Floats]:
    """
    Variance of accuracy between runs, without what the choice of questions adds to it.

    The plain variance of measured accuracies grows with the number of questions that runs answer differently, also
    where all runs are equally good. This estimate multiplies different questions only, and so is unbiased.

    Parameters
    ----------
    right : `[run, question]`, whether the answer is right; at least two runs, the same questions for all.

    Returns
    -------
    The estimate, which may be negative; and `[question]`, what it is without one question (for `jackknife`).
    """
    answers = np.asarray(right)
    deviation = answers - np.mean(answers, axis=0)
    n_cells, n = deviation.shape
    sums, squares = deviation.sum(1), (deviation**2).sum(1)

    def estimate(sums: Floats, squares: Floats, n: int) -> Any:
        return (sums**2 - squares).sum(0) / (n * (n - 1) * (n_cells - 1))

    without = estimate(sums[:, None] - deviation, squares[:, None] - deviation**2, n - 1)
    return float(estimate(sums, squares, n)), without


def jackknife(value: float, without: Floats) -> Effect:
    """Value, and ends of its 95 % interval from `[question]` values that leave out one question each."""
    n = len(without)
    half = NormalDist().inv_cdf((1 + intervals.LEVEL) / 2) * np.sqrt((n - 1) * np.var(without))
    return value, float(value - half), float(value + half)


def signed_root(variances: Sequence[float]) -> tuple[float, ...]:
    """Roots that keep the sign: variances, and differences of them, in the unit of accuracy."""
    return tuple(float(np.sign(one) * np.sqrt(abs(one))) for one in variances)
