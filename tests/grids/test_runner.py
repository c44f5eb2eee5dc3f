"""Many jobs on many processes: what is done when processes really die, folders fill up and workers differ."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import runner_jobs
from runner_jobs import computed, job

from iclgd_helpers import cli, errors, storage
from iclgd_helpers.experiments import dask_workers, performing, provenance, runner

TESTS = Path(__file__).parent.parent
LONGEST = 60  # seconds that anything may take on a busy machine


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes find the jobs; their temporary folder is empty when a test ends, and none of them is left."""
    before = set(_workers_of(psutil.Process()))  # of other tests in this process
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(runner, "BUSY_SECONDS", 0.3)
    yield
    assert not set(_workers_of(psutil.Process())) - before
    assert list((tmp_path / "tmp").iterdir()) == []


def _workers_of(process: psutil.Process) -> list[psutil.Process]:
    """Processes that were started as workers, without Python's own tracker of resources."""
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.Error):
            if "resource_tracker" not in " ".join(child.cmdline()) and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def _until(condition: Callable[[], Any], seconds: float = LONGEST) -> Any:
    """The first true value of the condition."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)
    return found


def _perform(jobs: list[performing.Job], on: str = "local", **options: Any) -> tuple[list[str], list[str]]:
    """The names that failed, and what was said."""
    lines: list[str] = []
    with dask_workers.connected(on, **({"workers": 2, "gpus": ()} | options)) as client:
        return runner.run(jobs, client, lines.append), lines


# ------------------------------------------------------------------------------------------------------------- the rest
def test_jobs_are_done_in_order_with_the_values_they_need(tmp_path):
    jobs = [job(tmp_path, "rates"), *(job(tmp_path, f"cell {i}", after=("rates",)) for i in range(3))]
    failed, lines = _perform(jobs, "here")
    assert failed == [] and [line.split("  ")[0] for line in lines] == [
        "[1/4] rates", "[2/4] cell 0", "[3/4] cell 1", "[4/4] cell 2"
    ]  # fmt: skip
    here = {path.name: storage.read_json(path) for path in tmp_path.glob("*.json")}
    assert here["cell 1.json"]["needed"]["rates"]["name"] == "rates"
    other = tmp_path / "other"
    other.mkdir()
    jobs = [job(other, "rates"), *(job(other, f"cell {i}", after=("rates",)) for i in range(3))]
    assert _perform(jobs)[0] == []
    on_workers = {path.name: storage.read_json(path) for path in other.glob("*.json")}
    places = {content["place"] for content in on_workers.values()}
    assert places <= {"worker-0", "worker-1"}
    assert json.dumps(here) == json.dumps(on_workers).replace("worker-0", "here").replace("worker-1", "here")
    assert not list(other.glob("*.lock"))
    assert all(performing.STORED in line for line in _perform(jobs, "here")[1]) and len(computed(other)) == 4


def test_the_rest_takes_as_long_as_what_was_computed(tmp_path):
    jobs = [job(tmp_path, "a", cost=1e12), job(tmp_path, "b", cost=1e12), job(tmp_path, "c", cost=119e12)]
    board = runner._Board(jobs, lines := [])  # type: ignore[arg-type]
    board.say = lines.append
    board.take("a", {"state": "done", "message": performing.STORED, "value": 0, "seconds": 0.0})
    board.take("b", {"state": "done", "message": "computed", "value": 0, "seconds": 60.0})
    assert "left" not in lines[0] and lines[1].endswith("1 m 00 s, computed; about 1 h 59 m left")
    board.at_once = 2
    assert board._left() == "; about 59 m 30 s left"


def test_a_list_that_cannot_be_done_is_a_mistake(tmp_path):
    for jobs in ([job(tmp_path, "a"), job(tmp_path, "a")], [job(tmp_path, "a", after=("b",)), job(tmp_path, "b")]):
        with pytest.raises(ValueError):
            runner.run(jobs, None)


class Pool:
    """Workers of these names, of one slot each: it notes which job is handed out, and past whom."""

    def __init__(self, *names: str) -> None:
        self.names, self.flying, self.asked = names, {}, []

    def slots(self, one: performing.Job) -> dict[str, int]:
        return dict.fromkeys(self.names, 1)

    def submit(self, one: performing.Job, order: str, refused_by: set[str]) -> None:
        self.flying[one.name] = one
        self.asked.append((one.name, set(refused_by)))


def test_no_more_jobs_are_handed_out_than_workers_take(tmp_path):
    board, pool = runner._Board([job(tmp_path, name) for name in "abc"], print), Pool("first", "second")
    board.fill(pool, None)
    board.fill(pool, None)
    assert list(pool.flying) == ["a", "b"] and list(board.waiting) == ["c"] and board.at_once == 2


def test_what_needs_a_failed_job_is_not_tried(tmp_path):
    jobs = [job(tmp_path, "a"), job(tmp_path, "b", after=("a",)), job(tmp_path, "c", after=("b",)), job(tmp_path, "d")]
    board = runner._Board(jobs, print)
    assert [one.name for one in board.ready()] == ["a", "d"]
    del board.waiting["a"]
    board.take("a", {"state": performing.FAILED, "message": "no"})
    assert [one.name for one in board.ready()] == ["d"] and board.untried == ["b", "c"]


def test_a_refused_job_goes_to_others_until_none_is_left(tmp_path):
    board, pool = runner._Board([job(tmp_path, "job")], print), Pool("first", "second")
    for place in pool.names:
        board.fill(pool, None)
        del pool.flying["job"]
        board.take("job", {"state": performing.REFUSED, "message": "no", "place": place})
    board.fill(pool, None)
    assert pool.asked == [("job", set()), ("job", {"first"})] and board.failed == ["job"]


def test_a_busy_job_is_asked_for_again_after_a_while(tmp_path):
    board = runner._Board([job(tmp_path, "job")], print)
    board.take("job", {"state": performing.BUSY, "message": "another process computes it"})
    assert list(board.ready()) == []
    assert _until(lambda: list(board.ready()))


def test_a_worker_with_other_helpers_refuses(tmp_path):
    one = job(tmp_path, "job")
    order = json.loads(runner._Board([one], print).order(one, None))
    order["identities"]["helpers"] = "old"
    outcome = performing.perform(json.dumps(order))
    assert outcome["state"] == performing.REFUSED and computed(tmp_path) == []
    assert outcome["message"] == "it has other helpers than the command"


def test_what_a_future_says_of_its_job(tmp_path):
    """One that was lost with its worker says nothing, one that was cancelled that the scheduler is lost."""
    pool = dask_workers.Workers(SimpleNamespace(status="running"))
    assert pool._outcome(SimpleNamespace(status="lost")) is None
    with pytest.raises(errors.CellError, match="the scheduler is lost"):
        pool._outcome(SimpleNamespace(status="cancelled"))


def test_a_job_is_handed_out_past_workers_that_refused_it(tmp_path):
    asked: list[dict[str, Any]] = []
    pool = dask_workers.Workers(SimpleNamespace(submit=lambda *_, **options: asked.append(options) or Future()))
    pool.found = {f"tcp://{name}": {"name": name} for name in ("first", "second")}
    for refused in (set(), {"first"}):
        pool.submit(job(tmp_path, "job"), "", refused)
    assert [options.get("workers") for options in asked] == [None, ["tcp://second"]]


def test_one_failing_job_is_one_line(tmp_path):
    kinds = [job(tmp_path, f"bad {kind}", "fail", kind=kind) for kind in ("input", "exit", "key")]
    needs = [job(tmp_path, "first", after=("bad key",)), job(tmp_path, "second", after=("first",))]
    jobs = [*kinds, *needs, job(tmp_path, "good")]
    for on in ("here", "local"):
        failed, lines = _perform(jobs, on)
        assert sorted(failed) == ["bad exit", "bad input", "bad key"] and computed(tmp_path) == ["good"]
        text = "\n".join(lines)
        assert "bad input: failed: this cannot be used: use that\n" in text and "bad exit: failed: SystemExit" in text
        assert "bad key: failed: KeyError: 'value' (runner_jobs.py, line" in text
        assert lines[-1] == "1 of 6 jobs are done, 3 failed; 2 that need them were not tried"


def test_importing_the_runner_imports_neither_dask_nor_torch():
    slow = {"dask", "distributed", "torch", "numpy"}
    code = f"import sys, iclgd_helpers.experiments.runner; print({slow} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ----------------------------------------------------------------------------------------------------- a job's own lock
def test_a_lock_is_held_once_and_removed(tmp_path):
    path = tmp_path / "job.lock"
    with performing.locked(path) as ours, performing.locked(path) as others:
        assert ours and not others
    assert not path.exists()


def test_where_there_are_no_locks_it_is_always_ours(tmp_path, monkeypatch):
    def none(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with performing.locked(tmp_path / "job.lock") as ours, performing.locked(tmp_path / "job.lock") as others:
        assert ours and others


def test_a_lock_that_was_removed_since_it_was_opened_guards_nothing(tmp_path, monkeypatch):
    path, lock = tmp_path / "job.lock", fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda *arguments: path.unlink() or lock(*arguments))
    with performing.locked(path) as ours:
        assert not ours


@pytest.mark.parametrize("locked", [True, False])
def test_two_commands_do_each_job_once(tmp_path, locked):
    """Without a common lock, they do each twice."""
    names, orders = [f"job {i}" for i in range(4)], []
    for number in range(2):
        lock = tmp_path if locked else tmp_path / str(number)
        jobs = [{"name": name, "seconds": 1, "lock": str(lock / name)} for name in names]
        orders.append({"folder": str(tmp_path), "jobs": jobs, "on": "here", "workers": None})
    commands = [_command(order) for order in orders]
    assert [command.wait(LONGEST) for command in commands] == [0, 0]
    assert computed(tmp_path) == (names if locked else sorted(2 * names))
    said = commands[0].communicate()[0] + commands[1].communicate()[0]
    assert ("busy: another process computes it" in said) == locked


def _command(order: dict[str, Any]) -> subprocess.Popen[str]:
    """A command of its own, in a group of processes as a shell gives it one."""
    arguments = [sys.executable, "-m", "runner_jobs", json.dumps(order)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(arguments, start_new_session=True, **pipes)


# ----------------------------------------------------------------------------------------------------- workers that die
def test_the_worker_of_a_job_is_killed_and_everything_is_done(tmp_path):
    jobs = [job(tmp_path, "dies", "die", times=2), *(job(tmp_path, f"job {i}", seconds=0.1) for i in range(8))]
    failed, _ = _perform(jobs)
    assert failed == [] and {path.stem for path in tmp_path.glob("*.json")} == {one.name for one in jobs}
    assert len(set((tmp_path / "dies.deaths").read_text().split())) == 2


def test_a_job_that_kills_its_worker_is_named_and_no_other(tmp_path):
    """Where jobs wait on workers and not in the command, others are given up with it."""
    killers = [job(tmp_path, f"killer {i}", "die", times=99) for i in range(2)]
    jobs = [*killers, *(job(tmp_path, f"job {i}", seconds=0.1) for i in range(12))]
    failed, lines = _perform(jobs)
    deaths = [len((tmp_path / f"{one.name}.deaths").read_text().split()) for one in killers]
    assert sorted(failed) == ["killer 0", "killer 1"]
    assert all(1 <= n <= 3 for n in deaths), "while one worker alone is up, a killer may be blamed for the other's deed"
    assert any("killer 0: failed: given up" in line for line in lines)
    assert not [*tmp_path.glob("*.lock"), *tmp_path.glob("*.progress")]


def test_a_worker_that_starts_again_slowly_is_waited_for(tmp_path):
    """For long, where Dask has less patience than any start takes: without a line for it in the settings it is lost."""
    import dask
    import distributed  # noqa: F401  its settings have to be there before one of them is changed

    def say(line: str) -> None:
        assert "no worker is connected" not in line

    impatient = dask.config.set({"distributed.deploy.lost-worker-timeout": "0.1s"})
    with impatient, dask_workers.connected(workers=1, gpus=()) as client:
        assert runner.run([job(tmp_path, "dies", "die", times=1)], client, say, interval=LONGEST / 2) == []


@pytest.mark.parametrize("is_drawn", [False, True])
def test_it_is_said_how_far_a_job_is(tmp_path, is_drawn):
    """In a line now and then, or in lines that are drawn again and again."""
    jobs, said, drawn = [job(tmp_path, f"job {i}", "count", seconds=1.5) for i in range(2)], [], []
    with dask_workers.connected(workers=1, gpus=()) as client:
        draw = drawn.append if is_drawn else None
        assert runner.run(jobs, client, said.append, interval=0.2, draw=draw) == []
    now = ["; ".join(lines) for lines in drawn] if is_drawn else [line for line in said if line.startswith("now: ")]
    assert any(line.endswith("worker-0: job 0, finetuning standard 3 of 64") for line in now), now
    assert not is_drawn or len(said) == 2, "nothing is said twice"
    assert not list(tmp_path.glob("*.progress"))


# -------------------------------------------------------------------------------------------- the command's own workers
def test_each_gpu_has_a_worker_that_sees_no_other(tmp_path):
    jobs = [job(tmp_path, f"job {i}", seconds=0.5, resources={"GPU": 1}) for i in range(4)]
    assert _perform(jobs, workers=None, gpus=("3", "MIG-5"))[0] == []
    found = [storage.read_json(path) for path in tmp_path.glob("*.json")]
    assert {(one["place"], one["gpu"]) for one in found} == {("worker-0", "3"), ("worker-1", "MIG-5")}


def test_a_job_that_needs_what_no_worker_offers_is_refused(tmp_path):
    with pytest.raises(errors.InputError, match="job needs a worker that offers GPU 1: none is connected"):
        _perform([job(tmp_path, "job", resources={"GPU": 1})], workers=1)


def test_the_number_of_threads_is_set_where_it_counts(tmp_path):
    values: dict[str, Any] = {}
    board = runner._Board.take
    with pytest.MonkeyPatch.context() as patch, dask_workers.connected(workers=1, threads=2, gpus=()) as client:
        patch.setattr(runner._Board, "take", lambda *a: values.update({a[1]: a[2]["value"]}) or board(*a))
        assert runner.run([job(tmp_path, "first", "threads")], client, print, threads=None) == []
        assert runner.run([job(tmp_path, "second", "threads")], client, print, threads=1) == []
    assert values == {"first": [2, "2", "2", "2"], "second": [1, "2", "2", "2"]}


def test_no_more_workers_than_cores_memory_and_jobs(monkeypatch):
    import dask.system

    monkeypatch.setattr(dask.system, "CPU_COUNT", 8)
    assert (dask_workers.n_workers(), dask_workers.n_workers(3), dask_workers.n_workers(16)) == (8, 2, 1)
    free = min(psutil.virtual_memory().available, 10**18)
    assert dask_workers.n_workers(1, free / 3) == 2 and dask_workers.n_workers(1, 2 * free) == 1
    with dask_workers.connected("local", 1, workers=5, gpus=()) as client:
        assert len(client.scheduler_info()["workers"]) == 1
        listening = client.run(runner_jobs.sockets)
        assert client.submit(performing._place).result() == "worker-0"
        assert dask_workers.on_worker(client, "os:getppid") == os.getpid()
    assert {ip for found in listening.values() for ip in found} == {"127.0.0.1"}


def test_everything_listens_on_the_loopback_interface():
    with dask_workers.connected(workers=1, gpus=()) as client:
        found = [*runner_jobs.sockets(), *next(iter(client.run(runner_jobs.sockets).values()))]
    assert len(found) >= 3 and set(found) == {"127.0.0.1"}


def test_settings_are_those_of_the_file(tmp_path):
    import dask

    with dask_workers.connected(workers=1, gpus=()) as client:
        assert client.cluster.scheduler.allowed_failures == 2
        asked = "distributed.worker.profile.enabled"
        assert next(iter(client.run(dask.config.get, asked).values())) is False


# ------------------------------------------------------------------------------------------------- the end of a command
def _started(folder: Path, seconds: float = 30, n: int = 4) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A command in the middle of its first jobs: two are done, two are being computed; and its workers."""
    names = [{"name": f"job {i}", "seconds": 0 if i < 2 else seconds} for i in range(n)]
    command = _command({"folder": str(folder), "jobs": names, "on": "local", "workers": 2})
    _until(lambda: len(computed(folder)) == 4 and len(list(folder.glob("*.json"))) == 2)
    return command, _workers_of(psutil.Process(command.pid))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_it_at_once_and_says_what_is_kept(tmp_path, number):
    command, workers = _started(tmp_path)
    start = time.monotonic()
    os.killpg(command.pid, number) if number == signal.SIGINT else command.terminate()  # as a terminal does it
    said, complained = command.communicate(timeout=LONGEST)
    seconds = time.monotonic() - start
    assert command.returncode == 128 + number and seconds < 2
    words = "interrupted" if number == signal.SIGINT else "terminated"
    assert complained == f"{words}; start it again to go on from what is stored\n"
    assert said.splitlines()[-1] in [f"{n} of 4 jobs are done and stored" for n in (1, 2)]  # it may not know of one yet
    assert len(workers) == 2 and not any(worker.is_running() for worker in workers)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_an_interrupt_while_workers_start_ends_it_at_once(tmp_path):
    command = _command({"folder": str(tmp_path), "jobs": [{"name": "job"}], "on": "local", "workers": 2})
    workers = _until(lambda: _workers_of(psutil.Process(command.pid)))
    start = time.monotonic()
    os.killpg(command.pid, signal.SIGINT)
    said, complained = command.communicate(timeout=LONGEST)
    assert command.returncode == 130 and time.monotonic() - start < 2 and said == ""
    assert complained == "interrupted; start it again to go on from what is stored\n"
    _until(lambda: not any(worker.is_running() for worker in workers))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_killed_command_leaves_no_process_and_the_next_one_goes_on(tmp_path):
    command, workers = _started(tmp_path, seconds=2)
    command.kill()
    command.wait()
    _until(lambda: not any(worker.is_running() for worker in workers), 5)
    assert len(list(tmp_path.glob("*.json"))) == 2 and len(list((tmp_path / "tmp").iterdir())) == 1
    jobs = [job(tmp_path, f"job {i}") for i in range(4)]
    failed, lines = _perform(jobs)
    assert failed == [] and sum(performing.STORED in line for line in lines) == 2
    assert computed(tmp_path) == ["job 0", "job 1", "job 2", "job 2", "job 3", "job 3"]
    (tmp_path / "job 1.json").unlink()
    assert _perform(jobs, "here")[0] == [] and computed(tmp_path).count("job 1") == 2 and len(computed(tmp_path)) == 7


# ----------------------------------------------------------------------------------------------- a scheduler of its own
class Cluster:
    """A scheduler and workers, each a process of its own, as a Slurm job starts them."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.file, self.options, self.processes = folder / "scheduler.json", options, {}
        self._start("scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard", *self._protocol())
        _until(lambda: self.file.exists() and self.file.read_text().strip().endswith("}"))

    @property
    def address(self) -> str:
        return json.loads(self.file.read_text())["address"]

    def _protocol(self) -> tuple[str, ...]:
        return ("--protocol", "tls", *self.options) if self.options else ()

    def _start(self, kind: str, *arguments: str, name: str = "scheduler", limit: str = "") -> None:
        words = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--scheduler-file", str(self.file), *arguments]
        environment = os.environ | {"DASK_CONFIG": str(dask_workers.SETTINGS), "TMPDIR": str(self.file.parent)}
        shell = ["sh", "-c", f'{limit} exec "$@"', "sh", *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.processes[name] = subprocess.Popen(shell, env=environment, **quiet)

    def worker(self, name: str, *arguments: str, limit: str = "") -> None:
        fixed = ("--nthreads", "1", "--memory-limit", "0", "--no-dashboard", "--no-nanny", "--host", "127.0.0.1")
        scratch = ("--local-directory", str(self.file.parent / "scratch"))
        self._start("worker", *fixed, *scratch, "--name", name, *self.options, *arguments, name=name, limit=limit)

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()


@contextmanager
def _cluster(folder: Path, *options: str) -> Iterator[Cluster]:
    folder.mkdir(exist_ok=True)
    cluster = Cluster(folder, *options)
    try:
        yield cluster
    finally:
        for name in cluster.processes:
            cluster.kill(name)


@contextmanager
def _client(cluster: Cluster, n: int) -> Iterator[Any]:
    with dask_workers.connected(str(cluster.file)) as client:
        client.wait_for_workers(n, timeout=LONGEST)
        yield client


def test_jobs_on_a_running_cluster(tmp_path, monkeypatch):
    """The scheduler needs no torch, a node may die, GPU jobs find their worker; at last the scheduler dies."""
    with _cluster(tmp_path / "cluster") as cluster:
        cluster.worker("cpu-0")
        cluster.worker("cpu-1")
        cluster.worker("gpu-0", "--resources", "GPU=1")
        lines: list[str] = []
        with _client(cluster, 3) as client:
            with pytest.raises(errors.InputError, match="gpu-0 say [0-9]+"):
                dask_workers.on_worker(client, "runner_jobs:process")
            with pytest.raises(errors.InputError, match="cpu-0.* say ModuleNotFoundError"):
                dask_workers.on_worker(client, "no_such_module:nothing")
            assert (
                dask_workers.on_worker(client, "iclgd_helpers.experiments.provenance:engine_hash")
                == provenance.engine_hash()
            )
            gpu = [job(tmp_path, f"gpu {i}", seconds=0.1, resources={"GPU": 1}) for i in range(3)]
            jobs = [*gpu, *(job(tmp_path, f"cpu {i}", seconds=0.4) for i in range(8))]

            def say(line: str) -> None:
                lines.append(line)
                if len(lines) == 3:
                    cluster.kill("cpu-0")

            assert runner.run(jobs, client, say) == []
            assert client.run_on_scheduler(runner_jobs.imported) == []
        found = {path.stem: storage.read_json(path)["place"] for path in tmp_path.glob("?pu ?.json")}
        assert len(found) == 11 and {found[one.name] for one in gpu} == {"gpu-0"}
        _kill_scheduler(tmp_path, cluster)
        with pytest.raises(errors.InputError, match="no scheduler answers at tcp://"):
            monkeypatch.setattr(dask_workers, "ANSWER_SECONDS", 1)
            _perform([], str(cluster.file))


@pytest.mark.parametrize(("asked", "found"), [([], "float32"), (["-p", "dtype", "auto"], "float16")])
def test_an_automatic_precision_is_that_of_the_workers(asked, found, tmp_path, monkeypatch):
    """The worker has a GPU, this machine has none; the preset's own precision is no matter of theirs."""
    (tmp_path / "gpu.py").write_text(
        "from iclgd_helpers.engine import models\nmodels.choose_device = lambda _: 'cuda'\n"
    )
    dtypes: list[str] = []

    def product(several: list[Any], folder: Path) -> list[Any]:
        dtypes.extend(given.dtype for given in several)
        return []

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("iclgd_helpers.experiments.plans.product", product)
    monkeypatch.setattr(dask_workers, "ANSWER_SECONDS", LONGEST)  # a worker with torch may start slowly
    with _cluster(tmp_path / "cluster") as cluster:
        cluster.worker("gpu", "--preload", str(tmp_path / "gpu.py"))
        words = ["grid", "--preset", "smoke", *asked, "--on", str(cluster.file), "--cost-only", "--tflops", "1"]
        assert cli.main(words) == 0
    assert dtypes == [found]


def test_a_worker_that_is_just_starting_again_is_waited_for(tmp_path):
    """At the beginning, too: between two lists of jobs the only one may have ended."""
    known: dict[str, Any] = {}
    later = {"tcp://first": {"name": "first", "nthreads": 1, "resources": {}}}

    class Client:
        status = "running"

        def wait_for_workers(self, n: int, timeout: float) -> None:
            known.update(later)

        def scheduler_info(self) -> dict[str, Any]:
            return {"workers": known}

        def submit(self, *_: Any, **__: Any) -> None:
            raise LookupError("handed out")

    with pytest.raises(LookupError, match="handed out"):
        runner.run([job(tmp_path, "job")], Client())
    known.clear()
    later.clear()
    with pytest.raises(errors.InputError, match="none is connected"):  # the control: none comes
        runner.run([job(tmp_path, "job")], Client())


def test_a_result_that_dies_with_its_worker_is_asked_for_again(tmp_path):
    """The record is stored, the worker ends before the command has its answer: another one reads the record."""
    one = job(tmp_path, "job")
    with _cluster(tmp_path / "cluster") as cluster:
        for name in ("first", "second"):
            cluster.worker(name)
        with _client(cluster, 2) as client:
            pool = dask_workers.Workers(client)
            pool.look()
            pool.submit(one, runner._Board([one], print).order(one, None), set())
            name, future = pool.futures.get(timeout=LONGEST)
            cluster.kill(storage.read_json(tmp_path / "job.json")["place"])
            _until(lambda: future.status != "finished")
            pool.futures.put((name, future))
            [(name, outcome)] = _until(lambda: list(pool.ended()))
            assert (name, outcome["state"], outcome["message"]) == ("job", performing.DONE, performing.STORED)
            assert computed(tmp_path) == ["job"] and pool.flying == {}


def _kill_scheduler(folder: Path, cluster: Cluster) -> None:
    order = {"folder": str(folder), "jobs": [{"name": f"long {i}", "seconds": 3} for i in range(4)], "workers": None}
    command = _command(order | {"on": cluster.address})
    _until(lambda: any(name.startswith("long") for name in computed(folder)))
    cluster.kill("scheduler")
    _, complained = command.communicate(timeout=LONGEST)
    assert complained == f"error: {dask_workers.LOST}\n" and command.returncode == 1


def test_workers_that_cannot_do_it_are_named_and_others_do_it(tmp_path):
    """One has other helpers, one a full disk: every job is done by the third; when that is gone, none is."""
    old = tmp_path / "old.py"
    old.write_text("from iclgd_helpers.experiments import provenance\nprovenance.engine_hash = lambda: 'old'\n")
    with _cluster(tmp_path / "cluster") as cluster:
        cluster.worker("old", "--preload", str(old))
        cluster.worker("full", limit="ulimit -f 0;")
        cluster.worker("good")
        with _client(cluster, 3) as client:
            lines: list[str] = []
            assert runner.run([job(tmp_path, f"job {i}", seconds=0.2) for i in range(9)], client, lines.append) == []
            assert {storage.read_json(path)["place"] for path in tmp_path.glob("job*.json")} == {"good"}
            refusals = sorted(line.split("] ")[1] for line in lines if "refused" in line)
            assert len(refusals) == 2 and refusals[1] == "old refused: it has other helpers than the command"
            assert refusals[0].startswith(f"full refused: cannot write to {tmp_path} (File too large)")
            cluster.kill("good")
            _until(lambda: len(client.scheduler_info()["workers"]) == 2)
            assert runner.run([job(tmp_path, "last")], client, lines.append) == ["last"]
            assert "last: failed: every worker refused it" in lines[-2]


def test_a_scheduler_without_workers_and_none_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(dask_workers, "ANSWER_SECONDS", 1)
    with _cluster(tmp_path / "cluster") as cluster:
        with pytest.raises(errors.InputError, match="no worker is connected to tcp://127.0.0.1:"):
            _perform([], cluster.address)
    for on in (cluster.address, "tcp://nowhere.invalid:1", "quic://127.0.0.1:1"):
        with pytest.raises(errors.InputError, match="no scheduler answers at"):
            _perform([], on)
    (tmp_path / "file").write_text("{}")
    for on in (str(tmp_path / "file"), str(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(errors.InputError, match="is neither a scheduler's address nor its file"):
            _perform([], on)


def test_tls(tmp_path, monkeypatch):
    key, certificate = (str(tmp_path / name) for name in ("key.pem", "certificate.pem"))
    words = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost".split()
    subprocess.run([*words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    options = ("--tls-ca-file", certificate, "--tls-cert", certificate, "--tls-key", key)
    with _cluster(tmp_path / "cluster", *options) as cluster:
        cluster.worker("worker")
        assert cluster.address.startswith("tls://")
        order = {"folder": str(tmp_path), "jobs": [{"name": "job"}], "on": cluster.address, "workers": None}
        refused = _command(order)
        assert "no scheduler answers at tls://" in refused.communicate(timeout=LONGEST)[1] and refused.returncode == 2
        monkeypatch.setenv("DASK_DISTRIBUTED__COMM__TLS__CA_FILE", certificate)
        for role in ("CLIENT", "WORKER", "SCHEDULER"):
            monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{role}__CERT", certificate)
            monkeypatch.setenv(f"DASK_DISTRIBUTED__COMM__TLS__{role}__KEY", key)
        accepted = _command(order)
        assert accepted.communicate(timeout=LONGEST)[1] == "" and accepted.returncode == 0
    assert computed(tmp_path) == ["job"]
