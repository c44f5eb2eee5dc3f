"""A grid on worker processes: the records of an undisturbed run, whatever is killed; Slurm with `srun` made up."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from iclgd_helpers.experiments import records
from iclgd_helpers.paths import repository_root

ROOT = repository_root()
GRID = ["--preset", "smoke", "-p", "data_source", "generated", "-p", "max_examples", "4", "-p", "n_demonstrations", "3"]
GRID += ["-p", "controls", "False", "-p", "conditioning", "False"]
GRID += ["--model", "tiny-llama", "--model", "tiny-gpt2", "--task", "cb", "--task", "mr", "--seed", "0", "--seed", "1"]
N_RUNS = 8


def start(words: list[str], folder: Path, **more: str) -> subprocess.Popen:
    environment = os.environ | {"ICLGD_RECORDS": str(folder), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
                            cwd=ROOT)  # fmt: skip


def grid(folder: Path, *words: str) -> subprocess.Popen:
    return start([sys.executable, "-m", "iclgd_helpers", "grid", *GRID, "--tflops", "1", *words], folder)


def workers(command: subprocess.Popen) -> list[psutil.Process]:
    """Processes that have loaded the engine."""
    children = psutil.Process(command.pid).children(recursive=True)
    return [child for child in children if child.is_running() and child.memory_info().rss > 250 * 2**20]


def parquet(folder: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in folder.glob("*/examples.parquet")}


def settled(folder: Path) -> dict[str, dict]:
    found = {record.json["id"]: dict(record.json) for record in records.load_all(folder)}
    return {name: {k: v for k, v in content.items() if k not in records.VOLATILE} for name, content in found.items()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The eight records as one process makes them, one after the other."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = grid(folder, "--on", "here")
    said, _ = command.communicate()
    assert command.returncode == 0, said
    assert len(parquet(folder)) == N_RUNS
    yield folder


def test_a_killed_worker_costs_nothing(undisturbed: Path, tmp_path: Path):
    folder = tmp_path / "records"
    command = grid(folder, "--workers", "2")
    while not (found := workers(command)) and command.poll() is None:
        time.sleep(0.05)
    found[0].send_signal(signal.SIGKILL)
    said, _ = command.communicate()
    assert command.returncode == 0 and f"[{N_RUNS}/{N_RUNS}]" in said, said
    assert parquet(folder) == parquet(undisturbed) and settled(folder) == settled(undisturbed)
    assert {path.name for path in folder.iterdir()} == set(parquet(folder)), "nothing but records is left"


def test_two_commands_share_the_work(undisturbed: Path, tmp_path: Path):
    folder = tmp_path / "records"
    both = [grid(folder, "--workers", "1") for _ in range(2)]
    said = [command.communicate()[0] for command in both]
    assert [command.returncode for command in both] == [0, 0], said
    computed = sum(text.count("peak ") for text in said)
    assert computed == N_RUNS and parquet(folder) == parquet(undisturbed)


SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
exec "$@"
"""


@pytest.mark.skipif(not (ROOT / ".venv" / "bin" / "dask").exists(), reason="the script runs what is in .venv")
def test_the_slurm_script_with_a_process_for_srun(undisturbed: Path, tmp_path: Path):
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    more = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "RESOURCES": "",
        "SLURM_JOB_ID": f"test{os.getpid()}",
    }
    command = start(["bash", "tools/slurm_grid.sh", *GRID, "--tflops", "1"], tmp_path / "records", **more)
    said, _ = command.communicate()
    assert command.returncode == 0, said
    assert parquet(tmp_path / "records") == parquet(undisturbed)
    assert not list((ROOT / "_runs").glob(f"scheduler-{more['SLURM_JOB_ID']}*"))
