"""
`python -m bench`: measure every section, write `_build/bench.json`, say which targets are met.

A section that is finished is kept in `_build/bench/` under a hash of the code and the sizes, so that an interrupted
bench goes on where it stopped. `--fresh` measures all of them again. Nothing else should run on the machine meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from bench import measure, peers
from bench.measure import Bench, Setting
from iclgd_helpers import parameters, storage, tasks
from iclgd_helpers.errors import InputError
from iclgd_helpers.identity import code_hash, engine_hash, same_engine
from iclgd_helpers.paths import PACKAGE, repository_root

# Sections in order, with the seconds that each was planned to take on two cores; the first is needed by others.
SECTIONS = {
    "scoring": 90,
    "recompute": 225,
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
    "ratio_vs_lm_eval": (True, 12.0),
    "ratio_vs_llama_cpp": (True, 1.5),
    "fraction_of_peak": (True, 0.6),
    "memory_growth": (False, 1.1),
    "bytes_per_query": (False, 1000.0),
}
KEYS = (*TARGETS, "bfloat16_speedup", "bfloat16_agreement", "finetune_step", "growth", "ablations")


def verdicts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a target: what was measured, and whether it is met; what was not measured is not met."""
    rows = []
    for key, (larger, target) in TARGETS.items():
        value = results.get(key)
        met = value is not None and (value >= target if larger else value <= target)
        if key == "ratio_vs_recompute" and value is not None:
            met = met and bool(results["sections"]["recompute"]["same_numbers"])
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
    code = (Path(measure.__file__), Path(peers.__file__), peers.HERE / "llama_peer.py", PACKAGE / "cost.py")
    digest = hashlib.sha256(f"{engine_hash()} {code_hash(code)}".encode())
    for path in (peers.HERE / "peers.txt", peers.HERE / "sst2_fixed.yaml"):
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
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = {}
    bench = Bench(setting, folder, done)
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
    found = {key: value for section in done.values() for key, value in section.items() if key in KEYS}
    result = {key: found.get(key) for key in KEYS}
    result |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "engine": engine_hash(), "quick": quick}
    result |= {"code": bench_hash(), "machine": machine(), "setting": asdict(setting), "sections": done}
    return result | {"targets": verdicts(result)}


def with_data(setting: Setting) -> Setting:
    """The setting, with the book's default text in place of SST-2 where that cannot be had."""
    try:
        given = setting.parameters()
        tasks.load_task(given.task, given.data_source, parameters.data_folder(given))
    except InputError as error:
        if os.environ.get("ICLGD_DATA"):  # named, so no other text will do
            raise
        print(f"SST-2 is not there ({error}).\nMeasuring on the movie-review snippets of the package index instead.")
        return replace(setting, task="snippets", data_source="pypi")
    return setting


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 if every target is met, 1 if one is missed or was not measured, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model, tiny sizes, no peers: tests the bench")
    parser.add_argument("--without-peers", action="store_true", help="leave out llama.cpp and lm-eval")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections (scoring comes with them)")
    parser.add_argument("--fresh", action="store_true", help="measure again what an earlier run has kept")
    parser.add_argument("--store", action="store_true", help="copy the result to results/bench/bench.json as well")
    parser.add_argument("--data-folder", type=Path, help="the six tasks; else $ICLGD_DATA, else the hub")
    parser.add_argument("--output", type=Path, default=repository_root() / "_build" / "bench.json")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(measure.run_child(json.loads(options.child))))
        return 0
    if options.data_folder:
        os.environ["ICLGD_DATA"] = str(options.data_folder.resolve())
    without = PEERS if options.quick or options.without_peers else ()
    wanted = ["scoring", *(options.only or SECTIONS)]
    chosen = [name for name in SECTIONS if name in wanted and name not in without]
    try:
        setting = Setting.quick() if options.quick else with_data(Setting())
        done = run(setting, chosen, options.output.parent / "bench", options.fresh)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished sections are kept", file=sys.stderr)
        return 130
    result = assembled(setting, options.quick, done)
    storage.write_json(options.output, result)
    print(f"\n{show(result['targets'])}\n\n{options.output}")
    stored = repository_root() / "results" / "bench" / "bench.json"
    if options.store and not options.quick:
        stored.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(options.output, stored)
    elif not options.quick:
        print(f"For the book: python -m bench --store, or cp {options.output.name} to results/bench/bench.json")
    return 0 if all(row["met"] for row in result["targets"]) else 1


if __name__ == "__main__":
    sys.exit(main())
