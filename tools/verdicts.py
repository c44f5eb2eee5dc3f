"""`python -m tools.verdicts`: the verdicts of the reproduction, from its records, into `results/verdicts.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.pages import decisions, judging, selection
from iclgd_helpers.pages.statements import STATEMENTS
from tools.book_pages import ROOT

PATH = ROOT / "results" / "verdicts.json"
DIGITS = 6  # significant; the rest differs between processors


def verdicts() -> list[dict[str, Any]]:
    """One object a statement, model, learning rate and reading; see `decisions.COLUMNS`."""
    exploratory = selection.grid()
    found = selection.preferred(selection.confirmatory(), exploratory)
    sweeps = (selection.sweeps("rates"), selection.sweeps("clips"))
    stored = judging.Stored(found, selection.reordered(), *sweeps, exploratory)
    return [_rounded(row) for row in decisions.decide(STATEMENTS, found, stored)]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main() -> int:
    """Write the file; exit status 0."""
    found = storage.plain(verdicts())
    lines = ",\n".join(json.dumps(row, ensure_ascii=False, sort_keys=False) for row in found)
    storage.write_bytes(PATH, f"[\n{lines}\n]\n".encode())
    print(f"{len(found)} verdicts in {PATH.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
