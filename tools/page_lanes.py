"""
Executing pages, two at a time where there are two cores: which one is next, and what is shown meanwhile.

Several pages show the same run. The first of them computes it, and the others begin when it is stored; so that little
waits, what others wait for comes first, and what takes longest before the rest.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import live_lines, notebook_files, warm_kernels
from iclgd_helpers.experiments.live_lines import LiveLines, duration
from iclgd_helpers.experiments.parameters import ExperimentParameters, validate_for_notebook
from tools.book_pages import read, write

MOST_LANES = 2  # more would need the memory of as many models


@dataclass(frozen=True, eq=False)
class Page:
    """A page that has to be executed: what it is given, the run that it shows, and the seconds that are expected."""

    notebook: Path
    target: Path
    costs_file: Path
    parameters: dict[str, Any]
    key: str
    run: str | None
    computes: bool  # with a language model
    expected: float | None

    @property
    def name(self) -> str:
        return self.notebook.stem


def shown_run(notebook: Path, parameters: dict[str, Any]) -> tuple[str | None, bool]:
    """
    The complete parameters of the run that a page computes or finds, None if there is none; whether it has a model.

    In one checkout they are the run's identity: data and model are what they name.
    """
    try:
        given = validate_for_notebook(notebook, parameters)
    except InputError:  # the page says so when it is executed
        return None, True
    has_model = isinstance(given, ExperimentParameters)
    runs = any("experiment.run(" in cell.source for cell in notebook_files.read_cells(notebook))
    return given.model_dump_json() if has_model and runs else None, has_model


def n_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def n_lanes() -> int:
    """How many pages are executed at a time."""
    return min(MOST_LANES, n_cores())


def n_threads(page: Page, beside: bool) -> int:
    """
    How many threads a page's libraries get. Without a model, one does.

    Pages beside each other share the cores. With more threads than cores, a product waits for the thread that shares
    its core, and those of finetuning gain little from two.
    """
    return n_cores() // (n_lanes() if beside else 1) if page.computes else 1


def next_page(waiting: Sequence[Page], busy: Collection[str | None], stored: Collection[str | None]) -> Page | None:
    """The page to begin with, of those whose run is not being computed (`busy`); None if there is none."""

    def awaited(page: Page) -> float:
        same = [other for other in waiting if other.run == page.run and page.run not in (None, *stored)]
        return sum((other.expected or 0) + 1 for other in same) if len(same) > 1 else 0.0

    free = [page for page in waiting if page.run is None or page.run in stored or page.run not in busy]
    return max(free, key=lambda page: (awaited(page), page.expected or 0), default=None)


class Lanes:
    """The pages that wait, those that are being executed, and the costs of those that are done."""

    def __init__(self, pages: Sequence[Page], preset: str, n_unchanged: int) -> None:
        self.waiting, self.preset, self.n_unchanged = list(pages), preset, n_unchanged
        self.running: dict[Page, Any] = {}
        self.stored: set[str | None] = set()
        self.costs: dict[str, dict[str, Any]] = {}
        self.spent = self.reference = 0.0  # seconds of finished pages that had been expected, and those expected
        self.lines = LiveLines()

    def work(self) -> dict[str, dict[str, Any]]:
        """
        Execute all pages.

        Returns
        -------
        dict
            by page, its costs.

        Raises
        ------
        InputError, CellError
            of the first page that fails; the other one is ended.
        """
        self.lines.draw([f"starting: {len(self.waiting)} pages to execute, {self.n_unchanged} unchanged"])
        with warm_kernels.served(page.notebook for page in self.waiting) as server:
            notebook_files.library()
            from iclgd_helpers.experiments import notebook_execution  # slow to import: the server does so meanwhile

            try:
                while self.waiting or self.running:
                    self._begin(notebook_execution, server)
                    time.sleep(live_lines.SECONDS)
                    self.lines.draw([*map(self._line, self.running), self._summary()])
                    for page in [page for page, running in self.running.items() if running.over.is_set()]:
                        self._take(page)
            finally:
                self.lines.draw([])
                for running in self.running.values():
                    running.execution.end()
                if server:
                    server.end()  # a kernel that is just being asked for
                for running in self.running.values():
                    running.end()
        return self.costs

    def _begin(self, notebook_execution: Any, server: warm_kernels.Server | None) -> None:
        """Fill the lanes."""
        while len(self.running) < n_lanes():
            page = next_page(self.waiting, {page.run for page in self.running}, self.stored)
            if page is None:
                return
            self.waiting.remove(page)
            page.costs_file.unlink(missing_ok=True)
            threads = n_threads(page, beside=bool(self.waiting or self.running))
            environment = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
            execution = notebook_execution.Execution(page.notebook, page.target, page.parameters, server, environment)
            self.running[page] = notebook_execution.Running(execution)
            if not self.lines.live:
                about = f" (about {duration(seconds)})" if (seconds := self._seconds(page)) else ""
                print(f"{page.name:<40}begins{about}", flush=True)

    def _take(self, page: Page) -> None:
        """Note what a page took that has ended; its error, if it has one."""
        running = self.running.pop(page)
        if running.error:
            raise running.error
        executed = read(page.target)
        for cell in executed.cells:
            if "injected-parameters" in cell.metadata.get("tags", []):
                cell.metadata.tags.append("remove-cell")
        write(executed, page.target)
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
        costs = {"key": page.key, "preset": self.preset, "seconds": round(running.seconds(), 1), "when": when}
        costs["peak_gb"] = round(running.peak / 1e9, 2)
        content = hashlib.sha256(page.target.read_bytes()).hexdigest()
        storage.write_json(page.costs_file, costs | {"sha256": content})
        self.costs[page.name] = costs
        self.stored.add(page.run)
        if page.expected:
            self.spent, self.reference = self.spent + costs["seconds"], self.reference + page.expected
        self.lines.say(line(page.name, costs))

    # ---------------------------------------------------------------------------------------------------- what is shown
    def _seconds(self, page: Page) -> float | None:
        """What a page is expected to take, at the speed of those that have ended."""
        pace = self.spent / self.reference if self.reference else 1.0
        return None if page.expected is None else page.expected * pace

    def _line(self, page: Page) -> str:
        """What a page does, in 80 columns."""
        running, seconds = self.running[page], self._seconds(page)
        about = f" of {duration(seconds)}" if seconds else ""
        return f"{duration(running.seconds())}{about}  {page.name[:24]}: {running.look()}"

    def _summary(self) -> str:
        """How much of the book is there, and how long the rest takes: the work that is left, or its longest page."""
        done = len(self.costs)
        text = f"{done} of {done + len(self.running) + len(self.waiting)} pages executed, {self.n_unchanged} unchanged"
        left = {page: self._seconds(page) for page in [*self.waiting, *self.running]}
        if None in left.values():
            return f"{text}; no estimate yet"
        rest = [
            max(0.0, (seconds or 0) - (self.running[page].seconds() if page in self.running else 0))
            for page, seconds in left.items()
        ]
        return f"{text}; about {duration(max(sum(rest) / n_lanes(), *rest, 0.0))} left"


def line(name: str, costs: dict[str, Any], unchanged: bool = False) -> str:
    """One page of the table that is printed."""
    made = "   (unchanged since)" if unchanged else ""
    return f"{name:<40}{costs['seconds']:8.1f} s {costs['peak_gb']:6.2f} GB{made}"
