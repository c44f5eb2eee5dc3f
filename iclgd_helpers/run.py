"""Run one notebook with checked parameters: `python -m iclgd_helpers.run NOTEBOOK -p seed 3`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from iclgd_helpers.command_line import exit_status, given_once, typed
from iclgd_helpers.errors import InputError
from iclgd_helpers.identity import engine_hash
from iclgd_helpers.parameters import ExperimentParameters, Parameters, validate_for_notebook
from iclgd_helpers.paths import records_folder, repository_root, resolve_path


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the running interpreter, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=50"]))


class CellError(RuntimeError):
    """A cell of a notebook failed for another reason than bad input."""


def execute(notebook: Path, target: Path, parameters: Mapping[str, Any], progress: bool = False) -> None:
    """
    Execute `notebook` into `target`, which appears only when the last cell has finished.

    Raises
    ------
    InputError
        if a cell raised one, or the target's folder cannot be made.
    CellError
        if a cell raised anything else; the notebook up to there is kept as `<target's stem>.failed.ipynb`.
    """
    partial = target.with_name(f".{target.stem}.partial.ipynb")
    failed = target.with_name(f"{target.stem}.failed.ipynb")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {target.parent} ({error.strerror}): name another folder") from None
    options = {"kernel_name": "python3", "language": "python", "kernel_manager_class": ThisInterpreter}
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # its notice would stay in the output
    try:
        papermill.execute_notebook(
            notebook, partial, dict(parameters), progress_bar=progress, cwd=repository_root(), **options
        )
    except PapermillExecutionError as error:
        if error.ename == "InputError":
            partial.unlink(missing_ok=True)
            raise InputError(error.evalue) from None
        partial.replace(failed)
        place = f"{notebook.name}, cell In [{error.exec_count}]: {error.ename}: {error.evalue}"
        raise CellError(f"{place}\nThe notebook up to there, with the traceback: {failed}") from None
    except DeadKernelError:
        partial.replace(failed)
        raise CellError(f"{notebook.name}: the kernel died, most likely for want of memory: {failed}") from None
    partial.replace(target)
    failed.unlink(missing_ok=True)


def default_folder(notebook: Path, given: Mapping[str, Any], parameters: Parameters) -> Path:
    """`_runs/<page>-<hash of parameters, the page's own among them, and helper code>` in the repository."""
    own = {name: value for name, value in given.items() if name not in type(parameters).model_fields}
    content = json.dumps([parameters.model_dump() | own, engine_hash()], sort_keys=True)
    return resolve_path(f"_runs/{notebook.stem}-{hashlib.sha256(content.encode()).hexdigest()[:12]}")


def run(notebook: Path, given: Mapping[str, Any], output: Path | None = None, progress: bool = False) -> Path:
    """
    Check the parameters, execute the notebook, and put it and its record into one folder.

    Returns
    -------
    Path
        the folder: the executed notebook and, if the page used its cell's record, `record.json` and
        `examples.parquet`.
    """
    parameters = validate_for_notebook(notebook, given)
    folder = (output or default_folder(notebook, given, parameters)).absolute()
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise InputError(f"--output {output} is a file: name a folder")
    try:
        execute(notebook, folder / notebook.name, given, progress)
    except InputError:
        if not existed and folder.is_dir():
            folder.rmdir()
        raise
    if isinstance(parameters, ExperimentParameters):
        from iclgd_helpers import records  # slow to import, and of no use to bad input

        identity = records.record_id(parameters)
        if (records_folder() / identity).is_dir():  # not every page observes a whole cell
            records.copy_to(identity, folder)
    return folder


@click.command()
@click.argument("notebook", type=click.Path(path_type=Path))
@click.option("--preset", help="smoke, quick (the notebooks' own default) or paper")
@click.option("-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="repeatable")
@click.option("--output", type=click.Path(path_type=Path), help="folder for the results [_runs/<page>-<hash>]")
def command(notebook: Path, preset: str | None, parameters: tuple[tuple[str, str], ...], output: Path | None) -> None:
    """Execute NOTEBOOK with the given parameters; bad input gives one line and exit status 2."""
    given = typed(parameters)
    if preset is not None:
        given_once(given, ["preset"])
        given["preset"] = preset
    folder = run(notebook, given, output, progress=sys.stderr.isatty())
    print(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir() if not p.name.startswith('.')))}")


def main(arguments: list[str] | None = None) -> int:
    """Exit status, as of every command; 1 for a failing cell."""
    try:
        return exit_status(command, arguments, "iclgd_helpers.run")
    except CellError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
