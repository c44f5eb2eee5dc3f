"""What the commands share: how parameters and paths are read from a command line, and how a command of click ends."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from iclgd_helpers.errors import InputError
from iclgd_helpers.paths import resolve_path

# Parameters that may name a file or a folder.
PATHS = ("data_file", "data_folder", "model", "other_model", "bench_file")


def literal(text: str) -> bool | int | float | str | None:
    """The value that papermill's command line makes of `text`."""
    names = {"True": True, "False": False, "None": None}
    if text in names:
        return names[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def from_here(path: str) -> str:
    """`path`, absolute if it lies in the working directory and that is not the repository, where pages look for it."""
    here = Path(path).expanduser().absolute()
    return str(here) if here.exists() and here.resolve() != resolve_path(path) else path


def typed(pairs: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Parameters from a command line: values as papermill reads them, paths as a shell does."""
    given = {name: literal(text) for name, text in pairs}
    return {n: from_here(value) if n in PATHS and isinstance(value, str) else value for n, value in given.items()}


def given_once(given: Iterable[str], options: Iterable[str]) -> None:
    """
    Refuse a parameter that was given twice, as an option and by `-p`.

    Raises
    ------
    click.UsageError
        naming the first of them.
    """
    if twice := [name for name in options if name in set(given)]:
        raise click.UsageError(f"--{twice[0]} and -p {twice[0]} are both given: use one")


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
