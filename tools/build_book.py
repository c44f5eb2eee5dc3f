"""Executing the pages that changed, and building the book: what `iclgd book` does."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.errors import CellError
from tools import light_pages, page_costs, page_lanes
from tools.book_pages import ROOT, notebooks, pages, preset_values

DOWNLOADS = "source/book/_generated/downloads.md"  # in a build: what the landing page says of the book in one file


def render(build: Path, builder: str = "html") -> Path:
    """Strict build of `build`/source into the folder that is returned, `build`/html; a warning is an error."""
    for old in (builder, ".doctrees"):
        shutil.rmtree(build / old, ignore_errors=True)
    known = ["--builder", builder] if builder != "epub" else ["--builder", "custom", "--custom-builder", "epub"]
    options = ["--path-output", str(build.parent), "--all", "-W", "-n", "--keep-going", *known]
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build"]
    command += [str(build / "source"), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    log = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    storage.write_text(build / "book.log", log)
    if done.returncode:
        faults = [line for line in log.splitlines() if "WARNING" in line or "ERROR" in line]
        faults.append(f"the strict build of the book failed; its log: {build / 'book.log'}")
        raise CellError("\n".join(faults))
    return build / builder


def book(folder: Path, preset: str = "quick", stored: bool = False) -> Path:
    """
    Build the book in `folder`/_build: execute what changed (or take the stored outputs), then render.

    Returns
    -------
    Path
        the folder of the HTML.
    """
    build = folder / "_build"
    copy_prose(build / "source")
    costs = take_stored(build) if stored else executed(build, preset)
    # Slow to import, and of no use before.
    from tools import api_page, claims_pages, coverage_page, page_frames, status_page

    for notebook in notebooks():
        target = places(build, notebook)[0]
        page_frames.frame(target, notebook, costs.get(notebook.stem, {}), build / "source" / notebook.relative_to(ROOT))
    generated = build / "source" / "book" / "_generated"
    storage.write_text(generated / "status.md", status_page.status_page(costs, preset))
    claims_pages.write_pages(generated)
    storage.write_text(generated / "coverage.md", coverage_page.coverage_page())
    storage.write_text(generated / "api.md", api_page.api_page())
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    storage.write_text(generated / "changes.md", re.sub(r"^#", "##", changes, flags=re.M))
    html(build)
    print(f"The book: {build / 'html' / 'index.html'}")
    return build / "html"


def html(build: Path) -> None:
    """The pages as HTML, with links to the book in one file where that has been made."""
    files = [file for ending in ("pdf", "epub") for file in build.glob(f"*.{ending}")]
    links = [f'<a href="../{file.name}">{file.suffix[1:].upper()}</a>, written {written(file)}' for file in files]
    said = (
        f"Download: {'; '.join(links)}."
        if links
        else "This build has no PDF and no ePub yet; `make pdf` and `make epub` write them."
    )
    storage.write_text(build / DOWNLOADS, f"{said}\n")
    render(build)
    light_pages.lighten(build / "html")
    for file in files:
        shutil.copy(file, build / "html" / file.name)


def written(file: Path) -> str:
    """When a file was written: one that is older than the pages beside it shows them as they were."""
    return datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def places(build: Path, notebook: Path) -> tuple[Path, Path]:
    """Where a page's executed copy is, and its costs."""
    return build / "executed" / notebook.name, build / "pages" / f"{notebook.stem}.json"


def take_stored(build: Path) -> dict[str, dict[str, Any]]:
    """Take all pages as they are stored in `notebooks/`; nothing is executed, so there are no costs."""
    for notebook in notebooks():
        target, costs_file = places(build, notebook)
        costs_file.unlink(missing_ok=True)
        storage.write_bytes(target, notebook.read_bytes())
    return {}


def executed(build: Path, preset: str) -> dict[str, dict[str, Any]]:
    """
    Execute the pages whose stored key is no longer theirs; the costs of all, in the order of the book.

    Raises
    ------
    KeyboardInterrupt
        when a line has said what is kept.
    """
    os.environ["ICLGD_RECORDS"] = str(records := build / "records")
    if page_lanes.n_lanes() > 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that waits leaves its core to the other page
    changed, costs, common = [], {}, page_costs.common_key()
    for notebook in notebooks():
        target, costs_file = places(build, notebook)
        parameters = preset_values(notebook, preset)
        key = page_costs.page_key(notebook, parameters, common)
        if (known := page_costs.known(target, costs_file)) and known.get("key") == key:
            costs[notebook.stem] = known
            print(page_lanes.line(notebook.stem, known, unchanged=True), flush=True)
            continue
        seconds, run = page_costs.expected(notebook, costs_file, preset), page_lanes.shown_run(notebook, parameters)
        changed.append(page_lanes.Page(notebook, target, costs_file, parameters, key, *run, seconds))
    before, lanes = _folders(records), page_lanes.Lanes(changed, preset, len(costs))
    try:
        costs |= lanes.work() if changed else {}
    except KeyboardInterrupt:
        n_new = len(_folders(records) - before)
        n_pages = len(costs) + len(lanes.costs)
        print(f"{n_pages} of {len(notebooks())} pages are done and stay; new records: {n_new}", file=sys.stderr)
        raise
    costs = {notebook.stem: costs[notebook.stem] for notebook in notebooks()}
    spent, memory = ([page[name] for page in costs.values()] for name in ("seconds", "peak_gb"))
    print(f"{'all pages':<40}{sum(spent):8.1f} s {max(memory):6.2f} GB")
    return costs


def _folders(records: Path) -> set[Path]:
    return {path for path in records.glob("[!.]*") if path.is_dir()}


def copy_prose(source: Path) -> None:
    """Everything of the book that is not executed, anew."""
    with storage.writing(source):
        shutil.rmtree(source / "book", ignore_errors=True)
        shutil.copytree(ROOT / "book", source / "book")
        for path in (ROOT / "_config.yml", ROOT / "_toc.yml", *(page for page in pages() if page.suffix == ".md")):
            (source / path.relative_to(ROOT)).parent.mkdir(exist_ok=True, parents=True)
            shutil.copy(path, source / path.relative_to(ROOT))
