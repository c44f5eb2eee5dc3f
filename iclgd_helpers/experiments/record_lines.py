"""Stored records as lines of text: listed, shown, compared, and why one is no longer current."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from iclgd_helpers.errors import InputError, shortened
from iclgd_helpers.experiments import provenance, records
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.records import Record, is_current
from iclgd_helpers.paths import resolve_here


def listed(folder: Path) -> Iterator[str]:
    """Identity, model, task, seed, questions, demonstrations, date, and whether it is current."""
    found = records.load_all(folder)
    yield f"{'record':<18}{'model':<28}{'task':<10}{'seed':>5}{'n':>6}{'demos':>7}  {'created':<12}helpers"
    for record in found:
        content, given = record.json, record.json["parameters"]
        numbers = f"{given['seed']:>5}{content['n_examples']:>6}{content['n_demonstrations']:>7}"
        state = "current" if is_current(record) else "older"
        name = shortened(Path(given["model"]).name, 27)
        yield f"{content['id']:<18}{name:<28}{given['task']:<10}{numbers}  {content['created'][:10]:<12}{state}"
    yield f"{len(found)} records in {folder}"


def currency(folder: Path) -> Iterator[str]:
    """How many records are current, and of each other one the reason."""
    found = records.load_all(folder)
    older = [record for record in found if not is_current(record)]
    yield f"{len(found) - len(older)} of {len(found)} records are current: helpers {provenance.engine_hash()}"
    for record in older:
        engine = record.json["engine"]
        yield f"{record.json['id']}: made by helpers {engine}, which are not shown to compute the same numbers"


def found(name: str, folder: Path) -> Record:
    """
    The record in the folder `name`, or the one whose identity begins with `name`.

    Raises
    ------
    InputError
        if there is none, or more than one.
    """
    here = resolve_here(name)
    if (here / records.JSON).is_file():
        return records.load(here)
    several = [path for path in sorted(folder.glob(f"*/{records.JSON}")) if path.parent.name.startswith(name)]
    if len(several) != 1:
        what = f"{len(several)} records in {folder} begin with {shortened(repr(name))}"
        raise InputError(f"{what}: see `iclgd records list`, and name the folder with --records")
    return records.load(several[0].parent)


def shown(name: str, folder: Path) -> Iterator[str]:
    """Parameters that are not the defaults, accuracies of all arms, and what made the record."""
    record = found(name, folder)
    content = record.json
    yield f"record {content['id']}, {'current' if is_current(record) else 'older helpers'}, {content['created']}"
    defaults = {name: field.default for name, field in ExperimentParameters.model_fields.items()}
    for parameter, value in content["parameters"].items():
        if value is not None and value != defaults.get(parameter, value if parameter == "preset" else object()):
            yield f"  {parameter} = {value}"
    for arm, one in content["arms"].items():
        interval = one["accuracy_interval"]
        text = "diverged" if arm in record.diverged else f"{one['accuracy']:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
        yield f"  accuracy of {arm:<24}{text}, n = {one['n']}"
    yield from (f"  {line}" for line in record.remarks)
    yield "  made with " + ", ".join(f"{key} {value}" for key, value in content["environment"].items())


def compared(first: str, second: str, folder: Path) -> tuple[list[str], bool]:
    """What differs between two records, as lines; whether their numbers are the same."""
    one, other = found(first, folder), found(second, folder)
    lines = list(_differences("", *(_settled(record) for record in (one, other))))
    lines += _columns(one, other)
    numbers = [line for line in lines if not line.startswith(("parameters", "engine", "id"))]
    return [*lines, "their numbers are the same" if not numbers else f"{len(numbers)} entries differ"], not numbers


def _settled(record: Record) -> dict[str, Any]:
    """A record's content, without the entries in which two runs of one identity may differ."""
    left_out = (*records.VOLATILE, "examples_sha256")
    return {name: value for name, value in record.json.items() if name not in left_out}


def _differences(where: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted(one.keys() | other.keys()):
            yield from _differences(f"{where}.{name}".lstrip("."), one.get(name), other.get(name))
    elif one != other:
        yield f"{where}: {shortened(str(one), 60)} / {shortened(str(other), 60)}"


def _columns(one: Record, other: Record) -> Iterator[str]:
    """The columns of numbers that differ, each with its largest difference."""
    ours, theirs = one.examples, other.examples
    for name in sorted({*ours, *theirs}):
        if name not in ours or name not in theirs or len(ours) != len(theirs):
            yield f"examples {name}: not in both"
            continue
        pairs = [(np.atleast_1d(a), np.atleast_1d(b)) for a, b in zip(ours[name], theirs[name], strict=True)]
        if any(a.shape != b.shape for a, b in pairs):
            yield f"examples {name}: of other shapes"
        elif not all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs):
            yield f"examples {name}: up to {max(float(np.nanmax(np.abs(a - b))) for a, b in pairs):.3g}"
