"""Executing a notebook: a kernel of this interpreter, an output that appears whole or not at all."""

from __future__ import annotations

import logging
import os
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from iclgd_helpers import storage
from iclgd_helpers.errors import CellError, InputError, reason, shortened
from iclgd_helpers.experiments import notebook_files
from iclgd_helpers.paths import repository_root, resolve_path

OPTIONS = {"kernel_name": "python3", "language": "python"}


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the running interpreter, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=50"]))


@contextmanager
def _kernels() -> Iterator[tuple[type[ThisInterpreter], list[ThisInterpreter]]]:
    """
    A class of kernels, and those that were made of it.

    When this ends, so do they, however far they were started, and nothing of them is left in the file system.
    """
    made: list[ThisInterpreter] = []
    with storage.writing("a temporary file", "free space there, or set TMPDIR"):
        folder = tempfile.TemporaryDirectory(prefix="iclgd-", ignore_cleanup_errors=True)

    class Kernel(ThisInterpreter):
        def __init__(self, **options: Any) -> None:
            super().__init__(connection_file=str(Path(folder.name, "kernel.json")), **options)
            made.append(self)

    with folder:
        try:
            yield Kernel, made
        finally:
            for process in filter(None, map(_process, made)):
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


def _process(kernel: ThisInterpreter) -> Popen[bytes] | None:
    process: Popen[bytes] | None = getattr(kernel.provisioner, "process", None)
    return process


def _how_it_ended(kernels: Sequence[ThisInterpreter]) -> str:
    """What is known of a kernel that is no longer there."""
    process = _process(kernels[-1]) if kernels else None
    status = process.poll() if process else None
    if status is None:
        return "did not answer"
    name = next((one.name for one in signal.Signals if one == -status), None)
    return f"was ended by {name or f'signal {-status}'}" if status < 0 else f"ended with exit status {status}"


def execute(notebook: Path, target: Path, parameters: Mapping[str, Any], progress: bool = False) -> None:
    """
    Execute `notebook` into `target`, which appears only when the last cell has finished.

    Raises
    ------
    InputError
        if the file is no notebook, a cell raised one, or the target's folder cannot be written.
    CellError
        if a cell raised anything else; the notebook up to there is kept as `<target's stem>.failed.ipynb`.
    """
    notebook_files.demand_valid(notebook)
    storage.require_writable(target.parent)
    failed = resolve_path(target.with_name(f"{target.stem}.failed.ipynb"))
    half = storage.part(target.parent, ".ipynb")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # its notice would stay in the output
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would log is said in one line
    try:
        _run_cells(notebook, half, parameters, progress)
        half.replace(target)
        failed.unlink(missing_ok=True)
    except CellError as error:
        half.replace(failed)
        raise CellError(f"{error}\nThe notebook up to there, with the traceback: {failed}") from None
    finally:
        half.unlink(missing_ok=True)


def _run_cells(notebook: Path, half: Path, parameters: Mapping[str, Any], progress: bool) -> None:
    """Execute into `half`, which is written again after every cell."""
    with _kernels() as (kind, made), storage.writing(f"the output of {notebook.name} to {half.parent}"):
        options = OPTIONS | {"kernel_manager_class": kind, "cwd": repository_root(), "progress_bar": progress}
        try:
            papermill.execute_notebook(_as_it_is(notebook), _as_it_is(half), dict(parameters), **options)
        except PapermillExecutionError as error:
            if error.ename == "InputError":
                raise InputError(error.evalue) from None
            what = shortened(f"{error.ename}: {error.evalue}", 1000)
            raise CellError(f"{notebook.name}, cell In [{error.exec_count}]: {what}") from None
        except DeadKernelError:
            raise CellError(f"{notebook.name}: the kernel {_how_it_ended(made)}") from None
        except RuntimeError as error:  # from its start
            raise CellError(f"{notebook.name}: no kernel ({reason(error)}); it {_how_it_ended(made)}") from None


def prepared(notebook: Path, parameters: Mapping[str, Any]) -> NotebookNode:
    """The notebook with a cell that sets `parameters`, as it would be executed; InputError if it is none."""
    notebook_files.demand_valid(notebook)
    made: NotebookNode = papermill.execute_notebook(
        _as_it_is(notebook), None, dict(parameters), prepare_only=True, **OPTIONS
    )
    return made


def _as_it_is(path: Path) -> str:
    """A path for papermill, which fills parameters into names in braces."""
    return str(path.absolute()).replace("{", "{{").replace("}", "}}")
