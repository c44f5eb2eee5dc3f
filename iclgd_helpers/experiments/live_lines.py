"""The last lines of a terminal, drawn again in the same place: what is being done, and for how long."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from iclgd_helpers.experiments.arms import ARMS

SECONDS = 0.25  # between two drawings


class LiveLines:
    """Lines on the error stream while there is a terminal; lines that stay go to the output, above them."""

    def __init__(self, wanted: bool = True) -> None:
        self.live, self._drawn = wanted and sys.stderr.isatty(), 0

    def draw(self, lines: Sequence[str]) -> None:
        """Put these lines in the place of those before."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            text = "".join(f"{line[:width]}\n" for line in lines)
            sys.stderr.write(f"\x1b[{self._drawn}F\x1b[J{text}" if self._drawn else text)
            sys.stderr.flush()
            self._drawn = len(lines)

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self.draw([])
        print(line, flush=True)


def starting() -> None:
    """Say that something is coming, before seconds of imports; the first line that is drawn takes its place."""
    if sys.stderr.isatty():
        print("starting", end="\r", file=sys.stderr, flush=True)


def stage(what: str, done: int, total: int | None) -> str:
    """What is being done, in words: `finetuning standard 3 of 64`."""
    steps = f" {done} of {total}" if total else ""
    return f"finetuning {what}{steps}" if what in ARMS else f"{what}{steps}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the larger two that count."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} m" if minutes >= 60 else f"{minutes} m {rest:02} s"
