"""The confirmatory runs: which they are, which arms they have, and that a lost one returns with the same numbers."""

import shutil
from pathlib import Path

import pandas as pd
import pytest

from iclgd_helpers import cli
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import arms, experiment, parameters, plans, protocol, readings, records, runs, sweeps
from iclgd_helpers.pages import selection

MODEL = "tiny-llama"
ONLY = ["standard", "joint", "in_context_shuffled", "standard_shuffled"]
GIVEN = {"preset": "smoke", "task": "mr", "n_demonstrations": 3, "max_examples": 6, "n_calibration_rows": 4}


def test_rows_are_new_and_seeds_are_known_or_new() -> None:
    for task, seeds in protocol.CONFIRMATORY_SEEDS.items():
        items = plans._confirmatory(protocol.MODELS[0], task)
        assert [item.given.seed for item in items] == list(seeds) and len({item.name for item in items}) == len(seeds)
        new = set(seeds) - set(protocol.SEEDS[task])
        given = items[0].given
        assert (given.first_row == 0) == (task in protocol.ALL_ROWS_TASKS), "else every row is new"
        assert given.first_row in (0, protocol.N_ROWS) and len(new) >= 2
        assert (len(new) == len(seeds)) == (given.first_row == 0), "where no row is new, every seed is"
        assert not new & set(protocol.MORE_SEEDS)
        assert given.n_calibration_rows == protocol.N_CALIBRATION_ROWS and given.arms == list(
            protocol.CONFIRMATORY_ARMS
        )


def test_a_run_has_the_arms_that_are_named() -> None:
    given = parameters.resolve(GIVEN | {"arms": ONLY, "chosen_rates": {"standard": 1e-3}, "conditioning": False})
    run = runs.prepare(given)
    record = experiment.compute(run, progress=False)
    wanted = ["zero_shot", "in_context", *ONLY, "standard_chosen"]
    assert set(record.json["arms"]) == set(wanted) == set(run.arms)
    assert set(record.json["finetuning"]) == {"standard", "joint", "standard_shuffled", "standard_chosen"}
    whole = experiment.compute(runs.prepare(parameters.resolve(GIVEN | {"conditioning": False})), progress=False)
    for name in ("in_context", "joint", "standard_shuffled"):
        for table in ("examples", "calibration"):
            one, other = (readings.scores(getattr(r, table), name) for r in (record, whole))
            assert abs(one - other).max() < 1e-4, "an arm is the same whichever others are run"
    assert whole.json["id"] != record.json["id"] and "sequential" in whole.json["arms"]


@pytest.mark.parametrize("name", ["norm_matched", "untrained_standard"])
def test_controls_one_by_one(name: str) -> None:
    given = parameters.resolve(GIVEN | {"arms": [*arms.NEEDED[name], name], "conditioning": False})
    record = experiment.compute(runs.prepare(given), progress=False)
    assert set(record.json["arms"]) == {"zero_shot", "in_context", *arms.NEEDED[name], name}
    assert set(record.json["comparisons"]) == set(record.json["arms"]) - {
        "zero_shot", "in_context", "untrained_zero_shot", "untrained_in_context"
    }  # fmt: skip


def test_chosen_rates_are_those_of_the_arms_that_are_run() -> None:
    rates = {"standard": 1e-3, "joint": 1e-4, "sequential": 1e-5}
    assert arms.among(rates, ONLY) == {"standard": 1e-3, "joint": 1e-4} and arms.among(rates, None) == rates
    assert arms.among(None, ONLY) is None


def test_a_record_without_its_texts_is_damaged(records_folder: Path) -> None:
    given = parameters.resolve(GIVEN | {"arms": ["standard"], "conditioning": False})
    record = experiment.run(given, progress=False)
    path = records_folder / record.json["id"]
    assert sorted(file.name for file in path.iterdir()) == ["calibration.parquet", "examples.parquet", "record.json"]
    again = records.load(path)
    pd.testing.assert_frame_equal(again.calibration, record.calibration)
    assert again.json == record.json | {key: again.json[key] for key in records.TABLES.values()}
    (path / "calibration.parquet").write_bytes((path / "examples.parquet").read_bytes())
    with pytest.raises(InputError, match=r"calibration\.parquet does not match"):
        records.load(path)


def test_a_lost_run_returns_with_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole plan of one task, with a tiny model and generated text, by the command."""
    few = {"max_examples": 5, "max_compared": 5, "n_calibration_rows": 3, "n_demonstrations": 3}
    resolve = parameters.resolve
    monkeypatch.setattr(plans, "resolve", lambda given: resolve(given | few | {"data_source": "generated"}))
    monkeypatch.setattr(protocol, "CONFIRMATION", str(tmp_path / "confirmation"))
    monkeypatch.setattr(selection, "CONFIRMATION", str(tmp_path / "confirmation"))
    monkeypatch.setattr(protocol, "N_ROWS", 4)
    monkeypatch.setattr(sweeps, "stored", lambda *_: {"chosen": {"standard": 1e-3, "joint": 1e-4}})
    monkeypatch.setattr(plans.learning_rates, "is_whole", lambda _: True)
    monkeypatch.setattr(cli.parameters, "combinations", lambda *_: [])
    call = ["grid", "--plan", "confirmation", "--model", MODEL, "--task", "mr", "--on", "here", "--tflops", "1"]
    assert cli.iclgd.main(call, standalone_mode=False) is None
    n = len(protocol.CONFIRMATORY_SEEDS["mr"])
    made = {path.name: path for path in (tmp_path / "confirmation").iterdir()}
    assert len(made) == n and f"0 of {n} jobs are stored" in capsys.readouterr().out
    lost = sorted(made)[0]
    before = records.load(made[lost])
    shutil.rmtree(made[lost])
    cli.iclgd.main(call, standalone_mode=False)
    assert f"{n - 1} of {n} jobs are stored" in capsys.readouterr().out
    after = records.load(made[lost])
    pd.testing.assert_frame_equal(before.examples, after.examples)
    pd.testing.assert_frame_equal(before.calibration, after.calibration)
    same = {key: value for key, value in before.json.items() if key not in records.VOLATILE}
    assert same == {key: after.json[key] for key in same}
