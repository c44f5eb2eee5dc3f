"""One job: what it is as plain data, and how it is performed, on a worker or in the command itself."""

from __future__ import annotations

import errno
import fcntl
import importlib
import json
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from iclgd_helpers import progress, storage
from iclgd_helpers.errors import InputError, reason
from iclgd_helpers.experiments import provenance

STORED = "stored already"  # the message of a function that found its record: it says nothing about how long jobs take
LIBRARIES = ("torch", "numpy", "transformers")  # whose versions are the same on every worker
DONE, BUSY, REFUSED, FAILED = "done", "busy", "refused", "failed"


@dataclass(frozen=True)
class Job:
    """
    One call whose result is stored at once, as plain data (what JSON holds).

    Parameters
    ----------
    name : what messages call it; no two in a list are the same.
    call : `package.module:function`. The function looks for its record first, and returns a message, which is `STORED`
        where it found that, and a small value as plain data. It gets the values of the jobs in `after` as
        `needed`, by name, if there are any.
    arguments : by name.
    lock : the file that is locked while it computes, beside what it stores; it is removed afterwards.
    cost : operations, for the time that is left.
    after : names of jobs earlier in the list.
    resources : what of its worker it takes, as `{"GPU": 1}`.
    """

    name: str
    call: str
    arguments: Mapping[str, Any]
    lock: str
    cost: float = 0.0
    after: tuple[str, ...] = ()
    resources: Mapping[str, float] = field(default_factory=dict)


@cache
def identities() -> dict[str, str]:
    """What a worker has in common with the command, as it was when this process first asked."""
    found = {"helpers": provenance.engine_hash(), "Python": ".".join(platform.python_version_tuple()[:2])}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name).split("+")[0]  # built for whichever device
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def perform(order: str) -> dict[str, Any]:
    """
    Do a job on a worker, or in the command itself: what became of it, as plain data.

    Parameters
    ----------
    order : JSON of the job's call, arguments, values needed and lock, of the threads and the command's `identities`.
    """
    asked, place, start = json.loads(order), _place(), time.perf_counter()

    def outcome(state: str, message: str, value: Any = None) -> dict[str, Any]:
        seconds = time.perf_counter() - start
        return {"state": state, "message": message, "value": value, "place": place, "seconds": seconds}

    lock = Path(asked["lock"])
    try:
        if other := [name for name, wanted in asked["identities"].items() if identities().get(name) != wanted]:
            return outcome(REFUSED, f"it has other {' and '.join(other)} than the command")
        storage.require_writable(lock.parent)
    except (InputError, OSError) as error:  # another worker may be able to
        return outcome(REFUSED, reason(error))
    try:
        with locked(lock) as is_ours:
            if not is_ours:
                return outcome(BUSY, "another process computes it")
            with progress.noting(progress_file(lock)):
                return outcome(DONE, *_result(asked))
    except InputError as error:
        return outcome(FAILED, str(error))
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}, line {last.lineno}"
        return outcome(FAILED, f"{type(error).__name__}: {reason(error)} ({where})")


def progress_file(lock: Path) -> Path:
    """Where the job that holds this lock notes how far it is."""
    return lock.with_suffix(".progress")


def dask() -> Any:
    """Dask, imported where it is needed: that takes a second."""
    return importlib.import_module("distributed")


def _place() -> str:
    """The worker's name; of the command itself, `here`."""
    if "distributed" in sys.modules:
        with suppress(ValueError):
            return str(dask().get_worker().name)
    return "here"


def _function(call: str) -> Callable[..., Any]:
    module, _, name = call.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def _result(asked: Mapping[str, Any]) -> tuple[str, Any]:
    function = _function(asked["call"])
    if asked["threads"] and "torch" in sys.modules:  # the number belongs to the thread that computes
        sys.modules["torch"].set_num_threads(asked["threads"])
    needed = {} if asked["needed"] is None else {"needed": asked["needed"]}
    message, value = function(**asked["arguments"], **needed)
    return message, value


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether the lock is ours; it always is where the file system has no locks. A process that dies gives it up."""
    with storage.writing(path):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.fstat(file).st_nlink > 0  # else it was removed since it was opened, and guards nothing
        except OSError as error:
            is_ours = error.errno not in (errno.EAGAIN, errno.EACCES)
        try:
            yield is_ours
        finally:
            if is_ours:
                path.unlink(missing_ok=True)  # before it is given up, so that nobody else's is removed
    finally:
        os.close(file)


def reply(call: str, arguments: Mapping[str, Any]) -> Any:
    """What `package.module:function` answers here."""
    return _function(call)(**arguments)
