"""Run one notebook with checked parameters."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from iclgd_helpers import storage
from iclgd_helpers.engine import checkpoints
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import inputs, live_lines, notebook_files
from iclgd_helpers.experiments.parameters import ExperimentParameters, own, validate_for_notebook
from iclgd_helpers.experiments.provenance import engine_hash
from iclgd_helpers.paths import records_folder, resolve_here, resolve_path
from iclgd_helpers.schemas import Schema

BENCH_KEYS = {"sections", "targets", "machine"}  # of what `make bench` writes


def default_folder(notebook: Path, given: Mapping[str, Any], parameters: Schema) -> Path:
    """`_runs/<page>-<hash of parameters, the page's own among them, and helper code>` in the repository."""
    others = {name: value for name, value in given.items() if name not in type(parameters).model_fields}
    content = json.dumps([parameters.model_dump() | others, engine_hash()], sort_keys=True)
    return resolve_path(f"_runs/{notebook.stem}-{hashlib.sha256(content.encode()).hexdigest()[:12]}")


def run(notebook: Path, given: Mapping[str, Any], output: Path | None = None, progress: bool = False) -> Path:
    """
    Check the parameters, execute the notebook, and put it and its record into one folder.

    Returns
    -------
    Path
        the folder: the executed notebook and, if the page used its run's record, `record.json` and
        `examples.parquet`.

    Raises
    ------
    InputError
        for bad input; what can be known beforehand is reported before a kernel starts.
    CellError
        if a cell fails for another reason.
    """
    notebook = resolve_here(notebook)
    parameters = validate_for_notebook(notebook, given)
    folder = resolve_here(output) if output else default_folder(notebook, given, parameters)
    target = folder / notebook.name
    _check_target(notebook, target)
    identity = _looked_for(notebook, given, parameters) if isinstance(parameters, ExperimentParameters) else None
    existed = folder.exists()
    storage.require_writable(folder)
    live_lines.starting()
    notebook_files.library()
    from iclgd_helpers.experiments import notebook_execution  # slow to import, and of no use to bad input

    try:
        notebook_execution.execute(notebook, target, given, progress)
    except InputError:
        with suppress(OSError):
            if not existed:
                folder.rmdir()
        raise
    if identity and (records_folder() / identity).is_dir():  # not every page makes a whole run
        from iclgd_helpers.experiments import records

        records.copy_to(identity, folder)
    return folder


def _check_target(notebook: Path, target: Path) -> None:
    """InputError if the output would take the place of a notebook that no run has written."""
    if os.path.exists(target) and (target.samefile(notebook) or not notebook_files.is_output(target)):
        raise InputError(f"{target} is there, and no output of a run: name another folder with --output")


def _looked_for(notebook: Path, given: Mapping[str, Any], parameters: ExperimentParameters) -> str | None:
    """The identity of the page's run when all that it names is there; None where the page brings its own text."""

    values = own(notebook_files.parameters_cell(notebook) | dict(given))
    if "bench_file" in values:
        _check_bench(resolve_path(values["bench_file"]))
    if "other_model" in values:
        checkpoints.content(values["other_model"])
        if not any(given.get(name) for name in ("task", "data_file", "data_folder")):
            inputs.check_device(parameters.device)
            checkpoints.content(parameters.model)
            return None
    (identity,) = inputs.check([parameters])
    if any("experiment.run(" in cell.source for cell in notebook_files.read_cells(notebook)):
        inputs.require_room([identity], records_folder())
    return identity


def _check_bench(path: Path) -> None:
    try:
        known = storage.read_json(path).keys() if path.is_file() else BENCH_KEYS
    except InputError:
        known = set()
    if not BENCH_KEYS <= known:
        raise InputError(f"bench_file {path} is no measurement, or damaged: pass what `make bench` wrote")
