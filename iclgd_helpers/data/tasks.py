"""Tasks: a prompt, words for the classes, and where the text comes from. Each is a file (`task_files`), or `own`."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iclgd_helpers.data import task_files
from iclgd_helpers.errors import InputError, shortened
from iclgd_helpers.paths import PACKAGE

OWN = "own"  # the task whose table, template and verbalizers are parameters
LONGEST_PROMPT = 500_000  # characters; no supported model has a context for half of that
WITHOUT_CONTENT = ("N/A", "[MASK]", "")
HALF = "holds half a character (a lone surrogate)"
# Without backtracking (the second plus): a label may be long, and nearly a number.
_WHOLE = re.compile(r"([+-]?)(?=[0-9])0*+([0-9]*+)(?:\.0*+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")


@dataclass(frozen=True)
class Task:
    """One task; the fields of `template` are column names, `verbalizers` are in label order."""

    name: str
    template: str
    verbalizers: tuple[str, ...]
    hub_id: str | None = None
    hub_config: str | None = None
    train_split: str = "train"
    evaluation_split: str = "validation"
    label_column: str = "label"
    label_values: tuple[str, ...] | None = None  # what the label column says for each class; None: 0, 1, …
    row_cap: int = 2000  # rows of an evaluation split that the protocol keeps
    sources: tuple[str, ...] = ("hub", "folder", "generated")
    title: str = ""  # as tables print it
    table: Path | None = None  # for the source `file`, where that is known
    cues: tuple[str, ...] = ()  # of each class, the words that only generated text of that class holds

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the columns that the template reads, in the template's order."""
        return tuple(field for _, field, _, _ in string.Formatter().parse(self.template) if field)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns that are read, each once; the last one holds the labels."""
        return (*dict.fromkeys(self.text_columns), self.label_column)


@dataclass(frozen=True)
class Example:
    """One prompt (without its label), its label and its row number in the source split."""

    prompt: str
    label: int
    row: int


@dataclass(frozen=True)
class TaskData:
    """The examples of a task; `evaluation` is in protocol order, `checksum` names the content."""

    task: Task
    train: list[Example]
    evaluation: list[Example]
    checksum: str


def without_content(task: Task) -> list[Example]:
    """
    Questions without content: their rows are -1, -2 and -3, and their label is not used.

    Source: the content-free inputs of Zhao et al. 2021: "N/A", "[MASK]" and the empty text. A template
    without words of its own has no question of the last kind.
    """
    texts = [task.template.format(**dict.fromkeys(task.text_columns, text)) for text in WITHOUT_CONTENT]
    return [Example(text, 0, -1 - place) for place, text in enumerate(texts) if text.strip()]


def from_file(path: Path, name: str | None = None) -> tuple[Task, dict[str, Any]]:
    """
    The task in a file, and what it sets: parameters of a run, and `row_cap`.

    Unless another is given, its name is its title in small letters, with `-` for all that is no letter or number. So a
    file that was moved or renamed is the same task.

    Raises
    ------
    InputError
        with one line for each fault.
    """
    found = task_files.read(path)
    words, values = tuple(word.strip() for word in found.verbalizers), found.label_values
    kinds = ["file"] if found.data_file else ["hub", "folder"] if found.hub.hub_id else ["folder"]
    task = Task(
        name or re.sub(r"[\W_]+", "-", found.title.lower()).strip("-"),
        found.template,
        words,
        **found.hub.model_dump(),
        label_column=found.label_column,
        label_values=None if values is None else tuple(map(str, values)),
        row_cap=found.settings.row_cap,
        sources=tuple(found.sources or kinds),
        title=found.title,
        table=None if found.data_file is None else path.parent / found.data_file,
        cues=tuple(found.cues or ()),
    )
    faults = list(_faults(task))
    if name is None and (not task.name or task.name in SETTINGS):
        faults.append(f"title={found.title!r}: give one with letters that no task of the book has")
    if len(task.cues) != len(words) and "generated" in task.sources:
        faults.append("sources: only a task with cues, one for each class, has generated text")
    if ("file" in task.sources) != (task.table is not None):
        faults.append("data_file: name a table where sources has file, and nowhere else")
    if faults:
        raise InputError("\n".join(f"{shortened(path.name)}: {fault}" for fault in faults))
    return task, found.settings.model_dump(exclude_none=True)


def own_task(template: str, verbalizers: str, label_column: str = "label", label_values: str | None = None) -> Task:
    """
    A task of the reader's own.

    Parameters
    ----------
    template
        the prompt; `{name}` is the text in the column of that name.
    verbalizers
        the classes' words, separated by commas.
    label_column, label_values
        the column with the labels, and what it holds for each class, separated by commas. Without them it holds the
        verbalizers themselves or the numbers 0, 1, …. `label_text` decides which labels are equal.

    Raises
    ------
    InputError
        if the template names no column or cannot be read, or classes are fewer than two, doubled or unequal.
    """
    for text in (template, verbalizers, label_column, label_values or ""):
        if not is_encodable(text):
            raise InputError(f"{shortened(repr(text))} {HALF}: type it again")
    words = tuple(word.strip() for word in verbalizers.split(","))
    values = None if label_values is None else tuple(value.strip() for value in label_values.split(","))
    task = Task(
        OWN,
        template,
        words,
        evaluation_split="evaluation",
        label_column=label_column,
        label_values=values,
        sources=("file",),
        title="own table",
    )
    for fault in _faults(task):
        raise InputError(fault)
    return task


def _faults(task: Task) -> Iterator[str]:
    """What is wrong with a task, each in one line."""
    for check in (_check_classes, _check_template):
        try:
            check(task)
        except InputError as error:
            yield str(error)


def _check_classes(task: Task) -> None:
    """Words and labels of the classes: two or more, none empty, all different."""
    words, values = task.verbalizers, task.label_values
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        what = f"verbalizers={shortened(repr(','.join(words)))}"
        raise InputError(f"{what}: give two or more different words, separated by commas")
    labels = [label_text(value) for value in values or words]
    if len(labels) != len(words) or not all(labels) or len(set(labels)) < len(labels):
        what = f"label_values={shortened(repr(values and ','.join(values)))}"
        raise InputError(f"{what}: give one different value for each of {shortened(', '.join(words))}")


def _check_template(task: Task) -> None:
    """
    Refuse a template that names no column, or that some text cannot be filled into.

    A format specification may cut or pad a text (`{text:.300}`), but no column's text may become a specification.
    Numbers are looked at before anything of that length is made.
    """
    what, way = f"template={shortened(repr(task.template))}", "write it like 'Review: {text} Sentiment:'"
    try:
        specifications = [given or "" for _, _, given, _ in string.Formatter().parse(task.template)]
        columns = task.text_columns
    except ValueError as error:
        raise InputError(f"{what} ({error}): {way}") from None
    if not columns or any(re.search(r"[.\[\]]|^\d+$", column) for column in columns):
        raise InputError(f"{what} (it needs the name of a text column in braces): {way}")
    numbers = [number for given in specifications for number in re.findall(r"\d+", given)]
    too_large = any(len(number) > 6 for number in numbers) or sum(map(int, numbers)) > LONGEST_PROMPT
    if too_large or any("{" in given for given in specifications):
        raise InputError(f"{what} (only a small number, as in :.300, may follow a column's name): {way}")
    try:
        longest = len(task.template.format(**dict.fromkeys(columns, "")))
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"{what} ({error}): {way}") from None
    if longest > LONGEST_PROMPT:
        raise InputError(f"{what} makes prompts of more than {LONGEST_PROMPT:,} characters: shorten it")
    if task.label_column in columns:
        raise InputError(f"{what} ({task.label_column!r} holds the labels: prompts would have their answers): {way}")


def is_encodable(text: str) -> bool:
    """Whether a text has only whole characters, so that a tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def label_text(value: object) -> str:
    """
    The text by which a label is compared; empty if there is none.

    Blanks around a label do not count. A number is its value, however it is written: 0, -0, 00, 0.0 and 0e0 are one
    label. The truth values of JSON and Parquet are the words true and false, in capitals or not, and no numbers.
    Everything else is compared letter by letter.
    """
    if value is None or value != value:
        return ""
    text = str(value).strip()
    if whole := _WHOLE.fullmatch(text):
        sign, digits = whole.groups()
        return f"-{digits}" if sign == "-" and digits else digits or "0"
    if _NUMBER.fullmatch(text):
        number = float(text)
        return str(int(number)) if number.is_integer() and abs(number) < 2**53 else str(number)
    return text.lower() if text.lower() in ("true", "false") else text


def _book() -> dict[str, tuple[Task, dict[str, Any]]]:
    """The tasks of the book, by name, in the order that their files give."""
    paths = sorted((PACKAGE / "tasks").glob("*.yaml"), key=lambda path: task_files.read(path).order)
    return {path.stem: from_file(path, path.stem) for path in paths}


_BOOK = _book()
NAMES = tuple(_BOOK)  # in the order of the paper's Table 1; the default task last
TASKS = {name: task for name, (task, _settings) in _BOOK.items()}
SETTINGS = {name: settings for name, (_task, settings) in _BOOK.items()}  # what each uses unless told otherwise
SETTINGS[OWN] = task_files.Settings.model_validate({}).model_dump(exclude_none=True)
