"""
The workers of a grid: processes that the command starts and ends, or those of a Dask scheduler that runs.

Nothing else imports Dask. Whoever reaches a scheduler's port can run code as its owner. The port of the workers that
the command starts is open on the loopback interface alone, where the other users of this machine reach it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import os
import queue
import shutil
import signal
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import yaml

from iclgd_helpers import progress, storage
from iclgd_helpers.errors import CellError, InputError, reason
from iclgd_helpers.experiments.live_lines import stage
from iclgd_helpers.experiments.performing import FAILED, Job, dask, perform, progress_file, reply
from iclgd_helpers.paths import PACKAGE

SETTINGS = PACKAGE / "experiments" / "dask.yaml"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LOOPBACK = "127.0.0.1"
ANSWER_SECONDS = 10  # within which a scheduler answers, and has a worker
POLL_SECONDS = 0.5  # after which it is looked again who is there
WORKER_BYTES = 2**29  # of a worker with its libraries, beside what its job needs
LOST = "the scheduler is lost; what is stored stays: start the command again when it is back"
SILENT = logging.CRITICAL + 1


def visible_gpus() -> list[str]:
    """The name of each GPU here in CUDA_VISIBLE_DEVICES; where that is not set, the numbers of all."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    n = torch.cuda.device_count()
    return named[:n] if any(named) else [str(number) for number in range(n)]


def n_workers(threads: int = 1, peak_memory: float = 0) -> int:
    """
    How many workers this machine has cores and memory for, at least one.

    Parameters
    ----------
    threads : of each worker.
    peak_memory : bytes that the largest job needs, as counted.
    """
    import psutil
    from dask.system import CPU_COUNT
    from distributed.system import MEMORY_LIMIT  # of the container, where there is one

    memory = min(psutil.virtual_memory().available, MEMORY_LIMIT)
    return max(1, min(int(CPU_COUNT) // threads, int(memory // (peak_memory + WORKER_BYTES))))


@contextmanager
def connected(
    on: str = "local",
    n_jobs: int | None = None,
    *,
    peak_memory: float = 0,
    workers: int | None = None,
    threads: int = 1,
    gpus: Sequence[str] | None = None,
) -> Iterator[Any]:
    """
    A client of the workers, for `run` and `on_worker`; None if this process computes. They end with the block.

    Parameters
    ----------
    on : `local` starts workers on this machine, one for each GPU, else as `n_workers` has it. `here` computes in this
        process. Anything else is the address of a scheduler or its scheduler file. An address begins with `tcp://`, or
        with `tls://` and takes the certificates that Dask's configuration names.
    n_jobs : no more workers than this are started.
    workers, threads, peak_memory : see `n_workers`; `workers` takes the place of that number.
    gpus : as CUDA_VISIBLE_DEVICES names them, in place of `visible_gpus`; () for none.

    Raises
    ------
    InputError
        if no scheduler answers, or it has no worker.
    CellError
        if workers cannot be started.
    """
    if on == "here":
        yield None
        return
    distributed, config = dask(), importlib.import_module("dask.config")
    config.update(config.config, yaml.safe_load(SETTINGS.read_text(encoding="utf-8")))
    for name in ("distributed", "distributed.client", "tornado.application"):
        logging.getLogger(name).setLevel(SILENT)  # what counts is said in a line of ours
    warnings.filterwarnings("ignore", category=distributed.versions.VersionMismatchWarning)  # see `identities`
    if on == "local":
        gpus = visible_gpus() if gpus is None else gpus
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus][:workers]
        places = places or [{}] * (workers or n_workers(threads, peak_memory))
        opened = _started(places[:n_jobs], threads)
    else:
        opened = _found(on)
    with _scratch(), opened as client:
        yield client


@contextmanager
def _scratch() -> Iterator[None]:
    """A folder for what Dask writes, which is removed; that of a command that was killed is removed by the next one."""
    config, temporary = importlib.import_module("dask.config"), Path(tempfile.gettempdir())
    storage.remove_leftovers(temporary)
    scratch = storage.part(temporary)
    with storage.writing(scratch, "free space there, or set TMPDIR"):
        scratch.mkdir()
    try:
        with config.set({"temporary-directory": str(scratch)}):
            yield
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _started(places: Sequence[Mapping[str, str]], threads: int) -> Iterator[Any]:
    """A cluster of one worker process for each place, which is its environment; nothing of it is left at the end."""
    distributed = dask()
    nannies: list[Any] = []

    def nanny(*arguments: Any, **options: Any) -> Any:
        nannies.append(distributed.Nanny(*arguments, **options))
        return nannies[-1]

    local = {"host": LOOPBACK, "dashboard": False, "dashboard_address": f"{LOOPBACK}:0"}
    common = local | {"nthreads": 1, "memory_limit": 0, "silence_logs": SILENT}
    specification = {}
    for number, place in enumerate(places):
        resources = {"GPU": 1} if place else {}
        options = common | {"env": dict(place), "resources": resources, "name": f"worker-{number}"}
        specification[f"worker-{number}"] = {"cls": nanny, "options": options}
    scheduler = {"cls": distributed.Scheduler, "options": local | {"protocol": "tcp://", "port": 0}}
    with _environment(threads), _loop() as loop:
        opened: list[Any] = []

        def open_them() -> None:
            opened.append(distributed.SpecCluster(workers=specification, scheduler=scheduler, loop=loop))
            opened.append(distributed.Client(opened[0], set_as_default=False))

        opening = ThreadPoolExecutor(1).submit(open_them)  # so that an interrupt does not stop it half-way
        try:
            try:
                opening.result()
            except Exception as error:
                raise CellError(f"the workers cannot be started ({reason(error)})") from None
            yield opened[1]
        finally:
            _end(nannies, opening)
            for one in reversed(opened):
                with suppress(Exception):
                    one.close(timeout=1)


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Workers begin with this number of threads: libraries read it when they are loaded."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


@contextmanager
def _loop() -> Iterator[Any]:
    """The loop that starts workers: in a thread that blocks `Ctrl-C`, as they then do, and leave it to the command."""
    resource_tracker.ensure_running()  # whoever starts it unblocks the signal
    runner = dask().utils.LoopRunner()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        with suppress(Exception):
            runner.stop(timeout=1)


def _end(nannies: Sequence[Any], opening: Future[None]) -> None:
    """Kill the workers, whatever they do and those that still start: nothing is lost, for records appear whole."""
    latest = time.monotonic() + 1
    while True:
        for nanny in list(nannies):
            nanny.close_gracefully()  # else it would start its worker again
            if nanny.pid:
                with suppress(ProcessLookupError):
                    os.kill(nanny.pid, signal.SIGKILL)
        if opening.done() or time.monotonic() > latest:
            return
        time.sleep(0.02)


@contextmanager
def _found(on: str) -> Iterator[Any]:
    """A client of a scheduler that is running."""
    address, distributed = on if "://" in on else _address(Path(on)), dask()

    async def knock() -> None:  # a client that finds nobody would take 20 s to end
        security = distributed.Security().get_connection_args("client")
        await (await distributed.comm.connect(address, timeout=ANSWER_SECONDS, **security)).close()

    with _loop() as loop:
        try:
            distributed.utils.sync(loop, knock)
            client = distributed.Client(address, loop=loop, timeout=ANSWER_SECONDS, set_as_default=False)
        except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:
            raise InputError(f"no scheduler answers at {address} ({reason(error)}): start one") from None
        try:
            try:
                client.wait_for_workers(1, timeout=ANSWER_SECONDS)
            except TimeoutError:
                way_out = f"start some by `dask worker {address}`"
                raise InputError(f"no worker is connected to {address}: {way_out}") from None
            yield client
        finally:
            with suppress(Exception):
                client.close(timeout=1)


def _address(file: Path) -> str:
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["address"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file} is neither a scheduler's address nor its file ({reason(error)})") from None


def on_worker(client: Any, call: str, arguments: Mapping[str, Any] | None = None) -> Any:
    """
    What `package.module:function` answers on every worker, which is the same.

    Raises
    ------
    InputError
        if a worker has no answer, or workers differ; it names them.
    """
    if client is None:
        return reply(call, arguments or {})
    found = client.run(reply, call, dict(arguments or {}), on_error="return")
    names = {address: str(worker["name"]) for address, worker in client.scheduler_info()["workers"].items()}
    by_answer: dict[str, list[str]] = {}
    for address, answer in found.items():
        text = f"{type(answer).__name__}: {reason(answer)}" if isinstance(answer, Exception) else repr(answer)
        by_answer.setdefault(text, []).append(names.get(address, address))
    if len(by_answer) == 1 and not isinstance(answer := next(iter(found.values())), Exception):
        return answer
    said = "; ".join(f"{', '.join(workers)} say {text}" for text, workers in by_answer.items())
    raise InputError(f"workers differ or fail in {call}: {said}: use workers that are alike")


class Workers:
    """The workers of a client."""

    def __init__(self, client: Any) -> None:
        self.client, self.id, self.numbers = client, uuid.uuid4().hex[:8], itertools.count()
        self.found: dict[str, dict[str, Any]] = {}
        self.flying: dict[str, Job] = {}
        self.futures: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.made_again: list[tuple[str, Any]] = []  # results that died with their worker: Dask has others do the job

    def wait(self) -> None:
        """Wait a moment for a worker where there is none: it may be starting again."""
        if self.client.status == "running":
            with suppress(TimeoutError):
                self.client.wait_for_workers(1, timeout=ANSWER_SECONDS)

    def look(self) -> None:
        """Ask which workers there are."""
        if self.client.status != "running":
            raise CellError(LOST)
        self.found = dict(self.client.scheduler_info()["workers"])

    def slots(self, job: Job) -> dict[str, int]:
        """How many such jobs each worker takes at once."""
        return {
            str(worker["name"]): worker["nthreads"]
            for worker in self.found.values()
            if all(worker["resources"].get(name, 0) >= amount for name, amount in job.resources.items())
        }

    def submit(self, job: Job, order: str, refused_by: set[str]) -> None:
        """Hand out a job, to workers that have not refused it."""
        # A key that was just released must not be used again; and other commands may have jobs of the same name.
        options: dict[str, Any] = {"key": f"{job.name}-{self.id}-{next(self.numbers)}", "pure": False}
        if refused_by:
            options["workers"] = [at for at, worker in self.found.items() if str(worker["name"]) not in refused_by]
            options["allow_other_workers"] = True  # they may be gone by then
        self.flying[job.name] = job
        self._await(job.name, self.client.submit(perform, order, resources=dict(job.resources) or None, **options))

    def _await(self, name: str, future: Any) -> None:
        future.add_done_callback(lambda ended: self.futures.put((name, ended)))

    def ended(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those that ended, after a moment if there are none, and what became of them."""
        looked, self.made_again = self.made_again, []
        for name, future in looked:
            if future.status != "lost":
                self._await(name, future)
            else:
                self.made_again.append((name, future))
        with suppress(queue.Empty):
            name, future = self.futures.get(timeout=POLL_SECONDS)
            if (outcome := self._outcome(future)) is None:
                self.made_again.append((name, future))
            else:
                del self.flying[name]
                yield name, outcome

    def _outcome(self, future: Any) -> dict[str, Any] | None:
        """None if it was lost with its worker, which Dask has others do again."""
        if future.status == "lost":
            return None
        if future.status == "cancelled":  # by the client, when it loses the scheduler
            raise CellError(LOST)
        try:
            outcome: dict[str, Any] = future.result(timeout=ANSWER_SECONDS)
            return outcome
        except TimeoutError:
            return None
        except dask().KilledWorker:
            message = "given up: every worker that tried it ended, for want of memory or by a signal"
        except Exception as error:  # it could not be read there
            message = f"{type(error).__name__}: {reason(error)}"
        if self.client.status != "running":
            raise CellError(LOST)
        return {"state": FAILED, "message": message}

    def now(self) -> list[str]:
        """What each worker computes, and how far it is."""
        names = {at: worker["name"] for at, worker in self.found.items()}
        busy = {names.get(at, at): keys for at, keys in self.client.processing().items() if keys}
        doing = [f"{name}: {', '.join(map(self._doing, keys))}" for name, keys in busy.items()]
        return doing or ["nothing yet" if names else "no worker is connected, waiting for one"]

    def _doing(self, key: Any) -> str:
        name = str(key).rsplit("-", 2)[0]
        job = self.flying.get(name)  # else it is another command's
        found = progress.noted(progress_file(Path(job.lock))) if job else None
        return f"{name}, {stage(*found)}" if found else name
