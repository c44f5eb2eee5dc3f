"""The pages of the whole book, executed cold: seconds and memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from bench.measuring import NotMeasured
from bench.setting import Bench
from iclgd_helpers import storage
from iclgd_helpers.experiments.notebook_execution import family
from iclgd_helpers.paths import repository_root
from tools import book_pages

COMMAND = (sys.executable, "-m", "iclgd_helpers", "book")
THEORY = frozenset("01 02 03 04 05 06 07 08 09 11 12".split())
POLL_SECONDS = 0.5  # between two looks at files and memory
LONGEST = 3600  # seconds that the pages may take


def book(bench: Bench) -> dict[str, Any]:
    """Every page on two cores, as `make book` has them, and on one. The HTML is left out."""
    runs = {}
    for n in bench.setting.book_cores:
        with tempfile.TemporaryDirectory(dir=bench.folder, prefix="book-") as folder:
            runs[str(n)] = built(Path(folder), n, bench.setting.book_preset)
    whole = runs[str(bench.setting.book_cores[0])]
    return rows(whole["pages"]) | {
        "book_peak_gb": whole["peak_bytes"] / 1e9,
        "cores": runs,
        "counts": "seconds from the first page's start to the last one's end, by the files that the command writes; "
        "memory of all processes of the command at a time, where pages are shared by processes once",
    }


def rows(pages: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """What the targets are about, of pages by their number."""
    start = min(page["ended"] - page["seconds"] for page in pages.values())
    single = {f"page_{number}_seconds": pages[number]["seconds"] for number in ("00", "10", "72") if number in pages}
    theory = sum(page["seconds"] for number, page in pages.items() if number in THEORY)
    whole = max(page["ended"] for page in pages.values()) - start
    return {"book_pages_seconds": whole, **single, "theory_pages_seconds": theory}


def built(folder: Path, n_cores: int, preset: str) -> dict[str, Any]:
    """The command on so many cores, ended when the last page is there; what it took, page by page."""
    wanted = {page.stem for page in book_pages.notebooks()}
    log, written = folder / "log", folder / "_build" / "pages"
    command = [*COMMAND, "--folder", str(folder), "--preset", preset]
    start, peak = time.monotonic(), 0
    with on_cores(n_cores), log.open("w") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, cwd=repository_root(), start_new_session=True
        )
    try:
        while not wanted <= {path.stem for path in written.glob("*.json")}:
            if process.poll() is not None or time.monotonic() - start > LONGEST:
                raise NotMeasured(f"the pages on {n_cores} cores: {log.read_text()[-500:].strip() or 'nothing said'}")
            peak = max(peak, held(process.pid))
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - start
    finally:
        end(process)
    return {"pages": costs(written), "peak_bytes": peak, "command_seconds": seconds, "n_cores": n_cores}


def costs(written: Path) -> dict[str, dict[str, float]]:
    """What the command says of each page, by the page's number, and when the page was done."""
    found = {}
    for path in sorted(written.glob("*.json")):
        said = storage.read_json(path)
        own = {name: float(said[name]) for name in ("seconds", "peak_gb")}
        found[path.stem[:2]] = own | {"ended": path.stat().st_mtime}
    return found


@contextmanager
def on_cores(n: int) -> Iterator[None]:
    """What is started meanwhile runs on `n` of the cores that this process may use."""
    if not hasattr(os, "sched_setaffinity"):
        raise NotMeasured("this system binds no process to some of its cores")
    before = os.sched_getaffinity(0)
    if len(before) < n:
        raise NotMeasured(f"{n} cores are asked for, and this process may use {len(before)}")
    os.sched_setaffinity(0, sorted(before)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def held(pid: int) -> int:
    """Bytes that a process and all that it has started hold now."""
    return sum(map(_own_share, family(pid)))


def _own_share(process: psutil.Process) -> int:
    """Resident bytes; what several processes have in common counts once in their sum where the system tells it."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) * 1024
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0  # it has ended


def end(process: subprocess.Popen[bytes]) -> None:
    """End the command, which ends what it has started; kill what is left."""
    started = family(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    for one in started:
        with suppress(psutil.Error):
            one.kill()
    process.wait()
