"""What the runner adds to a job: `python bench/jobs.py [jobs] [workers]` times empty jobs, plainly and on workers."""

import sys
import tempfile
import time
from pathlib import Path

from iclgd_helpers.experiments import dask_workers, performing, runner


def empty(number: int) -> tuple[str, int]:
    """A job that does nothing."""
    return "", number


def main(n: int = 1000, workers: int = 2) -> None:
    """Print milliseconds a job, and the seconds until workers stand and are gone."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = [
            performing.Job(f"job {i}", "jobs:empty", {"number": i}, str(Path(folder, f"{i}.lock"))) for i in range(n)
        ]
        for on in ("here", "local"):
            start = time.perf_counter()
            with dask_workers.connected(on, workers=workers, gpus=()) as client:
                begun = time.perf_counter()
                assert runner.run(jobs, client, lambda line: None) == []
                ended = time.perf_counter()
            gone = time.perf_counter()
            print(
                f"{on}: {1000 * (ended - begun) / n:.1f} ms a job, "
                f"start {begun - start:.1f} s, end {gone - ended:.1f} s"
            )
    start = time.perf_counter()
    for i in range(n):
        empty(i)
    print(f"plain loop: {1000 * (time.perf_counter() - start) / n:.4f} ms a job")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
