"""The pipeline behind the Makefile: execute the pages, build the book, prepare the notebooks for tests."""

from __future__ import annotations

if __name__ == "__main__":
    from iclgd_helpers.start import start

    start("iclgd_helpers.commands", "pipeline")

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import psutil
import yaml

from iclgd_helpers import commands, ledger, records, storage
from iclgd_helpers.errors import CellError, InputError, reason
from iclgd_helpers.execution import execute, prepared
from iclgd_helpers.notebook_files import parameters_cell
from iclgd_helpers.paths import repository_root

ROOT = repository_root()
VERSIONS_SHOWN = ("torch", "transformers", "numpy", "pandas", "datasets", "jupyter-book", "papermill")
main = partial(commands.main, "pipeline")
TABLES = "results/tables"  # the data of the tables that pages show, written by `refresh`
SETUP_MARK = "# Colab setup: "
SETUP = (
    SETUP_MARK
    + """the same cell in every notebook, written by `python -m iclgd_helpers.pipeline sync-setup`.
# For a GPU choose Runtime > Change runtime type > T4 GPU before running it. Elsewhere this cell does nothing.
import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

if "google.colab" in sys.modules and importlib.util.find_spec("iclgd_helpers") is None:
    folder = Path("iclgd-{tag}").absolute()  # the helpers, and the records that the pages show
    address = "{url}"
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", "--depth=1", "--branch={tag}", address, folder], check=True)
    keep = Path("keep.txt")  # torch and numpy stay exactly as Colab installed them
    keep.write_text("".join(f"{{name}}=={{version(name)}}\\n" for name in ("torch", "numpy")))
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "-c", keep, "-e", folder], check=True)
    sys.path.insert(0, str(folder))  # a package installed so is found by kernels that start later"""
)


def read(notebook: Path) -> nbformat.NotebookNode:
    """The notebook, in the current format."""
    return nbformat.read(notebook, as_version=4)


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write whole or not at all, the way Jupyter does."""
    storage.write_text(path, nbformat.writes(notebook) + "\n")


def settings(name: str) -> dict[str, Any]:
    """What one of the book's YAML files holds; InputError if it is damaged."""
    path = ROOT / name
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names")
        return content
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): correct it") from None


def pages() -> list[Path]:
    """What the table of contents names in notebooks/, in its order: notebooks, and prose if there is any."""

    def files(node: Any) -> Iterator[str]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if isinstance(node, dict) and "file" in node:
            yield str(node["file"])
        for child in children:
            yield from files(child)

    named = (ROOT / name for name in files(settings("_toc.yml")) if name.startswith("notebooks/"))
    return [_page(path) for path in named]


def _page(path: Path) -> Path:
    """The file that an entry of the table of contents means, which may leave out its ending."""
    endings = (".ipynb", ".md")
    files = [path] if path.suffix in endings else [path.with_name(path.name + ending) for ending in endings]
    return next(filter(Path.is_file, files), files[0])


def notebooks() -> list[Path]:
    """The notebooks of the book, in the order of its table of contents."""
    return [path for path in pages() if path.suffix == ".ipynb"]


def page_key(notebook: Path, parameters: dict[str, Any]) -> str:
    """Hash of all that a page's outputs depend on; downloads are pinned by the hashes in the helpers."""
    content = [[cell.cell_type, cell.source, cell.metadata] for cell in read(notebook).cells]
    digest = hashlib.sha256(json.dumps([content, parameters], sort_keys=True).encode())
    helpers = [p for p in (ROOT / "iclgd_helpers").rglob("*") if p.suffix in {".py", ".yaml"}]
    stored = [p for p in (ROOT / "results").rglob("*") if p.is_file() and ROOT / TABLES not in p.parents]
    stored = [p for p in stored if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]  # half-written
    for path in sorted([*helpers, *stored, ROOT / "requirements.lock"]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


class PeakMemory(threading.Thread):
    """Samples the resident memory of this process's descendants (the kernel and what it starts)."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._done = 0, threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.2):
            total = 0
            for process in psutil.Process().children(recursive=True):
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue  # it ended meanwhile
            self.peak = max(self.peak, total)

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self.join()


def execute_page(notebook: Path, target: Path, costs_file: Path, preset: str) -> dict[str, Any]:
    """Execute a page unless its stored key is current; returns its costs, with `new` telling which."""
    parameters = preset_values(notebook, preset)
    key = page_key(notebook, parameters)
    stored = known_costs(target, costs_file)
    if stored and stored.get("key") == key:
        return stored | {"new": False}
    costs_file.unlink(missing_ok=True)
    start = time.perf_counter()
    with PeakMemory() as memory:
        execute(notebook, target, parameters)
    seconds = time.perf_counter() - start
    executed = read(target)
    for cell in executed.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.metadata.tags.append("remove-cell")
    write(executed, target)
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    costs = {"key": key, "seconds": round(seconds, 1), "peak_gb": round(memory.peak / 1e9, 2), "when": when}
    storage.write_json(costs_file, costs | {"sha256": hashlib.sha256(target.read_bytes()).hexdigest()})
    return costs | {"new": True}


def known_costs(target: Path, costs_file: Path) -> dict[str, Any] | None:
    """The stored costs of the executed page; None if it is not there, or either file is no longer what was written."""
    if not (target.is_file() and costs_file.is_file()):
        return None
    try:
        costs = storage.read_json(costs_file)
    except InputError:
        return None
    return costs if costs.get("sha256") == hashlib.sha256(target.read_bytes()).hexdigest() else None


def git_commit() -> str:
    """Short hash of the checkout, marked when files differ from it; `unknown` without git."""
    try:
        options = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **options).stdout.strip()
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
            "**Not yet run on a GPU**, and tested on a processor only: `device=auto` with a GPU present, mixed "
            "precision in float16 with scaled losses, copies from pinned memory, attention without the processor's "
            "fused kernel, and smaller batches when the device runs out of memory. This line goes when a record made "
            "on a GPU is stored under `results/records`."
        )


def rehearsal_lines() -> Iterator[str]:
    """What all arms of a cell cost in the shape of the papers' model, with random weights (`make rehearse`)."""
    yield "Rehearsals of the papers' model (its exact shape, random weights, all arms of one cell):"
    yield ""
    yield "| Precision | Device | Demonstrations | Queries | Time (s) | Peak memory (GiB) | Helpers |"
    yield "|---|---|---:|---:|---:|---:|---|"
    for record in records.load_all("results/rehearsal"):
        found = record.json
        where, seconds = found["environment"], sum(found["timings"].values())
        current = "current" if record.is_current else "older"
        facts = [found["parameters"]["dtype"], where["device"], found["n_demonstrations"], found["n_examples"]]
        row = [*facts, f"{seconds:.0f}", f"{where['peak_memory_mib'] / 1024:.1f}", current]
        yield f"| {' | '.join(map(str, row))} |"


def render(build: Path) -> None:
    """Strict build of `build`/source into `build`/html; a warning is an error."""
    for old in ("html", ".doctrees"):
        shutil.rmtree(build / old, ignore_errors=True)
    options = ["--path-output", str(build.parent), "--all", "-W", "-n", "--keep-going"]
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*command, str(build / "source"), *options], **streams)
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    storage.write_text(build / "book.log", log)
    if done.returncode:
        faults = [line for line in log.splitlines() if "WARNING" in line or "ERROR" in line]
        faults.append(f"the strict build of the book failed; its log: {build / 'book.log'}")
        raise CellError("\n".join(faults))


def book(folder: Path, preset: str = "quick", stored: bool = False) -> Path:
    """
    Build the book in `folder`/_build: execute what changed (or take the stored outputs), then render.

    Returns
    -------
    Path
        the folder of the HTML.
    """
    build = folder / "_build"
    source = build / "source"
    copy_prose(source)
    os.environ["ICLGD_RECORDS"] = str(build / "records")
    costs = {}
    for notebook in notebooks():
        target, costs_file = source / notebook.relative_to(ROOT), build / "pages" / f"{notebook.stem}.json"
        if stored:
            costs_file.unlink(missing_ok=True)
            storage.write_bytes(target, notebook.read_bytes())
            continue
        print(f"{notebook.stem:<40}", end="", flush=True)
        page = costs[notebook.stem] = execute_page(notebook, target, costs_file, preset)
        made = "" if page["new"] else "   (unchanged since)"
        print(f"{page['seconds']:8.1f} s {page['peak_gb']:6.2f} GB{made}", flush=True)
    if costs:
        seconds, memory = ([page[name] for page in costs.values()] for name in ("seconds", "peak_gb"))
        print(f"{'all pages':<40}{sum(seconds):8.1f} s {max(memory):6.2f} GB")
    generated = source / "book" / "_generated"
    storage.write_text(generated / "status.md", status_page(costs, preset))
    ledger.write_pages(generated)
    render(build)
    print(f"The book: {build / 'html' / 'index.html'}")
    return build / "html"


def copy_prose(source: Path) -> None:
    """Everything of the book that is not executed, anew."""
    with storage.writing(source):
        shutil.rmtree(source / "book", ignore_errors=True)
        shutil.copytree(ROOT / "book", source / "book")
        for path in (ROOT / "_config.yml", ROOT / "_toc.yml", *(page for page in pages() if page.suffix == ".md")):
            (source / path.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(path, source / path.relative_to(ROOT))


def smoke_copies(folder: Path) -> None:
    """Copies for nbval: the smoke preset's values are injected, committed outputs and counts are kept."""
    for notebook in notebooks():
        write(prepared(notebook, preset_values(notebook, "smoke")), folder / notebook.name)


def preset_values(notebook: Path, preset: str) -> dict[str, Any]:
    """What to inject for `preset`: nothing for the notebooks' own default, or where a page has no presets."""
    own = parameters_cell(notebook).get("preset", preset)
    return {} if own == preset else {"preset": preset}


def refresh(chosen: Iterable[Path]) -> None:
    """Execute at the default preset and store the outputs in `notebooks/`; nothing else writes there."""
    chosen = list(chosen)
    for notebook in chosen:
        parameters_cell(notebook)  # refuses what is no notebook, before anything runs
    os.environ["ICLGD_RECORDS"] = str(ROOT / "_build" / "records")
    os.environ["ICLGD_TABLES"] = str(ROOT / TABLES)
    for notebook in chosen:
        executed = ROOT / "_build" / "refresh" / notebook.name
        execute(notebook, executed, {})
        write(cleaned(read(executed)), notebook)
        print(f"refreshed {notebook.name}", flush=True)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what a run leaves in the metadata: papermill's, timings, widget state, interpreter version."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.cells = [c for c in notebook.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    for cell in notebook.cells:
        for name in ("papermill", "execution", "collapsed"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":  # progress bars and warnings, which name paths of this machine
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def repository() -> tuple[str, str]:
    """Address and release tag; they stand in `_config.yml` only."""
    entry = settings("_config.yml")["repository"]
    return entry["url"], entry["branch"]


def setup_source() -> str:
    """Source of the Colab setup cell."""
    url, tag = repository()
    return SETUP.format(url=url, tag=tag)


def colab_link(notebook: Path) -> str:
    """The first cell's link to Colab; plain text, as a badge image would be loaded from elsewhere."""
    url, tag = repository()
    place = url.removeprefix("https://github.com/")
    return f"[Open in Colab](https://colab.research.google.com/github/{place}/blob/{tag}/notebooks/{notebook.name})"


def sync_setup() -> None:
    """Write what is the same in all notebooks: Colab link below the title, setup cell before any code."""
    for path in notebooks():
        notebook = read(path)
        title, *lines = notebook.cells[0].source.splitlines()
        rest = "\n".join(line for line in lines if not line.startswith("[Open in Colab](")).strip()
        notebook.cells[0].source = f"{title}\n\n{colab_link(path)}\n\n{rest}".strip()
        tags = {"tags": ["hide-cell", "nbval-ignore-output"]}
        cell = nbformat.v4.new_code_cell(setup_source(), id="setup", metadata=tags)
        places = [i for i, old in enumerate(notebook.cells) if old.source.startswith(SETUP_MARK)]
        if places:
            cell.execution_count = notebook.cells[places[0]].execution_count
            notebook.cells[places[0]] = cell
        else:
            first_code = [c.cell_type for c in notebook.cells].index("code")
            notebook.cells.insert(first_code, cell)
        write(notebook, path)
