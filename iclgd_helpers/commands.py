"""
The command lines: what each command takes, and what is looked at before anything slow is imported.

A command does its work in the module of its name, which is imported when its input is known to be good.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click

from iclgd_helpers import notebook_files, parameters, plans, storage
from iclgd_helpers.command_line import (
    MOST_THREADS,
    Given,
    Here,
    Rate,
    exit_status,
    from_here,
    given_once,
    typed,
)
from iclgd_helpers.parameters import ExperimentParameters
from iclgd_helpers.paths import repository_root

PARAMETERS = click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="a parameter; repeatable")
COST_ONLY = click.option("--cost-only", is_flag=True, help="print what the run would cost, and stop")


def rate_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`--rate` of a command that says what it costs; `default` tells what is taken without it."""
    return click.option("--rate", type=Rate(), help=f"TFLOP/s that the device sustains, for the estimate [{default}]")


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """The exit status of `python -m iclgd_helpers.<name>`; see `exit_status`."""
    return exit_status(COMMANDS[name], arguments, f"iclgd_helpers.{name}")


@click.command()
@click.argument("notebook", type=Here())
@click.option("--preset", type=Given(), help="smoke, quick (the notebooks' own default) or paper")
@PARAMETERS
@click.option("--output", type=Here(), help="folder for the results [_runs/<page>-<hash>]")
def run(notebook: Path, preset: str | None, pairs: tuple[tuple[str, str], ...], output: Path | None) -> None:
    """Execute NOTEBOOK with the given parameters; bad input gives one line and exit status 2."""
    from iclgd_helpers import run

    given = typed(pairs)
    if preset is not None:
        given_once(given, ["preset"])
        given["preset"] = preset
    folder = run.run(notebook, given, output, progress=sys.stderr.isatty())
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")


@click.command()
@click.option("--preset", type=Given(), help="smoke, quick or paper [paper]")
@click.option("--task", "tasks", type=Given(), multiple=True, help="repeatable [the six tasks]")
@click.option("--model", "model_names", type=Given(), multiple=True, help="repeatable [the preset's]")
@click.option("--seed", "seeds", type=int, multiple=True, help="repeatable [each task's first]")
@PARAMETERS
@click.option("--records", type=Here(), help="where records are kept and looked up [$ICLGD_RECORDS or _runs/records]")
@rate_option("a product measured now")
@COST_ONLY
def sweep(
    preset: str | None,
    tasks: tuple[str, ...],
    model_names: tuple[str, ...],
    seeds: tuple[int, ...],
    pairs: tuple[tuple[str, str], ...],
    records: Path | None,
    rate: float | None,
    cost_only: bool,
) -> None:
    """Run a grid of cells: tasks x models x seeds."""
    given = typed(pairs)
    over = {"model": [from_here(model) for model in model_names], "task": tasks, "seed": seeds}
    given_once(given, [name for name, several in (over | {"preset": preset}).items() if several])
    given = {"preset": preset or "paper"} | given
    if not {"task", "data_file"} & given.keys():
        over["task"] = tasks or plans.SIX_TASKS
    if records:
        os.environ["ICLGD_RECORDS"] = str(records)
    cells = plans.cells(given, over)
    _look_at(cells, cost_only)
    from iclgd_helpers import sweep

    sweep.work(cells, rate, cost_only)


@click.command()
@click.option("--model", "models", type=Given(), multiple=True, default=plans.MODELS, show_default=True)
@click.option("--stage", "stages", multiple=True, type=click.Choice(plans.STAGES), default=plans.STAGES)
@click.option("--task", "tasks", multiple=True, type=click.Choice(list(plans.SEEDS)), default=tuple(plans.SEEDS))
@rate_option("half of a product's, now")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), default=1, show_default=True, help="on a CPU")
@COST_ONLY
def grid(
    models: tuple[str, ...],
    stages: tuple[str, ...],
    tasks: tuple[str, ...],
    rate: float | None,
    threads: int,
    cost_only: bool,
) -> None:
    """Run what is not yet recorded of the grid, into `results/`; $ICLGD_DATA names the folder of the six tasks."""
    models = tuple(map(from_here, models))
    _look_at(plans.cells({"preset": "quick"}, {"model": models, "task": tasks}))
    from iclgd_helpers import grid

    grid.work(models, stages, tasks, rate, threads, cost_only)


@click.command()
@click.option("--model", type=Given(), default=plans.PROMPT_MODEL, show_default=True)
@click.option(
    "--task", "tasks", multiple=True, type=click.Choice(list(plans.PROMPT_SEEDS)), default=tuple(plans.PROMPT_SEEDS)
)
@rate_option("half of a product's, now")
@COST_ONLY
def fixed_prompt(model: str, tasks: tuple[str, ...], rate: float | None, cost_only: bool) -> None:
    """Run what is not yet recorded, into `results/prompts`; $ICLGD_DATA names the folder of the tasks."""
    model = from_here(model)
    _look_at(plans.cells({"preset": "quick", "model": model}, {"task": tasks}))
    from iclgd_helpers import fixed_prompt

    fixed_prompt.work(model, tasks, rate, cost_only)


@click.command()
def choose_settings() -> None:
    """Compare, choose, and write `results/settings/snippets.json`."""
    from iclgd_helpers import choose_settings

    choose_settings.work()


@click.group(no_args_is_help=False)
def pipeline() -> None:
    """What the Makefile calls: execute the pages, build the book, prepare the notebooks for tests."""


@pipeline.command()
@click.option("--preset", type=Given(), default="quick", show_default=True)
@click.option("--stored", is_flag=True, help="take the outputs stored in notebooks/")
@click.option("--folder", type=Here(), default=repository_root, help="where _build is made [the repository]")
def book(preset: str, stored: bool, folder: Path) -> None:
    """Execute what changed and build the HTML."""
    parameters.known_preset(preset)
    storage.require_writable(folder / "_build")
    from iclgd_helpers import pipeline

    pipeline.book(folder, preset, stored)


@pipeline.command()
@click.argument("folder", type=Here())
def smoke_copies(folder: Path) -> None:
    """Copies of the notebooks for nbval, in FOLDER."""
    storage.require_writable(folder)
    from iclgd_helpers import pipeline

    pipeline.smoke_copies(folder)


@pipeline.command()
@click.argument("notebooks", nargs=-1, type=Here())
def refresh(notebooks: tuple[Path, ...]) -> None:
    """Store new outputs in notebooks/, or in the NOTEBOOKS that are named."""
    for notebook in notebooks:
        notebook_files.parameters_cell(notebook)
    from iclgd_helpers import pipeline

    pipeline.refresh(notebooks or pipeline.notebooks())


@pipeline.command()
def sync_setup() -> None:
    """Write the Colab link and the setup cell into the notebooks."""
    from iclgd_helpers import pipeline

    pipeline.sync_setup()


def _look_at(cells: Iterable[ExperimentParameters], cost_only: bool = True) -> None:
    """InputError for what the cells lack; unless only their cost is asked for, for a place to store them, too."""
    from iclgd_helpers import preflight

    identities = preflight.check(cells)
    if not cost_only:
        preflight.require_room(identities)


COMMANDS = {
    "run": run,
    "sweep": sweep,
    "grid": grid,
    "fixed_prompt": fixed_prompt,
    "choose_settings": choose_settings,
    "pipeline": pipeline,
}
