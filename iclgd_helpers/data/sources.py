"""Where the examples of a task come from: the hub, a folder, the package index, the grammar, a table of one's own."""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from iclgd_helpers import paths
from iclgd_helpers.data.demonstrations import shuffled
from iclgd_helpers.data.synthetic import generate_rows
from iclgd_helpers.data.table_files import KINDS, Columns, places, read_columns
from iclgd_helpers.data.tasks import HALF, LONGEST_PROMPT, TASKS, Example, Task, TaskData, is_encodable, label_text
from iclgd_helpers.errors import InputError, shortened
from iclgd_helpers.pinned_downloads import hub_is_reachable, snippets_file

EVALUATION_SEED = 1  # the protocol shuffles every evaluation split with it, whatever the demonstrations' seed
GENERATED_ROWS = 300  # rows a split of `generated` text; a multiple of every task's number of classes
SNIPPET_VALENCE = 1.5  # snippets with a weaker mean human valence (-4 ... 4) carry no label and are left out
SNIPPET_EVALUATION_PER_CLASS = 1000
LONGEST_PROMPTS = 2**29  # characters of all prompts of a split together


def load_task(name: str, data_source: str, data_folder: Path | None = None) -> TaskData:
    """
    Read both splits of a task of the book from one of its sources; parameters and errors as for `load`.

    `name` is a key of `TASKS`.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    return load(TASKS[name], data_source, data_folder)


def load(task: Task, data_source: str, data_folder: Path | None = None) -> TaskData:
    """
    Read both splits of a task from one of its sources.

    Parameters
    ----------
    task
        of the book, or of a file of the reader's.
    data_source
        `hub`, `folder`, `pypi`, `generated` or `file` (see `load_table`); each task has its own subset.
    data_folder
        for `folder`, where `<task>/<split>.parquet` is, or another kind of table; `$ICLGD_DATA` by default.

    Raises
    ------
    InputError
        if the task, the source, the folder or its content cannot be used.
    """
    name = task.name
    if data_source not in task.sources:
        raise InputError(f"task {name!r} has no data_source={data_source}; it has {', '.join(task.sources)}")
    if task.table is not None and data_source == "file":
        return load_table(task, task.table)
    if data_source == "folder":
        tables = _from_folder(task, data_folder)
    else:
        tables = {"hub": _from_hub, "pypi": _from_pypi, "generated": _from_grammar}[data_source](task)
    splits = (task.train_split, task.evaluation_split)
    train, evaluation = (
        _examples(task, f"task {name!r}, split {split!r}", columns)
        for split, columns in zip(splits, tables, strict=True)
    )
    evaluation = [evaluation[i] for i in shuffled(len(evaluation), EVALUATION_SEED)[: task.row_cap]]
    return TaskData(task, train, evaluation, _checksum(task, train, evaluation))


def load_table(task: Task, path: Path) -> TaskData:
    """
    A table as a task: a fixed half of its rows for evaluation, the rest for training. Formats: see `table_files`.

    Raises
    ------
    InputError
        if the file cannot be read, has no such column, or a row has no label or a label that is no class.
    """
    examples = _examples(task, shortened(path.name), read_columns(path, task.columns))
    if len(examples) < 2:
        raise InputError(f"{shortened(path.name)} has {len(examples)} row: at least two are needed")
    order = shuffled(len(examples), EVALUATION_SEED)
    held_out = set(order[: len(examples) // 2])
    train = [example for i, example in enumerate(examples) if i not in held_out]
    evaluation = [examples[i] for i in order if i in held_out][: task.row_cap]
    return TaskData(task, train, evaluation, _checksum(task, train, evaluation))


def _examples(task: Task, where: str, columns: Columns) -> list[Example]:
    """Check one split and format it; rows without a label are left out."""
    texts = {name: columns[name] for name in task.text_columns}
    for name, column in texts.items():
        if set(map(type, column)) - {str}:
            row = next(row for row, text in enumerate(column, 1) if not isinstance(text, str))
            raise InputError(f"{where}: column {name!r} holds no text in row {row}: fill it in, or leave the row out")
    _check_lengths(task, where, texts)
    classes = _classes(task, where, columns[task.label_column])
    for name, column in texts.items():
        if not is_encodable("".join(column)):
            row = next(row for row, text in enumerate(column, 1) if not is_encodable(text))
            raise InputError(f"{where}: the text of row {row} in column {name!r} {HALF}: write it again")
    examples = [
        Example(task.template.format(**dict(zip(texts, row_texts, strict=True))), label, row)
        for row, (label, *row_texts) in enumerate(zip(classes, *texts.values(), strict=True))
        if label is not None
    ]
    if not examples:
        raise InputError(f"{where}: no row has a label")
    if empty := [example.row for example in examples if not example.prompt]:
        raise InputError(f"{where}: the prompt of row {empty[0] + 1} is empty: fill it in, or leave the row out")
    return examples


def _classes(task: Task, where: str, labels: Sequence[object]) -> list[int | None]:
    """
    The class of each row. Rows of a split without a label (missing or -1) have none, as in the protocol.

    All rows hold `label_values`. Without them all hold numbers, or, in a table that is to be halved, all verbalizers.
    """
    own = "file" in task.sources
    numbers = [str(number) for number in range(len(task.verbalizers))]
    words = [label_text(word) for word in task.label_values or task.verbalizers]
    readings = [words] if task.label_values else [words, numbers] if own else [numbers]
    texts = [label_text(value) for value in labels]
    counts = Counter(texts)
    said = max(readings, key=lambda reading: sum(counts[text] for text in reading))  # what most rows say
    classes: dict[str, int | None] = {text: number for number, text in enumerate(said)}
    if not own:
        classes.setdefault("", None)
        classes.setdefault("-1", None)
    row = next((row for row, text in enumerate(texts) if text not in classes), None)
    if row is not None:
        what, others = f"{where}: column {task.label_column!r}", [other for other in readings if other is not said]
        if not texts[row]:
            raise InputError(f"{what} has no label in row {row + 1}: fill it in, or leave the row out")
        wrong, right = shortened(repr(str(labels[row]))), shortened(", ".join(said))
        nor = f" (nor are all labels {shortened(', '.join(others[0]))})" if others else ""
        way = ", or pass label_values" if others else "" if own else " (-1 stands for none)"
        raise InputError(f"{what}: {wrong} in row {row + 1} is none of {right}{nor}: correct it{way}")
    return [classes[text] for text in texts]


def _check_lengths(task: Task, where: str, texts: Mapping[str, Sequence[str]]) -> None:
    """Refuse prompts that are too long, before they are made: a text may be in the file once and count often."""
    fixed = len(task.template.format(**dict.fromkeys(texts, "")))
    lengths = [fixed + sum(row) for row in zip(*(map(len, texts[name]) for name in task.text_columns), strict=True)]
    if max(lengths, default=0) > LONGEST_PROMPT:
        row = next(row for row, length in enumerate(lengths, 1) if length > LONGEST_PROMPT)
        raise InputError(f"{where}: the prompt of row {row} is longer than {LONGEST_PROMPT:,} characters: shorten it")
    if sum(lengths) > LONGEST_PROMPTS:
        raise InputError(f"{where}: the prompts are longer than {LONGEST_PROMPTS:,} characters: keep fewer rows")


def _checksum(task: Task, *splits: Iterable[Example]) -> str:
    """SHA-256 over everything that a model gets to see of the task, wherever it was read from."""
    content = hashlib.sha256(json.dumps([task.name, task.template, task.verbalizers]).encode())
    for split in splits:
        rows = [(example.prompt, example.label, example.row) for example in split]
        content.update(json.dumps(rows).encode())
    return content.hexdigest()


def _from_hub(task: Task) -> list[Columns]:
    import datasets
    import huggingface_hub

    names = [task.train_split, task.evaluation_split]
    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)  # modules, whose attributes are set
    before = [switch.HF_HUB_OFFLINE for switch in switches]
    try:
        if not hub_is_reachable():  # what was fetched before still serves; nothing is tried for minutes
            for switch in switches:
                switch.HF_HUB_OFFLINE = True
        splits = datasets.load_dataset(task.hub_id, task.hub_config, split=names)
    except Exception as error:  # of many libraries: all mean that the hub gave no data
        ways = ", ".join(f"data_source={source}" for source in task.sources if source != "hub")
        raise InputError(
            f"data set {task.hub_id!r} could not be had from the hub ({type(error).__name__}): "
            f"check the network, or pass {ways} or task={_without_hub()}"
        ) from error
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
    found = [places(f"data set {task.hub_id!r}", split.column_names, task.columns) for split in splits]
    columns = [list(split.to_dict().values()) for split in splits]
    return [{name: values[place] for name, place in f.items()} for f, values in zip(found, columns, strict=True)]


def _without_hub() -> str:
    """The task whose text is on the package index."""
    return next(name for name, task in TASKS.items() if "pypi" in task.sources)


def _from_folder(task: Task, folder: Path | None) -> list[Columns]:
    folder = folder or paths.data_folder()
    if folder is None:
        raise InputError("data_source=folder needs data_folder, or the environment variable ICLGD_DATA")
    if not (folder / task.name).is_dir():
        raise InputError(f"no folder {task.name!r} in the data folder {str(folder)!r}")
    return [_read_split(task, folder / task.name, split) for split in (task.train_split, task.evaluation_split)]


def _read_split(task: Task, folder: Path, split: str) -> Columns:
    """Read `<split>.parquet` or another kind of table, the first that is there; texts stay as they are."""
    for kind in (*KINDS, *map(str.upper, KINDS)):
        if (folder / (split + kind)).is_file():
            return read_columns(folder / (split + kind), task.columns)
    raise InputError(f"no {split}{', '.join(KINDS)} in {str(folder)!r}")


def _from_grammar(task: Task) -> list[Columns]:
    rows = generate_rows(task, 2 * GENERATED_ROWS)
    splits = rows[:GENERATED_ROWS], rows[GENERATED_ROWS:]
    return [{name: [row[name] for row in split] for name in task.columns} for split in splits]


def _from_pypi(task: Task) -> list[Columns]:
    splits = split_snippets(snippets_file().read_text(encoding="utf-8"))
    return [{name: split[name].tolist() for name in task.columns} for split in splits]


def split_snippets(table: str) -> list[pd.DataFrame]:
    """
    Movie-review snippets with a clear human valence, as (train, evaluation) with columns text and label.

    `table` has one tab-separated line (id, mean valence, text) a snippet. Texts get HTML entities decoded, doubled
    apostrophes written as quotation marks and runs of blanks made one. Of texts equal but for case and punctuation the
    first is kept. In the order of their SHA-256, the first 1,000 texts of each class are the evaluation split, all
    others the training split. The file has no review ids to group by.
    """
    rows = [line.split("\t") for line in table.splitlines() if line]
    texts = [_normalise(row[2]) for row in rows]
    frame = pd.DataFrame({"text": texts, "valence": [float(row[1]) for row in rows]})
    frame = frame[~frame["text"].map(lambda text: re.sub(r"\W", "", text.casefold())).duplicated()]
    frame = frame[frame["valence"].abs() >= SNIPPET_VALENCE]
    frame["label"] = (frame["valence"] > 0).astype(int)
    order = frame["text"].map(lambda text: hashlib.sha256(text.encode()).hexdigest())
    held_out = order.groupby(frame["label"]).rank() <= SNIPPET_EVALUATION_PER_CLASS
    return [part[["text", "label"]].reset_index(drop=True) for part in (frame[~held_out], frame[held_out])]


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(text).replace("''", '"')).strip()
