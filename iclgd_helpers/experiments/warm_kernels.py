"""
Kernels that need not import anything: forked from a process of this interpreter that has imported what pages import.

`multiprocessing` has such a server, too. Its children unpickle what they run, remember a parent and how it starts
processes, and import its main module. A kernel is to be like one that was started afresh.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from iclgd_helpers.experiments import notebook_files
from iclgd_helpers.paths import repository_root

LONGEST_END = 0.3  # seconds that the server has to end in
LOST = -signal.SIGKILL  # of a kernel whose server is gone, and which has ended with it


def forks() -> bool:
    """Whether a process with libraries may be forked here: macOS's own do not survive it, and Windows has no fork."""
    return sys.platform == "linux"


class Server:
    """The process to fork from, at work on its imports from the moment it is made."""

    def __init__(self, imports: Iterable[str]) -> None:
        self._link, theirs = socket.socketpair()
        self._lock = threading.Lock()  # a question and its answer stay together
        with theirs:
            command = [sys.executable, "-m", f"{__package__}.kernel_server", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, cwd=repository_root(),
                start_new_session=True,
            )  # fmt: skip
        self._answers = self._link.makefile("r", encoding="utf-8")
        self._asked, self.ended = 0, False
        self._say({"imports": list(imports)})

    def _say(self, question: dict[str, Any]) -> None:
        self._link.sendall(json.dumps(question).encode() + b"\n")
        self._asked += 1

    def ask(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """Its answer; None if the server is gone."""
        with self._lock:
            try:
                self._say(question)
                while self._asked:  # the first answer is that to the imports
                    self._asked -= 1
                    answer: dict[str, Any] = json.loads(self._answers.readline())
            except (OSError, ValueError):
                return None
            return answer

    def fork(self, argv: list[str], env: dict[str, str], cwd: str) -> Forked | None:
        """A kernel with these arguments, as soon as the server has imported; None if the server is gone."""
        answer = self.ask({"argv": argv, "env": env, "cwd": cwd})
        return Forked(self, answer["pid"]) if answer else None

    def end(self) -> None:
        """End it; kernels that are still there end with it, and whoever waits for an answer gets none."""
        self.ended = True
        with suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)  # closing it would wait for a thread that reads
        try:
            self.process.wait(LONGEST_END)
        except subprocess.TimeoutExpired:  # it imports
            self.process.kill()
            self.process.wait()
        self._link.close()


class Forked:
    """A forked kernel, with what `LocalProvisioner` and others ask of a `Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, server: Server, pid: int) -> None:
        self._server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The status, as `Popen.poll` has it."""
        if self.returncode is None:
            answer = self._server.ask({"pid": self.pid})
            self.returncode = answer["status"] if answer else LOST
        return self.returncode

    wait = poll  # it is called when `poll` has said that the kernel has ended

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the kernel has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


@contextmanager
def served(notebooks: Iterable[Path]) -> Iterator[Server | None]:
    """A server that imports what the notebooks do, for as long as the block; None where nothing is to be forked."""
    if not forks():
        yield None
        return
    server = Server(imports_of(notebooks))
    try:
        yield server
    finally:
        server.end()


def imports_of(notebooks: Iterable[Path]) -> list[str]:
    """The import statements of the notebooks' cells, each once; not those within a condition or a function."""
    found: dict[str, None] = {}
    for notebook in notebooks:
        for cell in notebook_files.read_cells(notebook):
            with suppress(SyntaxError):  # of a magic, or of raw text
                for node in ast.parse(cell.source).body:
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        found[ast.unparse(node)] = None
    return list(found)
