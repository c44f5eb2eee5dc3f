"""
One effect from questions within seeds within tasks, its interval, and a verdict.

The tasks are the paper's six and stay fixed: the effect is their plain mean. Seeds (draws of demonstrations) and
questions are samples, crossed within a task, for every seed answers the same questions. The variance of a crossed mean
is estimated from mean squares (Searle, Casella and McCulloch 1992, section 4.3), degrees of freedom are Satterthwaite's
(1946). A bootstrap of five seeds would be too narrow: its variance is 4/5 of theirs. A mixed model from a library
takes seconds for each of hundreds of effects, and page 77 simulates them many times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from iclgd_helpers.measures import intervals, resampling
from iclgd_helpers.measures.resampling import UNDEFINED, Effect

Floats = NDArray[np.float64]
REPRODUCED, REFUTED, EQUIVALENT, UNDECIDED = "reproduced", "refuted", "equivalent to none", "undecided"
NOT_JUDGED = "not judged"  # there is no effect
MOST_TIMES = 100  # as many seeds or questions; a plan for more is no plan
NORMAL = float(stats.norm.ppf((1 + intervals.LEVEL) / 2))
STEP = 1e-5  # of the central differences; columns are shares, cosines and the like


@dataclass(frozen=True)
class OfMeans:
    """
    An effect of one run: a function of means over its questions.

    Parameters
    ----------
    statistic : takes one mean a column (numbers, or arrays of one shape) and gives one value for each.
    columns : `[column][question]`; NaN where a question has no value.
    """

    statistic: Callable[..., Any]
    columns: tuple[ArrayLike, ...]

    def interval(self, seed: int = 0) -> Effect:
        """Value and bootstrap interval over the questions of this run alone, NaN where there are no questions."""
        if len(np.asarray(self.columns[0])) == 1:
            return float(self.statistic(*(np.asarray(column, float)[0] for column in self.columns))), *UNDEFINED[1:]
        return resampling.of_means(self.statistic, *self.columns, seed=seed)


@dataclass(frozen=True)
class TaskEffect:
    """
    The effect in one task, and what its variance is made of.

    `variances`: of the mean, by source: seeds, questions, and both (the rest). `mean_squares`: of the same
    three, the contribution to the variance and the degrees of freedom.
    """

    value: float
    n_seeds: int
    n_questions: int
    variances: tuple[float, float, float]
    mean_squares: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Estimate:
    """An effect over tasks with its 95 % interval, p value (two-sided, of no effect) and degrees of freedom."""

    value: float
    low: float
    high: float
    p: float
    degrees: float
    tasks: Mapping[str, TaskEffect]

    @property
    def n_seeds(self) -> int:
        """Of the task with the fewest."""
        return min((task.n_seeds for task in self.tasks.values()), default=0)

    @property
    def n_questions(self) -> int:
        """Of all tasks together."""
        return sum(task.n_questions for task in self.tasks.values())


def of_task(runs: Sequence[OfMeans]) -> TaskEffect | None:
    """
    The effect of one task from its runs, one a seed, over the same questions: the first ones that all of them have.

    The effect is the statistic of the means over all seeds and questions. So a seed in which the denominator of a ratio
    is small has little weight. The linear part (delta method) gives every answer its share of the variance.

    Returns
    -------
    None if the statistic is undefined there, or fewer than two seeds have a value.
    """
    if len(runs) < 2:
        return None
    shortest = min(len(np.asarray(run.columns[0])) for run in runs)
    values = np.array([np.array(run.columns, float)[:, :shortest] for run in runs])  # [seed, column, question]
    values = values[:, :, ~np.isnan(values).any((0, 1))]
    if not values.shape[2]:
        return None
    means, statistic = values.mean((0, 2)), runs[0].statistic
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(*means))
        steps = STEP * np.eye(len(means))
        gradient = np.array([(statistic(*(means + s)) - statistic(*(means - s))) / (2 * STEP) for s in steps], float)
    if not (np.isfinite(value) and np.isfinite(gradient).all()):
        return None
    return crossed(value, np.einsum("scq,c->sq", values - means[:, None], gradient))


def crossed(value: float, shares: Floats) -> TaskEffect:
    """
    The variance of the mean of `shares`, `[seed, question]`, both crossed and random; at least two seeds.

    With one question only (an effect that has no questions), seeds alone.
    """
    n_seeds, n_questions = shares.shape
    by_seed, by_question = shares.mean(1), shares.mean(0)
    if n_questions == 1:
        variance = float(by_seed.var(ddof=1) / n_seeds)
        return TaskEffect(value, n_seeds, 1, (variance, 0.0, 0.0), ((variance, n_seeds - 1.0),))
    rest = shares - by_seed[:, None] - by_question + shares.mean()
    degrees = (n_seeds - 1, n_questions - 1, (n_seeds - 1) * (n_questions - 1))
    squares = (n_questions * by_seed.var(ddof=1), n_seeds * by_question.var(ddof=1), (rest**2).sum() / degrees[2])
    n = n_seeds * n_questions
    seeds, questions = (max(0.0, float(square - squares[2])) / n for square in squares[:2])
    residual = float(squares[2]) / n
    parts = ((seeds + residual, degrees[0]), (questions + residual, degrees[1]), (-residual, degrees[2]))
    return TaskEffect(value, n_seeds, n_questions, (seeds, questions, residual), parts)


def from_interval(effect: Effect, n_questions: int, without: Sequence[float] = ()) -> TaskEffect | None:
    """
    An effect that was given with its 95 % interval over questions; None if it is undefined.

    `without`: the effect without each of its seeds, at least three, for the variance that these add (jackknife). Where
    there are none, one seed is all there is, and the interval is over questions alone.
    """
    value, low, high = effect
    if np.isnan([*effect, *without]).any() or len(without) in (1, 2):
        return None
    parts = [(((high - low) / (2 * NORMAL)) ** 2, n_questions - 1.0)]
    of_seeds = (len(without) - 1) * float(np.var(without)) if without else 0.0
    parts += [(of_seeds, len(without) - 1.0)] if without else []
    return TaskEffect(value, len(without) or 1, n_questions, (of_seeds, parts[0][0], 0.0), tuple(parts))


def over_tasks(runs: Mapping[str, Sequence[OfMeans]]) -> Estimate | None:
    """The mean over the tasks in which the effect is defined, with its interval; None if it is in none."""
    found = {task: effect for task, of_seeds in runs.items() if (effect := of_task(of_seeds)) is not None}
    return estimate(found) if found else None


def estimate(tasks: Mapping[str, TaskEffect]) -> Estimate:
    """The plain mean of some tasks' effects."""
    value = float(np.mean([task.value for task in tasks.values()]))
    variance, degrees = _variance(tasks)
    if variance == 0:  # the same in every answer: nothing is left to be unsure of
        return Estimate(value, value, value, float(value == 0), float("inf"), tasks)
    half = float(stats.t.ppf((1 + intervals.LEVEL) / 2, degrees) * np.sqrt(variance))
    p = float(2 * stats.t.sf(abs(value) / np.sqrt(variance), degrees))
    return Estimate(value, value - half, value + half, p, degrees, tasks)


def _variance(tasks: Mapping[str, TaskEffect]) -> tuple[float, float]:
    """Variance of the mean over tasks, and Satterthwaite's degrees of freedom."""
    variance = sum(sum(task.variances) for task in tasks.values()) / len(tasks) ** 2
    parts = [part for task in tasks.values() for part in task.mean_squares]
    spread = sum((size / len(tasks) ** 2) ** 2 / degrees for size, degrees in parts)
    return variance, variance**2 / spread if spread else float("inf")


# ------------------------------------------------------------------------------------------------------------ verdicts
def verdict(found: Estimate | None, adjusted_p: float, bound: float) -> str:
    """
    The verdict on a statement whose effect is positive where it holds.

    Parameters
    ----------
    found : None is not judged.
    adjusted_p : its p value after `false_discovery` over all statements.
    bound : effects within it, to either side, are as good as none.
    """
    if found is None:
        return NOT_JUDGED
    if -bound < found.low and found.high < bound:
        return EQUIVALENT
    if adjusted_p > 1 - intervals.LEVEL:
        return UNDECIDED
    return REPRODUCED if found.value > 0 else REFUTED


def false_discovery(p: ArrayLike) -> Floats:
    """P values adjusted by Benjamini and Hochberg (1995): at most 5 % of what is decided is expected to be false."""
    values = np.asarray(p, float)
    adjusted: Floats = np.asarray(stats.false_discovery_control(values)) if len(values) else values
    return adjusted


def needed(found: Estimate, bound: float) -> dict[str, int | None]:
    """
    How many seeds, or else questions, a task would need so that an effect of this size is decided.

    An effect is decided if its interval is on one side of 0, or within the bound; that p values are adjusted for many
    statements is left out. Every task gets as many times more, and the number is that of the task with the fewest.
    None: `MOST_TIMES` as many would not do, because the other source of variance alone leaves the effect undecided.
    """
    distance = max(abs(found.value), bound - abs(found.value))
    quantile = stats.t.ppf((1 + intervals.LEVEL) / 2, found.degrees)

    def times(of_seeds: bool) -> float | None:
        for more in np.geomspace(1.05, MOST_TIMES, 100):
            parts = [_with(task, *((more, 1.0) if of_seeds else (1.0, more))) for task in found.tasks.values()]
            if quantile * np.sqrt(sum(parts)) / len(parts) < distance:
                return float(more)
        return None

    fewest = {"n_seeds": found.n_seeds, "n_questions": min(task.n_questions for task in found.tasks.values())}
    wanted = {name: times(name == "n_seeds") for name in fewest}
    return {name: None if more is None else math.ceil(more * fewest[name]) for name, more in wanted.items()}


def _with(task: TaskEffect, seeds: float, questions: float) -> float:
    """The variance of a task's effect with so many times as many seeds and questions."""
    by_seed, by_question, rest = task.variances
    return by_seed / seeds + by_question / questions + rest / (seeds * questions)
