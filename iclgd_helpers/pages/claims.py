"""The ledger of claims (`results/claims.json`), as the pages that count them read it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.paths import repository_root

ROOT = repository_root()
PATH = ROOT / "results" / "claims.json"

Entry = dict[str, Any]


def load(path: Path = PATH) -> list[Entry]:
    """The ledger's claims; empty where nothing was recorded yet."""
    return storage.read_json(path)["claims"] if path.is_file() else []


def worded(claim: Entry) -> str:
    """A claim's statement; where a sentence of the papers is refuted, that one before it."""
    return f"“{claim['refutes']}” Correct: {claim['statement']}" if claim["refutes"] else str(claim["statement"])


@cache
def title(notebook: str) -> str:
    """First heading of a notebook; its name where there is none."""
    path = ROOT / "notebooks" / f"{notebook}.ipynb"
    if not path.is_file():
        return notebook
    return "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"]).splitlines()[0].lstrip("# ")
