"""The verdicts of the reproduction: gates, readings, estimates from records, and how pages show them."""

import dataclasses
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup

from iclgd_helpers.experiments import protocol, readings
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import calibration, hierarchical
from iclgd_helpers.pages import (
    decisions,
    gates,
    judging,
    planted,
    quantities,
    selection,
    verdict_overview,
    verdict_tables,
)
from iclgd_helpers.pages.statements import BY_ID, STATEMENTS

MODEL = "Gemma-3-270M"
HELPS, NO_HELP = planted.SCENARIOS[-1], planted.SCENARIOS[0]
FEW = tuple(BY_ID[name] for name in ("R1", "R3", "R5", "R13"))
NOTHING = judging.Stored([])


@cache
def a_grid(helps: bool = True, tasks: tuple[str, ...] = protocol.COLUMNS) -> tuple[Record, ...]:
    """Planted records of all confirmatory cells of one model."""
    generator, made = np.random.default_rng(3), []
    for task in tasks:
        seeds = protocol.CONFIRMATORY_SEEDS[task]
        drawn = planted.records(HELPS if helps else NO_HELP, generator, len(seeds), n=120)
        for seed, record in zip(seeds, drawn, strict=True):
            given = {"model": MODEL, "task": task, "seed": seed, "data_source": "folder"}
            json = record.json | {"id": f"{task}-{seed}", "parameters": given, "engine": "now"}
            made.append(dataclasses.replace(record, json=json))
    return tuple(made)


def said(found: Any, **wanted: str) -> list[dict[str, Any]]:
    rows = decisions.decide(FEW, found, NOTHING)
    return [row for row in rows if wanted.items() <= row.items()]


# --------------------------------------------------------------------------------------------------------------- gate
@pytest.mark.parametrize("reading", readings.READINGS)
def test_the_gate_is_open_where_demonstrations_help(reading: str) -> None:
    for helps in (True, False):
        of_task = [r for r in readings.of(a_grid(helps), reading) if selection.cell(r)[1] == "mr"]
        found = gates.gate(of_task)
        assert found.is_open == helps and found.estimate is not None and found.estimate.n_questions == planted.N_TEXTS


def test_the_gate_reads_the_texts_that_all_seeds_share() -> None:
    few = [r for r in a_grid() if selection.cell(r)[1] == "mr"]
    cut = [dataclasses.replace(r, calibration=r.calibration.iloc[i:]) for i, r in enumerate(few)]  # type: ignore[union-attr]
    found = gates.gate(cut)
    assert found.estimate is not None and found.estimate.n_questions == planted.N_TEXTS - len(few) + 1
    assert gates.gate(few[:1]) == gates.SHUT == gates.gate([dataclasses.replace(r, calibration=None) for r in few])
    assert gates.gate([dataclasses.replace(few[0], calibration=None)], exploratory=True).is_open


def test_a_gated_statement_needs_three_open_tasks() -> None:
    (open_, *_), (shut, *_) = said(a_grid(), id="R3"), said(a_grid(False), id="R3")
    assert open_["n_tasks"] == 6 and open_["verdict"] == "reproduced"
    assert shut["effect"] is None and shut["verdict"] == "not judged" and shut["n_tasks"] == 0
    assert shut["without_the_gate"] and open_["without_the_gate"][0] == pytest.approx(open_["effect"])
    soup = BeautifulSoup(verdict_overview.table([shut]).data, "html.parser")
    assert soup.find("circle")["class"] == ["described"] and "a description" in soup.find("svg")["aria-label"]  # type: ignore[index]
    two = [r for r in a_grid() if selection.cell(r)[1] in ("mr", "cb")]
    assert said(two, id="R3")[0]["effect"] is None


# ------------------------------------------------------------------------------------------------------------- verdicts
def test_rows_are_plain_and_whole() -> None:
    rows = decisions.decide(FEW, a_grid(), NOTHING)
    assert all(list(row) and set(row) == set(decisions.COLUMNS) for row in rows)
    assert {(r["id"], r["reading"], r["rate"]) for r in rows} >= {
        ("R1", "raw", "protocol"),
        ("R1", "calibrated", "protocol"),
    }
    (one,) = said(a_grid(), id="R1", reading="raw")
    assert (one["n_seeds"], one["n_examples"], one["model"]) == (3, 6 * 120, MODEL)
    assert set(one["by_task"]) == set(protocol.COLUMNS) and one["effect"] == pytest.approx(
        np.mean(list(one["by_task"].values()))
    )


def test_effects_are_those_of_the_reading() -> None:
    raw, calm = (said(a_grid(), id="R1", reading=reading)[0] for reading in readings.READINGS)
    expected: dict[str, list[float]] = {}
    for record in a_grid():
        right = {}
        for arm in ("in_context", "zero_shot"):
            on_texts, on_questions = (readings.scores(t, arm) for t in (record.calibration, record.examples))
            scores = on_questions - calibration.log_prior(on_texts)
            right[arm] = (scores.argmax(-1) == record.examples["label"]).mean()
        expected.setdefault(selection.cell(record)[1], []).append(right["in_context"] - right["zero_shot"])
    assert calm["effect"] == pytest.approx(np.mean([np.mean(of_task) for of_task in expected.values()]))
    assert abs(raw["effect"] - calm["effect"]) > 1e-3


def test_no_effect_is_not_reproduced_and_arms_exchanged_refute() -> None:
    assert all(row["verdict"] != "reproduced" for row in said(a_grid(False), id="R1"))
    one, other = "log_probability/in_context", "log_probability/zero_shot"

    def exchanged(table: pd.DataFrame) -> pd.DataFrame:
        return table.rename(columns={one: other, other: one})

    turned = [
        dataclasses.replace(r, examples=exchanged(r.examples), calibration=exchanged(r.calibration))  # type: ignore[arg-type]
        for r in a_grid()
    ]
    assert said(turned, id="R1", reading="raw")[0]["verdict"] == "refuted"


def test_p_values_are_adjusted_over_all_that_is_judged() -> None:
    rows = [row for row in decisions.decide(FEW, a_grid(), NOTHING) if row["p"] is not None]
    assert [row["adjusted_p"] for row in rows] == pytest.approx(
        hierarchical.false_discovery([row["p"] for row in rows])
    )
    assert any(row["adjusted_p"] > row["p"] for row in rows)


def test_new_seeds_stand_apart() -> None:
    (row,) = said(a_grid(), id="R1", reading="raw")
    new = [r for r in a_grid() if selection.cell(r)[2] > 20]
    assert len(new) == 5 * 2 + 3
    assert row["new_seeds"][0] == pytest.approx(said(new, id="R1", reading="raw")[0]["effect"])


def test_seeds_are_crossed_with_the_same_questions_or_not_at_all() -> None:
    mine, others = ([r for r in a_grid() if (selection.cell(r)[1] == "mr") == here] for here in (True, False))
    shorter = dataclasses.replace(mine[0], json=mine[0].json | {"n_compared": 60})
    (cut,) = said([shorter, *mine[1:], *others], id="R1", reading="raw")
    assert "mr" in cut["by_task"] and cut["n_examples"] == 5 * 120 + 60
    moved = dataclasses.replace(mine[0], examples=mine[0].examples.assign(row=mine[0].examples["row"] + 1))
    (left_out,) = said([moved, *mine[1:], *others], id="R1", reading="raw")
    assert "mr" not in left_out["by_task"] and left_out["n_tasks"] == 5


def test_what_has_diverged_is_left_out_and_no_record_gives_no_verdict() -> None:
    few = [r for r in a_grid() if selection.cell(r)[1] != "mr"]
    marked = [dataclasses.replace(r, json=r.json | {"arms": r.json["arms"] | {"in_context": {"diverged": True}}})
              for r in a_grid() if selection.cell(r)[1] == "mr"]  # fmt: skip
    (row,) = said([*few, *marked], id="R1", reading="raw")
    assert row["n_tasks"] == 5 and "mr" not in row["by_task"]
    assert decisions.decide(FEW, [], NOTHING) == []
    random = [
        dataclasses.replace(r, json=r.json | {"parameters": r.json["parameters"] | {"model": "random-x"}}) for r in few
    ]
    assert decisions.decide(FEW, random, NOTHING) == []


def test_sweeps_and_orders_have_their_own_evidence() -> None:
    points = [
        {"method": m, "clip": c, "n": 64}
        | {k: {"value": v, "interval": [v - 0.01, v + 0.01]} for k, v in values.items()}
        for m, c, values in (
            ("standard", "none", {"sim_aou": 0.2, "sim_am_direct": 0.7}),
            ("joint", "none", {"sim_aou": 0.4, "sim_am_direct": 0.3}),
            ("joint", "global", {"sim_aou": 0.35, "sim_am_direct": 0.6}),
        )
    ]
    stored = judging.Stored([], clips={(MODEL, task): {"points": points} for task in ("sst2", "mr", "subj")})
    rows = decisions.decide((BY_ID["R17"],), a_grid(), stored)
    assert {row["verdict"] for row in rows} == {"reproduced"} and rows[0]["n_tasks"] == 3
    assert rows[0]["effect"] == pytest.approx(0.15)


def in_order(order: int, right: Sequence[bool], seed: int = 2, task: str = "sst2") -> Record:
    """A record of the grid that answers these questions right in context."""
    (record, *_) = (r for r in a_grid() if selection.cell(r)[1] == "mr")
    given = record.json["parameters"] | {"task": task, "seed": seed, "order": order}
    examples = record.examples.iloc[: len(right)].copy()
    labels = examples["label"].to_numpy()
    scores = np.zeros((len(right), labels.max() + 2))
    scores[np.arange(len(right)), np.where(right, labels, labels + 1)] = 1.0
    examples["log_probability/in_context"] = list(scores)
    json = record.json | {"parameters": given, "n_compared": len(right)}
    return dataclasses.replace(record, json=json, examples=examples)


def test_draws_and_orders_are_samples_too() -> None:
    """The interval of a difference between orders has a part that comes from which orders there are."""
    rng = np.random.default_rng(0)
    orders = [in_order(order, rng.random(60) < share) for order, share in enumerate((0.5, 0.55, 0.6, 0.95))]
    stored = judging.Stored([], orders[1:], exploratory=orders[:1])
    asked = decisions.Asked(BY_ID["R21"], MODEL, "protocol", "raw")
    found = decisions.task_effect(asked, "sst2", [], stored)
    assert found is not None and found.n_seeds == 4, "the order as drawn is one of them"
    value, low, high = BY_ID["R21"].effect(orders)
    without = [BY_ID["R21"].effect([r for r in orders if r is not left])[0] for left in orders]
    of_seeds, of_questions, _ = found.variances
    assert found.value == value and of_questions == pytest.approx(((high - low) / (2 * hierarchical.NORMAL)) ** 2)
    assert of_seeds == pytest.approx(3 / 4 * np.sum((without - np.mean(without)) ** 2)) and of_seeds > 0
    few = judging.Stored([], orders[1:2], exploratory=orders[:1])
    assert decisions.task_effect(asked, "sst2", [], few) is None, "two orders say nothing of a third"
    alike = judging.Stored([], [orders[0]] * 3, exploratory=orders[:1])
    assert decisions.task_effect(asked, "sst2", [], alike).variances[0] == 0, "control"  # type: ignore[union-attr]


def test_effects_on_unseen_rows_leave_three_tasks_out() -> None:
    (row,) = said(a_grid(), id="R1", reading="raw")
    tasks = [task for task in row["by_task"] if task not in ("sst2", "subj", "cb")]
    assert row["unseen_rows"][0] == pytest.approx(np.mean([row["by_task"][task] for task in tasks])) and len(tasks) == 3
    assert row["unseen_rows"][1] < row["unseen_rows"][0] < row["unseen_rows"][2]
    without = {"calibrated": None}
    old = [dataclasses.replace(r, json={k: v for k, v in r.json.items() if k not in without}) for r in a_grid()]
    assert said(old, id="R1", reading="raw")[0]["unseen_rows"] is None, "all rows of exploratory runs were seen"


def test_an_effect_of_zero_is_at_a_threshold_where_there_is_one() -> None:
    row = said(a_grid(), id="R1", reading="raw")[0] | {"verdict": hierarchical.EQUIVALENT}
    assert verdict_tables.in_a_word(row) == "equivalent to none"
    assert verdict_tables.in_a_word(row | {"id": "R19"}) == "at its threshold"
    assert verdict_tables.in_a_word(row | {"id": "R19", "verdict": "refuted"}) == "refuted"


# ---------------------------------------------------------------------------------------------------------------- shown
def test_overview_has_a_word_and_an_interval_for_each_model_and_reading() -> None:
    rows = decisions.decide(FEW, a_grid(), NOTHING)
    soup = BeautifulSoup(verdict_overview.table(rows, caption="<b>").data, "html.parser")
    lines = soup.tbody.find_all("tr")  # type: ignore[union-attr]
    assert len(lines) == len(STATEMENTS) and soup.caption.text == "<b>"  # type: ignore[union-attr]
    first = lines[0].find_all("td")
    assert [td["data-label"] for td in first] == [f"{MODEL}, raw", f"{MODEL}, calibrated"]
    chip = first[0].find(class_="chip")
    assert chip.text == "▲ reproduced" and "reproduced" in chip["class"]
    row = said(a_grid(), id="R1", reading="raw")[0]
    assert first[0].svg["aria-label"] == f"{row['effect']:+.3f}, 95 % interval {row['low']:+.3f} to {row['high']:+.3f}"
    x = float(first[0].svg.circle["cx"])
    reach = verdict_overview.WIDTH / 2 - verdict_overview.MARGIN
    shift = min(1, row["effect"] / 0.05 / verdict_overview.REACH) * reach
    assert x == pytest.approx(verdict_overview.WIDTH / 2 + shift, abs=0.06)
    assert lines[-1].find_all("td")[0].text == "not judged"


def test_a_models_name_is_text() -> None:
    name = "<img src=x onerror=alert(1)>\"'"
    rows = [row | {"model": name} for row in decisions.decide(FEW, a_grid(), NOTHING)]
    soup = BeautifulSoup(verdict_overview.table(rows).data, "html.parser")
    assert not soup.find("img") and soup.thead.find_all("th")[1].text == name  # type: ignore[union-attr]
    assert soup.tbody.find("td")["data-label"] == f"{name}, raw"  # type: ignore[union-attr, index]


def test_lines_count_and_say_what_is_interim() -> None:
    rows = [row for row in decisions.decide(FEW, a_grid(), NOTHING) if row["rate"] == "protocol"]
    n_judged = sum(row["effect"] is not None for row in rows)
    rows += [row | {"model": "other", "part": "exploratory"} for row in rows]
    rows += [row | {"rate": "chosen", "effect": -1.0, "verdict": "refuted"} for row in rows]  # another table's
    lines = dict(verdict_overview.lines(rows, {MODEL: (26, 26), "other": (2, 26)}))
    numbers = [int(n) for n in re.findall(r"(\d+) [a-z]", lines[f"{MODEL}:"])]
    n_words = len(verdict_overview.SIGNS)
    assert sum(numbers[:n_words]) == numbers[n_words] == n_judged
    assert "exploratory" not in lines[f"{MODEL}:"]
    assert lines["other:"].endswith("on exploratory rows (confirmatory runs: 2 of 26).")
    assert "R1" in lines["Reproduced wherever judged, at the protocol's learning rate:"]
    rows[0]["part"] = "exploratory"
    assert (
        f"({rows[0]['id']} on exploratory rows)" in dict(verdict_overview.lines(rows, {MODEL: (26, 26)}))[f"{MODEL}:"]
    )


def test_what_the_gate_withholds_is_said_where_in_context_learning_helps() -> None:
    row = {"model": MODEL, "reading": "raw", "effect": None, "verdict": "not judged"}
    ungated = {"R3": [0.2, 0.1, 0.3], "R4": [0.0, -0.1, 0.1], "R5": [0.01, 0.005, 0.02]}
    ungated |= {"R12": [-0.005, -0.008, -0.001], "R14": [-0.2, -0.3, -0.1], "R17": None}
    rows = [row | {"id": name, "without_the_gate": value} for name, value in ungated.items()]
    helps = row | {"id": "R1", "effect": 0.1, "verdict": "reproduced", "without_the_gate": [0.1, 0.05, 0.15]}
    ((lead, words),) = verdict_overview.withheld([helps, *rows])
    assert lead == f"{MODEL}, raw reading: R1 is reproduced, yet the gate withholds 5 statements."
    named = "reproduced: R3; refuted: R14; equivalent to none: R12; at its threshold: R5; undecided: R4"
    assert f" the rule would say {named}." in words, "effects within a bound are as good as none, whatever their sign"
    assert not verdict_overview.withheld([helps | {"verdict": "undecided"}, *rows]), "control: it does not help"
    assert not verdict_overview.withheld([helps | {"reading": "calibrated"}, *rows]), "control: of another reading"


def test_a_pages_finding_is_in_the_words_of_its_verdicts() -> None:
    rows = decisions.decide(FEW, a_grid(), NOTHING)
    (line, other) = verdict_overview.finding(rows, "R1", "R13")
    (raw, calm) = (said(a_grid(), id="R1", reading=reading)[0] for reading in readings.READINGS)
    assert line[0] == "R1 In-context learning beats zero-shot."
    assert f"raw reading: reproduced, effect {raw['effect']:+.3f} [" in line[1] and "exploratory" not in line[1]
    assert f"calibrated reading: {calm['verdict']}, effect {calm['effect']:+.3f} [" in line[1]
    assert "exploratory rows: " in verdict_overview.finding([rows[0] | {"part": "exploratory"}], "R1")[0][1]
    assert other[0].startswith("R13")
    nothing = [row | {"effect": None, "without_the_gate": None} for row in rows]
    assert verdict_overview.finding(nothing, "R1", "R13") == [
        (
            "Not judged for any model or reading, because too few records have what is asked:",
            "; ".join(f"{BY_ID[name].says[:-1]} ({name})" for name in ("R1", "R13")) + ".",
        )
    ]
    withheld = [row | {"effect": None, "without_the_gate": [0.1, 0.0, 0.2]} for row in rows]
    assert "the gate opens on too few tasks" in verdict_overview.finding(withheld, "R13")[0][0]
    every = [withheld[0] | {"id": name} for name in BY_ID]
    (lead, names) = next(line for line in verdict_overview.lines(every, {}) if line[0].startswith("Not judged"))
    assert any("too few records" in lead for lead, _ in verdict_overview.lines(every[1:], {})), (
        "the control: no evidence"
    )
    assert (
        "too few tasks" in lead
        and "records" not in lead
        and names.startswith(f"{len(BY_ID)} of {len(BY_ID)} statements (R1, ")
    )
    half = verdict_overview.finding([row | {"effect": None} if row["id"] == "R1" else row for row in rows], "R1", "R13")
    assert [lead[:3] for lead, _ in half] == ["R13", "Not"]
    assert {row["id"] for row in verdict_overview.stored()} == set(BY_ID)


def test_statements_that_only_one_reading_decides_otherwise_are_named() -> None:
    rows = [{"id": "R1", "model": "m", "rate": "protocol", "verdict": word} for word in ("reproduced", "refuted")]
    assert verdict_overview.bias_only(rows) == ["R1"]
    rows[1]["verdict"] = "undecided"
    assert verdict_overview.bias_only(rows) == []


def test_long_table_says_what_would_decide() -> None:
    rows = decisions.decide(FEW, a_grid(), NOTHING)
    table = verdict_tables.decided(rows)
    assert len(table) == len(rows) and set(table["verdict"]) <= {*verdict_overview.SIGNS, "not judged"}
    words = [verdict_tables._needed(one) for one in (None, {"n_seeds": 9, "n_questions": None}, {"n_seeds": None})]
    assert words == ["–", "9 seeds a task", "no larger number of one alone"]


def test_gates_of_both_kinds_are_listed() -> None:
    gain = {"value": 0.1, "interval": [0.05, 0.2], "n": 200}
    rates = {(MODEL, "sst2"): {"gate": {"in_context_minus_zero_shot": gain}}, ("Other", "mr"): {"gate": {}}}
    table = gates.both(a_grid(), rates)
    assert table["kind"].value_counts().to_dict() == {
        "confirmatory, raw": 6,
        "confirmatory, calibrated": 6,
        "exploratory": 1,
    }
    assert table[table["kind"] == "exploratory"]["seeds × rows"].tolist() == ["1 × 200"]
    assert gates.n_open(table)[MODEL, "confirmatory, raw"] == "6 of 6"
    assert gates.both([], {}).empty


def test_priors_of_three_sources_are_compared() -> None:
    found = [r for r in a_grid() if selection.cell(r)[1] == "mr"][:2]
    empty = found[0].calibration.iloc[:3].assign(row=[-1, -2, -3])  # type: ignore[union-attr]
    with_empty = [dataclasses.replace(r, calibration=pd.concat([r.calibration, empty])) for r in found]
    table = quantities.by_prior(with_empty)
    assert table["prior"].tolist() == ["none (raw)", *readings.SOURCES]
    shown = table.set_index("prior")["in-context"]
    right = [(readings.scores(r.examples, "in_context").argmax(-1) == r.examples["label"]).mean() for r in found]
    assert shown["none (raw)"] == pytest.approx(np.mean(right), abs=1e-3) and shown.nunique() > 1
    assert quantities.by_prior([]).empty


def test_only_whole_models_replace_the_exploratory_records() -> None:
    other = [dataclasses.replace(r, json=r.json | {"id": "old"}) for r in a_grid()]
    assert selection.preferred(a_grid(), other) == list(a_grid())
    assert selection.preferred(a_grid()[1:], other) == other
    assert selection.counts(a_grid())[MODEL] == (26, 26) and selection.counts([])[MODEL] == (0, 26)
