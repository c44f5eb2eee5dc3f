"""
The first thing a command does: from here on, a signal ends it with one line, whatever is being imported.

`Ctrl-C` ends with status 130, SIGTERM with 143. What is stored is written whole or not at all, so that a command may
end at any moment and be started again.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_IMPORT = "<frozen importlib._bootstrap>"  # the code that runs while a module is imported


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command the way `Ctrl-C` does."""


def farewell(number: int) -> str:
    """The one line that a command ends with when it gets the signal."""
    return f"{WORDS[number]}; start it again to go on from what is stored"


def start(module: str, *arguments: str) -> NoReturn:
    """Import `module` and end with the status that its `main(*arguments)` returns."""
    for number in WORDS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as for a command in the background
            signal.signal(number, _on_signal)
    status = importlib.import_module(module).main(*arguments)
    if status > 128:  # of a signal: nothing is left to do, and libraries would only report what they could not finish
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """
    Raise, so that what is being done is cleaned up; a second signal does not wait for that.

    While a module is imported there is nothing to clean up, and libraries turn an interrupt into errors of their own.
    """
    for other in WORDS:
        signal.signal(other, _leave)
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT:
            _leave(number, frame)
        frame = frame.f_back
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    os.write(2, f"{farewell(number)}\n".encode())
    os._exit(128 + number)
