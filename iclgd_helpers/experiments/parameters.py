"""Parameters of every notebook: one schema, presets, and the identity of a run."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from iclgd_helpers import paths
from iclgd_helpers.data.tasks import SETTINGS
from iclgd_helpers.errors import InputError, shortened
from iclgd_helpers.experiments import notebook_files

PRESETS = paths.PACKAGE / "presets"
OWN_TABLE = ("data_file", "template", "verbalizers", "label_column", "label_values")  # the first three are needed
DEVICE = r"auto|cpu|mps|(cuda|xpu)(:\d{1,2})?"  # what PyTorch computes on without a further package
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _number(value: Any) -> Any:
    """A number that was written as a text is that number; everything else stays what it is."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _whole(value: Any) -> Any:
    """The same for whole numbers, however they are written: 10, 10.0, 1e1."""
    value = _number(value)
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 2**53 else value


def _whole_characters(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half a character (a lone surrogate)") from None
    return value


Text = Annotated[str, AfterValidator(_whole_characters)]
Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]


class Parameters(BaseModel):
    """
    What every schema shares: values are typed strictly, unknown names are refused, nothing changes later.

    One thing is not strict: numbers may be texts (YAML 1.1 reads `1e-3` as one), and whole numbers may have a point.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class TheoryParameters(Parameters):
    """
    Parameters of the theory notebooks; each has at least the first two.

    `learning_rate` is the rate of the implied step; `recompute` trains again what is otherwise read from its record.
    Within the bounds every verdict holds: rounding has room, and loops over pairs of examples take seconds.
    """

    seed: Whole = Field(0, ge=0, lt=2**32)
    n_demonstrations: Whole = Field(16, ge=1, le=64)
    learning_rate: Number = Field(1.0, ge=1e-5, le=1e6)
    recompute: bool = False


class ExperimentParameters(Parameters):
    """
    Parameters of a run (model, task, seed); the defaults below are the original code's choices.

    Zero-shot and in-context learning are observed on `max_examples` questions, the other arms on the first
    `max_compared` of them (all, if None). Each description is the comment in the cells of parameters
    (`tools.notebooks`). A table of one's own: see `tasks.own_task`.
    """

    preset: str = Field(description="smoke, quick or paper: a set of values for everything left at None")
    model: Text = Field(description="a named model, a folder, or an id on the model hub")
    task: Text = Field(description="snippets, cb, sst2, sst5, subj, mr or agnews")
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
    separator: Literal["eos", "newline"] = Field(description="between demonstrations: eos or newline")
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
    conditioning: bool = Field(True, description="whether finetuning is repeated from weights moved by one rounding")


class PageParameters(Parameters):
    """What single pages have beside these; a name means the same wherever it stands."""

    n_clip_values: Whole = Field(2, ge=1, le=12, description="page 72: bounds in the sweep, for each kind of clipping")
    n_sweep_examples: Whole = Field(60, ge=1, description="page 72: test questions in the sweep")
    n_questions: Whole = Field(32, ge=2, description="page 76: test questions, at most")
    store: bool = Field(False, description="page 76: keep the summary under results/demonstration_attention")
    device_tflops: Number = Field(20.0, ge=1e-6, le=1e9, description="page 80: 10^12 operations a second, sustained")
    bench_file: Text = Field("results/bench/bench.json", description="page 80: what `make bench` has stored")
    other_model: Text = Field("tiny-gpt2", description="page 90: the model that is compared on the same questions")


Schema = TypeVar("Schema", bound=Parameters)


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


def one_of(kind: str, name: Any, known: Iterable[str]) -> None:
    """InputError with the nearest known name if `name` is none of them."""
    known = list(known)
    if name not in known:
        said = shortened(repr(name))
        close = difflib.get_close_matches(said.strip("'"), known, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(f"unknown {kind} {said}: {hint}known are {', '.join(known)}")


def _validated(schema: type[Schema], values: Mapping[str, Any]) -> Schema:
    try:
        return schema(**values)
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}={shortened(repr(e['input']))}: {e['msg']}" for e in error.errors())
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
        one_of("parameter", name, ExperimentParameters.model_fields)
    of_preset = preset(given.get("preset", "quick"))
    task = given.get("task", "own" if "data_file" in given else of_preset["task"])
    one_of("task", task, SETTINGS)
    settings = dict(SETTINGS[task])
    of_task = {
        "preset": "quick",
        "task": task,
        "max_examples": min(settings.pop("row_cap"), of_preset["max_examples"]),
    }
    if "data_source" not in given:
        of_task["data_source"] = _default_source(task, of_preset["data_source"], given)
    parameters = _validated(ExperimentParameters, {**of_preset, **settings, **of_task, **given})
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


def _default_source(task: str, preset_source: str, given: Mapping[str, Any]) -> str:
    """The preset's text source; a file or folder that was named wins, and only the default task lies on the index."""
    if task == "own":
        return "file"
    if "data_folder" in given:
        return "folder"
    if preset_source == "pypi" and task != "snippets":
        return "folder" if paths.data_folder() else "hub"
    return preset_source


def _check_combinations(given: ExperimentParameters) -> None:
    """InputError for values that are right alone, and not together, or not of a kind that the schema can name."""
    if not re.fullmatch(DEVICE, given.device, re.ASCII):
        what = f"device {shortened(repr(given.device))} cannot be used here"
        raise InputError(f"{what}: known are auto, cpu, cuda, cuda:0, …, mps, xpu; pass device=cpu")
    if given.data_folder is not None and given.data_source != "folder":
        raise InputError(f"data_folder is given, but data_source={given.data_source!r}: pass data_source=folder")
    is_own, table = given.task == "own", {name: getattr(given, name) for name in OWN_TABLE}
    if is_own and (missing := [name for name in OWN_TABLE[:3] if table[name] is None]):
        raise InputError(
            f"task=own needs {missing[0]}: pass data_file (a table), template ('Text: {{column}} Label:') and "
            "verbalizers ('negative,positive')"
        )
    if is_own != (given.data_source == "file"):
        raise InputError(
            f"data_source={given.data_source!r} with task={given.task!r}: "
            "task=own is read with data_source=file, and no other task is"
        )
    if not is_own and (foreign := [name for name, value in table.items() if value]):
        raise InputError(f"{foreign[0]} is given, but task={given.task!r} has its own: pass task=own")
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


def _named(schema: type[Parameters], namespace: Mapping[str, Any]) -> dict[str, Any]:
    return {name: namespace[name] for name in schema.model_fields if name in namespace}


def validate_for_notebook(notebook: str | Path, given: Mapping[str, Any]) -> Parameters:
    """
    The complete parameters that `notebook` would run with, given some.

    Raises
    ------
    InputError
        if the notebook is missing, has no such parameter, or a value is wrong.
    """
    notebook = Path(notebook)
    defaults = notebook_files.parameters_cell(notebook)
    for name in given:
        one_of(f"parameter of {notebook.name}", name, defaults)
    values = {**defaults, **given}
    own(values)
    return resolve(given_in(values)) if "preset" in defaults else theory(values)
