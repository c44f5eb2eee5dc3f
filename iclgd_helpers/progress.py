"""
How far something is that takes a while: a bar of text, and a line in the file that `noting` or the environment names.

A command that waits for a notebook or for a job names the file and reads it; without it there is the bar alone. Bars
are text everywhere: Jupyter's widgets would need a package more, and leave nothing in a stored notebook.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iclgd_helpers.errors import InputError
from iclgd_helpers.storage import part

FILE = "ICLGD_PROGRESS"  # the environment variable
SECONDS = 0.2  # between two lines, at least
_named: ContextVar[Path | None] = ContextVar("_named", default=None)  # each thread's own


def note(what: str, done: int = 0, total: int | None = None) -> None:
    """Say how far it is to whoever named the file; where that cannot be written, nobody is waiting for it."""
    if name := _named.get() or os.environ.get(FILE):
        half = part(Path(name).parent)
        try:
            half.write_text(json.dumps([what, done, total]), encoding="utf-8")
            half.replace(name)
        except (OSError, InputError):
            half.unlink(missing_ok=True)


@contextmanager
def noting(file: Path) -> Iterator[None]:
    """For the length of the block, what this thread does is noted in this file, which is removed at the end."""
    before = _named.set(file)
    try:
        yield
    finally:
        _named.reset(before)
        file.unlink(missing_ok=True)


def noted(file: Path) -> tuple[str, int, int | None] | None:
    """What was last noted in the file; None if there is nothing, or it is over."""
    try:
        what, done, total = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (what, done, total) if what else None


@contextmanager
def stage(what: str) -> Iterator[None]:
    """For the length of the block, this is what is being done; it has no steps to count."""
    note(what)
    try:
        yield
    finally:
        note("")


class Bar(tqdm):  # type: ignore[misc]
    """A bar of tqdm that notes how far it is, whether it is shown or not."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._what, self._steps, self._of = options.get("desc") or "", 0, options.get("total")
        self._noted = 0.0
        self._note()

    def _note(self) -> None:
        if (now := time.monotonic()) - self._noted > SECONDS:
            self._noted = now
            note(self._what, self._steps, self._of)

    def update(self, n: float | None = 1) -> Any:
        """So many steps more."""
        self._steps += int(n or 0)
        self._note()
        return super().update(n)

    def close(self) -> None:
        """It is over."""
        if not getattr(self, "_is_over", False):
            self._is_over = True
            note("")
        super().close()
