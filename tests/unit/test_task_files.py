"""Tasks as files: the book's own and a reader's, by every command, and one clear line for each fault."""

import ast
import json
import shutil
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import in_one_line

from iclgd_helpers import cli, paths
from iclgd_helpers.data import task_files
from iclgd_helpers.data.sources import load, load_task
from iclgd_helpers.data.tasks import NAMES, OWN, SETTINGS, TASKS, from_file
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import experiment, inputs, parameters, protocol, runs
from iclgd_helpers.experiments.inputs import task_data
from iclgd_helpers.experiments.parameters import ExperimentParameters, resolve
from iclgd_helpers.measures import intervals

EXAMPLE = paths.repository_root() / "book" / "examples" / "opinions.yaml"
PAGE = paths.repository_root() / "notebooks" / "00_quickstart.ipynb"
LABELS = ["strongly agree", "agree", "neither agree nor disagree", "disagree"]
FIELDS = {"title": "Mine", "template": "{text} It is", "verbalizers": ["bad", "good"], "data_file": "mine.csv"}
ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(24)]


@pytest.fixture
def own(tmp_path: Path):
    """A function that writes a task file, some fields changed, and its table; where the file is."""

    def make(rows: list[dict] = ROWS, name: str = "mine.yaml", **changed) -> Path:
        pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
        content = {name: value for name, value in (FIELDS | changed).items() if value is not None}
        (tmp_path / name).write_text(yaml.safe_dump(content, allow_unicode=True))
        return tmp_path / name

    return make


def lines(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        from_file(path)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------------------------------------- the book's own tasks
@pytest.mark.parametrize("path", sorted((paths.PACKAGE / "tasks").glob("*")), ids=lambda path: path.stem)
def test_a_task_of_the_book_is_a_file_as_a_readers(path: Path):
    content = task_files.read(path)
    assert content.licence and content.source and content.order == 1 + NAMES.index(path.stem)
    task, settings = from_file(path, path.stem)
    assert (task, settings) == (TASKS[path.stem], SETTINGS[path.stem])
    assert settings["seed"] == protocol.SEEDS.get(path.stem, (settings["seed"],))[0]


def names_of_tasks(source: str) -> list[str]:
    nodes = ast.walk(ast.parse(source))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and node.value in (*NAMES, "own table")]


def test_no_module_names_a_task():
    found = {path.stem: names_of_tasks(path.read_text()) for path in paths.PACKAGE.rglob("*.py")}
    # The downloaded archive has that name, too, and a table by parameters has no title of its own.
    assert {name: words for name, words in found.items() if words} == {
        "pinned_downloads": ["snippets"],
        "tasks": ["own table"],
    }
    assert names_of_tasks("a = {'sst2': 1}") == ["sst2"]


# ----------------------------------------------------------------------------------------------------- a reader's file
def test_the_example_of_the_guide():
    task, settings = from_file(EXAMPLE)
    assert (task.name, task.title, list(task.verbalizers)) == ("opinions", "Opinions", LABELS)
    p = resolve({"preset": "smoke", "task": str(EXAMPLE)})
    assert (p.task, p.task_file, p.data_source) == ("opinions", str(EXAMPLE), "file")
    assert (p.separator, p.instruction, p.balanced) == ("\n\n", settings["instruction"], True)
    data = task_data(p)
    assert Counter(example.label for example in data.train + data.evaluation) == dict.fromkeys(range(4), 6)
    first = next(example for example in data.train + data.evaluation if example.row == 16)
    assert first.prompt.startswith("Statement: The café should stop selling paper cups. Reply: At last")
    assert resolve(p.model_dump()) == p, "what a worker is given is what was resolved"


def test_the_example_by_page_grid_cost_and_records(records_folder: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLE.parent)
    few = ["-p", "controls", "False", "-p", "conditioning", "False"]
    asked = ["--preset", "smoke", *few]
    assert cli.main(["cost", "--task", "./opinions.yaml", "--tflops", "1", *asked]) == 0
    assert "tiny-llama on opinions, seed 0" in capsys.readouterr().out
    grid = ["grid", "--on", "here", "--task", "opinions.yaml", "--task", "cb", "--tflops", "1", *asked]
    assert cli.main([*grid, "-p", "n_demonstrations", "4", "-p", "max_examples", "3"]) == 0
    assert "tiny-llama/opinions/0" in capsys.readouterr().out
    options = ["-p", "task", "opinions.yaml", "-p", "max_examples", "3", "--output", str(tmp_path / "out")]
    assert cli.main(["run", str(PAGE), "--preset", "smoke", *options]) == 0
    stored = json.loads((tmp_path / "out" / "record.json").read_text())
    assert stored["parameters"]["task"] == "opinions" and stored["verbalizers"] == LABELS
    assert stored["template"] == from_file(EXAMPLE)[0].template
    assert str(EXAMPLE.parent) not in json.dumps(stored), "a record says nothing of where the file lies"
    capsys.readouterr()
    assert cli.main(["records", "show", stored["id"]]) == 0
    assert "task = opinions" in capsys.readouterr().out


def identity(path: Path, **given) -> str:
    return inputs.check([resolve({"preset": "smoke", "task": str(path), "n_demonstrations": 2, **given})])[0]


def test_a_record_is_named_by_what_a_file_says_and_not_by_where_it_lies(own, tmp_path: Path):
    first = identity(own())
    (tmp_path / "moved").mkdir()
    for name in ("mine.yaml", "mine.csv"):
        shutil.copy(tmp_path / name, tmp_path / "moved" / name)
    moved = (tmp_path / "moved" / "mine.yaml").rename(tmp_path / "moved" / "other.yml")
    assert identity(moved) == first
    assert identity(own(licence="none", source="me")) == first, "what no model gets to see"
    others = [own(template="{text} That is", name="a.yaml"), own(verbalizers=["bad", "fine"], name="b.yaml")]
    others += [own(label_values=[1, 0], name="c.yaml"), own(title="Others", name="d.yaml")]
    others += [own(settings={"separator": "newline"}, name="e.yaml"), own(settings={"seed": 3}, name="f.yaml")]
    assert len({identity(path) for path in others} | {first}) == 1 + len(others)


@pytest.mark.parametrize(
    ("title", "name"),
    [("My task", "my-task"), ("../../etc/x", "etc-x"), ("Größe_2: é", "größe-2-é"), ("a\nb", "a-b")],
)
def test_a_task_is_called_by_its_title(own, title: str, name: str):
    task, _settings = from_file(own(title=title))
    assert (task.name, task.title) == (name, title) and "/" not in name


def test_settings_given_on_the_command_line_win(own):
    path = str(own(settings={"seed": 3, "chat": True, "row_cap": 7, "learning_rate": "1e-2", "label_prefix": ""}))
    p = resolve({"task": path})
    assert (p.seed, p.chat, p.max_examples, p.learning_rate, p.label_prefix) == (3, True, 7, 0.01, "")
    p = resolve({"task": path, "seed": 4, "chat": False, "label_prefix": " "})
    assert (p.seed, p.chat, p.label_prefix) == (4, False, " ")


def test_a_file_may_name_a_data_set_of_the_hub_or_be_read_from_a_folder(own, tmp_path: Path):
    path = own(data_file=None, hub={"hub_id": "me/mine", "evaluation_split": "test"}, label_values=["no", "yes"])
    task, _settings = from_file(path)
    assert (task.sources, task.hub_id, task.train_split, task.evaluation_split) == (
        ("hub", "folder"),
        "me/mine",
        "train",
        "test",
    )
    (tmp_path / "data" / "mine").mkdir(parents=True)
    frame = pd.DataFrame({"text": ["a", "b", "c"], "label": ["yes", "no", None]})
    for split in ("train", "test"):
        frame.to_parquet(tmp_path / "data" / "mine" / f"{split}.parquet")
    p = resolve({"preset": "smoke", "task": str(path), "data_folder": str(tmp_path / "data"), "n_demonstrations": 1})
    assert p.data_source == "folder"
    assert [(e.prompt, e.label) for e in task_data(p).train] == [("a It is", 1), ("b It is", 0)]
    assert resolve({"task": str(path)}).data_source == "hub"
    assert resolve({"task": str(own(data_file=None))}).data_source == "folder"


# ------------------------------------------------------------------------------------------------------------ faults
FAULTS = {  # what is changed of a good file -> the beginning of the line that says so
    "a misspelt field": ({"verbaliser": ["x"]}, "unknown field 'verbaliser': did you mean 'verbalizers'?"),
    "a misspelt setting": ({"settings": {"sed": 3}}, "unknown field 'settings.sed': did you mean 'seed'?"),
    "a misspelt name of the hub": ({"hub": {"id": "x"}}, "unknown field 'hub.id'"),
    "no title": ({"title": None}, "title is missing: add it"),
    "no template": ({"template": None}, "template is missing: add it"),
    "a word that YAML reads as a truth value": ({"verbalizers": [True, "no"]}, "verbalizers.0=True: Input should be"),
    "a wrong seed": ({"settings": {"seed": -1}}, "settings.seed=-1: Input should be greater than or equal to 0"),
    "a wrong kind": ({"settings": {"balanced": "yes"}}, "settings.balanced='yes': Input should be a valid boolean"),
    "no separator": ({"settings": {"separator": ""}}, "settings.separator='': String should have at least 1"),
    "half a character": ({"template": "{text}\ud800"}, "cannot be read"),
    "a template without a column": ({"template": "It is"}, "template='It is' (it needs the name of a text column"),
    "an open brace": ({"template": "{text"}, "template='{text' (expected '}' before end of string)"),
    "a word twice": ({"verbalizers": ["a", "a "]}, "verbalizers='a,a': give two or more different words"),
    "one word": ({"verbalizers": ["a"]}, "verbalizers='a': give two or more different words"),
    "a value too few": ({"label_values": [0]}, "label_values='0': give one different value for each of bad, good"),
    "the title of a task of the book": ({"title": "SST-2", "template": "{text}"}, None),
    "a title of the book": ({"title": "sst2"}, "title='sst2': give one with letters that no task of the book has"),
    "a title without letters": ({"title": "..."}, "title='...': give one with letters"),
    "the name of the table by parameters": ({"title": OWN}, "title='own': give one with letters"),
    "no such source": ({"sources": ["disk"]}, "sources.0='disk': Input should be 'pypi', 'hub'"),
    "a source without its file": ({"data_file": None, "sources": ["file"]}, "data_file: name a table"),
    "generated text without cues": ({"sources": ["file", "generated"]}, "sources: only a task with cues"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_one_line(own, case: str):
    changed, says = FAULTS[case]
    if case == "half a character":
        path = own()
        path.write_bytes(b"title: \xff")
        assert says in lines(path)[0]
    elif says is None:
        assert from_file(own(**changed))[0].name == "sst-2"
    else:
        (line,) = lines(own(**changed))
        assert line.startswith(f"mine.yaml: {says}") and len(line) < 400


def test_every_fault_has_its_line_on_the_command_line(own, capsys):
    path = own(title=None, verbalizers=[1, "b"], settings={"sead": 1, "n_demonstrations": 0})
    assert len(lines(path)) == 4
    assert cli.main(["cost", "--preset", "smoke", "--task", str(path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said == [f"error: {line}" for line in lines(path)]


BAD = {
    "nothing": (b"", "holds no fields"),
    "a list": (b"- a\n- b", "holds no fields"),
    "no YAML": (b"title: a\n  b: c", "line 2 is no YAML"),
    "a reference": (b"a: &a [x]\nb: [*a, *a]", "refers to another place"),
    "code": (b"title: !!python/object/apply:os.system ['true']", "line 1 is no YAML"),
    "a date that is none": (b"title: 2020-99-99", "cannot be read"),
    "no text": (b"\x00\x01", "cannot be read"),
    "too large": (b"# " + b"x" * task_files.MAX_BYTES, "is larger than"),
    "too deep": (b"a: " + b"[" * 20000 + b"]" * 20000, "nests deeper"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, case: str):
    content, says = BAD[case]
    (tmp_path / "bad.yaml").write_bytes(content)
    assert says in in_one_line(from_file, tmp_path / "bad.yaml")


def test_a_task_file_that_is_not_there_or_not_the_one_that_is_named(own):
    assert "no task file at" in in_one_line(resolve, {"task": "./none.yaml"})
    assert "no task file at" in in_one_line(resolve, {"task": "some/folder"})
    assert "give one" in in_one_line(resolve, {"task": "sst2", "task_file": str(own())})
    assert "name a file" in in_one_line(resolve, {"task_file": 3})
    given = {"task": str(own()), "data_file": "x.csv"}
    assert "data_file is given, but task='mine' has its own" in in_one_line(resolve, given)
    assert "has no data_source=hub" in in_one_line(
        lambda: task_data(resolve({"task": str(own()), "data_source": "hub"}))
    )
    (own().parent / "mine.csv").unlink()
    path = own().parent / "mine.yaml"
    (own().parent / "mine.csv").unlink()
    assert "no table at" in in_one_line(lambda: task_data(resolve({"task": str(path)})))


# -------------------------------------------------------------------------------------------------- what texts hold
def test_several_columns_and_unicode(own):
    rows = [{"a b": f"日本語 {i}", "ü": "🙂 {x}", "label": i % 2} for i in range(8)]
    data = load(from_file(own(rows, template="{a b} | {ü} →"))[0], "file")
    assert {example.prompt for example in data.train + data.evaluation} == {
        f"日本語 {i} | 🙂 {{x}} →" for i in range(8)
    }
    given = {"preset": "smoke", "task": str(own(rows, template="{a b} | {ü} →")), "n_demonstrations": 2}
    plan = runs.plan(resolve(given))
    assert "日本語" in plan.layout.tokenizer.decode(plan.layout.prefix(plan.demonstrations))


def test_an_empty_text_is_a_text_while_the_prompt_has_words(own):
    rows = [{"text": "", "label": i % 2} for i in range(4)]
    assert {e.prompt for e in load(from_file(own(rows))[0], "file").train} == {" It is"}
    said = in_one_line(load, from_file(own(rows, template="{text}"))[0], "file")
    assert "the prompt of row 1 is empty" in said


@pytest.fixture
def one_class_missing(own):
    """A task of three classes; no row of its training half has the last one."""
    shown = load(from_file(own())[0], "file").train
    rows = [{"text": row["text"], "label": i % 2} for i, row in enumerate(ROWS)]
    unseen = next(i for i in range(len(ROWS)) if i not in {example.row for example in shown})
    rows[unseen]["label"] = 2
    return own(rows, verbalizers=["bad", "good", "fair"])


def test_a_class_without_training_rows_is_said(one_class_missing, monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 5)
    given = {"preset": "smoke", "task": str(one_class_missing), "n_demonstrations": 4, "controls": False}
    record = experiment.compute(runs.prepare(resolve(given)), progress=False)
    assert record.json["labels_not_in_training"] == ["fair"]
    assert record.remarks == ["No row of the training split has the label fair."]
    said = in_one_line(inputs.check, [resolve(given | {"balanced": True})])
    assert "balanced=True, and no row of the training split has the label 'fair': pass balanced=False" in said


def test_nothing_is_said_of_a_task_of_the_book():
    plan = runs.plan(resolve({"preset": "smoke", "task": "cb"}))
    assert plan.counts == {} and inputs.missing_classes(load_task("cb", "generated")) == []


def test_what_is_new_has_a_value_at_which_nothing_changes():
    new = ("label_prefix", "instruction", "chat", "too_long")
    fields = ExperimentParameters.model_fields
    from iclgd_helpers.experiments.provenance import AS_BEFORE, identifying

    assert {name: fields[name].default for name in new} == {name: AS_BEFORE[name] for name in new}
    assert not set(new) & set(identifying(parameters.resolve({}).model_dump()))


def test_what_yaml_would_take_silently_is_refused(own):
    path = own()
    path.write_text(path.read_text() + "title: Other\n")
    assert lines(path) == ["mine.yaml has the field 'title' twice: keep one"]
    path.write_text(own().read_text() + "settings: {seed: 1, seed: 2}\n")
    assert lines(path) == ["mine.yaml has the field 'seed' twice: keep one"]
    path.write_text(own().read_text() + f"source: {'[' * 30_000}{']' * 30_000}\n")
    assert lines(path) == ["mine.yaml nests deeper than a task needs: write values as on the page How to use"]


def test_a_template_may_not_show_the_answer(own):
    assert "holds the labels" in lines(own(template="{text} {label} It is"))[0]
    assert from_file(own(template="{text} {label} It is", label_column="answer"))


def test_a_file_sets_how_labels_are_scored(own):
    p = resolve({"preset": "smoke", "task": str(own(settings={"label_score": "mean", "too_long": "drop"}))})
    assert (p.label_score, p.too_long) == ("mean", "drop")
