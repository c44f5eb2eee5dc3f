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
import importlib
import json
import os
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil

from bench import report
from iclgd_helpers import storage
from iclgd_helpers.command_line import Here, exit_status
from iclgd_helpers.data import sources
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import inputs, parameters
from iclgd_helpers.experiments.provenance import code_hash, engine_hash, same_engine
from iclgd_helpers.paths import PACKAGE, repository_root

if TYPE_CHECKING:
    from bench.setting import Bench, Setting

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """
    One part of what is measured.

    Parameters
    ----------
    module : of this package, with the function of the section's name.
    seconds : that it was planned to take on two idle cores.
    everything : whether it depends on all of the package, the tools and the pages, not on the engine alone.
    peer, slow : whether it needs a peer's environment; whether even its smallest size is too slow for `--quick`.
    """

    module: str
    seconds: int
    everything: bool = False
    peer: bool = False
    slow: bool = False


# In order; the first is needed by others.
SECTIONS = {
    "scoring": Section("scoring", 90),
    "recompute": Section("recompute", 225),
    "labels": Section("recompute", 150),
    "llama_cpp": Section("beside_peers", 75, peer=True),
    "lm_eval": Section("beside_peers", 300, peer=True),
    "memory": Section("memory", 260),
    "record": Section("memory", 60),
    "finetune_step": Section("steps", 50),
    "growth": Section("growth", 450),
    "ablations": Section("ablations", 90),
    "whole_process": Section("whole_process", 50, everything=True),
    "empty_page": Section("empty_page", 20, everything=True),
    "grid": Section("grid", 60, everything=True),
    "book": Section("book", 1100, everything=True, slow=True),
}


def bench_hash() -> str:
    """Hash of the measuring code and of the engine; comments and layout do not count."""
    measuring = [path for path in sorted(HERE.glob("*.py")) if path.stem not in ("__init__", "__main__", "report")]
    code = (*measuring, PACKAGE / "experiments" / "cost.py")
    digest = hashlib.sha256(f"{engine_hash()} {code_hash(code)}".encode())
    for path in (HERE / "peers.txt", HERE / "sst2_fixed.yaml"):
        digest.update(path.read_bytes())
    return same_engine(digest.hexdigest()[:16])


def everything_hash() -> str:
    """Hash of the package, the tools and the pages."""
    root = repository_root()
    digest = hashlib.sha256(
        code_hash([*sorted(PACKAGE.rglob("*.py")), *sorted((root / "tools").glob("*.py"))]).encode()
    )
    for path in [*sorted((root / "notebooks").glob("*.ipynb")), *sorted(PACKAGE.rglob("*.yaml")), root / "_toc.yml"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


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


def kept_files(setting: Setting, folder: Path) -> dict[str, Path]:
    """Where each section's result is kept: under a name made of what it depends on."""
    common = json.dumps([bench_hash(), asdict(setting), machine()])
    names = {False: common, True: common + everything_hash()}
    hashes = {everything: hashlib.sha256(name.encode()).hexdigest()[:16] for everything, name in names.items()}
    return {name: folder / f"{name}-{hashes[section.everything]}.json" for name, section in SECTIONS.items()}


def run(setting: Setting, chosen: list[str], folder: Path, fresh: bool = False) -> dict[str, Any]:
    """The results of `chosen` sections, those of an earlier run with the same code among them."""
    from bench.measuring import NotMeasured
    from bench.setting import Bench

    done: dict[str, Any] = {}
    bench, files = Bench(setting, folder, done), kept_files(setting, folder)
    if os.getloadavg()[0] > 0.7:
        print(f"Something else is running (load average {os.getloadavg()[0]:.2f}): times will not be worth keeping.")
    for name, kept in files.items():  # those left out now, if they were measured before
        if name not in chosen and kept.is_file():
            done[name] = storage.read_json(kept)
    for number, name in enumerate(chosen, 1):
        kept, ahead = files[name], f"[{number}/{len(chosen)}] {name}"
        if kept.is_file() and not fresh:
            done[name] = storage.read_json(kept)
            print(f"{ahead}: kept from {done[name]['run']['when']}", flush=True)
            continue
        left = sum(SECTIONS[section].seconds for section in chosen[number - 1 :])
        when = f"about {SECTIONS[name].seconds} s of {left} s ahead on two idle cores"
        print(f"{ahead}: {when}; load average {os.getloadavg()[0]:.2f}", flush=True)
        try:
            done[name] = measured(name, bench)
        except NotMeasured as error:
            print(f"    not measured: {error}", flush=True)
            continue
        storage.write_json(kept, done[name])
        used, numbers = done[name]["run"], done[name].items()
        short = ", ".join(f"{key} {value:.3g}" for key, value in numbers if isinstance(value, float))
        print(f"    {used['seconds']:.0f} s, {used['cpu_seconds']:.0f} s of processor time; {short}", flush=True)
    return done


def measured(name: str, bench: Bench) -> dict[str, Any]:
    """A section's result as JSON holds it, with what the measuring itself took."""
    function = getattr(importlib.import_module(f"bench.{SECTIONS[name].module}"), name)
    load, start, cpu = os.getloadavg()[0], time.perf_counter(), cpu_seconds()
    found: dict[str, Any] = json.loads(json.dumps(function(bench)))
    used = {"seconds": time.perf_counter() - start, "cpu_seconds": cpu_seconds() - cpu}
    used |= {"load_before": load, "load_after": os.getloadavg()[0]}
    return found | {"run": used | {"when": datetime.now(UTC).isoformat(timespec="seconds")}}


def assembled(setting: Setting, quick: bool, done: Mapping[str, Any]) -> dict[str, Any]:
    """What `bench.json` holds: every key of the report, verdicts, and all sections in full."""
    result = report.top(done)
    result |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), "engine": engine_hash(), "quick": quick}
    result |= {"code": bench_hash(), "machine": machine(), "setting": asdict(setting), "sections": done}
    return result | {"targets": report.verdicts(result)}


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
@click.option("--quick", is_flag=True, help="a tiny model, tiny sizes, no peers, no book: tests the bench")
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
        from bench import children  # slow to import, and of no use to bad input

        print(json.dumps(children.run_child(json.loads(child))))
        return 0
    root = repository_root()
    output, stored = output or root / "_build" / "bench.json", root / "results" / "bench" / "bench.json"
    if output.is_dir():
        raise InputError(f"--output {output} is a folder: name a file")
    for folder in (output.parent / "bench", *([stored.parent] if store else ())):
        storage.require_writable(folder)
    if data_folder:
        os.environ["ICLGD_DATA"] = str(data_folder)
    without = {
        name for name, one in SECTIONS.items() if (one.peer and (quick or without_peers)) or (one.slow and quick)
    }
    chosen = [name for name in SECTIONS if name in ("scoring", *(only or SECTIONS)) and name not in without]
    changed = {} if quick else text()
    from bench.setting import Setting

    setting = Setting.quick() if quick else Setting(**changed)
    result = assembled(setting, quick, run(setting, chosen, output.parent / "bench", fresh))
    storage.write_json(output, result)
    print(f"\n{report.show(result['targets'], result['left_out'])}\n\n{output}")
    if store and not quick:
        storage.write_bytes(stored, output.read_bytes())
    elif not quick:
        print(f"For the book: python -m bench --store, or cp {output.name} to results/bench/bench.json")
    return 0 if all(row["met"] for row in result["targets"]) else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every target is met, 1 if one is missed or was not measured, 2 for bad input."""
    return exit_status(command, arguments, "python -m bench")
