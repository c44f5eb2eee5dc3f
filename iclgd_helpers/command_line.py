"""What the commands share: how parameters, paths and numbers are read from a command line, and how a command ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from iclgd_helpers.data.task_files import names_a_file
from iclgd_helpers.engine.checkpoints import BUILT_IN
from iclgd_helpers.errors import CellError, InputError, shortened
from iclgd_helpers.experiments.parameters import text_names
from iclgd_helpers.paths import resolve_here, resolve_path
from iclgd_helpers.signals import Terminated, farewell

# Parameters that may name a file or a folder.
PATHS = ("data_file", "data_folder", "model", "other_model", "bench_file", "task_file")
FORMAT = ("separator", "label_prefix", "instruction")  # texts in which `\n` and `\t` may be typed
TFLOPS = (1e-6, 1e9)  # TFLOP/s: no device is slower or faster, and times stay numbers that can be said
MOST_THREADS = 1024
Pairs = tuple[tuple[str, str], ...]  # of `-p NAME VALUE`


class Given(click.ParamType):  # type: ignore[type-arg]  # before version 8.4 it takes none
    """A text that is not empty: an empty one is a variable that the shell did not know."""

    name = "text"

    def convert(self, value: Any, option: click.Parameter | None, context: click.Context | None) -> Any:
        if not value.strip():
            self.fail("it is empty: give a value", option, context)
        return value


class Here(Given):
    """A file or folder, a relative one taken from the working directory; InputError if nothing can be there."""

    name = "path"

    def convert(self, value: Any, option: click.Parameter | None, context: click.Context | None) -> Path:
        return resolve_here(value if isinstance(value, Path) else super().convert(value, option, context))


class Tflops(click.ParamType):  # type: ignore[type-arg]  # see above
    """A speed in TFLOP/s, within `TFLOPS`."""

    name = "number"

    def convert(self, value: Any, option: click.Parameter | None, context: click.Context | None) -> float:
        number = literal(value) if isinstance(value, str) else value
        low, high = TFLOPS
        if isinstance(number, (int, float)) and not isinstance(number, bool) and low <= number <= high:
            return float(number)
        said = f"{shortened(repr(value))}: give a positive number of TFLOP/s, {low:g} to {high:g}"
        self.fail(said, option, context)


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
    """
    Make a path in the working directory absolute, unless that is the repository, where pages look for it.

    A built-in model's name is that model; a folder of that name is given as `./name`.
    """
    here = resolve_here(path)
    lies_here = path not in BUILT_IN and os.path.exists(here) and here != resolve_path(path)
    return str(here) if lies_here else path


def task_from_here(task: str) -> str:
    """The same for a task that is a file; others are names."""
    return from_here(task) if names_a_file(task) else task


def typed(pairs: Pairs) -> dict[str, Any]:
    """
    Parameters from a command line: texts unchanged, other values as papermill reads them, paths as a shell does.

    Raises
    ------
    click.UsageError
        for a parameter that is given twice.
    """
    given: dict[str, Any] = {}
    for name, value in _typed(pairs):
        if name in given:
            raise click.UsageError(f"-p {shortened(name)} is given twice: give it once")
        given[name] = value
    return given


def typed_product(pairs: Pairs) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The same where a name may be given several times: those with one value, and those with several."""
    values: dict[str, list[Any]] = {}
    for name, value in _typed(pairs):
        values.setdefault(name, []).append(value)
    given = {name: several[0] for name, several in values.items() if len(several) == 1}
    return given, {name: several for name, several in values.items() if name not in given}


def _typed(pairs: Pairs) -> Iterator[tuple[str, Any]]:
    texts = text_names()
    for name, text in pairs:
        value = text if name in texts and text != "None" else literal(text)
        if isinstance(value, str):
            value = from_here(value) if name in PATHS else task_from_here(value) if name == "task" else value
            value = value.replace(r"\n", "\n").replace(r"\t", "\t") if name in FORMAT else value
        yield name, value


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


def exit_status(command: click.Command, arguments: Sequence[str] | None, name: str) -> int:
    """
    Run the command; if it fails, print the reason in one line.

    Returns
    -------
    int
        its status: 0; 1 for a failing cell or job; 2 for bad input; 130 for an interrupt; 143 for SIGTERM.
    """
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        with command.make_context(name, words) as context:
            return int(command.invoke(context) or 0)
    except click.exceptions.Exit as end:  # of --help
        return end.exit_code
    except (InputError, click.ClickException) as error:
        # A usage error of click may be wrapped; ours have a line for each fault.
        lines = [error.format_message()] if isinstance(error, click.ClickException) else str(error).splitlines()
        print("\n".join(f"error: {' '.join(line.split())}" for line in lines), file=sys.stderr)
        return 2
    except CellError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # whoever read has seen enough; nothing is written to it when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt as interrupt:
        number = signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT
        print(farewell(number), file=sys.stderr)
        return 128 + number
