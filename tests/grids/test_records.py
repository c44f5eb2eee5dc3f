"""Run records: complete or not there at all, checked when read, named by all that determines them, resumable."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import house
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import arms, experiment, parameters, provenance, records, runs
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.paths import repository_root

SMOKE = parameters.resolve({"preset": "smoke"})
PLAIN = parameters.resolve({"preset": "smoke", "n_calibration_rows": 0})


@pytest.fixture
def folder(records_folder: Path) -> Path:
    """An empty folder of records."""
    return records_folder


def a_record(accuracy: float = 0.5, **changed: object) -> Record:
    """A record as a run of the smoke preset would store it, but for its numbers; `changed` goes into its JSON."""
    values = np.arange(6, dtype=np.float16).reshape(3, 2)
    names = sorted(arms.names(PLAIN.controls))
    columns = {f"log_probability/{arm}": list(-np.ones((3, 2), np.float32)) for arm in names}
    examples = pd.DataFrame({"row": [4, 2, 9], "sim_aou/joint": list(values), **columns})
    content = {"parameters": PLAIN.model_dump(), "engine": "e", "data_checksum": "d", "n_examples": 3}
    content |= {"arms": {arm: {"accuracy": accuracy} for arm in names}, "undefined": float("nan")}
    return Record(content | {"id": ID} | changed, examples)


ID = provenance.run_id(PLAIN.model_dump(), "e", "d", PLAIN.model)
FILES = [ID, f"{ID}/examples.parquet", f"{ID}/record.json"]


def accuracy(record: Record) -> float:
    return record.json["arms"]["zero_shot"]["accuracy"]


def contents(folder: Path) -> list[str]:
    """Everything below `folder`, hidden things too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ saving
def test_saved_and_found(folder: Path):
    assert records.find(ID) is None
    assert records.save(a_record()) == folder / ID
    found = records.find(ID)
    assert accuracy(found) == 0.5 and found.json["undefined"] is None
    assert found.examples["row"].tolist() == [4, 2, 9]
    assert np.stack(found.examples["sim_aou/joint"]).dtype == np.float16
    assert contents(folder) == FILES
    assert [r.json["id"] for r in records.load_all(folder)] == [ID]


def test_a_sound_record_stays_and_a_damaged_one_is_replaced(folder: Path):
    path = records.save(a_record())
    before = path.stat().st_ino
    records.save(a_record(0.7))
    assert accuracy(records.find(ID)) == 0.5 and path.stat().st_ino == before
    flip(path / "examples.parquet")
    records.save(a_record(0.7))
    assert accuracy(records.find(ID)) == 0.7 and contents(folder) == FILES


@pytest.mark.parametrize("there_before", [False, True])
@pytest.mark.parametrize("step", ["first file", "second file", "rename"])
def test_full_disk_leaves_nothing_half_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, step: str, there_before: bool
):
    """The disk is full at the first or the second file, or at the end: nothing new, and what was there is readable."""
    folder.mkdir()
    if there_before:
        flip(records.save(a_record()) / "examples.parquet")  # a sound one would not be written again
    before = contents(folder)
    written, write, rename = [], storage._write_through, Path.rename
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def partly(path: Path, content: bytes) -> None:
        written.append(path)
        write(path, content[:10])
        if len(written) == ("first file", "second file").index(step) + 1:
            raise full

    def refuse(path: Path, target: Path) -> Path:
        if target == folder / ID:
            raise full
        return rename(path, target)

    if step == "rename":
        monkeypatch.setattr(Path, "rename", refuse)
    else:
        monkeypatch.setattr(storage, "_write_through", partly)
    with pytest.raises(InputError, match="No space left.*ICLGD_RECORDS"):
        records.save(a_record(0.9))
    assert contents(folder) == ([] if step == "rename" else before)


def test_interrupt_between_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            records.save(a_record())
    assert contents(folder) == []


def test_two_runs_store_the_same_record_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The other run comes first, between this one's last look and its renaming."""
    original, other_was_here = Path.rename, []

    def rename(path: Path, target: Path):
        if target == folder / ID and not other_was_here:
            other_was_here.append(True)
            records.save(a_record())
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert records.save(a_record()) == folder / ID
    assert other_was_here and accuracy(records.find(ID)) == 0.5
    assert contents(folder) == FILES


def test_a_record_that_is_being_replaced_is_never_called_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A reader holds the JSON of a damaged record when another process puts a sound one in its place."""
    path = records.save(a_record())
    flip(path / "examples.parquet")
    original, replaced = Path.read_bytes, []

    def read(file: Path) -> bytes:
        if file == path / "examples.parquet" and not replaced:
            replaced.append(True)
            records.save(a_record(0.7))
            flip(path / "examples.parquet")  # as the reader, who opened the old file, would see it
            content = original(file)
            flip(path / "examples.parquet")
            return content
        return original(file)

    monkeypatch.setattr(Path, "read_bytes", read)
    assert accuracy(records.load(path)) == 0.7 and replaced


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path / "file" / "records"))
    with pytest.raises(InputError, match="cannot write .*ICLGD_RECORDS"):
        records.save(a_record())


def test_nothing_is_computed_that_could_not_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ICLGD_RECORDS", str(tmp_path / "file" / "records"))
    monkeypatch.setattr(runs, "prepare", lambda *_: pytest.fail("computed what cannot be stored"))
    with pytest.raises(InputError, match="cannot write to .*records"):
        experiment.run(parameters.resolve(GIVEN), progress=False)


# ------------------------------------------------------------------------------------- stored JSON, leftovers
def test_json_beside_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sweeps" / "a.json"
    storage.write_json(path, {"b": float("nan"), "a": (1, 2)})
    assert storage.read_json(path) == {"a": [1, 2], "b": None} and contents(tmp_path / "sweeps") == ["a.json"]
    other = path.read_text().replace("[1, 2]", "[1, 3]")
    damage = ["{", "[1]", "<<<<<<< HEAD", "null", "3", '"text"', "[" * 10**5, other, '{"a": NaN}']
    for text in [*damage, "{}"]:
        path.write_text(text)
        with pytest.raises(InputError, match="a.json is damaged.*delete it") as caught:
            storage.read_json(path)
        assert "\n" not in str(caught.value)

    def full(*_arguments: object, **_options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InputError, match=r"cannot write .*a\.json \(No space left"):
        storage.write_json(path, {"a": 1})
    assert path.read_text() == "{}" and contents(tmp_path / "sweeps") == ["a.json"]


@given(st.integers(0, 10**6), st.integers(0, 7))
def test_a_flipped_bit_is_noticed_or_changes_nothing(place: int, bit: int):
    content = {"points": [{"rate": 3e-05, "n": 12}, {"rate": None, "n": 7}], "model": "m"}
    text = bytearray(storage.json_bytes(content))
    text[place % len(text)] ^= 1 << bit
    try:
        assert storage.checked_json(bytes(text)) == content  # a blank, or e for E
    except ValueError:
        pass


def test_every_stored_file_carries_its_checksum():
    given = (
        records.JSON,
        "verdicts.json",
    )  # the one is checked with its tables; the other is a list for anybody's tools
    paths = [p for p in (repository_root() / "results").rglob("*.json") if p.name not in given]
    assert len(paths) > 30
    for path in paths:
        storage.read_json(path)


def test_leftovers_of_a_killed_process_are_removed_and_a_living_ones_are_not(folder: Path):
    script = "import os, signal, sys; from pathlib import Path; from iclgd_helpers import storage\n"
    script += "storage.os.fsync = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
    script += "storage.write_folder(Path(sys.argv[1]) / 'x', {'a': b'1'}, '')"
    killed = subprocess.run([sys.executable, "-c", script, str(folder)])
    assert killed.returncode == -signal.SIGKILL and len(list(folder.glob(".part-*"))) == 1
    mine, other = storage.part(folder), folder / ".part-elsewhere-1-0"
    mine.touch(), other.touch()
    records.save(a_record())
    assert contents(folder) == sorted([mine.name, other.name, *FILES]), "of this process, or another machine: it lives"
    os.utime(other, (0, 0))
    storage.require_writable(folder)
    assert contents(folder) == sorted([mine.name, *FILES])


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
))  # fmt: skip
def test_layout_of_a_file_changes_nothing_in_it(value: object):
    assert storage.checked_json(storage.json_bytes({"value": value})) == {"value": value}


def test_lists_of_numbers_stand_on_one_line():
    text = storage.json_bytes({"norms": [[1.5, -2e-07, None], [3, 4, 5]], "words": ["a", "b"]}).decode()
    assert "[1.5, -2e-07, null]" in text and "[3, 4, 5]" in text and '"a",\n' in text


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
        (path / "record.json").read_text().replace("0.5", "0.6")
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
    with pytest.raises(InputError, match=f"{ID} is damaged.*delete that folder") as caught:
        records.find(ID)
    assert "\n" not in str(caught.value)


OF_ANOTHER = {
    "another id": {"id": "0" * 16},
    "another seed": {"parameters": SMOKE.model_dump() | {"seed": 99}},
    "another engine": {"engine": "f"},
    "other data": {"data_checksum": "x"},
    "another model": {"model_content": "tiny-opt"},
    "an arm less": {"arms": {"zero_shot": {}}},
    "an arm of no one": {"arms": {arm: {} for arm in (*arms.names(SMOKE.controls), "joint_chosen")}},
    "more rows": {"n_examples": 4},
    "no parameters": {"parameters": None},
    "parameters of another form": {"parameters": [1]},
}


@pytest.mark.parametrize("changed", OF_ANOTHER.values(), ids=OF_ANOTHER.keys())
def test_a_record_that_is_not_its_folders_is_refused(folder: Path, changed: dict):
    """Its checksums are right, but it is of another run than its name says."""
    path = records.save(a_record())
    checksum = storage.checked_json((path / "record.json").read_bytes())["examples_sha256"]
    content = a_record(**changed).json | {"examples_sha256": checksum}
    (path / "record.json").write_bytes(storage.json_bytes(content))
    with pytest.raises(InputError, match="is damaged.*delete that folder"):
        records.find(ID)


# ---------------------------------------------------------------------------------------------- identity
OTHER = {
    "model": "tiny-opt", "task": "cb", "seed": 1, "n_demonstrations": 5, "max_examples": 7, "max_compared": 3,
    "learning_rate": 0.5, "dtype": "float64", "separator": "newline", "token_read": "prompt",
    "balanced": not SMOKE.balanced, "loss": "label", "clip": "global", "clip_value": 1.0,
    "equal_demonstrations": False, "max_context": 99, "untrained": "everything", "controls": False,
    "order": 1, "label_score": "mean", "label_prefix": "", "instruction": "Answer.", "chat": True, "too_long": "drop",
    "chosen_rates": {"joint": 0.1}, "conditioning": False, "template": "{a} b", "verbalizers": "x,y",
    "label_column": "c", "label_values": "0,1", "first_row": 3, "n_calibration_rows": 2, "arms": ["joint"],
}  # fmt: skip
WHERE_DATA_LIES = {"preset": "quick", "data_source": "folder", "data_folder": "elsewhere", "data_file": "elsewhere.csv"}
WHERE_DATA_LIES |= {"device": "cuda", "task_file": "/elsewhere/a_task.yaml"}


def test_identity_depends_on_every_parameter_on_the_data_and_on_the_model():
    assert set(OTHER) | set(provenance.WHERE) == set(parameters.ExperimentParameters.model_fields)

    def run_id(data: str = "data", **changed: object) -> str:
        given = SMOKE.model_copy(update=changed)
        return records.run_id(given, data, given.model)

    identities = [run_id(**{name: value}) for name, value in OTHER.items()] + [run_id(), run_id("other data")]
    assert len(set(identities)) == len(identities)
    for name, value in WHERE_DATA_LIES.items():
        assert run_id(**{name: value}) == run_id()
    assert records.run_id(SMOKE, "data", "sha256 of a folder") != run_id()


def test_committed_records_are_what_their_folders_say():
    for folder in ("results/records", "results/rehearsal"):
        assert records.load_all(folder)


# What they do to a number is in a record's parameters, or nothing.
NOT_HASHED = {
    "errors",
    "progress",
    "paths",
    "schemas",
    "storage",
    "experiments/parameters",
    "experiments/provenance",
    "experiments/records",
}


def test_engine_hash_covers_all_that_an_experiment_imports():
    imported = house.reached("experiments/experiment", NOT_HASHED)
    assert {"engine/prefix_attention", "engine/finetune", "measures/metrics", "data/tasks"} < imported
    assert imported == set(provenance.ENGINE) - {"experiments/experiment"}


def test_old_engines_are_told_from_the_present_one():
    record = a_record()
    assert not records.is_current(record)
    for engine in (provenance.engine_hash(), provenance.source_hash(), *provenance.proven_equal()):
        assert records.is_current(dataclasses.replace(record, json={"engine": engine}))


# ------------------------------------------------------------------------------------- killed and resumed
GIVEN = {"preset": "smoke", "task": "sst5", "n_demonstrations": 4, "max_examples": 6, "learning_rate": 0.05}
# Runs one cell. If asked to, it stops for good in the middle: of finetuning, or between the record's two files.
SCRIPT = f"""
import pathlib, sys, time
from iclgd_helpers import storage
from iclgd_helpers.engine import finetune
from iclgd_helpers.experiments import experiment, parameters

def stop(*_arguments, **_keywords):
    print("in the middle", flush=True)
    time.sleep(600)

if sys.argv[1] == "finetune":
    original = finetune.finetune_together
    finetune.finetune_together = lambda *a: stop() if a[2] == "sequential" else original(*a)
elif sys.argv[1] == "save":
    write = storage._write_through
    storage._write_through = lambda p, c: stop() if p.name == "record.json" else write(p, c)
experiment.run(parameters.resolve({GIVEN!r}), progress=False)
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
    first = experiment.run(parameters.resolve(GIVEN), progress=False)
    for process in killed:
        assert process.stdout.readline() == "in the middle\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    name = first.json["id"]
    assert any(name.endswith("examples.parquet") for name in contents(disturbed))  # one file of two was written,
    monkeypatch.setenv("ICLGD_RECORDS", str(disturbed))
    assert records.find(name) is None and records.load_all(disturbed) == []  # under no final name
    assert start(disturbed, "nowhere").communicate()[0] == "done\n"
    second = records.find(name)
    assert without_volatile(records.load(undisturbed / name)) == without_volatile(second)
    assert second.examples.equals(first.examples)
    assert len(records.load_all(disturbed)) == 1


def test_stored_record_is_not_computed_again(folder: Path, monkeypatch: pytest.MonkeyPatch):
    given = parameters.resolve(GIVEN)
    stored = experiment.run(given, progress=False)
    monkeypatch.setattr(runs, "prepare", lambda _given: pytest.fail("computed again"))
    assert experiment.run(given).json == stored.json | {"examples_sha256": ANY, "calibration_sha256": ANY}
