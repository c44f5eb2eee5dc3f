"""
What makes a result the same result: the code that computed it, its parameters, and the content of data and model.

Recorded beside a result, but no part of its identity: where model and data lay, the device, and the versions of Python
and of libraries.
"""

from __future__ import annotations

import hashlib
import io
import json
import token
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.paths import PACKAGE, repository_root

# Modules whose code can change a number; the others draw, run and report.
ENGINE = (
    "data/chat",
    "data/demonstrations",
    "data/sources",
    "data/synthetic",
    "data/table_files",
    "data/task_files",
    "data/tasks",
    "data/token_layout",
    "engine/checkpoints",
    "engine/families",
    "engine/finetune",
    "engine/models",
    "engine/observe",
    "engine/own_attention",
    "engine/parts",
    "engine/prefix_attention",
    "engine/self_check",
    "experiments/arms",
    "experiments/comparison",
    "experiments/experiment",
    "experiments/inputs",
    "experiments/runs",
    "experiments/updates",
    "measures/calibration",
    "measures/intervals",
    "measures/metrics",
    "pinned_downloads",
)
# Parameters that say where something lies or runs, or what others were derived from.
WHERE = ("preset", "data_source", "data_folder", "data_file", "task_file", "device")
# Parameters that runs had not from the start: at these values a run is the one that was made without them.
AS_BEFORE: Mapping[str, Any] = {
    "label_score": "sum",
    "label_prefix": " ",
    "instruction": None,
    "chat": False,
    "too_long": "error",
    "first_row": 0,
    "n_calibration_rows": 0,
    "arms": None,
}

_LAYOUT = (token.COMMENT, token.NL, token.ENCODING, token.ENDMARKER)
# From Python 3.12 on, an f-string is many tokens; before, it was one.
_OPENING, _CLOSING = ({getattr(token, f"{kind}STRING_{end}", None) for kind in "FT"} for end in ("START", "END"))


def _lines(source: str) -> Iterator[list[str]]:
    """Logical lines of Python source as their tokens, in a form that is the same for every version of Python."""
    text, line, depth, start = source.splitlines(keepends=True), [], 0, (0, 0)
    for found in tokenize.generate_tokens(io.StringIO(source).readline):
        if found.type in _OPENING:
            start = start if depth else found.start
            depth += 1
        elif found.type in _CLOSING:
            depth -= 1
            line += [] if depth else [_between(text, start, found.end)]
        elif depth or found.type in _LAYOUT:
            continue
        elif found.type in (token.INDENT, token.DEDENT):
            yield ["{" if found.type == token.INDENT else "}"]
        elif found.type == token.NEWLINE:
            yield line
            line = []
        else:
            line.append(found.string)


def _between(text: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    rows = text[start[0] - 1 : end[0]]
    rows[-1] = rows[-1][: end[1]]
    rows[0] = rows[0][start[1] :]
    return "".join(rows)


def _computes(line: list[str]) -> bool:
    """Whether a logical line can change a number: docstrings and imports cannot."""
    return line[0] not in ("import", "from") and not all(word[-1:] in "'\"" and word[0] != "f" for word in line)


def source_form(source: str) -> str:
    """Python source without comments, docstrings, layout and imports."""
    return json.dumps([line for line in _lines(source) if _computes(line)])


def code_hash(files: Iterable[Path]) -> str:
    """
    Hash of Python files, in this order, in the form of `source_form`.

    Raises
    ------
    FileNotFoundError
        if one is missing: a hash of nothing would agree with every other.
    """
    code = "".join(source_form(path.read_text(encoding="utf-8")) for path in files)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


@cache
def source_hash() -> str:
    """Hash of the present helper code that can change a number."""
    return code_hash(PACKAGE / f"{name}.py" for name in ENGINE)


@cache
def proven_equal() -> dict[str, str]:
    """From `results/engines.json`: each hash that is proven to compute the same numbers -> that of the records."""
    path = repository_root() / "results" / "engines.json"
    found = storage.read_json(path)["engines"] if path.is_file() else {}
    return {equal: engine for engine, entry in found.items() for equal in entry["equal"]}


def same_engine(engine: str) -> str:
    """The name under which an engine's results are kept: its hash, or the one that it is proven equal to."""
    return proven_equal().get(engine, engine)


def engine_hash() -> str:
    """Identity of the present helpers: see `same_engine`."""
    return same_engine(source_hash())


def identifying(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters by which results are told apart: without those that have the value of before they were there."""
    return {name: value for name, value in parameters.items() if AS_BEFORE.get(name, ...) != value}


def run_id(parameters: Mapping[str, Any], engine: str, data_checksum: str, model: str) -> str:
    """
    Identity of a run's record.

    Parameters
    ----------
    parameters : by name; those in `WHERE` are left out.
    engine : as `engine_hash` has it.
    data_checksum : of everything that a model gets to see of the task.
    model : its content, as `checkpoints.content` has it.
    """
    values = {name: value for name, value in identifying(parameters).items() if name not in WHERE}
    values |= {"model": model, "device": "auto"}  # the device's name was once a part of it
    content = json.dumps([values, engine, data_checksum], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
