"""A table of the reader's own: every format, every way to write labels, and one clear line for each fault."""

import json
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from iclgd_helpers import cli
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.sources import load_table
from iclgd_helpers.data.synthetic import generate_rows
from iclgd_helpers.data.tasks import TASKS, own_task
from iclgd_helpers.experiments import inputs, notebook_files, parameters, runs
from iclgd_helpers.experiments.inputs import task_data
from tools.book_pages import ROOT

GRID = ["grid", "--on", "here"]

PAGE = ROOT / "notebooks" / "50_prediction_alignment.ipynb"
SHORT_PAGE = ROOT / "notebooks" / "00_quickstart.ipynb"
TEMPLATE, WORDS = "Review: {text} Sentiment:", "negative,positive"
ROWS = 40


def sentences(rows: int = ROWS) -> pd.DataFrame:
    """Different sentences of the grammar in column `text`, and their class numbers in `label`, by turns."""
    return pd.DataFrame(generate_rows(TASKS["snippets"], rows))


def write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_parquet(path)
    return path


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes the sentences, some columns changed, and says where."""

    def make(suffix: str = ".csv", rows: int = ROWS, **columns: list) -> Path:
        return write(sentences(rows).assign(**columns), tmp_path / f"mine{suffix}")

    return make


def named(numbers: pd.Series, words: str) -> list[str]:
    """Class numbers as the words of a comma-separated list."""
    return [words.split(",")[number] for number in numbers]


# ------------------------------------------------------------------------------------------------------- good tables
def test_label_values_say_which_class_a_word_is(table):
    """A negative control: the same column read the other way round is another task."""
    path = table(label=named(sentences()["label"], "bad,good"))
    right, wrong = (load_table(own_task(TEMPLATE, WORDS, label_values=v), path) for v in ("bad,good", "good,bad"))
    assert [e.prompt for e in right.train] == [e.prompt for e in wrong.train]
    assert all(a.label == 1 - b.label for a, b in zip(right.train, wrong.train, strict=True))
    assert right.checksum != wrong.checksum


def test_columns_of_other_names_and_several_texts(tmp_path: Path):
    frame = sentences().rename(columns={"text": "body", "label": "stars"}).assign(title="a story", other=1.5)
    path = write(frame, tmp_path / "mine.csv")
    data = load_table(own_task("{title}: {body} It is", WORDS, label_column="stars"), path)
    rows = {example.row: example for example in (*data.train, *data.evaluation)}
    assert sorted(rows) == list(range(ROWS))
    for row, (text, label) in enumerate(zip(frame["body"], frame["stars"], strict=True)):
        assert (rows[row].prompt, rows[row].label) == (f"a story: {text} It is", label)


@pytest.mark.parametrize("rows", [2, 3, ROWS, ROWS + 1])
def test_halves_are_disjoint_complete_and_the_same_every_time(table, rows: int):
    task, path = own_task(TEMPLATE, WORDS), table(rows=rows)
    data, again = load_table(task, path), load_table(task, path)
    train, held_out = ([example.row for example in half] for half in (data.train, data.evaluation))
    assert sorted(train + held_out) == list(range(rows)) and len(held_out) == rows // 2
    assert data == again
    assert {e.row for e in select_demonstrations(data.train, len(train), 3, False)}.isdisjoint(held_out)


def test_a_record_is_named_by_the_content_not_by_the_place(table, tmp_path: Path):
    def identity(path: Path, template: str = TEMPLATE) -> str:
        given = {"preset": "smoke", "template": template, "verbalizers": WORDS, "data_file": str(path)}
        resolved = parameters.resolve(given)
        assert (resolved.task, resolved.data_source) == ("own", "file")
        return inputs.check([resolved.model_copy(update={"n_demonstrations": 1})])[0]

    first = identity(table())
    assert identity(table(".parquet").rename(tmp_path / "moved.parquet")) == first
    assert identity(table(), "Text: {text} Sentiment:") != first
    assert identity(table(text=sentences()["text"] + " Yes.")) != first


@pytest.mark.parametrize("column", ["review text", "review-text"])
def test_any_name_of_a_column_can_stand_in_the_template(tmp_path: Path, column: str):
    path = write(sentences().rename(columns={"text": column}), tmp_path / "mine.csv")
    data = load_table(own_task(f"Review: {{{column}}} Sentiment:", WORDS), path)
    assert len(data.train) + len(data.evaluation) == ROWS


# ------------------------------------------------------------------------------------------------------------- faults
FAULTS = {  # what is changed of a good call, or of its table -> what the line must say
    "a missing label": ({}, {"label": [0, 1] * 19 + [0, None]}, "no label in row 40"),
    "a label that is no class": (
        {},
        {"label": [0, 1] * 19 + [0, 7]},
        "'7' in row 40 is none of 0, 1 (nor are all labels negative, positive): correct it, or pass label_values",
    ),
    "no class by label_values": ({"label_values": "bad,good"}, {}, "'0' in row 1 is none of bad, good: correct it"),
    "no such column": ({"template": "Review: {body} Sentiment:"}, {}, "no column 'body' among ['text', 'label']"),
    "no such label column": ({"label_column": "stars"}, {}, "no column 'stars' among ['text', 'label']"),
    "a template without a column": ({"template": "Review: Sentiment:"}, {}, "needs the name of a text column"),
    "an open brace": ({"template": "Review: {text Sentiment:"}, {}, "template='Review: {text Sentiment:'"),
    "a number in braces": ({"template": "Review: {0} Sentiment:"}, {}, "needs the name of a text column"),
    "a verbalizer twice": ({"verbalizers": "good,good"}, {}, "give two or more different words"),
    "one verbalizer": ({"verbalizers": "good"}, {}, "give two or more different words"),
    "an empty verbalizer": ({"verbalizers": "good,"}, {}, "give two or more different words"),
    "too few label values": ({"label_values": "bad"}, {}, "one different value for each of negative, positive"),
    "a label value twice": ({"label_values": "bad,bad"}, {}, "one different value for each of negative, positive"),
    "labels of one beginning": (
        {"verbalizers": "good,good song"},
        {},
        "'good' and 'good song' of task 'own': the first",
    ),
    "no such file": ({"data_file": "no/such/file.csv"}, {}, "no table at"),
    "not a kind of table": ({"data_file": "README.md"}, {}, "ends in .parquet, .csv, .jsonl, .csv.gz, .jsonl.gz"),
    "more demonstrations than rows": ({"n_demonstrations": 21}, {}, "larger than the training split (20 rows)"),
    "no template": ({"template": None}, {}, "task=own needs template"),
    "no verbalizers": ({"verbalizers": None}, {}, "task=own needs verbalizers"),
    "another task": ({"task": "sst2"}, {}, "data_file is given, but task='sst2' has its own"),
    "a file for no task": ({"data_file": None, "task": "sst2"}, {}, "template is given, but task='sst2' has its own"),
    "another source": ({"data_source": "generated"}, {}, "data_source='generated' with task='own'"),
    "no file": ({"data_file": None}, {}, "template is given, but task='snippets' has its own"),
    "a text too long": ({}, {"text": ["the door . " * 1000] * 40}, "the context holds 2048: shorten the texts"),
}
BEFORE_THE_NOTEBOOK_STARTS = ("no template", "no verbalizers", "another task", "a file for no task", "no file")
IN_THE_TABLE = "a label that is no class"


def arguments(path: Path, changed: dict) -> dict:
    given = {"data_file": str(path), "template": TEMPLATE, "verbalizers": WORDS, "n_demonstrations": 4}
    return {name: value for name, value in (given | changed).items() if value is not None}


def as_options(given: dict) -> list[str]:
    return [part for name, value in given.items() for part in ("-p", name, str(value))]


def the_line(said: str) -> str:
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line(table, fault: str, capsys):
    """By the command for many cells, which finds every fault before anything is computed."""
    changed, columns, expected = FAULTS[fault]
    given = arguments(table(".jsonl", **columns), changed)
    task = given.pop("task", "snippets" if fault == "no file" else "own")
    assert cli.main([*GRID, "--preset", "smoke", "--task", task, "--cost-only", *as_options(given)]) == 2
    assert expected in the_line(capsys.readouterr().err)


def test_the_faults_are_faults_of_what_was_changed(table, capsys):
    """The control of all the tests above: the unchanged call is accepted."""
    given = arguments(table(".jsonl"), {})
    asked = ["--preset", "smoke", "--task", "own", "--cost-only", "--tflops", "1"]
    assert cli.main([*GRID, *asked, *as_options(given)]) == 0
    assert "tiny-llama/own/0" in capsys.readouterr().out


@pytest.mark.parametrize("fault", [*BEFORE_THE_NOTEBOOK_STARTS, IN_THE_TABLE])
def test_a_page_that_cannot_run_ends_in_one_line(table, fault: str, capsys, monkeypatch, tmp_path: Path):
    if fault != IN_THE_TABLE:
        monkeypatch.setattr(papermill, "execute_notebook", lambda *_, **__: pytest.fail("the notebook was started"))
    changed, columns, expected = FAULTS[fault]
    options = ["--output", str(tmp_path / "out"), *as_options(arguments(table(**columns), changed))]
    assert cli.main(["run", str(PAGE), "--preset", "smoke", *options]) == 2
    assert expected in the_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------- a whole record
def test_a_page_draws_the_readers_table_and_leaves_its_record(records_folder: Path, tmp_path: Path):
    """The command of the guide, on a table with other column names and words for labels."""
    frame = sentences().rename(columns={"text": "body", "label": "stars"})
    frame["stars"] = named(frame["stars"], "bad,good")
    given = {"data_file": str(write(frame, tmp_path / "mine.csv")), "template": "Review: {body} Sentiment:"}
    given |= {"verbalizers": WORDS, "label_column": "stars", "label_values": "bad,good"}
    given |= {"n_demonstrations": 4, "max_examples": 6}
    options = ["--preset", "smoke", "--output", str(tmp_path / "out"), *as_options(given)]
    assert cli.main(["run", str(SHORT_PAGE), *options]) == 0
    stored = json.loads((tmp_path / "out" / "record.json").read_text())
    assert stored["parameters"]["task"] == "own" and stored["verbalizers"] == WORDS.split(",")
    assert "mine.csv" not in json.dumps(stored), "a record says nothing of where the table lies"
    examples = pd.read_parquet(tmp_path / "out" / "examples.parquet")
    labels = dict(enumerate(frame["stars"]))
    assert [labels[row] for row in examples["row"]] == named(examples["label"], "bad,good")
    assert not any(frame["body"].iloc[0] in str(value) for value in stored.values())


def test_the_arms_see_the_readers_prompts(table):
    given = arguments(table(), {"preset": "smoke", "max_examples": 6})
    plan = runs.plan(parameters.resolve(given))
    data = task_data(plan.parameters)
    encode = plan.layout.tokenizer.encode
    for query, example in zip(plan.queries, data.evaluation, strict=False):
        assert list(query.tokens[:-1]) == encode(example.prompt, add_special_tokens=False)
    assert plan.layout.labels == tuple(tuple(encode(f" {word}")) for word in WORDS.split(","))


# ------------------------------------------------------------------------------------ parameters cells of the pages
def test_every_page_on_a_language_model_takes_a_table(table):
    for page in sorted((ROOT / "notebooks").glob("*.ipynb")):
        source = "".join(cell.source for cell in nbformat.read(page, 4).cells if cell.cell_type == "code")
        if "run_cell" in source and "preset" in notebook_files.parameters_cell(page):
            given = arguments(table(), {"preset": "smoke"})
            assert parameters.validate_for_notebook(page, given).task == "own", page.stem
