"""Executing a notebook: a kernel of this interpreter, an output that appears whole or not at all."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from subprocess import Popen
from typing import Any

import papermill
import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.exceptions import PapermillExecutionError

from iclgd_helpers import progress, storage
from iclgd_helpers.errors import CellError, InputError, reason, shortened
from iclgd_helpers.experiments import live_lines, notebook_files
from iclgd_helpers.experiments.warm_kernels import Forked, Server
from iclgd_helpers.paths import repository_root, resolve_path

OPTIONS = {"kernel_name": "python3", "language": "python"}
LONGEST_END = 1.2  # seconds that an execution has to end in


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels with the running interpreter, whatever kernels the user has registered."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=50"]))


class Warm(LocalProvisioner):
    """Has a server fork the kernel, in place of starting an interpreter; it does that if the server is gone."""

    server: Server

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        """The kernel with the arguments, the environment and the folder that it would have been started with."""
        module = cmd.index("-m") + 1
        script = importlib.util.find_spec(cmd[module])
        argv = [str(script and script.origin), *cmd[module + 1 :]]
        forked = self.server.fork(argv, options["env"], str(options["cwd"]))
        if self.server.ended:
            raise RuntimeError("the command ends")
        if forked is None:
            return await super().launch_kernel(cmd, **options)
        self.process: Any = forked
        self.pid, self.pgid, self.cwd = forked.pid, forked.pid, options["cwd"]
        return self.connection_info


@dataclass
class Execution:
    """
    One execution of `notebook` into `target`, which appears only when the last cell has finished.

    Parameters
    ----------
    notebook, target, parameters : what is executed, where it is written, and what is injected.
    server : to fork the kernel from; None starts an interpreter.
    environment : of the kernel, beside that of this process.
    """

    notebook: Path
    target: Path
    parameters: Mapping[str, Any]
    server: Server | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    made: list[ThisInterpreter] = field(default_factory=list)
    ended: bool = False
    cell: int = 0
    noted: Path | None = None
    half: Path | None = None

    def run(self) -> None:
        """
        Execute it.

        Raises
        ------
        InputError
            if the file is no notebook, a cell raised one, or the target's folder cannot be written.
        CellError
            if a cell raised anything else; the notebook up to there is kept as `<target's stem>.failed.ipynb`.
        """
        notebook_files.demand_valid(self.notebook)
        storage.require_writable(self.target.parent)
        failed = resolve_path(self.target.with_name(f"{self.target.stem}.failed.ipynb"))
        self.half = half = storage.part(self.target.parent, ".ipynb")
        os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # its notice would stay in the output
        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it would log is said in one line
        try:
            self._run_cells(half)
            half.replace(self.target)
            failed.unlink(missing_ok=True)
        except CellError as error:
            if self.ended:
                raise
            half.replace(failed)
            raise CellError(f"{error}\nThe notebook up to there, with the traceback: {failed}") from None
        finally:
            half.unlink(missing_ok=True)

    def _run_cells(self, half: Path) -> None:
        """Execute into `half`, which is written again after every cell."""
        name = self.notebook.name
        with self._kernels() as kind, storage.writing(f"the output of {name} to {half.parent}"):
            options = OPTIONS | {"kernel_manager_class": kind, "progress_bar": False}
            options["on_cell_execute"] = self._on_cell
            try:
                papermill.execute_notebook(_as_it_is(self.notebook), _as_it_is(half), dict(self.parameters), **options)
            except PapermillExecutionError as error:
                if error.ename == "InputError":
                    raise InputError(error.evalue) from None
                what = shortened(f"{error.ename}: {error.evalue}", 1000)
                raise CellError(f"{name}, cell In [{error.exec_count}]: {what}") from None
            except DeadKernelError:
                raise CellError(f"{name}: the kernel {_how_it_ended(self.made)}") from None
            except RuntimeError as error:  # from its start
                raise CellError(f"{name}: no kernel ({reason(error)}); it {_how_it_ended(self.made)}") from None

    @contextmanager
    def _kernels(self) -> Iterator[type[ThisInterpreter]]:
        """
        A class of kernels.

        When this ends, so do the kernels that were made of it, however far they were started. Nothing of them is left
        in the file system.
        """
        execution = self
        with storage.writing("a temporary file", "free space there, or set TMPDIR"):
            folder = tempfile.TemporaryDirectory(prefix="iclgd-", ignore_cleanup_errors=True)
        self.noted = Path(folder.name, "progress.json")
        environment = {progress.FILE: str(self.noted), **self.environment}

        class Kernel(ThisInterpreter):
            def __init__(self, **options: Any) -> None:
                super().__init__(connection_file=str(Path(folder.name, "kernel.json")), **options)
                execution.made.append(self)

            async def _async_pre_start_kernel(self, **options: Any) -> tuple[list[str], dict[str, Any]]:
                if execution.ended:
                    raise RuntimeError("the command ends")
                if execution.server:
                    self.provisioner = Warm(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
                    self.provisioner.server = execution.server
                more = {"env": {**os.environ, **environment}, "cwd": str(repository_root())}
                found: tuple[list[str], dict[str, Any]] = await super()._async_pre_start_kernel(**options | more)
                return found

        with folder:
            try:
                yield Kernel
            finally:
                self._kill()

    def _on_cell(self, **_: object) -> None:
        self.cell += 1

    def _kill(self) -> None:
        for process in map(_process, self.made):
            if process and process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

    # ---------------------------------------------------------------------------------------- asked from other threads
    def end(self) -> None:
        """End it, however far it is: `run` returns with an error, and keeps nothing."""
        self.ended = True
        self._kill()

    def remove(self) -> None:
        """Remove what `run` would have removed, had it come to its end."""
        if self.half:
            self.half.unlink(missing_ok=True)
        if self.noted:
            shutil.rmtree(self.noted.parent, ignore_errors=True)

    def doing(self) -> tuple[str, int, int | None]:
        """What is being done, and how many of how many steps of it are."""
        if self.noted and (found := progress.noted(self.noted)):
            return found
        return ("cell", self.cell, self.n_cells) if self.cell else ("starting", 0, None)

    @cached_property
    def n_cells(self) -> int:
        """How many cells of code there are, the one that is injected among them."""
        return sum(cell.is_code for cell in notebook_files.read_cells(self.notebook)) + bool(self.parameters)

    def resident(self) -> int:
        """Bytes of memory of its kernel and what that has started."""
        process = _process(self.made[-1]) if self.made else None
        return sum(map(_resident, family(process.pid))) if process else 0


def family(pid: int) -> list[psutil.Process]:
    """A process with its descendants; none if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it ended meanwhile
        return 0


def _process(kernel: ThisInterpreter) -> Popen[bytes] | Forked | None:
    process: Popen[bytes] | Forked | None = getattr(kernel.provisioner, "process", None)
    return process


def _how_it_ended(kernels: Sequence[ThisInterpreter]) -> str:
    """What is known of a kernel that is no longer there."""
    process = _process(kernels[-1]) if kernels else None
    status = process.poll() if process else None
    if status is None:
        return "did not answer"
    name = next((one.name for one in signal.Signals if one == -status), None)
    return f"was ended by {name or f'signal {-status}'}" if status < 0 else f"ended with exit status {status}"


class Running(threading.Thread):
    """An execution in a thread of its own, so that whoever started it can look at it and end it."""

    def __init__(self, execution: Execution) -> None:
        super().__init__(daemon=True)
        self.execution, self.started, self.peak = execution, time.monotonic(), 0
        self.error: BaseException | None = None
        self.over = threading.Event()  # before Python 3.13, a thread whose `join` is interrupted seems to have ended
        self.start()

    def run(self) -> None:
        try:
            self.execution.run()
        except BaseException as error:
            self.error = error
        finally:
            self.over.set()

    def look(self) -> str:
        """What it does now, in words; its memory is measured on the way."""
        self.peak = max(self.peak, self.execution.resident())
        return live_lines.stage(*self.execution.doing())

    def seconds(self) -> float:
        """For how long it has been running."""
        return time.monotonic() - self.started

    def end(self) -> None:
        """End it and wait for that, but not for ever: somebody has pressed `Ctrl-C`."""
        latest = time.monotonic() + LONGEST_END
        while not self.over.is_set() and time.monotonic() < latest:
            self.execution.end()
            self.over.wait(0.05)
        if not self.over.is_set():  # Jupyter asks once a second whether its kernel is there
            self.execution.remove()


def execute(notebook: Path, target: Path, parameters: Mapping[str, Any], progress: bool = False) -> None:
    """Execute `notebook` into `target`; errors as for `Execution.run`. With `progress` a line shows how far it is."""
    lines, running = live_lines.LiveLines(progress), Running(Execution(notebook, target, parameters))
    try:
        while not running.over.wait(live_lines.SECONDS):
            lines.draw([f"{notebook.stem}: {running.look()}, {live_lines.duration(running.seconds())}"])
    finally:
        lines.draw([])
        running.end()
    if running.error:
        raise running.error


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
