"""
Two uncertainties, never mixed; both at 95 %.

Over test questions, for one choice of demonstrations (the seed): percentile bootstrap. Over seeds: Student's t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 2000


Interval = tuple[float, float]


def over_examples(statistic: Callable[..., float], *columns: NDArray[Any]) -> Interval:
    """
    Interval of `statistic(*columns)` over questions, which are resampled jointly.

    Resamples in which the statistic is NaN are left out; (NaN, NaN) if that is all of them.
    """
    draws = np.random.default_rng(0).integers(0, len(columns[0]), (RESAMPLES, len(columns[0])))
    if statistic is np.mean and columns[0].ndim == 1:  # the same sums, without a call for each resample
        return _percentiles(columns[0][draws].mean(1))
    return _percentiles(np.array([statistic(*(column[i] for column in columns)) for i in draws]))


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """
    Mean of one value a seed, with Student's t interval; the interval is (NaN, NaN) for fewer than two seeds.

    Returns
    -------
    `mean`, `interval` (two numbers) and `n`; missing and NaN values are left out.
    """
    from scipy import stats  # slow to import, and only of use to pages

    found = np.array([value for value in values if value is not None and not np.isnan(value)], dtype=float)
    mean = float(found.mean()) if len(found) else float("nan")
    if len(found) < 2:
        return {"mean": mean, "interval": (float("nan"), float("nan")), "n": len(found)}
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(found) - 1) * found.std(ddof=1) / np.sqrt(len(found)))
    return {"mean": mean, "interval": (mean - half, mean + half), "n": len(found)}


def layer_means(values: NDArray[np.floating]) -> dict[str, Any]:
    """
    Mean of `values` (`[example, layer]`, NaN = undefined) for each layer and over all layers, with intervals.

    The order of averaging is the original code's: over questions within a layer, then over layers.

    Returns
    -------
    `mean`, `interval` (two numbers), `per_layer`, `per_layer_low`, `per_layer_high` (`[layer]`), `n` and `undefined`
    (how many of the values are NaN).
    """
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)
    generator = np.random.default_rng(0)
    weights = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        per_layer = filled.sum(0) / defined.sum(0)
        draws = (weights @ filled) / (weights @ defined)
    bounds = [_percentiles(column) for column in draws.T]
    return {
        "mean": _mean(per_layer),
        "interval": _percentiles(np.array([_mean(draw) for draw in draws])),
        "per_layer": per_layer.tolist(),
        "per_layer_low": [low for low, _high in bounds],
        "per_layer_high": [high for _low, high in bounds],
        "n": len(values),
        "undefined": int((~defined).sum()),
    }


def _mean(values: NDArray[np.floating]) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _percentiles(draws: NDArray[np.floating]) -> Interval:
    draws = draws[~np.isnan(draws)]
    if not len(draws):
        return float("nan"), float("nan")
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
