"""Many jobs by one command: what they cost, then the jobs that are not stored, on the workers that were asked for."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import cost, dask_workers, runner, runs
from iclgd_helpers.experiments.live_lines import LiveLines, duration
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.plans import Planned


def estimate(planned: Sequence[Planned], tflops: float | None) -> Iterator[str]:
    """Operations, memory and time of the jobs that are not stored, by group, at the speed that `speed` gives."""
    flops, source = speed(tflops)
    yield f"{'what':<44}{'jobs':>6}{'TFLOP':>10}{'memory':>10}{'time':>11}"
    waiting = [one for one in planned if not one.is_stored]
    groups = {name: [one for one in waiting if one.group == name] for name in dict.fromkeys(p.group for p in waiting)}
    for name, group in (groups | {"all": waiting}).items():
        work = sum(one.job.cost for one in group)
        memory = f"{max((one.memory for one in group), default=0) / 2**30:.1f} GiB"
        yield f"{name:<44}{len(group):>6}{work / 1e12:>10.1f}{memory:>10}{duration(work / flops):>11}"
    yield (
        f"Time: on one worker at {flops / 1e12:.2f} TFLOP/s, {source}. "
        "Memory: model, updates and largest batch of one job."
    )


def stages(given: ExperimentParameters, tflops: float | None) -> Iterator[str]:
    """What one run costs, stage by stage, and what it needs at once."""
    found, (flops, source) = cost.of_run(runs.plan(given)), speed(tflops)
    yield f"{given.model} on {given.task}, seed {given.seed} ({given.dtype}, {given.n_demonstrations} demonstrations)"
    yield f"{'stage':<44}{'TFLOP':>10}{'time':>11}"
    for row in found.table(flops):
        yield f"{row['stage']:<44}{row['total']:>10.3f}{duration(row['seconds']):>11}"
    for what, size in found.memory.items():
        yield f"{what:<44}{size / 2**30:>10.2f} GiB"
    yield f"Time: at {flops / 1e12:.2f} TFLOP/s, {source}."


def speed(tflops: float | None) -> tuple[float, str]:
    """FLOP/s that one worker sustains, and the source: as given, or half of what a matrix product reaches here, now."""
    if tflops:
        return tflops * 1e12, "as given"
    return cost.device_rate("auto", "float32") / 2, f"half of a matrix product's on {platform.node()}, now"


def work(
    planned: Sequence[Planned],
    on: str,
    workers: int | None,
    threads: int,
    tflops: float | None,
    cost_only: bool,
) -> list[str]:
    """
    Show the jobs that are not stored and their cost, and compute them; the names of those that failed.

    Parameters
    ----------
    on, workers, threads
        see `dask_workers.connected`.
    tflops
        see `speed`.

    Raises
    ------
    InputError
        if a job needs another one that is neither stored nor asked for.
    """
    waiting = [one for one in planned if not one.is_stored]
    torch.set_num_threads(threads)
    print(f"{len(planned) - len(waiting)} of {len(planned)} jobs are stored.")
    print("\n".join(estimate(planned, tflops)), flush=True)
    if cost_only or not waiting:
        return []
    names = {one.job.name for one in waiting}
    for one in waiting:
        if missing := [name for name in one.job.after if name not in names]:
            raise InputError(f"{one.job.name} needs {missing[0]}: run --stage rates first")
    for folder in {Path(one.job.lock).parent for one in waiting}:
        storage.require_writable(folder)
    peak = max(one.memory for one in waiting)
    with dask_workers.connected(on, len(waiting), peak_memory=peak, workers=workers, threads=threads) as client:
        lines = LiveLines()
        draw = lines.draw if lines.live else None
        return runner.run([one.job for one in waiting], client, lines.say, threads=threads, draw=draw)
