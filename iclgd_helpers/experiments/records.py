"""
Run records: one folder a run, found by identity.

`record.json` beside `examples.parquet` and, where priors were read, `calibration.parquet`.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError, reason
from iclgd_helpers.experiments import arms, provenance
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.paths import records_folder, resolve_path

JSON, PARQUET, CALIBRATION = "record.json", "examples.parquet", "calibration.parquet"
TABLES = {PARQUET: "examples_sha256", CALIBRATION: "calibration_sha256"}  # where the JSON holds their checksums
# Everything else in a record is determined by its identity, so two runs may differ in these keys alone.
VOLATILE = ("created", "timings", "environment")


@dataclass(frozen=True)
class Record:
    """
    A run's results.

    Parameters
    ----------
    json : plain: parameters, arms, comparisons, finetuning, …
    examples : one row a query.
    calibration : one row a text on which priors were read, those without content with a negative number; None where
        that was not asked for.
    """

    json: dict[str, Any]
    examples: pd.DataFrame
    calibration: pd.DataFrame | None = None

    @property
    def arms(self) -> dict[str, Any]:
        """What is known of each arm that holds numbers; `json["arms"]` has those that have diverged, too."""
        return {name: arm for name, arm in self.json["arms"].items() if not arm.get("diverged")}

    @property
    def diverged(self) -> list[str]:
        """The other arms."""
        return [name for name in self.json["arms"] if name not in self.arms]

    @property
    def comparisons(self) -> dict[str, Any]:
        """The same of the comparisons: those of which no arm has diverged."""
        return {name: found for name, found in self.json["comparisons"].items() if not found.get("diverged")}

    def column(self, name: str) -> NDArray[Any]:
        """A column of `examples` over the questions that all arms have seen, `[question, …]`; it is made once."""
        if name not in self._columns:
            values = self.examples[name].iloc[: self.json["n_compared"]].to_numpy()
            self._columns[name] = np.stack(list(values)) if values.dtype == object else values[:, None]
        return self._columns[name]

    @cached_property
    def _columns(self) -> dict[str, NDArray[Any]]:
        return {}

    @property
    def remarks(self) -> list[str]:
        """What a reader should know of the texts, a line each; mostly nothing."""
        found, lines = self.json, []
        if n := found.get("merged_prompts"):
            lines.append(f"Of {n} of {found['n_examples']} prompts the tokenizer merges the end with a label.")
        counts = {kind: found.get(f"dropped_{kind}s", 0) for kind in ("question", "demonstration")}
        long = [f"{n} {kind}" + "s" * (n > 1) for kind, n in counts.items() if n]
        if long:
            lines.append(f"Too long for the context, so left out: {' and '.join(long)}.")
        if labels := found.get("labels_not_in_training"):
            lines.append(f"No row of the training split has the label {', '.join(labels)}.")
        return lines


def is_current(record: Record) -> bool:
    """Whether helpers that compute the same numbers as the present ones made it."""
    return provenance.same_engine(record.json["engine"]) == provenance.engine_hash()


def run_id(parameters: ExperimentParameters, data_checksum: str, model: str) -> str:
    """Identity of a run by the present helpers: its parameters, and the content of its data and of its model."""
    return provenance.run_id(parameters.model_dump(), provenance.engine_hash(), data_checksum, model)


def save(record: Record, folder: Path | None = None) -> Path:
    """
    Write the record to its own folder below `folder`, which appears complete or not at all.

    A sound record that is there already stays: another run has stored the same at the same moment.

    Raises
    ------
    InputError
        if the disk is full or not writable.
    """
    final: Path = (folder or records_folder()) / record.json["id"]
    if _is_sound(final):
        return final
    tables = {PARQUET: record.examples, CALIBRATION: record.calibration}
    files = {name: _parquet(table) for name, table in tables.items() if table is not None}
    checksums = {TABLES[name]: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    files[JSON] = storage.json_bytes(record.json | checksums)
    try:
        storage.write_folder(final, files, "free space, or set ICLGD_RECORDS")
    except InputError:
        if not _is_sound(final):
            raise
    return final


def _parquet(table: pd.DataFrame) -> bytes:
    file = io.BytesIO()
    table.to_parquet(file, compression="zstd", index=False)
    return file.getvalue()


def _is_sound(path: Path) -> bool:
    try:
        return path.is_dir() and bool(load(path))
    except InputError:
        return False


def load(path: Path) -> Record:
    """
    The record in the folder `path`.

    Raises
    ------
    InputError
        if a part is missing, does not match its checksum, or belongs to another record.
    """
    before = _place(path)
    try:
        content = storage.checked_json((path / JSON).read_bytes())
        content["examples_sha256"]  # KeyError: there are always examples
        tables = {name: _table(path / name, content[key]) for name, key in TABLES.items() if key in content}
        record = Record(content, tables[PARQUET], tables.get(CALIBRATION))
        _check(path, record)
        return record
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if _place(path) != before:  # another process has just put a new one there
            return load(path)
        raise InputError(f"record {path} is damaged ({reason(error)}): delete that folder and run again") from None


def _table(path: Path, checksum: str) -> pd.DataFrame:
    parquet = path.read_bytes()
    if hashlib.sha256(parquet).hexdigest() != checksum:
        raise ValueError(f"{path.name} does not match its checksum")
    return pd.read_parquet(io.BytesIO(parquet))


def _place(path: Path) -> int | None:
    """What tells a folder from one that took its place."""
    return path.stat().st_ino if path.exists() else None


def _check(path: Path, record: Record) -> None:
    """A record has the identity in its folder's name, and holds the arms of its own parameters."""
    content, parameters = record.json, record.json["parameters"]
    model = content.get("model_content", parameters["model"])
    found = provenance.run_id(parameters, content["engine"], content["data_checksum"], model)
    if not content["id"] == found == path.name:
        raise ValueError(f"its parameters are those of {found}")
    chosen, only = parameters.get("chosen_rates") or (), parameters.get("arms")
    wanted = set(arms.names(parameters["controls"], chosen, only))
    tables = [table for table in (record.examples, record.calibration) if table is not None]
    columns = [{name.partition("/")[2] for name in table if name.startswith("log_probability/")} for table in tables]
    same_arms = all(found == wanted for found in (set(content["arms"]), *columns))
    if not same_arms or len(record.examples) != content["n_examples"]:
        raise ValueError("its arms or rows are not those of its parameters")
    if bool(parameters.get("n_calibration_rows")) != (record.calibration is not None):
        raise ValueError("its texts for priors are not those of its parameters")


def find(wanted: str, folder: Path | None = None) -> Record | None:
    """The record of that identity in `folder`, by default `paths.records_folder`; None if there is none."""
    path = (folder or records_folder()) / wanted
    return load(path) if path.exists() else None


def load_all(folder: str | Path) -> list[Record]:
    """All records below `folder` (relative to the repository root), in a fixed order."""
    return [load(path.parent) for path in sorted(resolve_path(folder).glob(f"*/{JSON}"))]


def copy_to(wanted: str, folder: Path) -> None:
    """Copy a stored record's files into `folder`."""
    for path in sorted((records_folder() / wanted).iterdir()):
        storage.write_bytes(folder / path.name, path.read_bytes())
