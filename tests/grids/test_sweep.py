"""A grid of cells by one command: cost first, nothing twice, and pages that pick the records up."""

import json
from dataclasses import replace

import pytest

from iclgd_helpers import cli
from iclgd_helpers.engine import models
from iclgd_helpers.experiments import (
    cost,
    experiment,
    grids,
    live_lines,
    parameters,
    plans,
    records,
    run_notebook,
    runs,
)
from iclgd_helpers.paths import repository_root

GRID = ["grid", "--on", "here"]

SMALL = ["-p", "max_examples", "4", "-p", "n_demonstrations", "3", "-p", "data_source", "generated"]


pytestmark = pytest.mark.usefixtures("records_folder")


@pytest.fixture
def checkpoint(tmp_path):
    """A small random XGLM checkpoint laid out as the hub's: config, tokenizer files, safetensors."""
    model = models.tiny_model("tiny-xglm")
    model.model.save_pretrained(tmp_path / "small-xglm")
    model.tokenizer.save_pretrained(tmp_path / "small-xglm")
    return str(tmp_path / "small-xglm")


def test_the_paper_preset_end_to_end_on_a_small_checkpoint(checkpoint, records_folder, tmp_path, capfd):
    """Records of two of the six tasks, then a page that draws one of them without computing anything."""
    arguments = ["--preset", "paper", "--model", checkpoint, "--task", "sst2", "--task", "cb", *SMALL]
    assert cli.main([*GRID, *arguments]) == 0
    printed = capfd.readouterr().out
    assert printed.index("0 of 2 jobs are stored") < printed.index("TFLOP") < printed.index("[1/2]")
    assert "small-xglm/sst2/2" in printed and "small-xglm/cb/3" in printed and " left" in printed
    stored = {path.parent.name: path.read_bytes() for path in records_folder.glob("*/record.json")}
    assert {json.loads(text)["parameters"]["task"] for text in stored.values()} == {"sst2", "cb"}
    given = {"preset": "paper", "model": checkpoint, "task": "sst2", "data_source": "generated"}
    given |= {"max_examples": 4, "n_demonstrations": 3}
    folder = run_notebook.run(
        repository_root() / "notebooks" / "50_prediction_alignment.ipynb", given, tmp_path / "page"
    )
    assert (folder / "record.json").read_bytes() in stored.values()
    assert {path.parent.name: path.read_bytes() for path in records_folder.glob("*/record.json")} == stored


def test_paths_are_read_from_where_they_are_typed(checkpoint, tmp_path, monkeypatch, capfd):
    """A model, a table and a folder of records, named as in a shell; a table that is not there says so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"word {i},{i % 2}\n" for i in range(20)))
    table = ["-p", "data_file", "mine.csv", "-p", "template", "{text} is", "-p", "verbalizers", "bad,good"]
    size = ["-p", "max_examples", "4", "-p", "n_demonstrations", "3"]
    arguments = ["--preset", "smoke", "--task", "own", "--model", "./small-xglm", "--records", "here", *table, *size]
    assert cli.main([*GRID, *arguments, "--cost-only", "--tflops", "1"]) == 0
    assert "small-xglm/own" in capfd.readouterr().out
    (tmp_path / "here").touch()
    assert cli.main([*GRID, *arguments]) == 2
    assert f"cannot write to {tmp_path / 'here'}" in capfd.readouterr().err
    (tmp_path / "mine.csv").rename(tmp_path / "elsewhere")
    assert cli.main([*GRID, *arguments, "--cost-only", "--tflops", "1"]) == 2


def test_recorded_cells_are_skipped_and_lost_ones_made_again(records_folder, capfd, monkeypatch):
    arguments = ["--preset", "smoke", "--task", "sst2", "--seed", "0", "--seed", "1", *SMALL]
    assert cli.main([*GRID, *arguments]) == 0
    first = {record.json["id"]: record.json for record in records.load_all(records_folder)}
    assert len(first) == 2
    lost = sorted(first)[0]
    for path in (records_folder / lost).iterdir():
        path.unlink()
    (records_folder / lost).rmdir()
    capfd.readouterr()
    assert cli.main([*GRID, *arguments]) == 0
    assert "1 of 2 jobs are stored" in capfd.readouterr().out
    again = {record.json["id"]: record.json for record in records.load_all(records_folder)}
    for volatile in records.VOLATILE:
        for record in (*first.values(), *again.values()):
            record.pop(volatile, None)
    assert again == first
    monkeypatch.setattr(experiment, "record_of", lambda *_, **__: pytest.fail("computed what is recorded"))
    assert cli.main([*GRID, *arguments]) == 0


def test_a_task_may_be_given_either_way_but_once(capfd):
    arguments = ["--cost-only", "--tflops", "1", "--preset", "smoke", *SMALL]
    for asked in (["-p", "task", "cb"], ["--task", "cb"]):
        assert cli.main([*GRID, *arguments, *asked]) == 0
        printed = capfd.readouterr().out
        assert "/cb/" in printed and "/sst2/" not in printed
    assert cli.main([*GRID, *arguments, "--task", "cb", "-p", "task", "mr"]) == 2
    assert "--task and -p task are both given" in capfd.readouterr().err
    assert cli.main([*GRID, *arguments, "--task", "cb", "-p", "preset", "paper"]) == 2
    assert "--preset and -p preset are both given" in capfd.readouterr().err
    assert cli.main([*GRID, "--cost-only", "--tflops", "1", "-p", "preset", "smoke", *SMALL]) == 0
    assert "tiny-llama/snippets/7" in capfd.readouterr().out


def test_a_cell_asked_for_twice_is_one_cell(capfd):
    twice = 2 * ["--task", "cb", "--seed", "3", "--model", "tiny-llama"]
    assert cli.main([*GRID, "--preset", "smoke", "--cost-only", "--tflops", "1", *twice, *SMALL]) == 0
    assert capfd.readouterr().out.count("tiny-llama/cb/3") == 1


def test_cost_only_computes_nothing(records_folder, capfd):
    assert cli.main([*GRID, "--preset", "smoke", "--task", "cb", "--cost-only", "--tflops", "0.001", *SMALL]) == 0
    printed = capfd.readouterr().out
    assert "tiny-llama/cb/3" in printed and "0.00 TFLOP/s" in printed and not records_folder.exists()


def test_an_interrupt_keeps_what_is_recorded(records_folder, capfd, monkeypatch):
    compute = experiment.compute

    def interrupted(run, progress):
        if run.parameters.seed == 1:
            raise KeyboardInterrupt
        return compute(run, progress)

    monkeypatch.setattr(experiment, "compute", interrupted)
    arguments = ["--preset", "smoke", "--task", "sst2", "--seed", "0", "--seed", "1", *SMALL]
    assert cli.main([*GRID, *arguments]) == 130
    assert "start it again to go on" in capfd.readouterr().err
    assert len(records.load_all(records_folder)) == 1


def test_sums_and_durations():
    assert [live_lines.duration(seconds) for seconds in (0.4, 59.6, 61, 3600, 7322)] == [
        "0 m 00 s", "1 m 00 s", "1 m 01 s", "1 h 00 m", "2 h 02 m",
    ]  # fmt: skip
    fixed = {"preset": "smoke", "data_source": "generated"}
    given = parameters.combinations(fixed, {"task": ["cb", "sst2"], "seed": []})
    planned = plans.product(given, records.records_folder())
    lines = list(grids.estimate(planned, 1e-3))
    whole = sum(one.job.cost for one in planned)
    assert (
        len(lines) == 5
        and f"{whole / 1e12:.1f}" in lines[3]
        and whole == sum(cost.of_run(runs.plan(one)).flops for one in given)
    )


def test_what_is_stored_costs_nothing():
    given = parameters.combinations({"preset": "smoke", "data_source": "generated"}, {"task": ["cb", "sst2"]})
    cb, sst2 = plans.product(given, records.records_folder())
    assert list(grids.estimate([cb, replace(sst2, is_stored=True)], 1)) == list(grids.estimate([cb], 1))
