"""Executing the pages that changed, and building the book: what `iclgd book` does."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from iclgd_helpers import storage
from iclgd_helpers.errors import CellError, InputError
from iclgd_helpers.experiments.notebook_execution import execute
from tools import claims_pages
from tools.book_pages import ROOT, TABLES, notebooks, pages, read, write
from tools.notebooks import preset_values
from tools.status_page import status_page


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


def render(build: Path) -> None:
    """Strict build of `build`/source into `build`/html; a warning is an error."""
    for old in ("html", ".doctrees"):
        shutil.rmtree(build / old, ignore_errors=True)
    options = ["--path-output", str(build.parent), "--all", "-W", "-n", "--keep-going"]
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [str(build / "source"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
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
    claims_pages.write_pages(generated)
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
