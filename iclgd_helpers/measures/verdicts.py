"""
The rule by which pages 62, 74 and 78 judge their statements: a status for each task, then a verdict for each model.

An effect is (value, low, high): positive where the statement holds, with its 95 % interval over questions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from iclgd_helpers.measures import intervals

JUDGED = ("for", "against", "open")  # the statuses that a verdict counts; any other word takes no part


def status(effects: Sequence[Sequence[float]], least: int = 2) -> str:
    """
    The status of a statement in one task, from its seeds.

    Parameters
    ----------
    effects : one (value, low, high) a seed. A value of NaN means that the effect is undefined there: an arm has
        diverged, or a ratio has no denominator. That seed is left out. Low and high of NaN mean that there is no
        interval over questions: such a seed is not clear. If no seed has one, the interval over seeds replaces it.
    least : how many seeds are needed; 1 where one effect is that of the whole task.

    Returns
    -------
    `for` (`against`): all known values are above (below) 0, and at least `least` of their intervals are as well.
    `undefined`: fewer than `least` values are known, because others are NaN. `open`: everything else.
    """
    known = np.array([effect for effect in effects if not np.isnan(effect[0])], float).reshape(-1, 3)
    if len(known) < least:
        return "undefined" if len(known) < len(effects) else "open"
    if np.isnan(known[:, 1:]).all():
        seeds: dict[str, Any] = intervals.over_seeds(known[:, 0].tolist())
        known[:, 1:] = seeds["interval"]
    for sign, name in ((1, "for"), (-1, "against")):
        nearest = (sign * known[:, 1:]).min(1)  # NaN, and so not above 0, without an interval
        if (sign * known[:, 0] > 0).all() and (nearest > 0).sum() >= least:
            return name
    return "open"


def verdict(statuses: Iterable[str], fewest: int = 3, words: tuple[str, str] = ("reproduced", "not reproduced")) -> str:
    """
    The verdict on a statement for one model, from its tasks.

    Parameters
    ----------
    statuses : one a task. Words other than for, against and open (`undefined`, a closed gate) take no part.
    fewest : how many tasks have to be judged.
    words : the verdicts if at least two thirds of the judged tasks are for the statement, and if at least half are
        against it.

    Returns
    -------
    One of `words`; `inconclusive`; or `not run` if there is no task, or every one is `missing`.
    """
    found = list(statuses)
    judged = [one for one in found if one in JUDGED]
    if len(judged) < fewest:
        return "inconclusive" if set(found) - {"missing"} else "not run"
    if 3 * judged.count("for") >= 2 * len(judged):
        return words[0]
    return words[1] if 2 * judged.count("against") >= len(judged) else "inconclusive"
