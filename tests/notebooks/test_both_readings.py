"""How pages show both readings: the shares of changed answers by cause, and what is read from predictions."""

import dataclasses
from collections.abc import Iterator

import matplotlib.pyplot as plt
import notebook_cells
import numpy as np
import pytest

from iclgd_helpers.experiments import experiment, parameters, readings
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import metrics
from iclgd_helpers.pages import bias, changed_answers, questions, tables

GIVEN = {"preset": "smoke", "task": "mr", "n_demonstrations": 4, "max_examples": 30, "n_calibration_rows": 12}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    folder = tmp_path_factory.mktemp("records")
    return experiment.record_of(parameters.resolve(GIVEN | {"conditioning": False}), False, folder)[0]


def with_scores(record: Record, arm: str, like: str, shift: float) -> Record:
    """The record in which an arm has the scores of another, and a prior that prefers class 1 by so many nats."""
    name, other = f"log_probability/{arm}", f"log_probability/{like}"
    moved = np.array([0.0, shift])
    examples = record.examples.assign(**{name: [np.asarray(v) + moved for v in record.examples[other]]})
    json = record.json | {"calibrated": {**record.json["calibrated"]}}
    table = record.calibration.assign(**{name: [np.asarray(v) + moved for v in record.calibration[other]]})  # type: ignore[union-attr]
    return dataclasses.replace(record, json=json, examples=examples, calibration=table)


def test_shares_add_up_to_the_changes_that_are_seen(record: Record) -> None:
    table = bias.shares([record])
    for arm, mine in table.groupby("arm"):
        assert mine["value"].sum() == pytest.approx(questions.moved(record, str(arm)).mean())
        assert (mine["low"] <= mine["value"] + 1e-9).all() and (mine["value"] <= mine["high"] + 1e-9).all()
    assert set(table["arm"]) == {a for a in record.arms if a != "zero_shot" and not a.startswith("untrained")}


@pytest.mark.parametrize("shift", [3.0, -3.0])
def test_an_arm_that_shifts_its_prior_alone_changes_answers_by_that_alone(record: Record, shift: float) -> None:
    """Nearly: a mean of distributions does not shift by the same number of nats as each of them."""
    planted = with_scores(record, "in_context", "zero_shot", shift)
    mine = bias.shares([planted]).set_index(["arm", "cause"])["value"]["in_context"]
    assert mine["prior"] > 0.2 and abs(mine["evidence"]) < 0.35 * mine["prior"]
    assert bias.said(bias.shares([planted])).startswith("In-context changes")


def test_control_without_a_shift_no_answer_changes(record: Record) -> None:
    same = with_scores(record, "in_context", "zero_shot", 0.0)
    assert not bias.shares([same]).set_index("arm").loc["in_context", "value"].any()


def test_figure_and_table_of_causes(record: Record) -> None:
    table = bias.shares([record])
    figure = bias.draw(table)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == table["arm"].nunique() and "in-context" in labels
    plt.close(figure)
    wide = bias.by_task(table)
    assert wide.shape == (1, table["arm"].nunique())
    none = dataclasses.replace(record, json={k: v for k, v in record.json.items() if k != "calibrated"})
    assert bias.shares([none]).empty and "No priors" in bias.said(bias.shares([none]))


def test_both_readings_stand_side_by_side(record: Record) -> None:
    table = tables.both_readings(record)
    assert list(table.columns)[:2] == [("accuracy", "raw"), ("accuracy", "calibrated")]
    shown = table.loc["in-context", ("accuracy", "calibrated")]
    expected = questions.right(readings.read(record, readings.CALIBRATED), "in_context").mean()
    assert shown.startswith(f"{expected:.2f} [")
    assert table.loc["zero-shot", ("Jaccard", "raw")] == "", "it is what others are compared with"
    none = dataclasses.replace(record, json={k: v for k, v in record.json.items() if k != "calibrated"})
    assert {kind for _what, kind in tables.both_readings(none).columns} == {"raw"}


def test_jaccard_beside_chance(record: Record) -> None:
    calm = readings.of([record], readings.CALIBRATED)
    table = changed_answers.beside_chance([record], calm)
    wide = changed_answers.chance_laid_out(table)
    assert wide.shape == (1, 4) and list(wide.columns)[0] == ("raw", "seen")
    assert changed_answers.chance_laid_out(changed_answers.beside_chance([record], [])).iloc[0, 2] == "–"


def test_chance_is_what_page_50_writes_out() -> None:
    """The helper is the general version of the page's own lines."""
    rng = np.random.default_rng(50)

    def made_up(classes: int) -> Iterator[list[np.ndarray]]:
        for _ in range(200):
            base = rng.integers(0, classes, 60)
            yield [np.where(rng.random(60) < 0.5, base, rng.integers(0, classes, 60)) for _ in range(4)]

    page = notebook_cells.run("50_prediction_alignment", "verdict-blind", np=np, metrics=metrics, made_up=made_up)
    for z, c, f, y in (next(made_up(n)) for n in (2, 3, 5)):
        both, total = page["blind"](z, c, f, y), (c != z).sum() + (f != z).sum()
        assert metrics.jaccard_by_chance(z, c, f) == pytest.approx(both / (total - both))
