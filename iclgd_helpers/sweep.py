"""
Many cells by one command: `python -m iclgd_helpers.sweep --preset paper` runs the six tasks.

It says first what the run will cost, skips the cells that are recorded, and can be interrupted and started again.
"""

from __future__ import annotations

if __name__ == "__main__":
    from iclgd_helpers.start import start

    start("iclgd_helpers.commands", "sweep")

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial

import torch

from iclgd_helpers import commands, cost, experiment, models, paths, records, storage
from iclgd_helpers.parameters import ExperimentParameters

main = partial(commands.main, "sweep")


def device_rate(device: str, dtype: str) -> float:
    """FLOP/s of a large matrix product on the device, now: what no run of a model exceeds."""
    device, best = models.choose_device(device), 0.0
    side = 8192 if device.startswith("cuda") else 2048
    a = torch.randn(side, side, device=device).to(getattr(torch, dtype))
    for _ in range(4):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the device
        best = max(best, 2 * side**3 / (time.perf_counter() - start))
    return best


def cost_lines(cells: Sequence[experiment.Plan], costs: Sequence[cost.Cost], rate: float) -> Iterable[str]:
    """The cost of every cell and of all, as lines of a table."""
    yield f"{'cell':<44}{'queries':>8}{'TFLOP':>9}{'memory':>10}{'record':>9}{'time':>9}"
    for cell, one in zip(cells, costs, strict=True):
        yield f"{name(cell):<44}{len(cell.queries):>8}{_cost_columns(one.flops, one, rate)}"
    largest = max(costs, key=lambda one: one.peak_memory_bytes)
    everything = replace(largest, record_bytes=sum(one.record_bytes for one in costs))
    columns = _cost_columns(sum(one.flops for one in costs), everything, rate)
    yield f"{'all':<44}{sum(len(cell.queries) for cell in cells):>8}{columns}"
    yield (
        f"Time: every operation at {rate / 1e12:.2f} TFLOP/s; measured passes reach about half of a matrix product's "
        "rate. Memory: model, updates and largest batch, in GiB."
    )


def _cost_columns(flops: float, one: cost.Cost, rate: float) -> str:
    memory = f"{one.peak_memory_bytes / 2**30:.1f} GiB"
    return f"{flops / 1e12:>9.1f}{memory:>10}{one.record_bytes / 1e6:>6.1f} MB{duration(flops / rate):>9}"


def name(cell: experiment.Plan) -> str:
    """Model, task and seed of a cell, as one word."""
    return f"{os.path.basename(cell.parameters.model)}/{cell.parameters.task}/{cell.parameters.seed}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, the larger two that count."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} m" if minutes >= 60 else f"{minutes} m {rest:02} s"


def sweep(cells: Sequence[experiment.Plan], costs: Sequence[cost.Cost]) -> None:
    """Compute the cells that are not recorded, one after the other, and say how long the rest will take."""
    waiting = [(c, one) for c, one in zip(cells, costs, strict=True) if records.find(c.identity) is None]
    print(f"{len(cells) - len(waiting)} of {len(cells)} cells are recorded in {paths.records_folder()}", flush=True)
    if waiting:
        storage.require_writable(paths.records_folder())
    remaining, done, spent = sum(one.flops for _, one in waiting), 0.0, 0.0
    for cell, one in waiting:
        start = time.perf_counter()
        record = experiment.run_cell(cell.parameters)
        seconds = time.perf_counter() - start
        remaining, done, spent = remaining - one.flops, done + one.flops, spent + seconds
        accuracies = (f"{arm} {record.json['arms'][arm]['accuracy']:.3f}" for arm in ("zero_shot", "in_context"))
        memory = record.json["environment"]["peak_memory_mib"] / 1024
        print(
            f"{name(cell):<44}{duration(seconds):>9}, peak {memory:.1f} GiB, {', '.join(accuracies)}, "
            f"record {cell.identity}; about {duration(remaining * spent / done)} left",
            flush=True,
        )


def work(given: Sequence[ExperimentParameters], rate: float | None, cost_only: bool) -> None:
    """Say what the cells cost at a rate in TFLOP/s, and run them; none is begun before all are planned."""
    cells = [experiment.plan(one) for one in given]
    costs = [cost.of_cell(cell) for cell in cells]
    first = cells[0].parameters
    flops = rate * 1e12 if rate else device_rate(first.device, first.dtype)
    print(f"{first.dtype} on {models.choose_device(first.device)}, {first.preset} preset:")
    print("\n".join(cost_lines(cells, costs, flops)), flush=True)
    if not cost_only:
        sweep(cells, costs)
