"""
Many jobs on many processes: on workers that the command starts and ends, or on those of a Dask scheduler.

A job is plain data: a function's name and its arguments. Dask performs it at least once. The function looks for
its record first, and holds a lock while it computes, so its record is stored once. A worker may die, and so may the
command: what is stored stays, and the command that is started again goes on from there. Jobs wait in the command, not
on the workers. So a job that kills its worker takes no other with it, and only it is counted as having failed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments.dask_workers import POLL_SECONDS, Workers
from iclgd_helpers.experiments.live_lines import duration
from iclgd_helpers.experiments.performing import (
    BUSY,
    DONE,
    FAILED,
    REFUSED,
    STORED,
    Job,
    identities,
    locked,
    perform,
    progress_file,
)

BUSY_SECONDS = 2.0  # until a job that another process has in hand is asked for again


class _Here:
    """This process in place of `Workers`, whose methods it has: it computes one job at a time."""

    def __init__(self) -> None:
        self.flying: dict[str, Job] = {}
        self.orders: dict[str, str] = {}

    def wait(self) -> None: ...

    def look(self) -> None: ...

    def slots(self, job: Job) -> dict[str, int]:
        return {"here": 1}

    def submit(self, job: Job, order: str, refused_by: set[str]) -> None:
        self.flying[job.name], self.orders[job.name] = job, order

    def ended(self) -> Iterator[tuple[str, dict[str, Any]]]:
        if not self.flying:
            time.sleep(POLL_SECONDS)
        for name in list(self.flying):
            del self.flying[name]
            yield name, perform(self.orders.pop(name))

    def now(self) -> list[str]:
        return [f"here: {name}" for name in self.flying]


class _Board:
    """What has become of each job."""

    def __init__(self, jobs: Sequence[Job], say: Callable[[str], None]) -> None:
        self.jobs, self.say = {job.name: job for job in jobs}, say
        self.waiting = dict.fromkeys(self.jobs, 0.0)  # name -> when it may be asked for
        self.values: dict[str, Any] = {}
        self.failed: list[str] = []
        self.untried: list[str] = []
        self.refused: dict[str, set[str]] = {}  # by which workers
        self.told: set[str] = set()
        self.at_once, self.spent, self.done = 1, 0.0, 0.0
        earlier: set[str] = set()
        for job in jobs:
            if job.name in earlier or not earlier.issuperset(job.after):
                raise ValueError(f"{job.name} is there twice, or before what it needs")
            earlier.add(job.name)

    def ready(self) -> Iterator[Job]:
        """Jobs that may be performed now; those that need one that failed are left out for good."""
        now, lost = time.monotonic(), {*self.failed, *self.untried}
        for name, moment in list(self.waiting.items()):
            job = self.jobs[name]
            if lost.intersection(job.after):
                del self.waiting[name]
                self.untried.append(name)
                lost.add(name)
            elif moment <= now and all(one in self.values for one in job.after):
                yield job

    def order(self, job: Job, threads: int | None) -> str:
        """What `perform` is given."""
        needed = {name: self.values[name] for name in job.after} if job.after else None
        asked = {"call": job.call, "arguments": job.arguments, "needed": needed, "lock": job.lock, "threads": threads}
        return json.dumps(asked | {"identities": identities()})

    def take(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Note what became of a job, and print it in one line."""
        state, message = outcome["state"], " ".join(outcome["message"].split())
        if state == DONE:
            self.values[name] = outcome["value"]
            if message != STORED:
                self.spent += outcome["seconds"]
                self.done += self._cost(name)
            self._say(f"{name:<44} {duration(outcome['seconds'])}, {message}{self._left()}")
        elif state == FAILED:
            self.failed.append(name)
            self._say(f"{name}: failed: {message}")
        else:
            self.waiting[name] = time.monotonic() + (BUSY_SECONDS if state == BUSY else 0)
            if state == REFUSED:
                self.refused.setdefault(name, set()).add(outcome["place"])
            line = f"{outcome['place']} {state}: {message}" if state == REFUSED else f"{name} {state}: {message}"
            if line not in self.told:  # once, however often it is asked for
                self.told.add(line)
                self._say(line)

    def fill(self, pool: _Here | Workers, threads: int | None) -> None:
        """Hand out jobs, not more than workers take at once."""
        taken = Counter(tuple(job.resources.items()) for job in pool.flying.values())
        places: dict[Any, dict[str, int]] = {}
        for job in self.ready():
            kind, refused = tuple(job.resources.items()), self.refused.get(job.name, set())
            if kind not in places:
                places[kind] = pool.slots(job)
            if refused and refused.issuperset(places[kind]):
                del self.waiting[job.name]
                self.take(job.name, {"state": FAILED, "message": "every worker refused it"})
            elif taken[kind] < sum(places[kind].values()):
                taken[kind] += 1
                del self.waiting[job.name]
                pool.submit(job, self.order(job, threads), refused)
        self.at_once = max(1, sum(taken.values()))

    def _cost(self, name: str) -> float:
        return self.jobs[name].cost or 1.0

    def _say(self, text: str) -> None:
        n_ended = len(self.values) + len(self.failed) + len(self.untried)
        self.say(f"[{n_ended}/{len(self.jobs)}] {text}")

    def _left(self) -> str:
        """How long the rest takes at the speed of those that were computed."""
        ended = {*self.values, *self.failed, *self.untried}
        rest = sum(self._cost(name) for name in self.jobs if name not in ended)
        return f"; about {duration(rest * self.spent / self.done / self.at_once)} left" if self.done and rest else ""


def run(
    jobs: Sequence[Job],
    client: Any,
    say: Callable[[str], None] = print,
    threads: int | None = 1,
    interval: float = 60,
    draw: Callable[[Sequence[str]], None] | None = None,
) -> list[str]:
    """
    Perform the jobs, the earlier ones of the list first, and print a line for each as it ends.

    Parameters
    ----------
    jobs : each after those that it needs.
    client : as `connected` has it.
    threads : of torch, for each job; None leaves them as they are.
    interval : seconds without a line after which one says what is being computed, and how far it is.
    draw : shows that all the time instead, in lines that replace those before.

    Returns
    -------
    list
        the names of those that failed. What needs one of them is not tried, and counted in the last line.

    Raises
    ------
    InputError
        if no worker offers what a job needs.
    CellError
        if the scheduler is lost.
    """
    board, pool = _Board(jobs, say), _Here() if client is None else Workers(client)
    pool.wait()
    pool.look()
    for job in jobs:
        if not pool.slots(job):
            offered = ", ".join(f"{name} {amount:g}" for name, amount in job.resources.items())
            raise InputError(f"{job.name} needs a worker that offers {offered}: none is connected")
    try:
        _perform_all(board, pool, threads, interval, draw)
    except KeyboardInterrupt:
        others = "" if client is None or client.cluster else "; workers finish and store what they have begun"
        say(f"{len(board.values)} of {len(jobs)} jobs are done and stored{others}")
        raise
    for name in board.failed:  # whose worker was killed with the lock in its hand
        with suppress(InputError), locked(lock := Path(board.jobs[name].lock)):
            progress_file(lock).unlink(missing_ok=True)
    if board.failed:
        untried = f"; {len(board.untried)} that need them were not tried" if board.untried else ""
        say(f"{len(board.values)} of {len(jobs)} jobs are done, {len(board.failed)} failed{untried}")
    return board.failed


def _perform_all(
    board: _Board,
    pool: _Here | Workers,
    threads: int | None,
    interval: float,
    draw: Callable[[Sequence[str]], None] | None,
) -> None:
    said = time.monotonic()
    while board.waiting or pool.flying:
        pool.look()
        board.fill(pool, threads)
        if draw:
            draw(pool.now())
        for name, outcome in pool.ended():
            board.take(name, outcome)
            said = time.monotonic()
        if not draw and time.monotonic() - said > interval:
            board.say(f"now: {'; '.join(pool.now())}")
            said = time.monotonic()
