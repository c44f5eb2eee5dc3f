"""What a page was made with, and where its numbers come from: its second and its last cells."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import pandas as pd
import torch
from IPython.display import HTML

from iclgd_helpers.experiments import provenance
from iclgd_helpers.experiments.parameters import ExperimentParameters, TheoryParameters
from iclgd_helpers.experiments.records import Record, is_current
from iclgd_helpers.pages import tables

THEORY = ("torch", "numpy", "pandas", "matplotlib")
MODELS = ("torch", "transformers", "numpy", "pandas", "matplotlib")
PRINTED = ("torch", "transformers", "datasets", "numpy", "pandas", "matplotlib")


def environment(packages: Sequence[str] = THEORY, **more: object) -> dict[str, object]:
    """Versions of Python and of packages, and more facts, in this order."""
    return {"python": platform.python_version()} | {name: version(name) for name in packages} | more


def as_table(facts: Mapping[str, object], heading: str = "environment") -> HTML:
    """Facts below one another, under a heading."""
    return tables.table(pd.Series(facts).rename(heading).to_frame())


def _device(name: str) -> str:
    from iclgd_helpers.engine import models  # imports transformers, of which pages of theory have no need

    return models.choose_device(name)


def with_model(device: str) -> pd.DataFrame:
    """Environment of a page that runs a model on a device (`auto` or by name)."""
    facts = {"threads": torch.get_num_threads(), "helpers": provenance.engine_hash()}
    return as_table(environment(MODELS, device=_device(device), **facts))


def theory_run(p: TheoryParameters, started: float) -> pd.DataFrame:
    """Parameters of a page of theory, and how long it took since `started` (`time.perf_counter`)."""
    spent = {"seconds, whole page": round(time.perf_counter() - started, 1)}
    return as_table(p.model_dump() | spent | {"random": "one torch.Generator from seed"}, "provenance")


def print_environment(p: ExperimentParameters | None = None, apart: str = ", ") -> None:
    """System, versions with `apart` between them, and helpers; with parameters, their device and precision as well."""
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(apart.join(f"{name} {version(name)}" for name in PRINTED))
    device = f"device {_device(p.device)}, {p.dtype}, " if p else ""
    print(f"{device}helpers {provenance.engine_hash()}")


def print_record(record: Record, *more: str) -> None:
    """Identity of a record, more lines, and the time and the environment of its computation."""
    found = record.json
    lines = [f"run {found['id']}, computed {found['created']}"]
    lines += [f"helpers {found['engine']} (the present ones: {is_current(record)})"]
    lines += [f"data {found['data_checksum'][:16]}", *more]
    lines += [f"{name}: {value} s" for name, value in found["timings"].items()]
    lines += [f"{name}: {value}" for name, value in found["environment"].items()]
    print("\n".join(lines))


def of_record(record: Record, n_grid: int) -> pd.DataFrame:
    """Provenance of a live run beside so many records of the grid."""
    found = record.json
    facts: dict[str, Any] = {"run": found["id"], "helpers": found["engine"]}
    facts |= {"computed by the present helpers": is_current(record), "data": found["data_checksum"][:16]}
    facts |= {"created": found["created"], "records of the grid": n_grid}
    facts |= found["environment"] | {f"seconds, {stage}": spent for stage, spent in found["timings"].items()}
    return pd.Series(facts, name="provenance").astype(str).to_frame()
