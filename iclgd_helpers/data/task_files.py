"""
A task as a file: what it may hold, how it is read, and one line for each fault.

Every task of the book is such a file in `tasks/`, and so is one of the reader's own (`-p task ./my_task.yaml`).
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from iclgd_helpers.errors import InputError, reason, shortened
from iclgd_helpers.schemas import Number, Schema, SomeText, Text, Whole

MAX_BYTES = 2**16
MAX_DEPTH = 5  # of lists and fields within each other
ENDINGS = (".yaml", ".yml")


class Hub(Schema):
    """A data set of the model hub, and its splits; files of a folder have the splits' names."""

    hub_id: Text | None = None
    hub_config: Text | None = None
    train_split: Text = "train"
    evaluation_split: Text = "validation"


class Settings(Schema):
    """Parameters that a run of the task has unless it is told otherwise; `row_cap`: test questions, at most."""

    seed: Whole = Field(0, ge=0, lt=2**32)
    n_demonstrations: Whole = Field(16, ge=1)
    learning_rate: Number = Field(0.003, ge=0, allow_inf_nan=False)
    balanced: bool = False
    row_cap: Whole = Field(2000, ge=1)
    separator: SomeText = "eos"
    label_prefix: Text | None = None
    instruction: SomeText | None = None
    chat: bool | None = None
    label_score: Literal["sum", "mean", "first"] | None = None
    too_long: Literal["error", "drop"] | None = None


class TaskFile(Schema):
    """
    The fields of a file; `title`, `template` and `verbalizers` are needed.

    `template` holds columns' names in braces. `label_values` is what `label_column` holds for each class, in the order
    of the verbalizers. Without it these are 0, 1, …, or in a table of the reader's the verbalizers. `data_file` is one
    table, of which a half is the questions. `licence` and `source` note what is known of the text. `order` and `cues`
    (words of the grammar that tell a class) are for the tasks of the book.
    """

    title: Text = Field(max_length=60)
    template: Text
    verbalizers: list[Text]
    label_column: Text = "label"
    label_values: list[Text | int] | None = None
    data_file: Text | None = None
    hub: Hub = Hub()
    sources: list[Literal["pypi", "hub", "folder", "generated", "file"]] | None = Field(None, min_length=1)
    settings: Settings = Settings.model_validate({})
    licence: Text | None = None
    source: Text | None = None
    order: Whole = 0
    cues: list[Text] | None = None


def names_a_file(task: Any) -> bool:
    """Whether a task is given as a path: its name ends as a YAML file's, or has a separator of folders."""
    return isinstance(task, str) and (task.lower().endswith(ENDINGS) or "/" in task)


def read(path: Path) -> TaskFile:
    """
    The task in a file.

    Raises
    ------
    InputError
        if it cannot be read, or with one line for each field that is missing, unknown or wrong.
    """
    content, where = _content(path), shortened(path.name)
    if not isinstance(content, dict):
        raise InputError(f"{where} holds no fields: write lines like 'title: My task'")
    try:
        return TaskFile(**{str(name): value for name, value in content.items()})
    except ValidationError as error:
        lines = [f"{where}: {_fault(dict(one))}" for one in error.errors()]
        raise InputError("\n".join(dict.fromkeys(lines))) from None


def _content(path: Path) -> Any:
    """The content of the YAML. References to other places in it are refused: a few lines of them can be gigabytes."""
    where = shortened(path.name)
    if not path.is_file():
        raise InputError(f"no task file at {shortened(str(path))}: name a file that ends in {' or '.join(ENDINGS)}")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise InputError(f"{where} is larger than {MAX_BYTES:,} bytes: a task file holds no texts")
        _check_events(text, where)
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None and (name := _twice(root)):
            raise InputError(f"{where} has the field {shortened(repr(name))} twice: keep one")
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise InputError(f"{where}{line} is no YAML ({shortened(error.problem or '')}): correct it") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where} cannot be read ({reason(error)})") from None


def _check_events(text: bytes, where: str) -> None:
    """Refuse what a few lines can make endless, before anything is built: references, and lists within lists."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{where} refers to another place in it (*name): write it out")
        if depth > MAX_DEPTH:
            raise InputError(f"{where} nests deeper than a task needs: write values as on the page How to use")


def _twice(node: yaml.Node) -> str | None:
    """The first field that is twice in one place; of two, YAML would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return None
    names = [str(key.value) for key, _value in node.value]
    doubled = (name for name in names if names.count(name) > 1)
    return next(doubled, None) or next(filter(None, (_twice(value) for _key, value in node.value)), None)


def _fault(error: dict[str, Any]) -> str:
    """One of pydantic's errors in this project's words."""
    place = [part for part in error["loc"] if part not in ("str", "int")]  # the kinds of a union are no places
    name = ".".join(map(str, place))
    if error["type"] == "missing":
        return f"{name} is missing: add it"
    if error["type"] == "extra_forbidden":
        inner: dict[str, type[Schema]] = {"settings": Settings, "hub": Hub}
        schema = inner[str(place[0])] if len(place) > 1 else TaskFile
        close = difflib.get_close_matches(str(place[-1]), schema.model_fields, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown field {shortened(repr(name))}: {hint}known are {', '.join(schema.model_fields)}"
    is_word = not isinstance(error["input"], (str, list, dict, type(None))) and "string" in error["msg"]
    quotes = ": stand it in quotation marks" if is_word else ""
    return f"{name}={shortened(repr(error['input']))}: {error['msg']}{quotes}"
