"""Run records: complete or not there at all, checked when read, named by all that determines them, resumable."""

import ast
import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iclgd_helpers import experiment, parameters, records
from iclgd_helpers.errors import InputError
from iclgd_helpers.records import Record


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of records."""
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path / "records"))
    return tmp_path / "records"


def a_record(accuracy: float = 0.5) -> Record:
    values = np.arange(6, dtype=np.float16).reshape(3, 2)
    examples = pd.DataFrame({"row": [4, 2, 9], "sim_aou/joint": list(values)})
    return Record({"id": "abc", "engine": "e", "accuracy": accuracy, "undefined": float("nan")}, examples)


def contents(folder: Path) -> list[str]:
    """Everything below `folder`, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ saving
def test_saved_and_found(folder: Path):
    assert records.find("abc") is None
    assert records.save(a_record()) == folder / "abc"
    found = records.find("abc")
    assert found.json["accuracy"] == 0.5 and found.json["undefined"] is None
    assert found.examples["row"].tolist() == [4, 2, 9]
    assert np.stack(found.examples["sim_aou/joint"]).dtype == np.float16
    assert contents(folder) == ["abc", "abc/examples.parquet", "abc/record.json"]
    records.save(a_record(0.7))
    assert records.find("abc").json["accuracy"] == 0.7
    assert [r.json["id"] for r in records.load_all(folder)] == ["abc"]


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("method", ["write_bytes", "write_text", "mkdir"])
def test_full_disk_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, there_before: bool
):
    """The disk is full at the folder, the first or the second file: nothing new, and an old record stays whole."""
    folder.mkdir()
    if there_before:
        records.save(a_record())
    before = contents(folder)
    original = getattr(Path, method)

    def full(path: Path, *arguments, **keywords):
        if ".part-" not in str(path):
            return original(path, *arguments, **keywords)
        if method.startswith("write"):
            original(path, arguments[0][:10])  # a piece of the file is written
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, method, full)
    with pytest.raises(InputError, match="No space left.*ICLGD_RECORDS"):
        records.save(a_record(0.9))
    monkeypatch.undo()
    monkeypatch.setenv("ICLGD_RECORDS", str(folder))
    assert contents(folder) == before
    assert not there_before or records.find("abc").json["accuracy"] == 0.5


def test_interrupt_between_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            records.save(a_record())
    assert contents(folder) == []


def test_two_runs_store_the_same_record_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The other run comes first, between this one's last look and its renaming."""
    original, other_was_here = Path.rename, []

    def rename(path: Path, target: Path):
        if target == folder / "abc" and not other_was_here:
            other_was_here.append(True)
            records.save(a_record())
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert records.save(a_record()) == folder / "abc"
    assert other_was_here and records.find("abc").json["accuracy"] == 0.5
    assert contents(folder) == ["abc", "abc/examples.parquet", "abc/record.json"]


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path / "file" / "records"))
    with pytest.raises(InputError, match="cannot write the record.*ICLGD_RECORDS"):
        records.save(a_record())


def test_json_beside_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sweeps" / "a.json"
    records.write_json(path, {"b": float("nan"), "a": (1, 2)})
    assert records.read_json(path) == {"a": [1, 2], "b": None} and contents(tmp_path / "sweeps") == ["a.json"]
    for damage in ("{", "[1]", "<<<<<<< HEAD"):
        path.write_text(damage)
        with pytest.raises(InputError, match="a.json is damaged.*delete it"):
            records.read_json(path)

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path.write_text("{}")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.json \(No space left"):
        records.write_json(path, {"a": 1})
    assert path.read_text() == "{}" and contents(tmp_path / "sweeps") == ["a.json"]


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_layout_of_a_file_changes_nothing_in_it(value: object):
    text = records._text({"value": value})
    assert json.loads(text) == {"value": value}
    assert text == records._canonical({"value": value}) or len(text) < len(records._canonical({"value": value}))


def test_lists_of_numbers_stand_on_one_line():
    text = records._text({"norms": [[1.5, -2e-07, None], [3, 4, 5]], "words": ["a", "b"]})
    assert "[1.5, -2e-07, null]" in text and "[3, 4, 5]" in text and '"a",\n' in text


def test_file_names_of_models_keep_them_apart(tmp_path: Path):
    models = ["m", "one/m", "other/m", str(tmp_path / "one" / "m"), str(tmp_path / "other" / "m")]
    names = [records.file_name(model) for model in models]
    assert len(set(names)) == 5 and not any("/" in name for name in names)
    assert names[:2] == ["m", "one--m"] and names[3].startswith("m-")


# --------------------------------------------------------------------------------------- damaged records
DAMAGE = {
    "truncated JSON": lambda path: (path / "record.json").write_bytes((path / "record.json").read_bytes()[:40]),
    "empty JSON": lambda path: (path / "record.json").write_bytes(b""),
    "not UTF-8": lambda path: (path / "record.json").write_bytes(b"\xff\xfe{"),
    "other JSON": lambda path: (path / "record.json").write_text("[1, 2]"),
    "JSON without checksum": lambda path: (path / "record.json").write_text("{}"),
    "changed JSON without checksum": lambda path: (path / "record.json").write_text(
        json.dumps({k: v for k, v in json.loads((path / "record.json").read_text()).items() if k != "json_sha256"})
    ),
    "changed JSON": lambda path: (path / "record.json").write_text(
        (path / "record.json").read_text().replace("abc", "abd")
    ),
    "no JSON": lambda path: (path / "record.json").unlink(),
    "no examples": lambda path: (path / "examples.parquet").unlink(),
    "flipped bit": lambda path: flip(path / "examples.parquet"),
    "truncated examples": lambda path: os.truncate(path / "examples.parquet", 100),
    "a file instead of a folder": lambda path: (shutil.rmtree(path), path.write_text("x")),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_record(folder: Path, damage):
    damage(records.save(a_record()))
    with pytest.raises(InputError, match="abc is damaged.*delete that folder") as caught:
        records.find("abc")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- identity
SMOKE = parameters.resolve({"preset": "smoke"})
OTHER = {
    "model": "tiny-opt", "task": "cb", "seed": 1, "n_demonstrations": 5, "max_examples": 7, "max_compared": 3,
    "learning_rate": 0.5, "device": "cuda", "dtype": "float64", "separator": "newline", "token_read": "prompt",
    "balanced": not SMOKE.balanced, "loss": "label", "clip": "global", "clip_value": 1.0,
    "equal_demonstrations": False, "max_context": 99, "untrained": "everything", "controls": False,
    "order": 1, "chosen_rates": {"joint": 0.1}, "conditioning": False, "template": "{a} b", "verbalizers": "x,y",
    "label_column": "c", "label_values": "0,1",
}  # fmt: skip
WHERE_DATA_LIES = {"preset": "quick", "data_source": "folder", "data_folder": "elsewhere", "data_file": "elsewhere.csv"}


def test_identity_depends_on_every_parameter_and_on_the_data():
    assert set(OTHER) | set(WHERE_DATA_LIES) == set(parameters.ExperimentParameters.model_fields)
    identity = parameters.run_id(SMOKE, "data")
    identities = [parameters.run_id(SMOKE.model_copy(update={name: value}), "data") for name, value in OTHER.items()]
    identities += [identity, parameters.run_id(SMOKE, "other data")]
    assert len(set(identities)) == len(identities)
    for name, value in WHERE_DATA_LIES.items():
        assert parameters.run_id(SMOKE.model_copy(update={name: value}), "data") == identity


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the helpers' source that `engine_hash` reads."""
    shutil.copytree(parameters.PACKAGE, tmp_path / "package", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(parameters, "PACKAGE", tmp_path / "package")
    return tmp_path / "package"


def test_engine_hash_is_of_code_not_of_comments(package: Path):
    before = parameters.engine_hash.__wrapped__()
    assert before == parameters.engine_hash()
    for path in package.glob("*.py"):
        source = path.read_text()
        head, docstring, rest = source.split('"""', 2)
        assert not head and len(docstring) > 10
        path.write_text(f'"""Another docstring."""{rest}'.replace("\n\n\n", "\n\n# a comment\n\n\n"))
    (package / "figures.py").write_text("raise SystemExit")
    assert parameters.engine_hash.__wrapped__() == before
    for name in parameters.ENGINE:
        source = (package / f"{name}.py").read_text()
        (package / f"{name}.py").write_text(source + "\nADDED = 1\n")
        assert parameters.engine_hash.__wrapped__() != before, name
        (package / f"{name}.py").write_text(source)


def imported_by(name: str, seen: set[str]) -> set[str]:
    """Helper modules that `name` imports, directly or through others."""
    for node in ast.walk(ast.parse((parameters.PACKAGE / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "iclgd_helpers":
            names = [alias.name for alias in node.names] if node.module == "iclgd_helpers" else [node.module[14:]]
            for found in set(names) - seen:
                seen.add(found)
                imported_by(found, seen)
    return seen


def test_engine_hash_covers_all_that_an_experiment_imports():
    imported = imported_by("experiment", {"experiment"})
    assert {"attention", "finetune", "metrics", "observe", "sequences", "tasks"} < imported
    assert imported - {"errors", "parameters", "records"} <= set(parameters.ENGINE)


def test_old_engines_are_told_from_the_present_one():
    record = a_record()
    assert not record.is_current
    assert dataclasses.replace(record, json={"engine": parameters.engine_hash()}).is_current


# ------------------------------------------------------------------------------------- killed and resumed
GIVEN = {"preset": "smoke", "task": "sst5", "n_demonstrations": 4, "max_examples": 6, "learning_rate": 0.05}
# Runs one cell. If asked to, it stops for good in the middle: of finetuning, or between the record's two files.
SCRIPT = f"""
import pathlib, sys, time
from iclgd_helpers import experiment, parameters

def stop(*_arguments, **_keywords):
    print("in the middle", flush=True)
    time.sleep(600)

if sys.argv[1] == "finetune":
    original = experiment.finetune.finetune_together
    experiment.finetune.finetune_together = lambda *a: stop() if a[3] == "sequential" else original(*a)
elif sys.argv[1] == "save":
    pathlib.Path.write_text = stop
experiment.run_cell(parameters.resolve({GIVEN!r}), progress=False)
print("done", flush=True)
"""


def start(folder: Path, where: str) -> subprocess.Popen:
    environment = os.environ | {"ICLGD_RECORDS": str(folder)}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, where], stdout=subprocess.PIPE, text=True, env=environment)


def without_volatile(record: Record) -> str:
    return json.dumps({k: v for k, v in record.json.items() if k not in records.VOLATILE}, sort_keys=True)


def test_killed_run_gives_the_same_record_when_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    killed = [start(disturbed, where) for where in ("finetune", "save")]
    monkeypatch.setenv("ICLGD_RECORDS", str(undisturbed))
    first = experiment.run_cell(parameters.resolve(GIVEN), progress=False)
    for process in killed:
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    identity = first.json["id"]
    assert any(name.endswith("examples.parquet") for name in contents(disturbed))  # one file of two was written,
    monkeypatch.setenv("ICLGD_RECORDS", str(disturbed))
    assert records.find(identity) is None and records.load_all(disturbed) == []  # under no final name
    assert start(disturbed, "nowhere").communicate()[0] == "done\n"
    second = records.find(identity)
    assert without_volatile(records.load(undisturbed / identity)) == without_volatile(second)
    assert second.examples.equals(first.examples)
    assert len(records.load_all(disturbed)) == 1


def test_stored_record_is_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = parameters.resolve(GIVEN)
    stored = dataclasses.replace(a_record(), json={"id": records.record_id(given), "engine": "e"})
    records.save(stored)
    monkeypatch.setattr(experiment, "prepare", lambda _given: pytest.fail("computed again"))
    assert experiment.run_cell(given).json["id"] == stored.json["id"]
