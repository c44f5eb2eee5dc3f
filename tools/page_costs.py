"""What executing a page took and will take, and whether it has to be executed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError
from tools.book_pages import ROOT, TABLES, read

REFERENCE = "results/page_seconds.json"  # of each page, at its own preset, when it was last refreshed


def common_key() -> bytes:
    """Hash of what all pages' outputs depend on; downloads are pinned by the hashes in the helpers."""
    digest = hashlib.sha256()
    helpers = [p for p in (ROOT / "iclgd_helpers").rglob("*") if p.suffix in {".py", ".yaml"}]
    stored = [p for p in (ROOT / "results").rglob("*") if p.is_file() and ROOT / TABLES not in p.parents]
    stored = [p for p in stored if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)]  # half-written
    for path in sorted({*helpers, *stored, ROOT / "requirements.lock"} - {ROOT / REFERENCE}):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.digest()


def page_key(notebook: Path, parameters: Mapping[str, Any], common: bytes) -> str:
    """Hash of all that a page's outputs depend on."""
    content = [[cell.cell_type, cell.source, cell.metadata] for cell in read(notebook).cells]
    return hashlib.sha256(json.dumps([content, parameters], sort_keys=True).encode() + common).hexdigest()


def known(target: Path, costs_file: Path) -> dict[str, Any] | None:
    """The stored costs of the executed page; None if it is not there, or either file is no longer what was written."""
    if not (target.is_file() and (costs := _read(costs_file))):
        return None
    return costs if costs.get("sha256") == hashlib.sha256(target.read_bytes()).hexdigest() else None


def _read(file: Path) -> dict[str, Any]:
    try:
        return storage.read_json(file) if file.is_file() else {}
    except InputError:
        return {}


def expected(notebook: Path, costs_file: Path, preset: str) -> float | None:
    """
    Seconds that the page took the last time in this checkout, at this preset; else its reference, if it has one.

    A reference was measured at the page's own preset, and says nothing of others.
    """
    last = _read(costs_file)
    if last.get("preset") == preset and "seconds" in last:
        return float(last["seconds"])
    return reference(notebook) if preset == "quick" else None


def reference(notebook: Path) -> float | None:
    """Seconds that the page took when it was last refreshed, at its own preset; None if that was never timed."""
    seconds = _read(ROOT / REFERENCE).get("seconds", {}).get(notebook.stem)
    return float(seconds) if seconds else None


def refer(notebook: Path, seconds: float) -> None:
    """Store how long the page took, for those who have not executed it yet."""
    table = _read(ROOT / REFERENCE).get("seconds", {}) | {notebook.stem: round(seconds)}
    storage.write_json(ROOT / REFERENCE, {"seconds": table})
