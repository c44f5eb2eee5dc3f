"""The six tasks of the original experiments and the default one: sources, prompts, demonstrations."""

import hashlib
import html
import json
import os
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from iclgd_helpers.downloads import hub_is_reachable
from iclgd_helpers.errors import InputError
from iclgd_helpers.parameters import ExperimentParameters, data_folder, resolve_path

EVALUATION_SEED = 1  # the protocol shuffles every evaluation split with it, whatever the demonstrations' seed
ROW_CAP = 2000  # and keeps the first 2,000 rows
GENERATED_ROWS = 300  # rows a split of `generated` text; a multiple of every task's number of classes
SNIPPET_VALENCE = 1.5  # snippets with a weaker mean human valence (-4 ... 4) carry no label and are left out
SNIPPET_EVALUATION_PER_CLASS = 1000


@dataclass(frozen=True)
class Task:
    """One task; the fields of ``template`` are column names, ``verbalizers`` stand in label order."""

    name: str
    template: str
    verbalizers: tuple[str, ...]
    hub_id: str | None
    hub_config: str | None = None
    train_split: str = "train"
    evaluation_split: str = "validation"
    label_column: str = "label"
    label_values: tuple[str, ...] | None = None  # what the label column says for each class; None: 0, 1, …
    row_cap: int = ROW_CAP
    sources: tuple[str, ...] = ("hub", "folder", "generated")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """Names of the columns that the template reads, in the template's order."""
        return tuple(field for _, field, _, _ in string.Formatter().parse(self.template) if field)


_NEWS = "Classify the news articles into the categories of World, Sports, Business, and Technology."
_CB = "{premise} Question: {hypothesis}. True, False, or Neither? Answer:"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cb", _CB, ("True", "False", "Neither"), "aps/super_glue", "cb"),
        # GLUE's sentences end in a blank, which the original code keeps: two blanks stand before "Label:".
        Task("sst2", "Sentence: {sentence} Label:", ("Negative", "Positive"), "nyu-mll/glue", "sst2"),
        Task("sst5", "Sentence: {text} Label:", ("terrible", "bad", "neutral", "good", "great"), "SetFit/sst5"),
        Task("subj", "Input: {text} Type:", ("objective", "subjective"), "SetFit/subj", evaluation_split="test"),
        Task("mr", "Review: {text} Sentiment:", ("Negative", "Positive"), "cornell-movie-review-data/rotten_tomatoes"),
        Task(
            "agnews",
            _NEWS + " Article: {text} Answer:",
            ("World", "Sports", "Business", "Technology"),
            "fancyzhx/ag_news",
            evaluation_split="test",
        ),
        Task(
            "snippets",
            "Review: {text} Sentiment:",
            ("negative", "positive"),
            None,
            evaluation_split="evaluation",
            sources=("pypi", "folder", "generated"),
        ),
    )
}


@dataclass(frozen=True)
class Example:
    """One prompt (without its label), its label and its row number in the source split."""

    prompt: str
    label: int
    row: int


@dataclass(frozen=True)
class TaskData:
    """The examples of a task; ``evaluation`` is in protocol order, ``checksum`` names the content."""

    task: Task
    train: list[Example]
    evaluation: list[Example]
    checksum: str


def task_data(given: ExperimentParameters) -> TaskData:
    """The data that the parameters name; errors as for `load_task` and `own_task`."""
    if given.task == "own":
        labels = {"label_column": given.label_column, "label_values": given.label_values}
        task = own_task(given.template, given.verbalizers, **{k: v for k, v in labels.items() if v is not None})
        return load_table(task, resolve_path(given.data_file))
    return load_task(given.task, given.data_source, data_folder(given))


def own_task(template: str, verbalizers: str, label_column: str = "label", label_values: str | None = None) -> Task:
    """
    A task of the reader's own.

    Parameters
    ----------
    template : the prompt; ``{name}`` stands for the text in the column of that name.
    verbalizers : the classes' words, separated by commas.
    label_column, label_values : the column with the labels, and what it holds for each class, separated by commas;
        without them, the numbers 0, 1, … or the verbalizers themselves.

    Raises
    ------
    InputError : the template names no column or cannot be read, or classes are fewer than two, doubled or unequal.
    """
    words = tuple(word.strip() for word in verbalizers.split(","))
    values = None if label_values is None else tuple(value.strip() for value in str(label_values).split(","))
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        raise InputError(f"verbalizers={verbalizers!r}: give two or more different words, separated by commas")
    if values is not None and (len(values) != len(words) or len(set(values)) < len(values)):
        raise InputError(f"label_values={label_values!r}: give one different value for each of {', '.join(words)}")
    try:
        task = Task("own", template, words, None, None, "train", "evaluation", label_column, values, sources=("file",))
        if not task.text_columns or any(re.search(r"[.\[\]]|^\d+$", column) for column in task.text_columns):
            raise ValueError("it needs the name of a text column in braces")
        task.template.format(**dict.fromkeys(task.text_columns, ""))
    except (ValueError, KeyError, IndexError) as error:
        raise InputError(f"template={template!r} ({error}): write it like 'Review: {{text}} Sentiment:'") from None
    return task


def load_table(task: Task, path: Path) -> TaskData:
    """
    A table (.csv, .jsonl or .parquet) as a task: a fixed half of its rows for evaluation, the rest for training.

    Raises
    ------
    InputError : the file cannot be read, has no such column, or a row has no label or a label that is no class.
    """
    if path.suffix not in READERS or not path.is_file():
        raise InputError(f"no table at {path}: name a file that ends in {', '.join(READERS)}")
    frame = _read(path).reset_index(drop=True)
    if task.label_column in frame.columns:
        frame[task.label_column] = _as_numbers(task, frame[task.label_column])
    examples = _examples(task, path.name, frame)
    held_out = set(_shuffled(len(examples), EVALUATION_SEED)[: len(examples) // 2])
    train = [example for i, example in enumerate(examples) if i not in held_out]
    evaluation = [examples[i] for i in _shuffled(len(examples), EVALUATION_SEED) if i in held_out]
    if not held_out:
        raise InputError(f"{path.name} has {len(examples)} row: at least two are needed")
    return TaskData(task, train, evaluation[: task.row_cap], _checksum(task, train, evaluation[: task.row_cap]))


def _as_numbers(task: Task, labels: pd.Series) -> pd.Series:
    """The labels of the reader's table as class numbers; every row must have one."""
    texts = labels.map(lambda value: "" if np.ndim(value) == 0 and pd.isna(value) else str(value).strip())
    if (texts == "").any():
        row = int((texts == "").to_numpy().argmax())
        raise InputError(f"column {task.label_column!r} has no label in row {row}: fill it in, or leave the row out")
    words, numbers = list(task.label_values or task.verbalizers), [str(i) for i in range(len(task.verbalizers))]
    if not texts.isin(words).all():
        texts = texts.str.replace(r"^(-?\d+)\.0$", r"\1", regex=True)  # whole numbers that were read as floats
        if task.label_values is None and texts.isin(numbers).all():
            words = numbers
    wrong = texts[~texts.isin(words)]
    if len(wrong):
        way = "" if task.label_values else f" (nor are all labels 0 to {numbers[-1]}): pass label_values"
        what = f"{wrong.iloc[0]!r} in row {wrong.index[0]} is none of {', '.join(words)}{way}"
        raise InputError(f"column {task.label_column!r}: {what}")
    return texts.map(words.index)


def load_task(name: str, data_source: str, data_folder: Path | None = None) -> TaskData:
    """Read both splits of a task from one of its sources.

    Parameters
    ----------
    name : a key of ``TASKS``.
    data_source : "hub", "folder", "pypi" or "generated"; each task has its own subset.
    data_folder : for "folder", where ``<task>/<split>.parquet`` (or .csv, .jsonl) is; None: ``$ICLGD_DATA``.

    Raises
    ------
    InputError : the task, the source, the folder or its content cannot be used.
    """
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}")
    task = TASKS[name]
    if data_source not in task.sources:
        raise InputError(f"task {name!r} has no data_source={data_source}; it has {', '.join(task.sources)}")
    if data_source == "folder":
        frames = _from_folder(task, data_folder)
    else:
        frames = {"hub": _from_hub, "pypi": _from_pypi, "generated": _from_grammar}[data_source](task)
    splits = (task.train_split, task.evaluation_split)
    train, evaluation = (_examples(task, split, frame) for split, frame in zip(splits, frames, strict=True))
    evaluation = [evaluation[i] for i in _shuffled(len(evaluation), EVALUATION_SEED)[: task.row_cap]]
    return TaskData(task, train, evaluation, _checksum(task, train, evaluation))


def select_demonstrations(train: Sequence[Example], n: int, seed: int, balanced: bool) -> list[Example]:
    """The first ``n`` examples of the training split in the protocol's shuffled order.

    With ``balanced``, each of the C classes gets n // C places, and the n % C places left over go to the
    classes that first ask for one more; the shuffled order is kept.
    """
    if n > len(train):
        raise InputError(f"n_demonstrations={n} is larger than the training split ({len(train)} rows)")
    shuffled = (train[i] for i in _shuffled(len(train), seed))
    if not balanced:
        return [next(shuffled) for _ in range(n)]
    classes = Counter(example.label for example in train)
    share, left_over = divmod(n, len(classes))
    taken: Counter[int] = Counter()
    selected = []
    for example in shuffled:
        if taken[example.label] == share and left_over:
            left_over -= 1
        elif taken[example.label] >= share:
            continue
        taken[example.label] += 1
        selected.append(example)
    if len(selected) < n:
        label = min(classes, key=classes.__getitem__)
        raise InputError(f"n_demonstrations={n} cannot be balanced: label {label} has {classes[label]} rows")
    return selected


def reordered(demonstrations: Sequence[Example], order: int) -> list[Example]:
    """The same demonstrations in another order, which the number determines; 0 leaves them as drawn."""
    if order == 0:
        return list(demonstrations)
    return [demonstrations[i] for i in np.random.default_rng(order).permutation(len(demonstrations))]


def shuffle_labels(demonstrations: Sequence[Example], seed: int) -> list[Example]:
    """The same prompts with their labels permuted; the labels change unless all are the same."""
    labels = [example.label for example in demonstrations]
    generator = np.random.default_rng(seed)
    permuted = labels
    while permuted == labels and len(set(labels)) > 1:
        permuted = [labels[i] for i in generator.permutation(len(labels))]
    return [replace(example, label=label) for example, label in zip(demonstrations, permuted, strict=True)]


def _shuffled(rows: int, seed: int) -> list[int]:
    """Row numbers in the order of ``datasets.Dataset.shuffle(seed)``, the protocol's shuffle (a test compares)."""
    return np.random.default_rng(seed).permutation(rows).tolist()


def _examples(task: Task, split: str, frame: pd.DataFrame) -> list[Example]:
    """Check one split and format it; rows without a label (missing or -1) are dropped, as in the protocol."""
    where = f"task {task.name!r}, split {split!r}"
    missing = [column for column in (*task.text_columns, task.label_column) if column not in frame.columns]
    if missing:
        raise InputError(f"{where}: no column {missing[0]!r} among {list(frame.columns)}")
    given = frame[task.label_column].replace({"": None, -1: None, "-1": None})
    labels = pd.to_numeric(given, errors="coerce")
    allowed = range(len(task.verbalizers))
    wrong = given[given.notna() & ~labels.isin(allowed)]
    if len(wrong):
        raise InputError(f"{where}: label {wrong.iloc[0]} (row {wrong.index[0]}) not in {list(allowed)}")
    for column in task.text_columns:
        bad = [row for row, value in enumerate(frame[column]) if not isinstance(value, str)]
        if bad:
            raise InputError(f"{where}: column {column!r} holds no text in row {bad[0]}")
    columns = [frame[column].tolist() for column in task.text_columns]
    examples = [
        Example(task.template.format(**dict(zip(task.text_columns, texts, strict=True))), int(label), row)
        for row, (label, *texts) in enumerate(zip(labels, *columns, strict=True))
        if not pd.isna(label)
    ]
    if not examples:
        raise InputError(f"{where}: no row has a label")
    return examples


def _checksum(task: Task, *splits: Iterable[Example]) -> str:
    """SHA-256 over everything that a model gets to see of the task, wherever it was read from."""
    content = hashlib.sha256(json.dumps([task.name, task.template, task.verbalizers]).encode())
    for split in splits:
        rows = [(example.prompt, example.label, example.row) for example in split]
        content.update(json.dumps(rows).encode())
    return content.hexdigest()


def _from_hub(task: Task) -> list[pd.DataFrame]:
    import datasets
    import huggingface_hub

    names = [task.train_split, task.evaluation_split]
    switches = (datasets.config, huggingface_hub.constants)
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
            f"check the network, or pass {ways} or task=snippets"
        ) from error
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.HF_HUB_OFFLINE = value
    return [split.to_pandas() for split in splits]


def _from_folder(task: Task, folder: Path | None) -> list[pd.DataFrame]:
    folder = folder or (Path(os.environ["ICLGD_DATA"]) if os.environ.get("ICLGD_DATA") else None)
    if folder is None:
        raise InputError("data_source=folder needs data_folder, or the environment variable ICLGD_DATA")
    if not (folder / task.name).is_dir():
        raise InputError(f"no folder {task.name!r} in the data folder {str(folder)!r}")
    return [_read_file(folder / task.name, split) for split in (task.train_split, task.evaluation_split)]


READERS = {
    ".parquet": pd.read_parquet,
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False),
    ".jsonl": lambda path: pd.DataFrame(map(json.loads, path.read_bytes().splitlines())),
}


def _read_file(folder: Path, split: str) -> pd.DataFrame:
    """Read ``<split>.parquet``, ``.csv`` or ``.jsonl``, the first that is there; texts stay as they are."""
    for suffix in READERS:
        if (folder / (split + suffix)).is_file():
            return _read(folder / (split + suffix))
    raise InputError(f"no {split}.parquet, .csv or .jsonl in {str(folder)!r}")


def _read(path: Path) -> pd.DataFrame:
    try:
        return READERS[path.suffix](path)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path.name} in {str(path.parent)!r} cannot be read ({reason})") from error


def _from_grammar(task: Task) -> list[pd.DataFrame]:
    from iclgd_helpers.grammar import generate_rows

    frame = pd.DataFrame(generate_rows(task, 2 * GENERATED_ROWS))
    return [frame[:GENERATED_ROWS].reset_index(drop=True), frame[GENERATED_ROWS:].reset_index(drop=True)]


def _from_pypi(task: Task) -> list[pd.DataFrame]:
    from iclgd_helpers.downloads import snippets_file

    return split_snippets(snippets_file().read_text(encoding="utf-8"))


def split_snippets(table: str) -> list[pd.DataFrame]:
    """Movie-review snippets with a clear human valence, as (train, evaluation) with columns text and label.

    ``table`` has one tab-separated line (id, mean valence, text) a snippet. Texts get HTML entities decoded,
    doubled apostrophes written as quotation marks and runs of blanks made one. Of texts equal but for case
    and punctuation the first is kept. In the order of their SHA-256, the first 1,000 texts of each class
    are the evaluation split, all others the training split. The file has no review ids to group by.
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
