"""The one error a reader may cause, bad input, and how a command of click ends."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


class InputError(ValueError):
    """Something given by the reader cannot be used; the message names it and the way out."""


def exit_status(command: click.Command, arguments: Sequence[str] | None, module: str) -> int:
    """Run the command of `python -m module`: 0, 2 for bad input (one line), 130 for an interrupt."""
    try:
        command.main(arguments, prog_name=f"python -m {module}", standalone_mode=False)
        return 0
    except (InputError, click.UsageError) as error:
        message = error.format_message() if isinstance(error, click.UsageError) else str(error)
        print(f"error: {' '.join(message.split())}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("interrupted; start it again to go on from what is stored", file=sys.stderr)
        return 130
