"""The smaller sub-commands of `iclgd`: records, cost, doctor; and the examples in every help text."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from iclgd_helpers import cli, pinned_downloads, storage
from iclgd_helpers.experiments import health, provenance, records
from iclgd_helpers.paths import repository_root

STORED = repository_root() / "results" / "records"


def said(arguments: list[str], capsys: pytest.CaptureFixture, status: int = 0) -> str:
    assert cli.main(arguments) == status
    return capsys.readouterr().out


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, str, str]:
    """A folder with two committed records, and their names."""
    names = [path.parent.name for path in sorted(STORED.glob("*/record.json"))[:2]]
    for name in names:
        shutil.copytree(STORED / name, tmp_path / "records" / name)
    return tmp_path / "records", names[0], names[1]


# ------------------------------------------------------------------------------------------------------------- records
def test_records_are_listed_one_a_line(two: tuple[Path, str, str], capsys: pytest.CaptureFixture):
    folder, *names = two
    lines = said(["records", "list", "--records", str(folder)], capsys).splitlines()
    assert len(lines) == 4 and [line.split()[0] for line in lines[1:3]] == names
    assert all(line.endswith("current") for line in lines[1:3])


def test_what_is_not_current_says_why(two: tuple[Path, str, str], capsys: pytest.CaptureFixture, monkeypatch):
    folder, first, _second = two
    asked = ["records", "current", "--records", str(folder)]
    assert said(asked, capsys).startswith("2 of 2 records are current")
    monkeypatch.setattr(provenance, "engine_hash", lambda: "another")
    text = said(asked, capsys)
    assert text.startswith("0 of 2 records are current: helpers another") and f"{first}: made by helpers" in text


def test_a_record_is_shown_by_the_beginning_of_its_name(two: tuple[Path, str, str], capsys: pytest.CaptureFixture):
    folder, first, _second = two
    record = records.load(folder / first)
    text = said(["records", "show", first[:6], "--records", str(folder)], capsys)
    assert f"record {first}" in text and f"task = {record.json['parameters']['task']}" in text
    assert f"{record.json['arms']['zero_shot']['accuracy']:.3f}" in text
    assert said(["records", "show", str(folder / first)], capsys) == text


def test_a_record_equals_itself_and_no_other(two: tuple[Path, str, str], capsys: pytest.CaptureFixture):
    folder, first, second = two
    assert "the same" in said(["records", "compare", first, first, "--records", str(folder)], capsys)
    text = said(["records", "compare", first, second, "--records", str(folder)], capsys, 1)
    assert "entries differ" in text and "parameters." in text


def test_one_changed_number_is_seen(two: tuple[Path, str, str], tmp_path: Path, capsys: pytest.CaptureFixture):
    folder, first, _second = two
    record = records.load(folder / first)
    content = storage.parse_json(json.dumps(record.json))
    content["arms"]["zero_shot"]["label_log_probability"] += 1e-6
    records.save(records.Record(content, record.examples), tmp_path / "changed")
    asked = ["records", "compare", str(folder / first), str(tmp_path / "changed" / first)]
    assert "arms.zero_shot.label_log_probability" in said(asked, capsys, 1)
    examples = record.examples.assign(row=record.examples["row"] + 1)
    records.save(records.Record(record.json, examples), tmp_path / "rows")
    assert "examples row: up to 1" in said([*asked[:3], str(tmp_path / "rows" / first)], capsys, 1)


# ------------------------------------------------------------------------------------------------------ cost and doctor
def test_cost_says_every_stage_and_computes_nothing(capsys: pytest.CaptureFixture):
    text = said(["cost", "--preset", "smoke", "--task", "cb", "--task", "mr", "--tflops", "1"], capsys)
    assert text.count("tiny-llama on ") == 2 and text.count("finetune sequential") == 2 and "GiB" in text


def test_doctor_names_what_is_missing(capsys: pytest.CaptureFixture, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(health, "PACKAGES", ("torch",))
    monkeypatch.setattr(health, "_answers", lambda _address: True)
    text = said(["doctor"], capsys)
    assert re.search(r"^ok +torch ", text, re.M) and "missing" not in text
    monkeypatch.setattr(health, "PACKAGES", ("torch", "no-such-package"))
    monkeypatch.setenv("ICLGD_RECORDS", "/proc/x")
    text = said(["doctor"], capsys, 1)
    assert "missing  no-such-package" in text and "missing  records" in text


def test_doctor_without_a_network_asks_for_what_is_not_in_the_cache(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(health, "_answers", lambda _address: False)
    monkeypatch.setattr(pinned_downloads, "hub_is_reachable", lambda: False)
    monkeypatch.setenv("ICLGD_CACHE", str(tmp_path))
    assert "missing  default model" in said(["doctor"], capsys, 1)


# ------------------------------------------------------------------------------------------------------------ examples
def commands(group: click.Group, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        yield (*before, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*before, name))


EXAMPLES = [
    example
    for _words, command in commands(cli.iclgd)
    for example in re.sub(r"^Examples?: ", "", command.epilog or "").split("; ")
    if example
]


def test_every_command_has_an_example():
    assert [words for words, command in commands(cli.iclgd) if not command.epilog and words != ("records",)] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_name_commands_and_options_that_exist(example: str):
    """They are parsed, not run."""
    words = shlex.split(example)
    assert words[0] == "iclgd"
    with cli.iclgd.make_context("iclgd", words[1:], resilient_parsing=False) as context:
        command, rest = cli.iclgd.commands[words[1]], words[2:]
        while isinstance(command, click.Group):
            command, rest = command.commands[rest[0]], rest[1:]
        if command.name != "bench":
            command.make_context(words[1], rest, parent=context)
