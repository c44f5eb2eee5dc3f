"""Parameters of every notebook: one schema, presets, and the identity of a run."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from iclgd_helpers import paths
from iclgd_helpers.errors import InputError
from iclgd_helpers.identity import engine_hash  # noqa: F401
from iclgd_helpers.paths import repository_root, resolve_path  # noqa: F401

PRESETS = paths.PACKAGE / "presets"

OWN_TABLE = ("data_file", "template", "verbalizers", "label_column", "label_values")  # the first three are needed


class Parameters(BaseModel):
    """What every schema shares: values are typed strictly, unknown names are refused, nothing changes later."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class TheoryParameters(Parameters):
    """
    Parameters of the theory notebooks; each has at least the first two.

    `learning_rate` is the rate of the implied step; `recompute` trains again what is otherwise read from its record.
    """

    seed: int = Field(0, ge=0, lt=2**32)
    n_demonstrations: int = Field(16, ge=1)
    learning_rate: float = Field(1.0, gt=0, allow_inf_nan=False)
    recompute: bool = False


class ExperimentParameters(Parameters):
    """
    Parameters of a cell (model, task, seed); the defaults below are the original code's choices.

    Zero-shot and in-context learning are observed on `max_examples` queries, the other arms on the first
    `max_compared` of them (all, if None). `order` permutes the demonstrations (0: as drawn). With `chosen_rates`
    (method -> rate) those methods are run a second time, at that rate. A table of one's own: see `tasks.own_task`.
    """

    preset: str
    model: str
    task: str
    seed: int = Field(ge=0, lt=2**32)
    data_source: Literal["hub", "folder", "pypi", "generated", "file"]
    data_folder: str | None = None
    data_file: str | None = None
    template: str | None = None
    verbalizers: str | None = None
    label_column: str | None = None
    label_values: str | None = None
    n_demonstrations: int = Field(ge=1)
    order: int = Field(0, ge=0)
    max_examples: int = Field(ge=1)
    max_compared: int | None = Field(None, ge=1)
    learning_rate: float = Field(ge=0, allow_inf_nan=False)
    chosen_rates: dict[Literal["standard", "joint", "sequential"], float] | None = None
    device: str
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"]
    separator: Literal["eos", "newline"]
    balanced: bool
    token_read: Literal["label", "prompt"] = "label"
    loss: Literal["all", "label", "label_space"] = "all"
    clip: Literal["none", "global", "per_layer", "elementwise"] = "none"
    clip_value: float | None = Field(None, gt=0, allow_inf_nan=False)
    equal_demonstrations: bool = True
    max_context: int = Field(2048, ge=8)
    untrained: Literal["blocks", "everything"] = "blocks"
    controls: bool = True
    conditioning: bool = True


@cache
def _yaml(name: str) -> dict[str, Any]:
    return yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml") if path.stem != "tasks")


def _one_of(kind: str, name: Any, known: Iterable[str]) -> None:
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown {kind} {name!r}: {hint}known are {', '.join(known)}")


def _validated(schema: type[Parameters], values: Mapping[str, Any]) -> Any:
    try:
        return schema(**values)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise InputError("bad parameter " + "; ".join(faults)) from None


def resolve(given: Mapping[str, Any]) -> ExperimentParameters:
    """
    Complete parameters from what was given (`None` counts as not given).

    A value is the one given, else the task's committed setting, else the preset's. Row limits are caps, so of the
    task's and the preset's the smaller one holds.

    Raises
    ------
    InputError
        for an unknown name, task or preset, a wrong type, or a folder given to a source that reads none.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        _one_of("parameter", name, ExperimentParameters.model_fields)
    values = {"preset": "quick"} | ({"task": "own"} if "data_file" in given else {}) | given
    _one_of("preset", values["preset"], presets())
    preset = _yaml(values["preset"])
    values.setdefault("task", preset["task"])
    _one_of("task", values["task"], _yaml("tasks"))
    settings = dict(_yaml("tasks")[values["task"]])
    settings["max_examples"] = min(settings.pop("row_cap"), preset["max_examples"])
    values = preset | settings | values
    if "data_source" not in given:
        values["data_source"] = _default_source(values["task"], preset["data_source"], given)
    parameters = _validated(ExperimentParameters, values)
    _check_combinations(parameters)
    if parameters.dtype == "auto":
        parameters = parameters.model_copy(update={"dtype": _half_on_a_gpu(parameters.device)})
    return parameters


def _half_on_a_gpu(device: str) -> str:
    """`dtype=auto`: the original code's half precision on a GPU, float32 elsewhere."""
    import torch  # slow to import, and of no use to bad input

    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return "float16" if on_gpu else "float32"


def given_in(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook's `globals()` hold of the schema's names: the values of its parameters cell."""
    return {name: namespace[name] for name in ExperimentParameters.model_fields if name in namespace}


def _default_source(task: str, preset_source: str, given: Mapping[str, Any]) -> str:
    """The preset's text source; a file or folder that was named wins, and only the default task lies on the index."""
    if task == "own":
        return "file"
    if "data_folder" in given:
        return "folder"
    if preset_source == "pypi" and task != "snippets":
        return "folder" if paths.data_folder() else "hub"
    return preset_source


def _check_combinations(parameters: ExperimentParameters) -> None:
    if parameters.data_folder is not None and parameters.data_source != "folder":
        raise InputError(f"data_folder is given, but data_source={parameters.data_source!r}: pass data_source=folder")
    own = {name: getattr(parameters, name) for name in OWN_TABLE}
    if parameters.task == "own" and None in (missing := {n: own[n] for n in OWN_TABLE[:3]}).values():
        name = next(name for name, value in missing.items() if value is None)
        raise InputError(
            f"task=own needs {name}: pass data_file (a table), template ('Text: {{column}} Label:') and "
            "verbalizers ('negative,positive')"
        )
    if (parameters.task == "own") != (parameters.data_source == "file"):
        raise InputError(
            f"data_source={parameters.data_source!r} with task={parameters.task!r}: "
            "task=own is read with data_source=file, and no other task is"
        )
    if parameters.task != "own" and any(own.values()):
        name = next(name for name, value in own.items() if value)
        raise InputError(f"{name} is given, but task={parameters.task!r} has its own: pass task=own")
    if (parameters.clip == "none") != (parameters.clip_value is None):
        raise InputError(f"clip={parameters.clip!r} with clip_value={parameters.clip_value}: give both, or neither")


def data_folder(parameters: ExperimentParameters) -> Path | None:
    """The folder of the six tasks: the parameter, else the environment variable `ICLGD_DATA`."""
    return resolve_path(parameters.data_folder) if parameters.data_folder else paths.data_folder()


def notebook_parameters(notebook: Path) -> dict[str, Any]:
    """
    Names and literal defaults in the cell of `notebook` that is tagged `parameters`.

    Raises
    ------
    InputError
        if the file is missing or no notebook, or that cell does more than assign literals.
    """
    import nbformat  # slow to import, and only of use to commands that run notebooks

    if not notebook.is_file():
        raise InputError(f"no notebook at {notebook}")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
        tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    except (ValueError, AttributeError, nbformat.ValidationError):  # text, JSON of another kind, half a notebook
        raise InputError(f"{notebook} is no notebook") from None
    if len(tagged) != 1:
        raise InputError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    try:
        found = {}
        for statement in ast.parse(tagged[0].source).body:
            (name,) = statement.targets  # neither `a = b = 3` nor `a: int = 3`: papermill reads them otherwise
            found[name.id] = ast.literal_eval(statement.value)
        return found
    except (ValueError, AttributeError, SyntaxError):
        raise InputError(f"{notebook.name}: its cell of parameters may only hold lines such as seed = 3") from None


def validate_for_notebook(notebook: str | Path, given: Mapping[str, Any]) -> Parameters:
    """
    The complete parameters that `notebook` would run with, given some.

    Raises
    ------
    InputError
        if the notebook is missing, has no such parameter, or a value is wrong.
    """
    notebook = Path(notebook)
    defaults = notebook_parameters(notebook)
    for name in given:
        _one_of(f"parameter of {notebook.name}", name, defaults)
    values = defaults | dict(given)
    if "preset" in defaults:
        return resolve(given_in(values))
    return theory(values)


def theory(namespace: Mapping[str, Any]) -> TheoryParameters:
    """Validated parameters of a theory notebook, taken from its `globals()`."""
    given = {name: namespace[name] for name in TheoryParameters.model_fields if name in namespace}
    return _validated(TheoryParameters, given)
