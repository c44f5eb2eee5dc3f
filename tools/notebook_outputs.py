"""
Says which notebooks are committed without what a reader is to see: `python -m tools.notebook_outputs FILE ...`.

Every code cell carries its execution count, and every cell whose verdict is compared its output: nbval compares
nothing with a cell that has none. Exit status 1 with one line for each notebook that lacks some.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

COMPARED = "nbval-check-output"


def fault(path: Path) -> str | None:
    """What the notebook lacks, and the way out; None if nothing."""
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]
        uncounted = sum(cell["execution_count"] is None for cell in code)
        silent = sum(COMPARED in cell["metadata"].get("tags", []) and not cell["outputs"] for cell in code)
        shown = any(cell["outputs"] for cell in code)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be read as a notebook ({type(error).__name__})"
    if code and (uncounted or silent or not shown):
        missing = f"{uncounted} without execution count, {silent} without the output that is compared"
        return f"of {len(code)} code cells {missing}: run `python -m tools.notebooks refresh {path}`"
    return None


def main(names: Sequence[str]) -> int:
    """Exit status 1 unless all notebooks carry their outputs."""
    faults = {name: found for name in names if (found := fault(Path(name)))}
    for name, found in faults.items():
        print(f"{name}: {found}", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
