"""
The process that warm kernels are forked from: it has imported what pages import, and has computed nothing.

`warm_kernels` starts it. It has one thread and answers one line after the other, so that a fork copies nothing that is
half done. It ends when whoever started it does, and every kernel with it.
"""

from __future__ import annotations

import builtins
import ctypes
import gc
import json
import os
import signal
import socket
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

MATPLOTLIB = ("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # which a kernel sets before any import
MOST_FILES = 2**12
BEFORE = frozenset(os.environ)  # what libraries set themselves when they are imported, a kernel has as well


def serve(link: socket.socket) -> None:
    """Answer until the other side is gone: import, fork, or report how a kernel has ended."""
    children: set[int] = set()
    with link, link.makefile("r", encoding="utf-8") as questions:
        try:
            for line in questions:
                asked = json.loads(line)
                if "imports" in asked:
                    answer: dict[str, Any] = prepared(asked["imports"])
                elif "argv" in asked:
                    children.add(pid := forked(asked))
                    answer = {"pid": pid}
                else:
                    answer = {"status": ended(asked["pid"])}
                    if answer["status"] is not None:
                        children.discard(asked["pid"])
                link.sendall(json.dumps(answer).encode() + b"\n")
        finally:
            for pid in children:
                with suppress(OSError):
                    os.killpg(pid, signal.SIGKILL)


def prepared(imports: list[str]) -> dict[str, Any]:
    """
    Import the modules that the lines name, as far as they are there: for the rest, a page has the error message.

    Messages of libraries would otherwise appear on the terminal, and between the lines of the command.
    """
    _end_with_parent(signal.SIGKILL)
    os.environ.setdefault(*MATPLOTLIB)
    builtins.get_ipython = lambda: SimpleNamespace(kernel=None)  # type: ignore[attr-defined]  # pandas looks for one
    said, nowhere = (os.dup(1), os.dup(2)), os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    for line in ("import ipykernel.kernelapp, ipykernel.ipkernel", *imports):
        with suppress(Exception):
            exec(line, {"__name__": "imports"})
    sys.stdout.flush()
    for stream, before in zip((1, 2), said, strict=True):
        os.dup2(before, stream)
        os.close(before)
    os.close(nowhere)
    del builtins.get_ipython  # type: ignore[attr-defined]
    _end_with_parent(0)  # from here on, the end of the questions tells it
    gc.collect()
    gc.freeze()  # what is here stays; a collection in a kernel would copy its memory
    return {"modules": len(sys.modules)}


def _end_with_parent(number: int) -> None:
    """Have the system send this signal when the command ends: an import takes seconds, and hears of nothing."""
    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG


def ended(pid: int) -> int | None:
    """The status of a child that has ended: that of its exit, or its signal below zero."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if found else None


def forked(asked: dict[str, Any]) -> int:
    """The process number of a new kernel, which leads a group of its own by now: so it can be ended."""
    waiting, told = os.pipe()
    with warnings.catch_warnings():  # from Python 3.12 on, of threads: those of allocators and of BLAS expect a fork
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        become_kernel(asked)
    os.close(told)
    os.read(waiting, 1)  # nothing: it returns when the child closes its end
    os.close(waiting)
    return pid


def become_kernel(asked: dict[str, Any]) -> NoReturn:
    """In the child: all that a kernel has which was started afresh, then the kernel itself."""
    try:
        os.setsid()
        os.closerange(3, min(os.sysconf("SC_OPEN_MAX"), MOST_FILES))  # the server's, of which a kernel has none
        by_imports = {name: value for name, value in os.environ.items() if name not in BEFORE}
        os.environ.clear()
        os.environ.update(by_imports | asked["env"] | {"JPY_PARENT_PID": str(os.getppid())})
        os.chdir(asked["cwd"])
        sys.argv[:] = asked["argv"]
        sys.path[:1] = [] if Path(sys.path[0] or ".").resolve() == Path.cwd() else sys.path[:1]
        _draw_anew(asked["env"].get("OMP_NUM_THREADS", ""))
        from ipykernel import kernelapp

        kernelapp.launch_new_instance([*asked["argv"][1:], f"--IPKernelApp.parent_handle={os.getppid()}"])
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 1 if end.code else 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    _leave()


def _draw_anew(threads: str) -> None:
    """What a process settles as it begins: its seeds, none of which is fixed, and its number of threads."""
    # Python's `random` draws a seed by itself whenever a process is forked.
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
        if threads.isdigit():
            torch.set_num_threads(int(threads))


def _leave() -> NoReturn:
    """End as an interpreter does: what is registered is called, and the streams are written out."""
    import atexit

    atexit._run_exitfuncs()
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        with suppress(Exception):
            stream.flush()
    os._exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
