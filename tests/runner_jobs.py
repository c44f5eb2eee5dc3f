"""Jobs that the runner's tests perform, and a command that performs them: `python -m runner_jobs ORDER`."""

from __future__ import annotations

if __name__ == "__main__":
    from iclgd_helpers.signals import start

    start("runner_jobs")

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import click

from iclgd_helpers import command_line, progress, storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import dask_workers, performing, runner


def job(folder: Path, name: str, function: str = "store", after: tuple[str, ...] = (), **more: Any) -> performing.Job:
    """A job whose record is in `folder`; what is named like a field of `Job` is one, the rest are arguments."""
    fields = {key: more.pop(key) for key in ("cost", "resources", "lock") if key in more}
    given = {"lock": str(folder / f"{name}.lock")} | fields
    arguments = {"folder": str(folder), "name": name} | more
    return performing.Job(name, f"runner_jobs:{function}", arguments, after=after, **given)


def store(folder: str, name: str, seconds: float = 0, needed: dict[str, Any] | None = None) -> tuple[str, Any]:
    """Look for the record, else compute and store it; every computation is one line of a log."""
    record = Path(folder, f"{name}.json")
    if record.exists():
        return performing.STORED, storage.read_json(record)
    with Path(folder, "log").open("a") as log:
        log.write(f"{name}\n")
    time.sleep(seconds)
    value = {
        "name": name,
        "needed": needed,
        "place": performing._place(),
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"),
    }
    storage.write_json(record, value)
    return f"computed {name}", storage.read_json(record)


def computed(folder: Path) -> list[str]:
    """The names that were computed, each as often as it was."""
    log = folder / "log"
    return sorted(log.read_text().splitlines()) if log.exists() else []


def count(folder: str, name: str, seconds: float) -> tuple[str, Any]:
    """Be at step 3 of 64 for so long."""
    with progress.Bar(desc="standard", total=64, disable=True) as bar:
        bar._noted = 0  # long ago
        bar.update(3)
        return store(folder, name, seconds)


def die(folder: str, name: str, times: int, **more: Any) -> tuple[str, Any]:
    """Kill the worker the first `times` times; every time leaves its process number."""
    record = Path(folder, f"{name}.deaths")
    deaths = record.read_text().split() if record.exists() else []
    if len(deaths) < times:
        record.write_text(" ".join([*deaths, str(os.getpid())]))
        progress.note("dying")
        os.kill(os.getpid(), signal.SIGKILL)
    return store(folder, name, **more)


def fail(folder: str, name: str, kind: str) -> tuple[str, Any]:
    """Fail in one of the ways that a job may."""
    if kind == "input":
        raise InputError("this cannot be used:\nuse that")
    if kind == "exit":
        sys.exit(3)
    return {"message": 1}["value"]


def threads(folder: str, name: str) -> tuple[str, Any]:
    """How many threads torch has here, and was told of."""
    import torch

    return "", [torch.get_num_threads(), *(os.environ.get(variable) for variable in dask_workers.THREADS)]


def sockets() -> list[str]:
    """Addresses that this process listens on."""
    import psutil

    return [one.laddr.ip for one in psutil.Process().net_connections("inet") if one.status == psutil.CONN_LISTEN]


def imported() -> list[str]:
    """Which of the large libraries are imported."""
    return sorted({"torch", "transformers"} & set(sys.modules))


def process() -> int:
    """What no two workers have in common."""
    return os.getpid()


@click.command()
@click.argument("order")
def command(order: str) -> int:
    """Perform jobs as a command of the project does."""
    asked = json.loads(order)
    jobs = [job(Path(asked["folder"]), **one) for one in asked["jobs"]]
    with dask_workers.connected(asked["on"], workers=asked["workers"], gpus=()) as client:
        print("up", flush=True)
        return 1 if runner.run(jobs, client, lambda line: print(line, flush=True)) else 0


def main() -> int:
    """The command's status."""
    return command_line.exit_status(command, None, "runner_jobs")
