"""What pages 62 and 78 share: the gate, the judge, and verdicts as tables, lines and maps."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from test_reproduction import MODEL, a_grid, diverged, made_up

from iclgd_helpers.measures import resampling, verdicts
from iclgd_helpers.measures.hierarchical import OfMeans
from iclgd_helpers.pages import gates, judging, selection, verdict_maps, verdict_tables
from iclgd_helpers.pages.judging import Stored
from iclgd_helpers.pages.statements import Statement
from iclgd_helpers.pages.verdict_maps import Mark, Panel

UP = OfMeans(lambda mean: mean, ([0.2] * 9,))  # 0.2, whatever is resampled


def statement(name: str = "R1", effect: Callable[..., Any] = lambda *_: UP, **given: Any) -> Statement:
    given = {"kind": "paper", "gated": False, "rates": ("protocol",), "bound": 0.1} | given
    return Statement(name, says=f"Statement {name} holds.", source="here", test="a number", effect=effect, **given)


# --------------------------------------------------------------------------------------------------------------- gate
@pytest.mark.parametrize(
    ("helps", "said"), [(True, "for"), (False, "no in-context effect"), (None, "gate not measured")]
)
def test_behind_the_gate_a_task_counts_only_if_it_is_open(helps: bool | None, said: str) -> None:
    assert gates.state("for", helps) == said


# -------------------------------------------------------------------------------------------------------------- judge
def test_the_judge_applies_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = Stored([made_up(MODEL, task) for task in selection.TASKS])  # one seed a task
    assert judging.judge([statement()], stored)[0]["verdict"].item() == "inconclusive"  # two are asked for

    monkeypatch.setattr(verdicts, "status", lambda effects, least: "for" if effects and least == 2 else "open")
    assert judging.judge([statement()], stored)[0]["verdict"].item() == "reproduced"
    monkeypatch.setattr(verdicts, "verdict", lambda states, fewest: f"{len(states)} {fewest}")
    said = judging.judge([statement()], stored)[0]
    assert said["verdict"].item() == said["without_the_gate"].item() == "6 3"


def test_an_effect_belongs_to_the_seeds_of_its_task() -> None:
    suffixes = []

    def effect(record: Any, suffix: str) -> OfMeans:
        suffixes.append(suffix)
        return OfMeans(lambda mean: mean, ([float(record.json["parameters"]["seed"])] * 4,))

    found = judging.effects_of(statement(effect=effect), (MODEL, "cb"), "chosen", Stored(a_grid()))
    assert found == [((seed, seed, seed), f"{MODEL}-cb-{seed}") for seed in (3, 4, 5)] and set(suffixes) == {"_chosen"}
    seen = statement()
    assert judging.effects_of(seen, ("another", "cb"), "chosen", Stored(a_grid())) == []


def test_an_absent_arm_has_no_effect_and_a_diverged_one_an_undefined() -> None:
    asked = statement(effect=lambda record, _suffix: record.arms["joint"] and UP)
    without = made_up(MODEL, "cb", 3)
    del without.json["arms"]["joint"]
    found = Stored([without, diverged(made_up(MODEL, "cb", 4), "joint"), made_up(MODEL, "cb", 5)])
    effects = judging.effects_of(asked, (MODEL, "cb"), "protocol", found)
    assert [run for _effect, run in effects] == [f"{MODEL}-cb-4", f"{MODEL}-cb-5"]
    assert effects[0][0] == resampling.UNDEFINED and effects[1][0] == pytest.approx((0.2, 0.2, 0.2))


@pytest.mark.parametrize(("unit", "n"), [("draws", 3), ("orders", 3), ("clips", None)])
def test_other_units_give_one_effect_of_the_whole_task(unit: str, n: int | None) -> None:
    seeds = [made_up(MODEL, "cb", seed) for seed in (3, 4, 5)]
    orders = [made_up(MODEL, "cb", 3, order=order) for order in (1, 2)]  # of the first seed alone
    stored = Stored(seeds, orders, clips={(MODEL, "cb"): {"points": []}})
    asked = statement(unit=unit, effect=lambda given: (len(given), 0, 0))
    ((effect, runs),) = judging.effects_of(asked, (MODEL, "cb"), "protocol", stored)
    assert effect[0] == (n or 1) and len(runs.split()) == (n or 3)
    assert judging.judged(asked, (MODEL, "sst2"), "protocol", stored).state == "missing"


def test_exploratory_statements_are_counted_on_exploratory_records() -> None:
    stored = Stored([made_up(MODEL, "cb", 21)], exploratory=[made_up(MODEL, "cb", seed) for seed in (3, 4)])
    for is_exploratory, runs in ((True, [f"{MODEL}-cb-3", f"{MODEL}-cb-4"]), (False, [f"{MODEL}-cb-21"])):
        asked = statement(exploratory=is_exploratory)
        assert [run for _, run in judging.effects_of(asked, (MODEL, "cb"), "protocol", stored)] == runs


def test_control_one_record_is_no_draw() -> None:
    stored = Stored([made_up(MODEL, "cb", 3)])
    assert judging.effects_of(statement(unit="draws"), (MODEL, "cb"), "protocol", stored) == []


def test_a_statement_says_how_many_tasks_it_needs() -> None:
    stored = Stored([record for record in a_grid() if selection.cell(record)[1] in ("cb", "mr")])
    asked = [statement("R1"), statement("R2", fewest=2)]
    assert judging.judge(asked, stored)[0]["verdict"].tolist() == ["inconclusive", "reproduced"]


def test_independent_effects_are_as_far_apart_as_their_ends() -> None:
    assert resampling.minus((0.5, 0.4, 0.7), (0.2, 0.1, 0.25)) == pytest.approx((0.3, 0.15, 0.6))


# ------------------------------------------------------------------------------------------------------------- tables
def verdicts_of(*rows: tuple[str, str, str, str, str]) -> pd.DataFrame:
    """(id, model, rate, verdict, without the gate); all tasks but one are for the statement."""
    states = {task: "for" for task in selection.TASKS} | {"cb": "against"}
    return pd.DataFrame([(*row, states) for row in rows], columns=list(judging.VERDICTS))


ASKED = [statement("R2", gated=True), statement("R10", kind="stricter")]
SAID = verdicts_of(
    ("R10", "m", "protocol", "not reproduced", "not reproduced"),
    ("R2", "m", "protocol", "inconclusive", "reproduced"),
    ("R2", "m", "chosen", "reproduced", "reproduced"),
)


def test_states_are_counted_in_their_order() -> None:
    assert verdict_tables.counted(["open", "for", "open"]) == "2 open, 1 for" and verdict_tables.counted([]) == ""


def test_wide_table_has_the_statements_in_order_and_the_protocol_first() -> None:
    wide = verdict_tables.by_model(verdict_tables.long(SAID, ASKED), ASKED)
    assert [key[0] for key in wide.index] == ["R2", "R10"], "by number, not by letters"
    assert list(wide.columns) == [("m", "protocol"), ("m", "chosen")]
    assert wide.loc[("R2", "paper", "Statement R2 holds."), ("m", "chosen")] == (
        "reproduced\n1 against, 5 for\nwithout the gate: reproduced"
    )
    assert wide.iloc[1].tolist() == ["not reproduced\n1 against, 5 for", ""], "not gated, and not run at the other rate"
    empty = verdict_tables.long(SAID.iloc[:0], ASKED)
    assert len(verdict_tables.by_model(empty, ASKED)) == 0 and list(empty) == list(verdict_tables.COLUMNS)


# --------------------------------------------------------------------------------------------------------------- maps
def marks_of(figure: plt.Figure) -> list[tuple[float, float, str, float]]:
    """(column, row, marker, size) of every mark in the figure's first panel."""
    lines = figure.axes[0].lines
    return [(line.get_xdata()[0], line.get_ydata()[0], line.get_marker(), line.get_markersize()) for line in lines]


def test_map_has_a_mark_for_each_status_and_the_verdict_beside_it() -> None:
    panel = Panel([Mark(0, "sst2", "for"), Mark(1, "cb", "against", dimmed=True), Mark(1, "mr", "missing")], {1: "no"})
    figure = verdict_maps.draw({"m": panel}, ["R1", "R2"], height=2, room=2, fontsize=8, dimmed="closed")
    assert marks_of(figure) == [(0, 0, "^", 7), (5, 1, "v", pytest.approx(4.2))], "nothing stands for missing"
    (text,) = figure.axes[0].texts
    assert (text.get_text(), text.get_position()[1]) == ("no", 1)
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels == ["for", "against", "open", "undefined", "closed"]
    plt.close(figure)


def test_map_of_statements_has_a_panel_for_each_rate_that_was_run() -> None:
    said = pd.concat([SAID, verdicts_of(("R2", "n", "protocol", "not run", "not run"))])
    for said_again, titles in ((said, ["m, protocol rate", "m, chosen rate"]), (said.iloc[:0], [""])):
        figure = verdict_maps.of_statements(said_again, ["R2", "R10"])
        assert [ax.get_title("left") for ax in figure.axes] == titles
        assert len(figure.axes[0].texts) == 2 * (len(titles) - 1)
        plt.close(figure)
