"""
`python -m bench`: measure every section, write `_build/bench.json`, say which targets are met.

A section that is finished is kept in `_build/bench/` under a hash of the code and the sizes, so that an interrupted
bench goes on where it stopped. `--fresh` measures all of them again. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

if __name__ == "__main__":
    from iclgd_helpers.signals import start

    start("bench.__main__")

import hashlib
import json
import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil

from iclgd_helpers import storage
from iclgd_helpers.command_line import Here, exit_status
from iclgd_helpers.data import sources
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import inputs, parameters
from iclgd_helpers.experiments.provenance import code_hash, engine_hash, same_engine
from iclgd_helpers.paths import PACKAGE, repository_root

if TYPE_CHECKING:
    from bench.measure import Setting

HERE = Path(__file__).parent
# Sections in order, with the seconds that each was planned to take on two cores; the first is needed by others.
SECTIONS = {
    "scoring": 90,
    "recompute": 225,
    "labels": 150,
    "llama_cpp": 75,
    "lm_eval": 300,
    "memory": 200,
    "record": 60,
    "finetune_step": 50,
    "growth": 320,
    "ablations": 90,
}
PEERS = ("llama_cpp", "lm_eval")
# key -> (is a larger value better?, target)
TARGETS = {
    "ratio_vs_recompute": (True, 20.0),
    "labels_ratio_vs_recompute": (True, 15.0),
    "ratio_vs_lm_eval": (True, 12.0),
    "ratio_vs_llama_cpp": (True, 1.5),
    "fraction_of_peak": (True, 0.6),
    "memory_growth": (False, 1.1),
    "bytes_per_query": (False, 1000.0),
}
SAME_NUMBERS = {"ratio_vs_recompute": "recompute", "labels_ratio_vs_recompute": "labels"}  # key -> its section
KEYS = (*TARGETS, "bfloat16_speedup", "bfloat16_agreement", "finetune_step", "growth", "ablations")


def verdicts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a target: what was measured, and whether it is met; what was not measured is not met."""
    rows = []
    for key, (larger, target) in TARGETS.items():
        value = results.get(key)
        met = value is not None and (value >= target if larger else value <= target)
        if key in SAME_NUMBERS and value is not None:
            met = met and bool(results["sections"][SAME_NUMBERS[key]]["same_numbers"])
        rows.append({"key": key, "target": f"{'at least' if larger else 'at most'} {target:g}", "value": value})
        rows[-1]["met"] = met
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The table at the end."""
    lines = [f"{'':<22}{'target':<16}{'measured':>10}   met"]
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.3f}"
        lines.append(f"{row['key']:<22}{row['target']:<16}{value:>10}   {'yes' if row['met'] else 'NO'}")
    return "\n".join(lines)


def bench_hash() -> str:
    """Hash of the measuring code and of the engine; comments and layout do not count."""
    code = (HERE / "measure.py", HERE / "peers.py", HERE / "llama_peer.py", PACKAGE / "experiments" / "cost.py")
    digest = hashlib.sha256(f"{engine_hash()} {code_hash(code)}".encode())
    for path in (HERE / "peers.txt", HERE / "sst2_fixed.yaml"):
        digest.update(path.read_bytes())
    return same_engine(digest.hexdigest()[:16])


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch  # slow to import, and of no use to bad input

    return {
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
    }


def cpu_seconds() -> float:
    """Processor time of this process and of the children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def run(setting: Setting, chosen: list[str], folder: Path, fresh: bool = False) -> dict[str, Any]:
    """The results of `chosen` sections, those of an earlier run with the same code among them."""
    from bench import measure, peers

    done: dict[str, Any] = {}
    bench = measure.Bench(setting, folder, done)
    code = hashlib.sha256(json.dumps([bench_hash(), asdict(setting), machine()]).encode()).hexdigest()[:16]
    if os.getloadavg()[0] > 0.7:
        print(f"Something else is running (load average {os.getloadavg()[0]:.2f}): times will not be worth keeping.")
    for name in SECTIONS:  # those left out now, if they were measured before
        if name not in chosen and (folder / f"{name}-{code}.json").is_file():
            done[name] = storage.read_json(folder / f"{name}-{code}.json")
    for number, name in enumerate(chosen, 1):
        kept = folder / f"{name}-{code}.json"
        ahead = f"[{number}/{len(chosen)}] {name}"
        if kept.is_file() and not fresh:
            done[name] = storage.read_json(kept)
            print(f"{ahead}: kept from {done[name]['run']['when']}", flush=True)
            continue
        left = sum(SECTIONS[section] for section in chosen[number - 1 :])
        load = os.getloadavg()[0]
        when = f"about {SECTIONS[name]} s of {left} s ahead on two idle cores"
        print(f"{ahead}: {when}; load average {load:.2f}", flush=True)
        start, cpu = time.perf_counter(), cpu_seconds()
        try:
            found = getattr(measure, name)(bench)
        except peers.PeerError as error:
            print(f"    not measured: {error}", flush=True)
            continue
        used = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
        used |= {"load_before": load, "load_after": os.getloadavg()[0]}
        used |= {"when": datetime.now(UTC).isoformat(timespec="seconds")}
        done[name] = json.loads(json.dumps(found)) | {"run": used}
        storage.write_json(kept, done[name])
        short = ", ".join(f"{key} {value:.3g}" for key, value in found.items() if isinstance(value, float))
        print(f"    {used['seconds']:.0f} s, {used['cpu_seconds']:.0f} s of processor time; {short}", flush=True)
    return done


def assembled(setting: Setting, quick: bool, done: Mapping[str, Any]) -> dict[str, Any]:
    """What `bench.json` holds: every key of the report, verdicts, and all sections in full."""
    found = {key: value for name in done if name != "labels" for key, value in done[name].items() if key in KEYS}
    found["labels_ratio_vs_recompute"] = done.get("labels", {}).get("ratio_vs_recompute")
    result = {key: found.get(key) for key in KEYS}
    result |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "engine": engine_hash(), "quick": quick}
    result |= {"code": bench_hash(), "machine": machine(), "setting": asdict(setting), "sections": done}
    return result | {"targets": verdicts(result)}


def text() -> dict[str, str]:
    """What to change in the setting where SST-2 cannot be had: the book's default text takes its place."""
    given = parameters.resolve({"preset": "quick", "task": "sst2"})
    try:
        sources.load_task(given.task, given.data_source, inputs.data_folder(given))
    except InputError as error:
        if os.environ.get("ICLGD_DATA"):  # named, so no other text will do
            raise
        print(f"SST-2 is not there ({error}).\nMeasuring on the movie-review snippets of the package index instead.")
        return {"task": "snippets", "data_source": "pypi"}
    return {}


@click.command()
@click.option("--quick", is_flag=True, help="a tiny model, tiny sizes, no peers: tests the bench")
@click.option("--without-peers", is_flag=True, help="leave out llama.cpp and lm-eval")
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="repeatable (scoring comes with it)")
@click.option("--fresh", is_flag=True, help="measure again what an earlier run has kept")
@click.option("--store", is_flag=True, help="copy the result to results/bench/bench.json as well")
@click.option("--data-folder", type=Here(), help="the six tasks; else $ICLGD_DATA, else the hub")
@click.option("--output", type=Here(), help="[_build/bench.json]")
@click.option("--child", hidden=True)
def command(
    quick: bool,
    without_peers: bool,
    only: tuple[str, ...],
    fresh: bool,
    store: bool,
    data_folder: Path | None,
    output: Path | None,
    child: str | None,
) -> int:
    """Measure every section, write `_build/bench.json`, say which targets are met; status 1 if one is missed."""
    if child:
        from bench import measure  # slow to import, and of no use to bad input

        print(json.dumps(measure.run_child(json.loads(child))))
        return 0
    root = repository_root()
    output, stored = output or root / "_build" / "bench.json", root / "results" / "bench" / "bench.json"
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file")
    for folder in (output.parent / "bench", *([stored.parent] if store else ())):
        storage.require_writable(folder)
    if data_folder:
        os.environ["ICLGD_DATA"] = str(data_folder)
    without = PEERS if quick or without_peers else ()
    chosen = [name for name in SECTIONS if name in ("scoring", *(only or SECTIONS)) and name not in without]
    changed = {} if quick else text()
    from bench.measure import Setting

    setting = Setting.quick() if quick else Setting(**changed)
    result = assembled(setting, quick, run(setting, chosen, output.parent / "bench", fresh))
    storage.write_json(output, result)
    print(f"\n{show(result['targets'])}\n\n{output}")
    if store and not quick:
        storage.write_bytes(stored, output.read_bytes())
    elif not quick:
        print(f"For the book: python -m bench --store, or cp {output.name} to results/bench/bench.json")
    return 0 if all(row["met"] for row in result["targets"]) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every target is met, 1 if one is missed or was not measured, 2 for bad input."""
    return exit_status(command, arguments, "python -m bench")
