"""Parameters of every notebook: one schema, presets, and the identity of a run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from iclgd_helpers import paths
from iclgd_helpers.data.task_files import names_a_file
from iclgd_helpers.data.tasks import NAMES, OWN, SETTINGS, TASKS, from_file
from iclgd_helpers.errors import InputError, shortened
from iclgd_helpers.experiments import notebook_files
from iclgd_helpers.experiments.arms import NEEDED, OPTIONAL
from iclgd_helpers.schemas import Number, Schema, SomeText, Text, Whole, one_of

PRESETS = paths.PACKAGE / "presets"
OWN_TABLE = ("data_file", "template", "verbalizers", "label_column", "label_values")  # the first three are needed
PROMPT_FORMAT = ("separator", "label_prefix", "instruction", "chat", "label_score", "too_long")  # of the prompt
CHAT_FORMAT = {"separator": "eos", "label_prefix": ""}  # with a chat template, neither is read
DEVICE = r"auto|cpu|mps|(cuda|xpu)(:\d{1,2})?"  # what PyTorch computes on without a further package


def _listed(value: Any) -> Any:
    """Names that were written as one text, with commas, are a list; everything else stays what it is."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class TheoryParameters(Schema):
    """
    Parameters of the theory notebooks; each has at least the first two.

    `learning_rate` is the rate of the implied step; `recompute` trains again what is otherwise read from its record.
    Within the bounds every verdict holds: rounding has room, and loops over pairs of examples take seconds.
    """

    seed: Whole = Field(0, ge=0, lt=2**32)
    n_demonstrations: Whole = Field(16, ge=1, le=64)
    learning_rate: Number = Field(1.0, ge=1e-5, le=1e6)
    recompute: bool = False


class ExperimentParameters(Schema):
    """
    Parameters of a run (model, task, seed); the defaults below are the original code's choices.

    Zero-shot and in-context learning are observed on `max_examples` questions, the other arms on the first
    `max_compared` of them (all, if None). Each description is the comment in the cells of parameters
    (`tools.notebooks`). A table of one's own: see `tasks.own_task`.
    """

    preset: str = Field(description="smoke, quick or paper: a set of values for everything left at None")
    model: Text = Field(description="a named model, a folder, or an id on the model hub")
    task: Text = Field(description=f"{', '.join((NAMES[-1], *NAMES[:-2]))} or {NAMES[-2]}")
    task_file: Text | None = Field(None, description="a task of your own (.yaml); may be given as task, too")
    seed: Whole = Field(ge=0, lt=2**32, description="which demonstrations are drawn, and every other random choice")
    data_source: Literal["hub", "folder", "pypi", "generated", "file"] = Field(
        description="pypi, generated, folder or hub"
    )
    data_folder: Text | None = Field(None, description="where the tasks lie, if the source is a folder")
    data_file: Text | None = Field(
        None, description="a table of your own (.csv, .jsonl, .parquet): page 90 explains this name and the next four"
    )
    template: Text | None = Field(None, description="its prompt: 'Review: {text} Sentiment:'")
    verbalizers: Text | None = Field(None, description="its classes' words: 'negative,positive'")
    label_column: Text | None = Field(None, description="the column with its labels")
    label_values: Text | None = Field(None, description="what that column holds for each class: 'bad,good'")
    n_demonstrations: Whole = Field(ge=1, description="solved examples that are shown, or finetuned on")
    order: Whole = Field(0, ge=0, description="which permutation of the demonstrations; 0 is as drawn")
    max_examples: Whole = Field(ge=1, description="test questions, at most")
    first_row: Whole = Field(0, ge=0, description="test questions to pass over, from the first")
    n_calibration_rows: Whole = Field(
        0, ge=0, description="training texts, labels unread, on which an arm's prior is the mean answer; 0: no prior"
    )
    max_compared: Whole | None = Field(
        None, ge=1, description="test questions for the arms beside zero-shot and in-context, at most"
    )
    learning_rate: Number = Field(ge=0, allow_inf_nan=False, description="of the finetuning arms")
    chosen_rates: dict[Literal["standard", "joint", "sequential"], float] | None = Field(
        None, description="learning rates at which these methods are run a second time"
    )
    device: Text = Field(description="auto, cpu, cuda, …")
    dtype: Literal["auto", "float32", "float64", "bfloat16", "float16"] = Field(
        description="float32, float64, bfloat16, float16 or auto"
    )
    separator: SomeText = Field(description="between demonstrations: eos, newline or any text")
    label_prefix: Text = Field(" ", description="what stands between a prompt and its label")
    instruction: SomeText | None = Field(
        None, description="a text before the first demonstration, and before a question that has none"
    )
    chat: bool = Field(False, description="whether the tokenizer's chat template writes demonstrations as turns")
    too_long: Literal["error", "drop"] = Field(
        "error", description="a text too long for the context ends the run (error) or is left out (drop)"
    )
    balanced: bool = Field(description="as many demonstrations of each class: True or False")
    label_score: Literal["sum", "mean", "first"] = Field(
        "sum", description="score of a label of several tokens: sum or mean of their log-probabilities, or the first"
    )
    token_read: Literal["label", "prompt"] = Field(
        "label",
        description="attention is compared at the class-0 label token (label) or the last prompt token (prompt)",
    )
    loss: Literal["all", "label", "label_space"] = Field(
        "all",
        description="finetune on all tokens (all), the label token (label), or among the verbalizers (label_space)",
    )
    clip: Literal["none", "global", "per_layer", "elementwise"] = Field(
        "none", description="kind of gradient clipping: none, global, per_layer or elementwise"
    )
    clip_value: Number | None = Field(None, gt=0, allow_inf_nan=False, description="the bound of clipping")
    equal_demonstrations: bool = Field(
        True, description="finetune on the demonstrations that fit the context (True) or on all (False)"
    )
    max_context: Whole = Field(2048, ge=8, description="tokens that a prompt may have, at most")
    untrained: Literal["blocks", "everything"] = Field(
        "blocks", description="control with random blocks (blocks) or with everything random (everything)"
    )
    controls: bool = Field(True, description="whether the control arms are run")
    arms: Annotated[list[Literal[OPTIONAL]], BeforeValidator(_listed)] | None = Field(  # type: ignore[valid-type]
        None, description="arms that are run beside zero-shot and in-context (standard,joint); None: all"
    )
    conditioning: bool = Field(True, description="whether finetuning is repeated from weights moved by one rounding")


class PageParameters(Schema):
    """What single pages have beside these; a name means the same on every page."""

    n_clip_values: Whole = Field(1, ge=1, le=12, description="page 72: bounds in the sweep, for each kind of clipping")
    n_sweep_examples: Whole = Field(60, ge=1, description="page 72: test questions in the sweep")
    n_questions: Whole = Field(32, ge=2, description="page 76: test questions, at most")
    store: bool = Field(False, description="page 76: keep the summary under results/demonstration_attention")
    device_tflops: Number = Field(20.0, ge=1e-6, le=1e9, description="page 80: 10^12 operations a second, sustained")
    device_bandwidth: Number = Field(
        2.0, ge=1e-6, le=1e9, description="page 80: 10^12 bytes a second between memory and processor"
    )
    bench_file: Text = Field("results/bench/bench.json", description="page 80: what `make bench` has stored")
    other_model: Text = Field("tiny-gpt2", description="page 90: the model that is compared on the same questions")


Given = TypeVar("Given", bound=Schema)


def presets() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def known_preset(name: Any) -> str:
    """`name`, if it is a preset's; InputError if not."""
    one_of("preset", name, presets())
    return str(name)


def preset(name: Any) -> Mapping[str, Any]:
    """The values of a preset; InputError if there is no such."""
    return _yaml(known_preset(name))


@cache
def _yaml(name: str) -> Mapping[str, Any]:
    found: dict[str, Any] = yaml.safe_load((PRESETS / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def text_names() -> set[str]:
    """Names of the parameters that are texts, even where the text looks like a number."""
    fields = ExperimentParameters.model_fields | PageParameters.model_fields
    kinds = {name: list(_choices(field.annotation)) for name, field in fields.items()}
    return {name for name, choices in kinds.items() if any(one is str or isinstance(one, str) for one in choices)}


def _choices(annotation: Any) -> Iterator[Any]:
    """The types that an annotated value may have, and the values of a `Literal`."""
    parts = get_args(annotation)
    yield from (choice for part in parts for choice in _choices(part)) if parts else (annotation,)


def _validated(schema: type[Given], values: Mapping[str, Any]) -> Given:
    try:
        return schema(**values)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}={shortened(repr(e['input']))}: {e['msg']}" for e in error.errors())
        raise InputError("bad parameter " + "; ".join(faults)) from None


def resolve(given: Mapping[str, Any]) -> ExperimentParameters:
    """
    Complete parameters from what was given (`None` counts as not given).

    A value is the one given, else the task's committed setting, else the preset's. Row limits are caps, so of the
    task's and the preset's the smaller one holds. A task that is given as a file becomes its name and `task_file`.

    Raises
    ------
    InputError
        for an unknown name, task or preset, a wrong type, or a folder that the source does not read. The faults of a
        task file have a line each.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        one_of("parameter", name, ExperimentParameters.model_fields)
    of_preset = preset(given.get("preset", "quick"))
    task = given.get("task", OWN if "data_file" in given else of_preset["task"])
    if "task_file" in given or names_a_file(task):
        task, settings, named = _task_file(given)
        given |= named
    else:
        one_of("task", task, SETTINGS)
        settings = dict(SETTINGS[task])
    of_task = {
        "preset": "quick",
        "task": task,
        "max_examples": min(settings.pop("row_cap"), of_preset["max_examples"]),
    }
    if "data_source" not in given:
        of_task["data_source"] = _default_source(task, of_preset["data_source"], given)
    values = {**of_preset, **settings, **of_task, **given}
    if values.get("chat") is True:  # its template writes what a task's settings say of plain text
        values |= CHAT_FORMAT | {name: given[name] for name in CHAT_FORMAT if name in given}
    parameters = _validated(ExperimentParameters, values)
    _check_combinations(parameters)
    if parameters.dtype == "auto":
        return parameters.model_copy(update={"dtype": half_on_a_gpu(parameters.device)})
    return parameters


def combinations(given: Mapping[str, Any], over: Mapping[str, Sequence[Any]]) -> list[ExperimentParameters]:
    """
    Every combination of the values in `over` (parameter -> values), with `given` in all of them.

    Raises
    ------
    InputError
        if any of them has a wrong value.
    """
    names = [name for name, values in over.items() if values]
    products = itertools.product(*(dict.fromkeys(over[name]) for name in names))  # twice the same: once
    return [resolve({**given, **dict(zip(names, values, strict=True))}) for values in products]


def half_on_a_gpu(device: str) -> str:
    """`dtype=auto`: the original code's half precision on a GPU, float32 elsewhere."""
    import torch  # slow to import, and of no use to bad input

    on_gpu = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    return "float16" if on_gpu else "float32"


def _task_file(given: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Of the task file that is given: the task's name, what it sets, and the parameters that name it."""
    path = given.get("task_file", given.get("task"))
    if not isinstance(path, str):
        raise InputError(f"task_file={shortened(repr(path))}: name a file")
    path = paths.resolve_path(path)
    task, settings = from_file(path)
    other = given.get("task", task.name)
    if other != task.name and not names_a_file(other):
        raise InputError(f"task={shortened(repr(other))} with task_file={path.name!r}, which is another: give one")
    source = {} if "data_source" in given or "data_folder" in given else {"data_source": task.sources[0]}
    return task.name, settings, {"task": task.name, "task_file": str(path), **source}


def _default_source(task: str, preset_source: str, given: Mapping[str, Any]) -> str:
    """The preset's text source; a file or folder that was named wins, and only the default task is on the index."""
    if task == OWN:
        return "file"
    if "data_folder" in given:
        return "folder"
    if preset_source == "pypi" and preset_source not in TASKS[task].sources:
        return "folder" if paths.data_folder() else "hub"
    return preset_source


def _check_combinations(given: ExperimentParameters) -> None:
    """InputError for values that are right alone, and not together, or not of a kind that the schema can name."""
    if not re.fullmatch(DEVICE, given.device, re.ASCII):
        what = f"device {shortened(repr(given.device))} cannot be used here"
        raise InputError(f"{what}: known are auto, cpu, cuda, cuda:0, …, mps, xpu; pass device=cpu")
    if given.data_folder is not None and given.data_source != "folder":
        raise InputError(f"data_folder is given, but data_source={given.data_source!r}: pass data_source=folder")
    is_own, table = given.task == OWN, {name: getattr(given, name) for name in OWN_TABLE}
    if is_own and (missing := [name for name in OWN_TABLE[:3] if table[name] is None]):
        raise InputError(
            f"task=own needs {missing[0]}: pass data_file (a table), template ('Text: {{column}} Label:') and "
            "verbalizers ('negative,positive')"
        )
    if is_own != (given.data_source == "file") and given.task_file is None:
        raise InputError(
            f"data_source={given.data_source!r} with task={given.task!r}: "
            "task=own is read with data_source=file, and no other task is"
        )
    if not is_own and (foreign := [name for name, value in table.items() if value]):
        raise InputError(f"{foreign[0]} is given, but task={given.task!r} has its own: pass task=own")
    if given.chat and (other := [name for name, value in CHAT_FORMAT.items() if getattr(given, name) != value]):
        raise InputError(f"{other[0]} is given with chat=True, whose template writes that: leave it out")
    for name in given.arms or ():
        if missing := [other for other in NEEDED.get(name, ()) if other not in (given.arms or ())]:
            raise InputError(f"arms has {name!r}, which needs {', '.join(missing)}: add it, or leave {name!r} out")
    if (given.clip == "none") != (given.clip_value is None):
        raise InputError(f"clip={given.clip!r} with clip_value={given.clip_value}: give both, or neither")


def own(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """Validated values of the parameters that only single pages have, taken from a page's `globals()`."""
    given = _named(PageParameters, namespace)
    return _validated(PageParameters, given).model_dump(include=set(given))


def theory(namespace: Mapping[str, Any]) -> TheoryParameters:
    """Validated parameters of a theory notebook, taken from its `globals()`."""
    return _validated(TheoryParameters, _named(TheoryParameters, namespace))


def given_in(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """What a notebook's `globals()` hold of the schema's names: the values of its parameters cell."""
    return _named(ExperimentParameters, namespace)


def _named(schema: type[Schema], namespace: Mapping[str, Any]) -> dict[str, Any]:
    return {name: namespace[name] for name in schema.model_fields if name in namespace}


def validate_for_notebook(notebook: str | Path, given: Mapping[str, Any]) -> Schema:
    """
    The complete parameters that `notebook` would run with, given some of its cell's or, for a task, of its format.

    Raises
    ------
    InputError
        if the notebook is missing, has no such parameter, or a value is wrong.
    """
    notebook = Path(notebook)
    defaults = notebook_files.parameters_cell(notebook)
    known = dict.fromkeys([*defaults, *(PROMPT_FORMAT if "task" in defaults else ())])
    for name in given:
        one_of(f"parameter of {notebook.name}", name, known)
    values = {**defaults, **given}
    own(values)
    return resolve(given_in(values)) if "preset" in defaults else theory(values)
