"""
What the book claims, and the function that checks each claim.

Importing this module's `CLAIMS` after all chapters have been imported (`claims.registry.load()`) gives every claim.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

import claims

STATUSES = ("identity", "conditional", "empirical", "refuted here")
LEAST_CONTROL = 1e3  # a control must miss by at least this many tolerances


@dataclass(frozen=True)
class Exact:
    """Outcome of an exact check: the largest relative residual, and the error of each deliberately wrong version."""

    residual: float
    control_errors: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """Outcome of a statistical check: an interval (`low`, `high`) with its level and n, and those of the controls."""

    interval: tuple[float, float]
    control_intervals: tuple[tuple[float, float], ...]
    level: float
    n: int


class Interval(NamedTuple):
    """An interval of a measured quantity, from n observations."""

    low: float
    high: float
    n: int
    level: float = 0.95


def mean_of(values: Iterable[float]) -> Interval:
    """Student's t interval of the mean of independent `values`."""
    found = np.asarray(values, dtype=float)
    low, high = stats.t.interval(Interval._field_defaults["level"], len(found) - 1, found.mean(), stats.sem(found))
    return Interval(float(low), float(high), len(found))


Check = Callable[..., "float | Sequence[float] | Interval"]


class Control(NamedTuple):
    """
    A wrong version of a statement.

    text: what is wrong, in words. fault: the options of the check that make it so, `check(seed, **options | fault)`;
    with the claim's own options in their place the hypothesis is restored, and the check passes.
    erratum: numbers of theory errata (`book/errata.md`) whose printed form this is.
    """

    text: str
    fault: dict[str, Any]
    erratum: tuple[int, ...] = ()


@dataclass(frozen=True)
class Claim:
    """
    A claim: `check(seed, **options)` gives its relative error, the errors of several cases, or an `Interval`.

    source: paper, section and equation. notebook: the chapter (file stem) that shows it.
    tolerance: relative, of an exact claim. controls: each must fail the same check.
    drawn: what a seed draws at random, in words; empty where nothing is, and the check runs once.
    refutes: the papers' sentence that the claim corrects, where its status says that one is refuted.
    side: of a measured claim, on which side of each control's interval its own lies, `below` or `above`.
    """

    id: str
    statement: str
    notebook: str
    controls: Sequence[Control]
    check: Check
    drawn: str
    source: str = "the book's own derivation"
    options: dict[str, Any] = field(default_factory=dict)
    status: str = "identity"
    tolerance: float | None = 1e-9
    refutes: str = ""
    side: str = ""

    def outcome(self, seed: int) -> Exact | Measured:
        """What the check finds in double precision: the largest error, and each control's smallest in any case."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = self.check(seed, **self.options)
            wrong = [self.check(seed, **self.options | control.fault) for control in self.controls]
        finally:
            torch.set_default_dtype(before)
        if isinstance(found, Interval):
            return Measured(found[:2], tuple(w[:2] for w in wrong), found.level, found.n)
        return Exact(float(np.max(found)), tuple(float(np.min(w)) for w in wrong))


CLAIMS: dict[str, Claim] = {}


def claim(id: str, **fields: Any) -> Callable[[Check], Check]:
    """Decorator that enters a check under `id`; fields as in `Claim`. One check may serve several claims."""

    def enter(check: Check) -> Check:
        if id in CLAIMS:
            raise ValueError(f"claim {id!r} is entered twice")
        CLAIMS[id] = Claim(id=id, check=check, **fields)
        if CLAIMS[id].status not in STATUSES:
            raise ValueError(f"claim {id!r} has status {CLAIMS[id].status!r}; known are {STATUSES}")
        if bool(CLAIMS[id].refutes) != (CLAIMS[id].status == STATUSES[-1]):
            raise ValueError(f"claim {id!r} has to name the sentence that it refutes, or refutes none")
        return check

    return enter


def chapter(notebook: str, **fields: Any) -> Callable[..., Callable[[Check], Check]]:
    """The decorator `claim` for the claims of one chapter, with fields that most of them share."""
    return partial(claim, notebook=notebook, **fields)


def load() -> dict[str, Claim]:
    """All claims, in the order of the chapters."""
    for module in sorted(m.name for m in pkgutil.iter_modules(claims.__path__) if m.name.startswith("c")):
        importlib.import_module(f"claims.{module}")
    return dict(sorted(CLAIMS.items(), key=lambda item: (item[1].notebook, item[0])))
