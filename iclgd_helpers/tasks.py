"""The six tasks of the original experiments and the default one: sources, prompts, demonstrations."""

import hashlib
import html
import json
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from iclgd_helpers import paths
from iclgd_helpers.downloads import hub_is_reachable
from iclgd_helpers.errors import InputError, shortened
from iclgd_helpers.parameters import ExperimentParameters, data_folder
from iclgd_helpers.table_files import KINDS, Columns, places, read_columns

EVALUATION_SEED = 1  # the protocol shuffles every evaluation split with it, whatever the demonstrations' seed
ROW_CAP = 2000  # and keeps the first 2,000 rows
GENERATED_ROWS = 300  # rows a split of `generated` text; a multiple of every task's number of classes
SNIPPET_VALENCE = 1.5  # snippets with a weaker mean human valence (-4 ... 4) carry no label and are left out
SNIPPET_EVALUATION_PER_CLASS = 1000
LONGEST_PROMPT = 500_000  # characters; no supported model has a context for half of that
LONGEST_PROMPTS = 2**29  # characters of all prompts of a split together

_HALF = "holds half a character (a lone surrogate)"
# Without backtracking (the second plus): a label may be long, and nearly a number.
_WHOLE = re.compile(r"([+-]?)(?=[0-9])0*+([0-9]*+)(?:\.0*+)?")
_NUMBER = re.compile(r"[+-]?(?:[0-9]++(?:\.[0-9]*+)?|\.[0-9]++)(?:[eE][+-]?[0-9]++)?")


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

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns that are read, each once; the last one holds the labels."""
        return (*dict.fromkeys(self.text_columns), self.label_column)


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
        return load_table(task, paths.resolve_path(given.data_file))
    return load_task(given.task, given.data_source, data_folder(given))


def own_task(template: str, verbalizers: str, label_column: str = "label", label_values: str | None = None) -> Task:
    """
    A task of the reader's own.

    Parameters
    ----------
    template : the prompt; ``{name}`` stands for the text in the column of that name.
    verbalizers : the classes' words, separated by commas.
    label_column, label_values : the column with the labels, and what it holds for each class, separated by commas;
        without them, the verbalizers themselves or the numbers 0, 1, …; `label_text` says which labels are equal.

    Raises
    ------
    InputError : the template names no column or cannot be read, or classes are fewer than two, doubled or unequal.
    """
    for text in (template, verbalizers, label_column, label_values or ""):
        if not _is_encodable(text):
            raise InputError(f"{shortened(repr(text))} {_HALF}: type it again")
    words = tuple(word.strip() for word in verbalizers.split(","))
    values = None if label_values is None else tuple(value.strip() for value in label_values.split(","))
    if len(words) < 2 or not all(words) or len(set(words)) < len(words):
        what = f"verbalizers={shortened(repr(verbalizers))}"
        raise InputError(f"{what}: give two or more different words, separated by commas")
    labels = [label_text(value) for value in values or words]
    if len(labels) != len(words) or not all(labels) or len(set(labels)) < len(labels):
        what = f"label_values={shortened(repr(label_values))}"
        raise InputError(f"{what}: give one different value for each of {shortened(', '.join(words))}")
    task = Task("own", template, words, None, None, "train", "evaluation", label_column, values, sources=("file",))
    _check_template(task)
    return task


def _check_template(task: Task) -> None:
    """
    Refuse a template that names no column, or that some text cannot be filled into.

    A format specification may cut or pad a text (`{text:.300}`), but no column's text may become a specification, and
    numbers are looked at before anything of that length is made.
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


def load_table(task: Task, path: Path) -> TaskData:
    """
    A table as a task: a fixed half of its rows for evaluation, the rest for training. Formats: see `table_files`.

    Raises
    ------
    InputError : the file cannot be read, has no such column, or a row has no label or a label that is no class.
    """
    examples = _examples(task, shortened(path.name), read_columns(path, task.columns))
    if len(examples) < 2:
        raise InputError(f"{shortened(path.name)} has {len(examples)} row: at least two are needed")
    order = _shuffled(len(examples), EVALUATION_SEED)
    held_out = set(order[: len(examples) // 2])
    train = [example for i, example in enumerate(examples) if i not in held_out]
    evaluation = [examples[i] for i in order if i in held_out][: task.row_cap]
    return TaskData(task, train, evaluation, _checksum(task, train, evaluation))


def _is_encodable(text: str) -> bool:
    """Whether a text has only whole characters, so that a tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def load_task(name: str, data_source: str, data_folder: Path | None = None) -> TaskData:
    """Read both splits of a task from one of its sources.

    Parameters
    ----------
    name : a key of ``TASKS``.
    data_source : "hub", "folder", "pypi" or "generated"; each task has its own subset.
    data_folder : for "folder", where ``<task>/<split>.parquet`` is, or another kind of table; None: ``$ICLGD_DATA``.

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
        tables = _from_folder(task, data_folder)
    else:
        tables = {"hub": _from_hub, "pypi": _from_pypi, "generated": _from_grammar}[data_source](task)
    splits = (task.train_split, task.evaluation_split)
    train, evaluation = (
        _examples(task, f"task {name!r}, split {split!r}", columns)
        for split, columns in zip(splits, tables, strict=True)
    )
    evaluation = [evaluation[i] for i in _shuffled(len(evaluation), EVALUATION_SEED)[: task.row_cap]]
    return TaskData(task, train, evaluation, _checksum(task, train, evaluation))


def select_demonstrations(train: Sequence[Example], n: int, seed: int, balanced: bool) -> list[Example]:
    """The first ``n`` examples of the training split in the protocol's shuffled order.

    With ``balanced``, each of the C classes gets n // C places, and the n % C places left over go to the
    classes that first ask for one more; the shuffled order is kept.

    Raises
    ------
    InputError : there are not so many examples, or, with ``balanced``, not of each class.
    """
    if n > len(train):
        what = f"n_demonstrations={n} is larger than the training split ({_rows(len(train))})"
        raise InputError(f"{what}: pass n_demonstrations={len(train)} or less, or add rows")
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
        label, rows = min(classes.items(), key=lambda item: item[1])
        most = rows * len(classes) + sum(count > rows for count in classes.values())
        what = f"n_demonstrations={n} cannot be balanced: label {label} has {_rows(rows)} in the training split"
        raise InputError(f"{what}; pass n_demonstrations={most} or less, balanced=False, or add rows of that label")
    return selected


def _rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


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


def label_text(value: object) -> str:
    """
    The text by which a label is compared; empty if there is none.

    Blanks around a label do not count. A number is its value, however it is written: 0, -0, 00, 0.0 and 0e0 are one
    label. The truth values of JSON and Parquet are the words true and false, in capitals or not, and no numbers.
    Everything else is compared as it stands.
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


def _classes(task: Task, where: str, labels: Sequence[object]) -> list[int | None]:
    """
    The class of each row. Rows of the six tasks without a label (missing or -1) have none, as in the protocol.

    A table of the reader's own says ``label_values`` in all rows; without them, verbalizers in all or numbers in all.
    """
    own = task.sources == ("file",)
    numbers = [str(number) for number in range(len(task.verbalizers))]
    words = [label_text(word) for word in task.label_values or task.verbalizers]
    readings = ([words] if task.label_values else [words, numbers]) if own else [numbers]
    texts = [label_text(value) for value in labels]
    counts = Counter(texts)
    said = max(readings, key=lambda reading: sum(counts[text] for text in reading))  # what most rows say
    classes: dict[str, int | None] = {text: number for number, text in enumerate(said)}
    classes |= {} if own else {"": None, "-1": None}
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
        if not _is_encodable("".join(column)):
            row = next(row for row, text in enumerate(column, 1) if not _is_encodable(text))
            raise InputError(f"{where}: the text of row {row} in column {name!r} {_HALF}: write it again")
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


def _check_lengths(task: Task, where: str, texts: Mapping[str, Sequence[str]]) -> None:
    """Refuse prompts that are too long, before they are made: a text may stand in the file once and count often."""
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
    found = [places(f"data set {task.hub_id!r}", split.column_names, task.columns) for split in splits]
    columns = [list(split.to_dict().values()) for split in splits]
    return [{name: values[place] for name, place in f.items()} for f, values in zip(found, columns, strict=True)]


def _from_folder(task: Task, folder: Path | None) -> list[Columns]:
    folder = folder or paths.data_folder()
    if folder is None:
        raise InputError("data_source=folder needs data_folder, or the environment variable ICLGD_DATA")
    if not (folder / task.name).is_dir():
        raise InputError(f"no folder {task.name!r} in the data folder {str(folder)!r}")
    return [_read_split(task, folder / task.name, split) for split in (task.train_split, task.evaluation_split)]


def _read_split(task: Task, folder: Path, split: str) -> Columns:
    """Read ``<split>.parquet`` or another kind of table, the first that is there; texts stay as they are."""
    for kind in (*KINDS, *map(str.upper, KINDS)):
        if (folder / (split + kind)).is_file():
            return read_columns(folder / (split + kind), task.columns)
    raise InputError(f"no {split}{', '.join(KINDS)} in {str(folder)!r}")


def _from_grammar(task: Task) -> list[Columns]:
    from iclgd_helpers.grammar import generate_rows

    rows = generate_rows(task, 2 * GENERATED_ROWS)
    splits = rows[:GENERATED_ROWS], rows[GENERATED_ROWS:]
    return [{name: [row[name] for row in split] for name in task.columns} for split in splits]


def _from_pypi(task: Task) -> list[Columns]:
    from iclgd_helpers.downloads import snippets_file

    splits = split_snippets(snippets_file().read_text(encoding="utf-8"))
    return [{name: split[name].tolist() for name in task.columns} for split in splits]


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
