"""
What the book claims, and the function that checks each claim.

Importing this module's `CLAIMS` after all chapters have been imported (`claims.registry.load()`) gives every claim.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import claims

STATUSES = ("identity", "conditional", "empirical", "refuted here")
LEAST_CONTROL = 1e3  # a control must miss by at least this many tolerances


@dataclass(frozen=True)
class Exact:
    """Outcome of an exact check: the largest relative residual, and the error of the deliberately wrong version."""

    residual: float
    control_error: float


@dataclass(frozen=True)
class Measured:
    """Outcome of a statistical check: an interval (`low`, `high`) with its level and n, and that of the control."""

    interval: tuple[float, float]
    control_interval: tuple[float, float]
    level: float
    n: int


@dataclass(frozen=True)
class Claim:
    """
    A claim: `check(seed)` computes its outcome.

    source: paper, section and equation; or the book's own derivation. notebook: the chapter (file stem) that shows it.
    tolerance: relative, of an exact claim; None for a measured one. control: what the wrong version does, in words.
    erratum: numbers of theory errata (`book/errata.md`) whose printed form is this claim's control.
    """

    id: str
    statement: str
    source: str
    notebook: str
    status: str
    tolerance: float | None
    control: str
    check: Callable[[int], Exact | Measured]
    erratum: tuple[int, ...] = ()


CLAIMS: dict[str, Claim] = {}


def claim(id: str, **fields: Any) -> Callable[[Callable[[int], Exact | Measured]], Callable[[int], Exact | Measured]]:
    """Decorator that enters `check` under `id`; fields as in `Claim` (`tolerance` defaults to 1e-9)."""

    def enter(check: Callable[[int], Exact | Measured]) -> Callable[[int], Exact | Measured]:
        if id in CLAIMS:
            raise ValueError(f"claim {id!r} is entered twice")
        if fields["status"] not in STATUSES:
            raise ValueError(f"claim {id!r} has status {fields['status']!r}; known are {STATUSES}")
        CLAIMS[id] = Claim(id=id, check=check, **({"tolerance": 1e-9} | fields))
        return check

    return enter


def load() -> dict[str, Claim]:
    """All claims, in the order of the chapters."""
    for module in sorted(m.name for m in pkgutil.iter_modules(claims.__path__) if m.name.startswith("c")):
        importlib.import_module(f"claims.{module}")
    return dict(sorted(CLAIMS.items(), key=lambda item: (item[1].notebook, item[0])))
