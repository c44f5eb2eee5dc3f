"""The status page: what was built when, with what, at which cost, and what has not been run yet."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import psutil

from iclgd_helpers.experiments import records
from tools.book_pages import ROOT

VERSIONS_SHOWN = ("torch", "transformers", "numpy", "pandas", "datasets", "jupyter-book", "papermill")


def git_commit() -> str:
    """Short hash of the checkout, marked when files differ from it; `unknown` without git."""
    try:
        options: dict[str, Any] = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        commit: str = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain"], **options).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}, with local changes" if changed else commit


def status_page(costs: dict[str, dict[str, Any]], preset: str) -> str:
    """Markdown of what was built when, with what, at which cost."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    facts = {
        "Preset": preset if costs else "as stored in the notebooks (nothing was executed for this build)",
        "Commit": git_commit(),
        "Built": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "Machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {memory} memory",
        "Python": platform.python_version(),
    } | {name: importlib.metadata.version(name) for name in VERSIONS_SHOWN}
    lines = ["| What | Value |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]
    if costs:
        lines += ["", "| Page | Time (s) | Peak memory (GB) | Executed (UTC) |", "|---|---:|---:|---|"]
        rows = ([page, c["seconds"], c["peak_gb"], c["when"][:16]] for page, c in costs.items())
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([*lines, "", *gpu_lines(), "", *rehearsal_lines()]) + "\n"


def gpu_lines() -> Iterator[str]:
    """Which parts only a GPU runs, and whether a stored record shows that one did."""
    devices = [record.json["environment"]["device"] for record in records.load_all("results/records")]
    on_gpu = sum(device.startswith("cuda") for device in devices)
    yield f"Stored records: {len(devices)}, of which {on_gpu} were made on a GPU."
    if not on_gpu:
        yield (
            "**Not yet run on a GPU.** Tested on a processor only are `device=auto` with a GPU present, mixed "
            "precision in float16 with scaled losses, and copies from pinned memory. So are attention without the "
            "processor's fused kernel, and smaller batches when the device runs out of memory. This line goes when a "
            "record made on a GPU is stored under `results/records`."
        )


def rehearsal_lines() -> Iterator[str]:
    """What all arms of a run cost in the shape of the papers' model, with random weights (`make rehearse`)."""
    yield "Rehearsals of the papers' model (its exact shape, random weights, all arms of one run):"
    yield ""
    yield "| Precision | Device | Demonstrations | Queries | Time (s) | Peak memory (GiB) | Helpers |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for record in records.load_all("results/rehearsal"):
        found = record.json
        where, seconds = found["environment"], sum(found["timings"].values())
        current = "current" if records.is_current(record) else "older"
        facts = [found["parameters"]["dtype"], where["device"], found["n_demonstrations"], found["n_examples"]]
        row = [*facts, f"{seconds:.0f}", f"{where['peak_memory_mib'] / 1024:.1f}", current]
        yield f"| {' | '.join(map(str, row))} |"
