"""What the runner adds to the cells of a grid: many that compute nothing, on workers and in a plain loop."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import jobs
from bench.measuring import child, timed
from bench.setting import Bench, Setting
from iclgd_helpers.experiments import dask_workers, performing, runner


def grid(bench: Bench) -> dict[str, Any]:
    """Milliseconds that a cell takes more than in a plain loop; the workers' start and end are among them."""
    found = child({"what": "performed", "setting": asdict(bench.setting)})
    return {"grid_overhead_ms": overhead(found), **found}


def overhead(found: Mapping[str, Any]) -> float:
    """Milliseconds a cell."""
    return 1000 * (found["runner_seconds"] - found["loop_seconds"]) / found["n_cells"]


def performed(setting: Setting, _job: Mapping[str, Any]) -> dict[str, Any]:
    """In a fresh process: every cell by the runner, on workers that it starts, and every cell in a loop."""
    with tempfile.TemporaryDirectory() as folder:
        plain, run = Path(folder, "plain"), Path(folder, "run")
        plain.mkdir()
        run.mkdir()
        loop = timed(lambda: [jobs.store(str(plain), number) for number in range(setting.cells)])
        start = time.perf_counter()
        with dask_workers.connected("local", setting.cells, gpus=()) as client:
            begun = time.perf_counter()
            failed = runner.run([job(run, number) for number in range(setting.cells)], client, lambda line: None)
            ended = time.perf_counter()
            workers = len(client.scheduler_info()["workers"])
        seconds = time.perf_counter() - start
        stored = len(list(run.glob("*.json")))
    if failed or stored != setting.cells:
        raise RuntimeError(f"{stored} of {setting.cells} cells were stored, {len(failed)} failed")
    parts = {"start_seconds": begun - start, "cells_seconds": ended - begun}
    return {"runner_seconds": seconds, "loop_seconds": loop, "n_cells": setting.cells, "workers": workers, **parts}


def job(folder: Path, number: int) -> performing.Job:
    """One cell as the runner takes it."""
    arguments = {"folder": str(folder), "number": number}
    return performing.Job(f"cell {number}", "bench.jobs:store", arguments, str(folder / f"{number}.lock"))
