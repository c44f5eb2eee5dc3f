"""Run records: one folder a cell, `record.json` beside `examples.parquet`, written atomically, found by identity."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from iclgd_helpers import parameters as schema
from iclgd_helpers.errors import InputError
from iclgd_helpers.parameters import ExperimentParameters, repository_root, resolve_path
from iclgd_helpers.tasks import task_data

JSON, PARQUET = "record.json", "examples.parquet"
# Everything else in a record is determined by its identity, so two runs may differ in these keys alone.
VOLATILE = ("created", "timings", "environment")


@dataclass(frozen=True)
class Record:
    """A cell's results: `json` (parameters, arms, comparisons, finetuning, …) and `examples`, one row a query."""

    json: dict[str, Any]
    examples: pd.DataFrame

    def __post_init__(self) -> None:
        # The same object whether just computed or read back: undefined values are None, sequences are lists.
        object.__setattr__(self, "json", plain(self.json))

    @property
    def is_current(self) -> bool:
        """Whether the helpers that computed it are the present ones."""
        return self.json["engine"] == schema.engine_hash()


def records_folder() -> Path:
    """Where records are kept: `$ICLGD_RECORDS`, else `_runs/records`."""
    return resolve_path(os.environ.get("ICLGD_RECORDS") or repository_root() / "_runs" / "records")


def require_writable(folder: Path) -> None:
    """
    Make `folder`, and try to write to it: before anything is computed that could not be stored there.

    Raises
    ------
    InputError
        if that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): needed is a folder that can be written and has space"
        ) from None


def record_id(parameters: ExperimentParameters) -> str:
    """Identity of the cell: its parameters, the helpers' code, and the content of its data."""
    return schema.run_id(parameters, task_data(parameters).checksum)


def save(record: Record, folder: Path | None = None) -> Path:
    """
    Write the record to its own folder below `folder`; the folder appears complete or not at all.

    Raises
    ------
    InputError
        if the disk is full or not writable.
    """
    parent = folder or records_folder()
    final = parent / record.json["id"]
    parquet = io.BytesIO()
    record.examples.to_parquet(parquet, compression="zstd", index=False)
    content = record.json | {"examples_sha256": hashlib.sha256(parquet.getvalue()).hexdigest()}
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=parent) as temporary:
            part = Path(temporary) / final.name
            part.mkdir()
            (part / PARQUET).write_bytes(parquet.getvalue())
            (part / JSON).write_text(_text(content | {"json_sha256": _checksum(content)}), encoding="utf-8")
            _put_in_place(part, final, Path(temporary) / "replaced")
    except OSError as error:
        way_out = "free space, or set ICLGD_RECORDS"
        raise InputError(f"cannot write the record to {final} ({error.strerror}): {way_out}") from None
    return final


def _put_in_place(part: Path, final: Path, replaced: Path) -> None:
    """Rename `part` to `final`; another run that stores the same record at the same moment may come first."""
    try:
        if final.exists():
            final.rename(replaced)
        part.rename(final)
    except OSError:
        if not (final / JSON).exists():
            raise


def load(path: Path) -> Record:
    """
    The record in the folder `path`.

    Raises
    ------
    InputError
        if a part is missing or does not match its checksum.
    """
    try:
        content = json.loads((path / JSON).read_text(encoding="utf-8"))
        if content.pop("json_sha256") != _checksum(content):
            raise ValueError(f"{JSON} does not match its checksum")
        parquet = (path / PARQUET).read_bytes()
        if hashlib.sha256(parquet).hexdigest() != content["examples_sha256"]:
            raise ValueError(f"{PARQUET} does not match its checksum")
        return Record(content, pd.read_parquet(io.BytesIO(parquet)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"record {path} is damaged ({error}): delete that folder and run again") from None


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _checksum(content: Mapping[str, Any]) -> str:
    """Of the content, however its file is laid out."""
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


NUMBER = r"(?:-?\d[-+.\deE]*|null)"
NUMBERS = re.compile(rf"\[\n\s+({NUMBER}(?:,\n\s+{NUMBER})*)\n\s+\]")


def _text(content: Mapping[str, Any]) -> str:
    """The file's text: keys in order, a list of numbers on one line (a fifth of the size is saved)."""
    return NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", _canonical(content))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """
    Write `content`, NaN as null, keys in order; the file appears complete or not at all.

    Raises
    ------
    InputError
        if the disk is full or not writable.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # two processes never share one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(_text(plain(content)), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error.strerror}): free space, or make it writable") from None


def read_json(path: Path) -> dict[str, Any]:
    """
    What `write_json` wrote.

    Raises
    ------
    InputError
        if the file is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names")
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): delete it and run again") from None
    return content


def file_name(model: str) -> str:
    """A model's name as part of a file's: an id keeps its owner, a folder its last part and a hash of its path."""
    if not Path(model).is_absolute():
        return model.replace("/", "--")
    return f"{Path(model).name}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def find(identity: str) -> Record | None:
    """The stored record of that identity, or None."""
    path = records_folder() / identity
    return load(path) if path.exists() else None


def load_all(folder: str | Path) -> list[Record]:
    """All records below `folder` (relative to the repository root), in a fixed order."""
    return [load(path.parent) for path in sorted(resolve_path(folder).glob(f"*/{JSON}"))]


def copy_to(identity: str, folder: Path) -> None:
    """Copy a stored record's two files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (PARQUET, JSON):
        part = folder / f".part-{name}"
        shutil.copyfile(records_folder() / identity / name, part)
        part.replace(folder / name)


def plain(value: Any) -> Any:
    """`value` as JSON holds it: NaN becomes null, tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
