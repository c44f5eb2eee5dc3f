"""
Says that the present engine computes the numbers of the stored records: `python tests/engines.py`, from the root.

It compares the engine with `tests/golden.json`, number by number, and with rows of a committed record, and only then
writes its hash into `results/engines.json`, where records look which engines are the same. Run it after a change of the
engine that changes no number; where numbers change, records have to be made again.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import golden

from iclgd_helpers import storage
from iclgd_helpers.experiments import provenance
from iclgd_helpers.paths import repository_root

PATH = repository_root() / "results" / "engines.json"
TEST = "tests/exactness/test_engines.py::test_numbers_are_those_of_the_engine_of_the_records"
CLOSE = 1e-7  # relative to the largest number of a list: log-probabilities are stored in float32


def differences(stored: dict[str, list[float | None]], found: dict[str, list[float | None]]) -> list[str]:
    """Names of lists of numbers that are missing or not the same; an undefined number equals only itself."""
    wrong = []
    for name, old in stored.items():
        new = found.get(name, [])
        scale = max([1.0, *(abs(x) for x in old if x is not None)])
        pairs = zip(old, new, strict=False)
        same = len(old) == len(new) and all(
            a is b if a is None or b is None else abs(a - b) <= CLOSE * scale for a, b in pairs
        )
        wrong += [] if same else [name]
    return wrong


def accept(path: Path = PATH) -> None:
    """
    Write the present engine beside the one whose numbers it gives, in place of an earlier one of the same version.

    No record needs that one: what an accepted engine computes is stored under the name of the first.
    """
    stored, now = storage.parse_json(golden.PATH.read_bytes()), f"version {version('iclgd-helpers')}"
    content = storage.read_json(path) if path.is_file() else {"engines": {}}
    entry = content["engines"].setdefault(stored["engine"], {"equal": {}, "shown_by": TEST})
    equal = {engine: what for engine, what in entry["equal"].items() if what != now}
    entry["equal"] = equal | {provenance.source_hash(): now}
    storage.write_json(path, content)


def main() -> int:
    """Exit status 1, and nothing written, where a number differs."""
    stored = storage.parse_json(golden.PATH.read_bytes())
    for family, numbers in stored["cells"].items():
        if wrong := differences(numbers, golden.cell(family)):
            print(f"{family}: {len(wrong)} lists of numbers differ, {', '.join(wrong[:5])}", file=sys.stderr)
            return 1
    if golden.checksums() != stored["checksums"]:
        print("generated text differs", file=sys.stderr)
        return 1
    accept()
    print(f"{provenance.source_hash()} computes what {stored['engine']} did")
    return 0


if __name__ == "__main__":
    sys.exit(main())
