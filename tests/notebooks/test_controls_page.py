"""The pages that draw from the grid: a control put in an arm's place turns every verdict round; seeds stay apart."""

import base64
import re
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from notebook_cells import run
from test_reproduction import MODEL, a_grid, answers, diverged, edited, made_up

from iclgd_helpers.experiments import protocol
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import intervals
from iclgd_helpers.pages import grid_figures, quantities, selection

RULE = ("claims", "columns", "effect", "rule", "effects-of")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names of page 62 up to the judging of an empty grid, every gate open."""
    monkeypatch.setattr(intervals, "RESAMPLES", 200)
    monkeypatch.setattr(selection, "gate", lambda *_: True)
    return run("62_controls", "parameters", "imports", *RULE, "judge", found=[], rates={})


def verdicts(page: dict[str, Any], found: Any, measure: str = "sim_aou") -> dict[str, str]:
    judged = page["judge"](list(found))[2]
    return judged[judged["measure"] == measure].set_index("id")["verdict"].to_dict()


def swapped(record: Record, a: str, b: str) -> Record:
    metrics = ("sim_aou", "sim_aou_null", "sim_am_delta")
    return edited(record, {f"{m}/{x}": f"{m}/{y}" for m in metrics for x, y in ((a, b), (b, a))})


# ---------------------------------------------------------------------------------------------------------- page 62
def test_planted_levels_are_found(page: dict[str, Any]) -> None:
    found = verdicts(page, a_grid())
    assert {name: found[name] for name in ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8")} == dict.fromkeys(
        ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8"), "more than the control"
    )
    assert found["C9"] == "not more"  # the norm-matched update is less alike


@pytest.mark.parametrize(
    ("claim", "arm", "control"),
    [
        ("C2", "standard", "random_update"), ("C3", "standard", "standard_shuffled"),
        ("C4", "standard", "untrained_standard"), ("C5", "standard", "untrained_standard"),
        ("C7", "joint", "standard_shuffled"), ("C8", "joint", "standard"),
    ],
)  # fmt: skip
def test_swapped_arms_turn_the_verdict_round(page: dict[str, Any], claim: str, arm: str, control: str) -> None:
    turned = [swapped(record, arm, control) for record in a_grid()]
    assert verdicts(page, turned)[claim] == "not more"


def test_swapped_measure_and_null_turn_the_verdict_round(page: dict[str, Any]) -> None:
    pairs = {f"sim_aou/{a}": f"sim_aou_null/{a}" for a in ("standard", "joint")}
    turned = [edited(record, pairs | {new: old for old, new in pairs.items()}) for record in a_grid()]
    found = verdicts(page, turned)
    assert (found["C1"], found["C6"]) == ("not more", "not more")


def test_labels_that_do_not_matter_are_not_found(page: dict[str, Any]) -> None:
    assert verdicts(page, a_grid(), "accuracy")["C10"] == "more than the control"
    same = answers() | {"in_context_shuffled": answers()["in_context"]}
    other = [made_up(MODEL, *selection.cell(record)[1:], arms=same) for record in a_grid()]
    assert verdicts(page, other, "accuracy")["C10"] == "inconclusive"


def test_what_has_diverged_is_never_judged(page: dict[str, Any]) -> None:
    found = [diverged(record, "standard") for record in a_grid()]
    for measure in page["MEASURES"]:
        decided = {name for name, said in verdicts(page, found, measure).items() if said != "inconclusive"}
        assert not decided & {"C1", "C2", "C3", "C4", "C5", "C8", "C9", "C11"}, measure
    assert verdicts(page, found)["C6"] == "more than the control", "the other arms are judged as before"


def test_highest_of_several_controls_counts(page: dict[str, Any]) -> None:
    (record, *_) = a_grid()
    effect, every = page["effect"], page["EVERY"]
    single = [effect(record, "sim_aou", "standard", (control,))[0] for control in every]
    assert effect(record, "sim_aou", "standard", every)[0] == pytest.approx(min(single))


def test_jaccard_is_the_records_own(page: dict[str, Any]) -> None:
    (record, *_) = a_grid()
    shared, union = page["columns"](record, "jaccard", "standard")
    assert shared.mean() / union.mean() == pytest.approx(
        record.json["comparisons"]["standard"]["jaccard_all_code"]["value"]
    )


def test_few_cells_closed_gates_and_random_weights_decide_nothing(
    page: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    firsts = selection.first_seeds(a_grid())
    assert len(firsts) == 6 and set(verdicts(page, firsts).values()) == {"inconclusive"}
    random = [edited(r, parameters=r.json["parameters"] | {"model": "random-x"}) for r in a_grid()]
    assert verdicts(page, random) == {}
    monkeypatch.setattr(selection, "gate", lambda *_: False)
    assert set(verdicts(page, a_grid()).values()) == {"inconclusive"}


# ------------------------------------------------------------------------------------------------------ other pages
@pytest.mark.parametrize(
    ("first", "second", "word"), [(0, 40, "the draw"), (40, 0, "the order"), (0, 0, "undecided"), (20, 20, "undecided")]
)
def test_order_and_draw_are_told_apart(first: int, second: int, word: str) -> None:
    def group(step: int) -> list[Record]:
        arms, y = answers(), answers()["label"]
        shown = [np.where(np.arange(len(y)) < step * i // 2 + 10, y, 1 - y) for i in range(4)]
        return [made_up(MODEL, "sst2", arms=arms | {"in_context": answer}) for answer in shown]

    record = made_up()
    names = {"record": record, "run": record.json, "orders": group(first), "draws": group(second)}
    page = run("50_prediction_alignment", "parameters", "imports", "predictions", "order-spread", **names)
    assert page["spread_row"](MODEL, "sst2", "in_context")["matters more"] == word
    assert page["spread_row"](MODEL, "subj", "in_context") is None


def test_draws_are_of_the_models_that_were_reordered() -> None:
    orders = [made_up(MODEL, "sst2", order=order) for order in range(5)]
    seeds = [made_up(model, task, seed) for model in (MODEL, "Other") for task, seed in
             (("sst2", 2), ("sst2", 3), ("sst2", 4), ("mr", 5))]  # fmt: skip
    names = {"everything": orders + seeds, "found": seeds, "extra": {}, "selection": selection, "protocol": protocol}
    page = run("50_prediction_alignment", "order-groups", **names)
    assert [selection.cell(record) for record in page["draws"]] == [(MODEL, "sst2", seed) for seed in (2, 3, 4)]
    assert len(page["orders"]) == 5


def test_clipping_is_counted() -> None:
    def point(method: str, clip: str, am: float, aou: float) -> dict[str, Any]:
        values = {"sim_am_direct": am, "sim_aou": aou}
        made = {name: {"value": v, "interval": [v - 0.1, v + 0.1]} for name, v in values.items()}
        return {"method": method, "clip": clip} | made

    free = [point("joint", "none", 0.2, 0.7), point("standard", "none", 0.5, 0.4)]
    sweep = {"points": [*free, point("joint", "global", 0.3, 0.6), point("joint", "global", 0.5, 0.8)]}
    page = run("72_gradient_norms_and_clipping", "clips-restore")
    found = page["restores"](sweep)
    assert (found["both"], found["both, clear"], found["bounds"]) == (2, 1, 2)
    sweep["points"][:2] = [point("joint", "none", 0.9, 0.7), point("standard", "none", 0.5, 0.4)]
    assert page["restores"](sweep)["both"] == 0


# ------------------------------------------------------------------------------------------------------------ helper
def test_two_uncertainties_stay_apart() -> None:
    long = quantities.collect(a_grid(), {"one": "sim_aou/joint", "two": "sim_aou/standard"})
    assert list(long.columns) == ["quantity", *quantities.LONG] and len(long) == 36
    summary = quantities.by_task(long)
    assert len(summary) == 12 and (summary["n_seeds"] == 3).all()
    one = quantities.by_task(quantities.collect(selection.first_seeds(a_grid()), {"one": "sim_aou/joint"}))
    assert one["seeds_low"].isna().all() and one["examples_low"].notna().all()
    assert quantities.by_task(long.iloc[:0]).empty


def test_shown_table_has_every_cell_and_its_download() -> None:
    long = quantities.collect(a_grid(), {"one": "sim_aou/joint"})
    page, nothing = quantities.show(long, "some").data, quantities.show(long.iloc[:0], "some").data
    assert page.count("<br>s [") == 6 and page.count("<br>q [") == 6 and page.count("n 3 × ") == 6
    text = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]).decode()
    assert all(record.json["id"] in text for record in a_grid())
    assert "0 rows" in nothing


def test_drawing_any_subset() -> None:
    arms = {"finetuned": "standard", "finetuned, chosen rate": "standard_chosen"}
    named = {"finetuned": "sim_aou/standard", "finetuned, chosen rate": "sim_aou/joint"}
    for found in ([], a_grid()[:1], a_grid(), [*a_grid(), *a_grid("SmolLM2-135M-Instruct")]):
        long = quantities.collect(found, named)
        figure = grid_figures.draw(long, arms, "SimAOU", marks=long, line=0)
        assert len(figure.axes) == max(1, len({selection.cell(record)[0] for record in found}))
        if found:
            low, high = figure.axes[0].get_xlim()
            assert low < long["low"].min() and long["high"].max() < high
        plt.close(figure)
