"""
The command `iclgd`: what each sub-command takes, and what is looked at before anything slow is imported.

A sub-command does its work in a module that is imported when its input is known to be good.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from iclgd_helpers import storage
from iclgd_helpers.command_line import (
    MOST_THREADS,
    Given,
    Here,
    Pairs,
    Tflops,
    exit_status,
    from_here,
    given_once,
    task_from_here,
    typed,
    typed_product,
)
from iclgd_helpers.errors import CellError, InputError
from iclgd_helpers.experiments import live_lines, notebook_files, parameters, protocol
from iclgd_helpers.paths import records_folder, repository_root
from iclgd_helpers.schemas import one_of

if TYPE_CHECKING:
    from iclgd_helpers.experiments.plans import Planned

PARAMETERS = click.option("-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="a parameter; repeatable")
PRODUCT = click.option(
    "-p", "pairs", nargs=2, multiple=True, metavar="NAME VALUE", help="a parameter; twice the same name: a run for each"
)
TFLOPS = click.option("--tflops", type=Tflops(), help="what one worker sustains [half of a matrix product's here, now]")
PRESET = click.option("--preset", type=Given(), help="smoke, quick or paper")
WHERE: dict[str, Any] = {"type": Here(), "help": "where records are [$ICLGD_RECORDS or _runs/records]"}
RECORDS = click.option("--records", "folder", **WHERE)
STORED = click.option("--records", "folder", default=records_folder, **WHERE)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `iclgd`; see `exit_status`."""
    return exit_status(iclgd, arguments, "iclgd")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Bad input ends with one line and status 2, a failed job with 1, an interrupt with 130. Tab completion: "
    '`eval "$(_ICLGD_COMPLETE=bash_source iclgd)"` (or zsh_source, fish_source).',
)
def iclgd() -> None:
    """In-Context Learning as Gradient Descent: run its pages and experiments with your own parameters."""


@iclgd.command(epilog="Example: iclgd run 50 --preset smoke -p seed 3")
@click.argument("notebook", type=Here())
@PRESET
@PARAMETERS
@click.option("--output", type=Here(), help="folder for the results [_runs/<page>-<hash>]")
def run(notebook: Path, preset: str | None, pairs: Pairs, output: Path | None) -> None:
    """Execute NOTEBOOK, a file or the number of a page of the book, with the given parameters."""
    given = typed(pairs)
    if preset is not None:
        given_once(given, ["preset"])
        given["preset"] = preset
    from iclgd_helpers.experiments import run_notebook

    folder = run_notebook.run(notebook_files.page(notebook), given, output, progress=sys.stderr.isatty())
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")


@iclgd.command(
    epilog="Examples: iclgd grid --preset smoke --model tiny-llama --model tiny-gpt2 --seed 0 --seed 1; "
    "iclgd grid --plan reproduction --cost-only; "
    "iclgd grid --preset smoke --on here -p n_demonstrations 2 -p n_demonstrations 4"
)
@click.option(
    "--plan",
    type=click.Choice(("reproduction", "confirmation", "prompts")),
    help="what the book's pages show, into results/",
)
@PRESET
@click.option("--task", "tasks", type=Given(), multiple=True, help="repeatable [the preset's or the plan's]")
@click.option("--model", "models", type=Given(), multiple=True, help="repeatable [the preset's or the plan's]")
@click.option("--seed", "seeds", type=int, multiple=True, help="repeatable [each task's first]")
@PRODUCT
@click.option("--stage", "stages", multiple=True, help="of the plan reproduction; repeatable [all]")
@RECORDS
@click.option("--on", default="local", show_default=True, type=Given(), help="local: worker processes; here: this one; "
              "else a Dask scheduler's address or file")  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1, MOST_THREADS), help="on this machine [one a GPU, or by cores, memory]"
)
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), default=1, show_default=True, help="of each worker")
@TFLOPS
@click.option("--cost-only", is_flag=True, help="print what it would cost, and stop")
def grid(
    plan: str | None,
    preset: str | None,
    tasks: tuple[str, ...],
    models: tuple[str, ...],
    seeds: tuple[int, ...],
    pairs: Pairs,
    stages: tuple[str, ...],
    folder: Path | None,
    **options: Any,
) -> None:
    """Run many jobs: every combination of models, tasks, seeds and parameters, or a PLAN. What is stored is skipped."""
    if plan is not None:
        refuse({"--preset": preset, "-p": pairs, "--seed": seeds, "--records": folder}, f"--plan {plan} fixes it")
        planned = _plan(plan, models, tasks, stages)
    else:
        refuse({"--stage": stages}, "give it with --plan reproduction")
        given, over = _product(preset, tasks, models, seeds, pairs)
        planned = _runs(given, over, folder or records_folder(), options)
    from iclgd_helpers.experiments import grids

    if failed := grids.work(planned, **options):
        raise CellError(f"{len(failed)} failed: {', '.join(failed)}")


def refuse(given: Mapping[str, Any], reason: str) -> None:
    """UsageError for the first option that was given."""
    for name, value in given.items():
        if value:
            raise click.UsageError(f"{name}: {reason}")


def _product(
    preset: str | None, tasks: Sequence[str], models: Sequence[str], seeds: Sequence[int], pairs: Pairs
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all runs have in common, and what they differ in: parameter -> values."""
    given, over = typed_product(pairs)
    named = {
        "model": [from_here(model) for model in models],
        "task": list(map(task_from_here, tasks)),
        "seed": list(seeds),
    }
    named = {name: several for name, several in named.items() if several}
    given_once([*given, *over], [*named, *(["preset"] if preset else [])])
    if preset:
        given["preset"] = preset
    return given, {**over, **named}


def _runs(given: dict[str, Any], over: dict[str, Any], folder: Path, options: Mapping[str, Any]) -> list[Planned]:
    """The jobs of a product, when its devices, models, tables and folder are known to be there."""
    from iclgd_helpers.experiments import inputs

    if options["on"] not in ("local", "here") and "dtype" not in over:
        given = {**given, **_dtype_of_workers(given, options["on"])}
    several = parameters.combinations(given, over)
    identities = inputs.check(several)
    if not options["cost_only"]:
        inputs.require_room(identities, folder)
    from iclgd_helpers.experiments import plans

    return plans.product(several, folder)


def _dtype_of_workers(given: Mapping[str, Any], on: str) -> dict[str, Any]:
    """What `dtype=auto` means on the workers, which need not be what it means here."""
    if given.get("dtype", parameters.preset(given.get("preset", "quick"))["dtype"]) != "auto":
        return {}
    from iclgd_helpers.experiments import dask_workers

    with dask_workers.connected(on) as client:
        call, device = "iclgd_helpers.experiments.jobs:automatic_dtype", given.get("device", "auto")
        return {"dtype": dask_workers.on_worker(client, call, {"device": device})}


def _plan(name: str, models: Sequence[str], tasks: Sequence[str], stages: Sequence[str]) -> list[Planned]:
    """The jobs of one of the book's plans."""
    known = protocol.PROMPT_SEEDS if name == "prompts" else protocol.SEEDS
    for task in tasks:
        one_of("task of the plan", task, known)
    for stage in stages:
        one_of("stage", stage, protocol.STAGES)
    if name != "reproduction":
        refuse({"--stage": stages}, "give it with --plan reproduction")
    named = [from_here(model) for model in models] or list(protocol.MODELS[: 1 if name == "prompts" else None])
    chosen = list(tasks) or list(known)
    from iclgd_helpers.experiments import inputs

    inputs.check(parameters.combinations({"preset": "quick"}, {"model": named, "task": chosen}))
    from iclgd_helpers.experiments import plans

    if name == "reproduction":
        return plans.reproduction(named, list(stages) or protocol.STAGES, chosen)
    if name == "confirmation":
        return plans.confirmation(named, chosen)
    return [job for model in named for job in plans.prompts(model, chosen)]


@iclgd.command(epilog="Example: iclgd cost --preset smoke --task sst2 --tflops 30")
@PRESET
@click.option("--task", "tasks", type=Given(), multiple=True, help="repeatable [the preset's]")
@click.option("--model", "models", type=Given(), multiple=True, help="repeatable [the preset's]")
@PRODUCT
@TFLOPS
def cost(
    preset: str | None, tasks: tuple[str, ...], models: tuple[str, ...], pairs: Pairs, tflops: float | None
) -> None:
    """Show what single runs would cost, stage by stage; no weights are loaded."""
    several = parameters.combinations(*_product(preset, tasks, models, (), pairs))
    from iclgd_helpers.experiments import inputs

    inputs.check(several)
    from iclgd_helpers.experiments import grids

    print("\n".join(line for given in several for line in grids.stages(given, tflops)))


@iclgd.command(epilog="Example: iclgd settings")
def settings() -> None:
    """Choose the default task's settings on its training rows, into `results/settings`."""
    from iclgd_helpers.experiments import choose_settings

    choose_settings.work()


@iclgd.group()
def records() -> None:
    """List, show and compare stored records."""


@records.command("list", epilog="Example: iclgd records list --records results/records")
@STORED
def list_records(folder: Path) -> None:
    """One line for each record: its run, and whether the present helpers would compute the same."""
    from iclgd_helpers.experiments import record_lines

    print("\n".join(record_lines.listed(folder)))


@records.command(epilog="Example: iclgd records current --records results/records")
@STORED
def current(folder: Path) -> None:
    """Which records are current, and why the others are not."""
    from iclgd_helpers.experiments import record_lines

    print("\n".join(record_lines.currency(folder)))


@records.command(epilog="Example: iclgd records show ID --records results/records")
@click.argument("record", type=Given())
@STORED
def show(record: str, folder: Path) -> None:
    """Parameters and accuracies of RECORD (its id, the beginning of it, or its folder)."""
    from iclgd_helpers.experiments import record_lines

    print("\n".join(record_lines.shown(record, folder)))


@records.command(epilog="Example: iclgd records compare ID OTHER --records results/records")
@click.argument("first", type=Given())
@click.argument("second", type=Given())
@STORED
def compare(first: str, second: str, folder: Path) -> None:
    """What differs between two records: parameters, then numbers; status 1 if any number does."""
    from iclgd_helpers.experiments import record_lines

    lines, same = record_lines.compared(first, second, folder)
    print("\n".join(lines))
    if not same:
        raise CellError("the numbers differ")


def _of_checkout(module: str) -> ModuleType:
    """A module beside the package: a checkout has it, an installation of the package alone does not."""
    folder = repository_root() / module.partition(".")[0]
    if not folder.is_dir():
        raise InputError(f"{folder} is not there: this command needs the whole repository")
    sys.path.insert(0, str(repository_root()))
    return importlib.import_module(module)


@iclgd.command(epilog="Example: iclgd book --stored")
@click.option("--preset", type=Given(), default="quick", show_default=True)
@click.option("--stored", is_flag=True, help="take the outputs stored in notebooks/")
@click.option("--folder", type=Here(), default=repository_root, help="where _build is made [the repository]")
def book(preset: str, stored: bool, folder: Path) -> None:
    """Execute the pages that changed and build the HTML."""
    parameters.known_preset(preset)
    storage.require_writable(folder / "_build")
    live_lines.starting()
    notebook_files.library()
    _of_checkout("tools.build_book").book(folder, preset, stored)


@iclgd.command(add_help_option=False, context_settings={"ignore_unknown_options": True},
               epilog="Example: iclgd bench --help")  # fmt: skip
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def bench(context: click.Context, words: tuple[str, ...]) -> None:
    """Measure speed and memory beside peers; options: `iclgd bench --help`."""
    context.exit(_of_checkout("bench.__main__").main(list(words)))


@iclgd.command(epilog="Example: iclgd doctor")
def doctor() -> None:
    """Versions, device, memory, caches, sources, disk: a line each; status 1 if something is missing."""
    from iclgd_helpers.experiments import health

    if missing := health.report(print):
        raise CellError(f"missing: {', '.join(missing)}")
