"""The page of results: what enters its tables, which verdict follows, and that wrong arms turn every verdict round."""

import base64
import dataclasses
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import notebook_cells
import numpy as np
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from IPython.display import Image

from iclgd_helpers import storage
from iclgd_helpers.experiments import parameters, protocol, provenance, records
from iclgd_helpers.experiments.comparison import arm_summary
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import intervals, metrics
from iclgd_helpers.pages import (
    changed_answers,
    figures,
    gradient_norms,
    judging,
    paper_tables,
    quantities,
    selection,
    statements,
    tables,
)
from iclgd_helpers.paths import repository_root

PAGE = "78_results_of_the_reproduction"
REHEARSALS = repository_root() / "results" / "rehearsal"
MODEL, N, LAYERS = "Gemma-3-270M", 120, 6
SIMILARITIES = ("sim_aou", "sim_aou_null", "sim_aou_random", "sim_am_zero_shot", "sim_am_direct", "sim_am_delta")
# Levels at which every statement of the page holds; all other similarities are 0.2.
LEVELS = {
    "sim_aou/joint": 0.6, "sim_aou/standard": 0.4, "sim_aou/untrained_standard": 0.3, "sim_aou/standard_shuffled": 0.3,
    "sim_aou_random/standard": 0.0, "sim_am_direct/standard": 0.7, "sim_am_direct/joint": 0.3,
    "sim_am_zero_shot/standard": 0.5, "sim_am_delta/joint": 0.6, "sim_am_delta/standard": 0.4,
}  # fmt: skip
GATE = selection.gate  # the fixture of the page opens every gate
SHARING = {name: getattr(tables, name) for name in ("share", "download")}  # and it shows nothing
FINETUNED = ("standard", "joint", "sequential", "standard_shuffled", "random_update", "norm_matched")
NORMS = {"standard": 0.3}  # what gradient norms are multiplied by
COMPARED = {name: ("zero_shot", "in_context", name) for name in FINETUNED}
COMPARED["untrained_standard"] = ("untrained_zero_shot", "untrained_in_context", "untrained_standard")


# -------------------------------------------------------------------------------------------------- made-up records
def answers() -> dict[str, np.ndarray]:
    """`[example]` predictions of each arm; the first half is what zero-shot gets wrong."""
    y = np.arange(N) % 2
    wrong = np.arange(N) < N // 2
    zero_shot = np.where(wrong, 1 - y, y)
    rights, spoils = np.flatnonzero(wrong), np.flatnonzero(~wrong)

    def change(fixed: np.ndarray, spoilt: np.ndarray) -> np.ndarray:
        result = zero_shot.copy()
        result[fixed], result[spoilt] = y[fixed], 1 - y[spoilt]
        return result

    arms = {"zero_shot": zero_shot, "in_context": change(rights[:50], spoils[:10])}
    arms |= dict.fromkeys(COMPARED, change(rights[:20], spoils[20:24]))
    arms |= {"joint": np.ones(N, int), "untrained_zero_shot": zero_shot, "untrained_in_context": zero_shot}
    return arms | {"in_context_shuffled": zero_shot, "label": y}


def made_up(*cell: Any, **given: Any) -> Record:
    """A whole record, its JSON derived from its examples by the engine's own functions, with few resamples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 40)
        return _made_up(*cell, **given)


def _made_up(
    model: str = MODEL,
    task: str = "sst2",
    seed: int | None = None,
    arms: dict[str, np.ndarray] | None = None,
    **given: Any,
) -> Record:
    seed = protocol.SEEDS[task][0] if seed is None else seed
    asked = {"preset": "quick", "task": task, "model": model, "seed": seed, "data_source": "folder"}
    settings = parameters.resolve(asked | {"data_folder": "."} | given).model_dump(exclude={"data_folder"})
    arms = dict(answers() if arms is None else arms)
    y, rng = arms.pop("label"), np.random.default_rng([seed, len(task)])
    columns: dict[str, Any] = {"row": np.arange(N), "label": y.astype(np.int8)}
    scores = {arm: np.where(np.eye(2, dtype=bool)[given], -0.1, -2.5) for arm, given in arms.items()}
    columns |= {f"log_probability/{arm}": list(values.astype(np.float32)) for arm, values in scores.items()}
    found = {}
    for name, triple in COMPARED.items():
        found[name] = _compared(*(arms[arm] for arm in triple), y)
        for metric in SIMILARITIES:
            values = LEVELS.get(f"{metric}/{name}", 0.2) + rng.normal(0, 0.05, (N, LAYERS))
            found[name][metric] = intervals.layer_means(values)
            columns[f"{metric}/{name}"] = list(values.astype(np.float16))
    lens = np.zeros((N, LAYERS), int)
    norms = np.exp(-np.arange(LAYERS) + rng.normal(0, 0.1, (8, LAYERS)))
    content = {
        "id": f"{model}-{task}-{seed}", "engine": provenance.engine_hash(), "parameters": settings,
        "n_examples": N, "n_compared": N, "n_demonstrations": 32, "created": "now",
        "arms": {arm: arm_summary(values, lens, y) for arm, values in scores.items()},
        "comparisons": found,
        "finetuning": {name: {"gradient_norms": (norms * NORMS.get(name, 1.0)).tolist()} for name in FINETUNED},
    }  # fmt: skip
    return Record(content, pd.DataFrame({name: pd.Series(values) for name, values in columns.items()}))


def _compared(z: np.ndarray, c: np.ndarray, f: np.ndarray, y: np.ndarray) -> dict[str, Any]:
    none = [None, None]
    found: dict[str, Any] = {"partition": metrics.partition(z, c, f, y)}
    found["rec2ftp"] = {"value": metrics.rec2ftp(z, c, f, y), "interval": none}
    for which in ("all", "correct", "incorrect"):
        found[f"jaccard_{which}_code"] = {"value": metrics.jaccard(z, c, f, y, which), "interval": none}
    return found


@cache
def a_grid(model: str = MODEL) -> tuple[Record, ...]:
    """Six tasks and three seeds in which every statement of single records holds."""
    return tuple(made_up(model, task, seed) for task, seeds in protocol.SEEDS.items() for seed in seeds)


def edited(record: Record, columns: dict[str, str] | None = None, **json_changes: Any) -> Record:
    """The record with some example columns taken from others (`{column: taken from}`)."""
    examples = record.examples.assign(**{new: record.examples[old] for new, old in (columns or {}).items()})
    return dataclasses.replace(record, json=record.json | json_changes, examples=examples)


def diverged(record: Record, *names: str) -> Record:
    """The record with these arms marked, and their finite numbers left for whoever does not look at the mark."""
    marked = {
        part: {n: one | {"diverged": n in names} for n, one in record.json[part].items()}
        for part in ("arms", "comparisons")
    }
    for name in names:
        marked["arms"][name] |= {"accuracy": None, "accuracy_interval": (None, None), "predicted": []}
    return edited(record, **marked)


def a_sweep(values: dict[Any, tuple[float, float, float]], points: list[dict[str, Any]]) -> dict[str, Any]:
    made = [
        {"clip_value": None}
        | point
        | {
            name: {"value": middle, "interval": [middle - 0.01, middle + 0.01]}
            for name, middle in zip(("sim_aou", "sim_am_direct", "accuracy"), values[key], strict=True)
        }
        | {"n": N}
        for key, point in zip(values, points, strict=True)
    ]
    return {"model": MODEL, "points": made, "n_demonstrations": 16}


# ------------------------------------------------------------------------------------------------------------- page
@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Names after the page's first cells were executed on an empty grid; every exploratory gate is open."""
    monkeypatch.setattr(records, "load_all", lambda _folder: [])
    monkeypatch.setattr(selection, "sweeps", lambda _kind: {})
    monkeypatch.setattr(tables, "share", lambda _name, *_parts, **_options: None)
    monkeypatch.setattr(tables, "download", lambda frame, _name: type("Link", (), {"data": str(len(frame))}))
    monkeypatch.setattr(selection, "gate", lambda *_: True)
    names = notebook_cells.run(PAGE, "parameters", "imports", "stored", "state", "claims-rest", "rule", "verdict-rule")
    return names | {"STATEMENTS": list(statements.STATEMENTS), "stored": judging.Stored([], [], {}, {})}


def judged(page: dict[str, Any], found: Iterable[Record]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Verdicts and effects of these records, beside what else the page has read."""
    records = list(found)
    stored = dataclasses.replace(page["stored"], found=records, exploratory=records)
    return judging.judge(page["STATEMENTS"], stored)


def verdicts(page: dict[str, Any], found: Any, which: str) -> list[str]:
    """Verdicts on one statement at the protocol's rate, one a model."""
    page["STATEMENTS"][:] = [statement for statement in page["STATEMENTS"] if statement.id == which]
    made, _effects = judged(page, found)
    return made[made["rate"] == "protocol"]["verdict"].tolist()


def test_statements_are_complete_and_distinct(page: dict[str, Any]) -> None:
    found = page["STATEMENTS"]
    numbers = [str(i) for i in range(1, len(found))]
    assert [one.id for one in found] == [f"R{n}" for i in numbers for n in ((i, "18b") if i == "18" else (i,))]
    assert len({one.says for one in found}) == len(found)
    assert {one.kind for one in found} == {"paper", "archive", "stricter"}
    assert all(set(one.rates) <= set(judging.SUFFIX) for one in found)


def swapped(one: str, other: str) -> Any:
    """The grid with two columns of the examples in each other's place."""
    return lambda: [edited(record, {one: other, other: one}) for record in a_grid()]


def predicted(change: Any) -> Any:
    """The grid with other predictions: those that `change` makes of each arm's."""

    def grid() -> list[Record]:
        return [made_up(*selection.cell(record), arms=answers() | change(**answers())) for record in a_grid()]

    return grid


def righting_others(label: np.ndarray, zero_shot: np.ndarray, standard: np.ndarray, **_: Any) -> dict[str, np.ndarray]:
    """In-context learning rights what finetuning does not."""
    fixed = (zero_shot != label) & (standard == label)
    return {"in_context": np.where((zero_shot != label) & ~fixed, label, zero_shot)}


def with_reversed_layers() -> list[Record]:
    def reversed_layers(tuned: dict[str, Any]) -> dict[str, Any]:
        return {name: {"gradient_norms": [row[::-1] for row in one["gradient_norms"]]} for name, one in tuned.items()}

    return [edited(record, finetuning=reversed_layers(record.json["finetuning"])) for record in a_grid()]


def with_methods_exchanged() -> list[Record]:
    """The norms of layer-causal finetuning in the place of standard finetuning's, which are smaller in lower layers."""

    def exchanged(tuned: dict[str, Any]) -> dict[str, Any]:
        return tuned | {"joint": tuned["standard"], "standard": tuned["joint"]}

    return [edited(record, finetuning=exchanged(record.json["finetuning"])) for record in a_grid()]


Z, C, F = (f"log_probability/{arm}" for arm in ("zero_shot", "in_context", "standard"))
FALSE = {  # what makes a statement false
    "R1": swapped(Z, C),
    "R2": swapped(Z, F),
    "R3": swapped(F, C),
    "R4": swapped(F, C),
    "R5": predicted(lambda in_context, **_: {"standard": in_context}),  # the same changes
    "R6": predicted(lambda label, **_: {"label": 1 - label}),  # changes to a wrong label now overlap more
    "R7": predicted(righting_others),
    "R8": predicted(righting_others),
    "R9": swapped("sim_aou/standard", "sim_aou_random/standard"),
    "R10": swapped("sim_aou/standard", "sim_aou_null/standard"),
    "R11": swapped("sim_aou/standard", "sim_aou/untrained_standard"),
    "R12": swapped("sim_aou/standard", "sim_aou/standard_shuffled"),
    "R13": swapped("sim_aou/standard", "sim_aou/joint"),
    "R14": swapped("sim_am_direct/standard", "sim_am_zero_shot/standard"),
    "R15": swapped("sim_am_direct/standard", "sim_am_direct/joint"),
    "R16": swapped("sim_am_delta/standard", "sim_am_delta/joint"),
    "R18": with_reversed_layers,
    "R18b": with_methods_exchanged,
    "R19": predicted(lambda zero_shot, **_: {"joint": zero_shot}),  # predictions as spread as zero-shot's
}


@pytest.mark.parametrize("which", FALSE)
def test_wrong_arms_turn_the_verdict_round(page: dict[str, Any], which: str) -> None:
    assert verdicts(page, a_grid(), which) == ["reproduced"]
    assert verdicts(page, FALSE[which](), which) == ["not reproduced"]


@pytest.mark.parametrize(("others", "verdict"), [("zero_shot", "reproduced"), ("in_context", "not reproduced")])
def test_seeds_that_agree_turn_the_verdict_round(page: dict[str, Any], others: str, verdict: str) -> None:
    arms = answers() | {"in_context": answers()[others]}
    firsts = {(MODEL, task, seeds[0]) for task, seeds in protocol.SEEDS.items()}
    cells = [selection.cell(record) for record in a_grid()]
    grid = [made_up(*cell, arms=answers() if cell in firsts else arms) for cell in cells]
    assert verdicts(page, grid, "R20") == [verdict]


def test_draws_to_both_sides_of_the_first_are_seen(page: dict[str, Any]) -> None:
    y = answers()["label"]
    shares = (60, 24, 96)  # right answers of 120: the first draw is the mean of the others
    shown = [np.where(np.arange(N) < share, y, 1 - y) for share in shares]
    cells = [
        made_up(MODEL, "sst2", seed, arms=answers() | {"in_context": a})
        for seed, a in zip((2, 3, 4), shown, strict=True)
    ]
    value, low, _high = statements.draws_differ(cells)
    assert low > 0 and value == pytest.approx(np.sqrt(np.mean([0.3**2, 0.3**2, 0.6**2])) - 0.05, abs=0.02)


@pytest.mark.parametrize("still", ["standard", "in_context"])
def test_who_changes_nothing_overlaps_with_nobody(page: dict[str, Any], still: str) -> None:
    assert statements.jaccard_low(made_up(MODEL, "sst2"), "") is not None
    unmoved = made_up(MODEL, "sst2", arms=answers() | {still: answers()["zero_shot"]})
    assert statements.jaccard_low(unmoved, "") is None


def test_undefined_effects_are_not_judged(page: dict[str, Any]) -> None:
    still = answers() | {"standard": answers()["zero_shot"]}
    mixed = [
        made_up(MODEL, *selection.cell(r)[1:], arms=still) if selection.cell(r)[1] in ("subj", "cb") else r
        for r in a_grid()
    ]
    made = judged(page, mixed)[0]
    (row,) = made[(made["id"] == "R5") & (made["rate"] == "protocol")].itertuples()
    assert row.states["subj"] == row.states["cb"] == "undefined" and row.verdict == "reproduced"


CLIPPED = [
    {"method": "standard", "clip": "none"},
    {"method": "joint", "clip": "none"},
    {"method": "joint", "clip": "global", "clip_value": 1.0},
    {"method": "joint", "clip": "global", "clip_value": 9.0},
    {"method": "joint", "clip": "elementwise", "clip_value": 9.0},
]


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({0: (0.2, 0.7, 0), 1: (0.4, 0.3, 0), 2: (0.1, 0.8, 0), 3: (0.35, 0.6, 0), 4: (0, 0, 0)}, "reproduced"),
        ({0: (0.2, 0.7, 0), 1: (0.4, 0.3, 0), 2: (0.1, 0.8, 0), 3: (0.35, 0.2, 0), 4: (0.5, 0.9, 0)}, "not reproduced"),
        ({0: (0.2, 0.7, 0), 1: (0.4, 0.3, 0), 2: (0.1, 0.8, 0), 3: (0.1, 0.7, 0), 4: (0.5, 0.9, 0)}, "not reproduced"),
        ({0: (0.2, 0.7, 0), 1: (0.4, 0.3, 0), 2: (0.1, 0.8, 0), 3: (0.3, 0.31, 0), 4: (0.5, 0.9, 0)}, "inconclusive"),
    ],
)
def test_clipping(page: dict[str, Any], values: dict[int, tuple[float, float, float]], verdict: str) -> None:
    sweeps = {(MODEL, task): a_sweep(values, CLIPPED) for task in ("subj", "sst2", "sst5", "mr")}
    page["stored"].clips.update(sweeps)
    assert verdicts(page, a_grid(), "R17") == [verdict]
    page["stored"].clips.clear()
    assert verdicts(page, a_grid(), "R17") == ["not run"]


@pytest.mark.parametrize(("others", "verdict"), [("zero_shot", "reproduced"), ("in_context", "not reproduced")])
def test_orders(page: dict[str, Any], others: str, verdict: str) -> None:
    assert verdicts(page, a_grid(), "R21") == ["not run"]
    arms = answers() | {"in_context": answers()[others]}
    page["stored"].reordered[:] = [
        made_up(MODEL, t, arms=arms, order=order) for t in ("sst2", "subj") for order in (1, 2)
    ]
    assert verdicts(page, a_grid(), "R21") == [verdict]


def test_draws_are_compared_on_the_same_questions_or_not_at_all(page: dict[str, Any]) -> None:
    one, other = a_grid()[:2]
    assert not np.isnan(statements.draws_differ([one, other])[0])
    moved = dataclasses.replace(other, examples=other.examples.assign(row=other.examples["row"] + 1))
    assert np.isnan(statements.draws_differ([one, moved])[0]) and np.isnan(statements.draws_differ([one])[0])


# --------------------------------------------------------------------------------------------------------- few cells
def test_few_cells_decide_nothing(page: dict[str, Any]) -> None:
    def unsettled(found: Any) -> bool:
        return set(judged(page, list(found))[0]["verdict"]) == {"inconclusive", "not run"}

    assert unsettled(record for record in a_grid() if selection.cell(record)[1] in ("sst2", "cb"))
    firsts = [seeds[0] for seeds in protocol.SEEDS.values()]
    one_seed = [r for r in a_grid() if r.json["parameters"]["seed"] == protocol.SEEDS[selection.cell(r)[1]][0]]
    assert len(one_seed) == len(firsts) and unsettled(one_seed)
    assert not unsettled(a_grid())
    assert judged(page, [])[0].empty


@pytest.mark.parametrize(("gate", "state"), [(False, "no in-context effect"), (None, "gate not measured")])
def test_closed_gate(page: dict[str, Any], monkeypatch: pytest.MonkeyPatch, gate: bool | None, state: str) -> None:
    monkeypatch.setattr(selection, "gate", lambda *_: gate)
    made, effects = judged(page, list(a_grid()))
    gated = {one.id for one in page["STATEMENTS"] if one.gated}
    assert set(made[made["id"].isin(gated)]["verdict"]) == {"inconclusive", "not run"}
    assert set(effects[effects["id"].isin(gated)]["status"]) == {state}
    opened = made[made["id"].isin(gated)].set_index(["id", "rate"])["without_the_gate"]
    assert opened["R13", "protocol"] == opened["R4", "protocol"] == "reproduced", "what the rule says of all tasks"
    assert "reproduced" in set(made[~made["id"].isin(gated)]["verdict"])


def test_the_maps_show_the_papers_task() -> None:
    figure = gradient_norms.draw_maps(a_grid())
    assert [ax.get_title("left").split(":")[0] for ax in figure.axes if ax.get_title("left")] == [f"{MODEL}, Subj"] * 2
    plt.close(figure)
    (other,) = gradient_norms.first_of([r for r in a_grid() if selection.cell(r)[1] != "subj"]).values()
    assert selection.cell(other)[1:] == ("sst2", protocol.SEEDS["sst2"][0]), "where Subj is missing"


def test_chosen_rate_is_judged_from_its_own_arms(page: dict[str, Any]) -> None:
    def chosen(record: Record) -> Record:  # at the chosen rate layer-causal finetuning is less similar
        swapped = {"sim_aou/joint_chosen": "sim_aou/standard", "sim_aou/standard_chosen": "sim_aou/joint"}
        found = record.json["comparisons"]
        chosen = {"joint_chosen": found["standard"], "standard_chosen": found["joint"]}
        return edited(record, swapped, comparisons=found | chosen)

    made, _effects = judged(page, [chosen(record) for record in a_grid()])
    found = made[made["id"] == "R13"].set_index("rate")["verdict"].to_dict()
    assert found == {"protocol": "reproduced", "chosen": "not reproduced"}


@pytest.mark.parametrize(
    ("arm", "which"), [("standard", "R2"), ("standard", "R10"), ("joint", "R13"), ("joint", "R18")]
)
def test_what_has_diverged_is_never_judged(page: dict[str, Any], arm: str, which: str) -> None:
    assert verdicts(page, a_grid(), which) == ["reproduced"]
    assert verdicts(page, [diverged(record, arm) for record in a_grid()], which) == ["inconclusive"]


def test_a_bound_that_diverges_hides_no_other(page: dict[str, Any]) -> None:
    points = [{"method": m, "clip": "none"} for m in ("joint", "standard")]
    points += [{"method": "joint", "clip": "global", "clip_value": bound} for bound in (1.0, 2.0)]
    levels = {0: (0.9, 0.5, 0.5), 1: (0.2, 0.6, 0.5), 2: (None, None, None), 3: (0.8, 0.7, 0.5)}
    sweep = {"points": [
        point | {name: {"value": value, "interval": [value and value - 0.01, value and value + 0.01]}
                 for name, value in zip(("sim_aou", "sim_am_direct", "accuracy"), levels[number], strict=True)}
        for number, point in enumerate(points)
    ]}  # fmt: skip
    assert statements.clipping_restores(sweep)[0] == pytest.approx(0.2)


def test_what_has_diverged_is_said(page: dict[str, Any]) -> None:
    record = diverged(made_up(), "joint")
    shown = tables.accuracy_table(record)["accuracy [95 % interval]"]
    assert shown[figures.ARMS["joint"].label] == "diverged" != shown[figures.ARMS["standard"].label]
    (line,) = [line for line in selection.notes([record]) if "Diverged" in line]
    assert record.json["id"] in line and "joint" in line
    assert not any("Diverged" in line for line in selection.notes([made_up()]))


def test_a_models_name_is_text_in_tables_lists_and_figures(page: dict[str, Any]) -> None:
    name, shown = r"<img src=x onerror=alert(1)> $\frac{$", []
    gate = {"engine": "", "gate": {"in_context_minus_zero_shot": {"value": 0.1, "interval": [0.0, 0.2], "n": 200}}}
    found = list(a_grid(name))
    names = {"found": found, "calm": found, "confirmatory": found, "exploratory": found}
    names["stored"] = judging.Stored(a_grid(name), rates={(name, "cb"): gate})
    cells = (
        "state table-1 partition figure-1 figure-1-calibrated figure-1-jaccard chance table-2 table-2-more table-3 "
        "figure-3-data figure-3 figure-3-steps gate all-verdicts verdict-table finding verdict-long second verdict-map "
        "sensitivity runs"
    ).split()
    with pytest.MonkeyPatch.context() as patch:
        for part, original in SHARING.items():
            patch.setattr(tables, part, original)
        patch.setattr(tables, "display", lambda data, **_: shown.append(data))
        notebook_cells.run(PAGE, *cells, **page | names)
    pages = [data["text/html"] for data in shown if isinstance(data, dict) and "text/html" in data]
    pictures = [data for data in shown if isinstance(data, Image)]
    soups = [BeautifulSoup(shown_page, "html.parser") for shown_page in pages]
    assert not any(soup.find("img") for soup in soups) and len(pictures) == 6
    assert sum(name in soup.text for soup in soups) >= len(soups) - 3, "all but the clips, and what has no priors"


def test_a_shared_figure_is_stored_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other pages name the file that the build writes for it; that it is there is tested on the built book."""
    shown: list[Any] = []
    monkeypatch.setattr(tables, "display", lambda data, **_: shown.append(data))
    tables.share_figure("some", figures.axes()[0], 'one "a" < b')
    image, glued = shown
    (page,) = glued.values()
    picture = BeautifulSoup(page, "html.parser").img
    assert picture and picture["alt"] == 'one "a" < b' and picture["src"].startswith("../_images/")
    assert Path(picture["src"]).stem == hashlib.sha256(image.data).hexdigest() and len(page) < 300


# --------------------------------------------------------------------------------------- random weights, other models
def test_a_record_of_the_paper_preset_joins_the_tables(page: dict[str, Any]) -> None:
    """The made-up grid, in which a cell is missing, and the committed rehearsals of the preset in random weights."""
    made_ups = [record for record in a_grid() if record.json["id"] != f"{MODEL}-cb-3"]
    found = selection.select([*made_ups, *LOAD_ALL(REHEARSALS)])
    random = [record for record in found if record.json["parameters"]["preset"] == "paper"]
    assert len(random) == 1 and not selection.is_evidence(random[0])
    for number in (1, 2):
        table = paper_tables.beside(number, found)
        assert {MODEL, "random-fairseq-dense-1.3B (random weights)"} == set(table["model"].dropna())
        shown = paper_tables.laid_out(table, 2).to_string()
        assert "(random weights)" in shown and "published" in shown
    assert any("No evidence" in line and random[0].json["id"] in line for line in selection.notes(found))
    made, effects = judged(page, found)
    assert set(made["model"]) == {MODEL} and set(effects["model"]) == {MODEL}
    without = judged(page, [record for record in found if record is not random[0]])
    assert made.equals(without[0]) and effects.equals(without[1])


def test_the_same_record_with_trained_weights_would_be_judged(page: dict[str, Any]) -> None:
    trained = [edited(r, parameters=r.json["parameters"] | {"model": "owner/dense-1.3B"}) for r in a_grid()]
    assert set(judged(page, trained)[0]["model"]) == {"owner/dense-1.3B"}
    for model, source in (("random-x", "folder"), ("tiny-llama", "folder"), ("trained", "generated")):
        other = [edited(r, parameters=r.json["parameters"] | {"model": model, "data_source": source}) for r in a_grid()]
        assert judged(page, other)[0].empty


LOAD_ALL = records.load_all  # which the page's fixture replaces


# --------------------------------------------------------------------------------------------------------- selection
@pytest.mark.parametrize(
    "given",
    [
        {"seed": 9}, {"n_demonstrations": 16}, {"separator": "newline"}, {"loss": "label"}, {"balanced": True},
        {"clip": "global", "clip_value": 1.0}, {"equal_demonstrations": False}, {"learning_rate": 0.1},
        {"token_read": "prompt"}, {"max_context": 512}, {"order": 1},
    ],
)  # fmt: skip
def test_only_the_protocols_settings_are_in_the_grid(given: dict[str, Any]) -> None:
    assert selection.in_grid(made_up())
    assert selection.in_grid(made_up(model="somebody/else", max_examples=7, dtype="bfloat16", controls=False))
    assert not selection.in_grid(made_up(**given))


def test_parameters_that_came_later_have_their_defaults_in_older_records() -> None:
    older = {name: value for name, value in made_up().json["parameters"].items() if name != "equal_demonstrations"}
    assert selection.in_grid(edited(made_up(), parameters=older))


def test_the_first_seed_is_the_protocols() -> None:
    assert all(parameters.resolve({"task": task}).seed == seeds[0] for task, seeds in protocol.SEEDS.items())


def test_variant() -> None:
    assert selection.in_grid(made_up(n_demonstrations=16), n_demonstrations=16)
    assert not selection.in_grid(made_up(), n_demonstrations=16)


def test_current_helpers_come_first_then_more_rows() -> None:
    cells = {
        "small": edited(made_up(), id="small", n_compared=100),
        "large": edited(made_up(), id="large", n_compared=400),
        "older": edited(made_up(), id="older", n_compared=800, engine="another"),
    }
    there = []
    for name in ("older", "small", "large"):
        there.append(cells[name])
        for order in (there, there[::-1]):
            (found,) = selection.select(order)
            assert found.json["id"] == name


def test_notes_name_what_is_missing_older_or_random(tmp_path: Path) -> None:
    assert selection.notes([])[0].startswith("0 of 36") and "CB (seed 3, 4, 5)" in selection.notes([])[1]
    lines = selection.notes([*a_grid(), *a_grid("SmolLM2-135M-Instruct")])
    assert lines == ["36 of 36 runs of the grid are recorded."]
    older = edited(made_up(), engine="another")
    assert any("older version" in line and "SST2 (seed 2)" in line for line in selection.notes([older]))
    for name, kind in (("random-thing", "random weights"), ("tiny-llama", "random weights"), ("real", None)):
        record = edited(made_up(), parameters=made_up().json["parameters"] | {"model": name})
        lines = [line for line in selection.notes([record]) if line.startswith("No evidence")]
        assert selection.is_evidence(record) == (kind is None) and len(lines) == (kind is not None)
        assert all(f"{name} ({kind})" in line and record.json["id"] in line for line in lines)


# ------------------------------------------------------------------------------------------------------------ tables
def test_two_uncertainties_are_kept_apart() -> None:
    long = quantities.table(a_grid(), "sim_aou/joint")
    assert list(long.columns) == list(quantities.LONG) and len(long) == 18
    wide = quantities.over_seeds(long)
    for row in wide.itertuples():
        group = long[long["task"] == row.task]
        expected = intervals.over_seeds(group["value"].tolist())
        assert (row.value, row.n_seeds, row.n) == (expected["mean"], 3, N)
        assert (row.seeds_low, row.seeds_high) == tuple(expected["interval"])
        np.testing.assert_allclose([row.examples_low, row.examples_high], group[["low", "high"]].mean())


def test_one_seed_has_no_interval_over_seeds_and_an_absent_arm_no_row() -> None:
    wide = quantities.over_seeds(quantities.table([made_up()], "accuracy/in_context"))
    assert len(wide) == 1 and np.isnan(wide["seeds_low"][0]) and not np.isnan(wide["examples_low"][0])
    assert quantities.over_seeds(quantities.table([made_up()], "sim_aou/standard_chosen")).empty
    assert quantities.over_seeds(quantities.table([], "accuracy/in_context")).empty


def test_average_is_of_all_six_tasks_or_not_at_all() -> None:
    for found, n in ((a_grid(), 6), ([r for r in a_grid() if selection.cell(r)[1] != "cb"], 0)):
        table = paper_tables.with_average(paper_tables.beside(2, found))
        rows = table[table["task"] == "average"]
        assert rows["value"].notna().sum() == n and rows["published"].notna().all()
    cells = paper_tables.beside(2, a_grid())
    for row in paper_tables.with_average(cells).query("task == 'average'").itertuples():
        assert row.value == pytest.approx(cells[cells["row"] == row.row]["value"].mean())
        assert row.difference == pytest.approx(row.value - row.published)


def test_what_table_2_leaves_out_has_a_line_for_each_arm_that_was_run() -> None:
    more = paper_tables.left_out(a_grid())
    assert set(more["row"]) >= {"accuracy, joint", "null of SimAOU, standard", "Rec2FTP, joint"}
    shown = paper_tables.left_out_laid_out(more, 3)
    assert list(shown.columns) == list(selection.TASKS.values()) and len(shown) == more["row"].nunique() + 1
    assert paper_tables.left_out_laid_out(more.iloc[:0], 3).empty


def test_table_3_shows_the_bound_of_global_clipping_with_the_best_sim_aou() -> None:
    levels = {0: (0.2, 0.7, 0), 1: (0.4, 0.3, 0), 2: (0.1, 0.8, 0), 3: (0.35, 0.6, 0), 4: (0.9, 0, 0)}
    points = paper_tables.clipping({(MODEL, "subj"): a_sweep(levels, CLIPPED)})
    assert len(points) == 5 and points["sim_aou_low"].tolist() == pytest.approx([0.19, 0.39, 0.09, 0.34, 0.89])
    best = paper_tables.best_bounds(points)
    assert best[["method", "clip"]].to_numpy().tolist() == [
        ["joint", "global"],
        ["joint", "none"],
        ["standard", "none"],
    ]
    assert best["bound"].tolist()[0] == 9.0 and best["sim_aou"].tolist()[0] == "0.350 [0.340, 0.360]"
    assert paper_tables.best_bounds(paper_tables.clipping({})).empty


def test_bars_of_figure_1_are_the_shares_of_changed_answers() -> None:
    partition = changed_answers.shares(a_grid())
    assert len(partition) == 18 * len(changed_answers.PARTS)
    figure = changed_answers.draw(partition)
    (first, *_) = a_grid()
    counts = first.json["comparisons"]["standard"]["partition"]
    bars = [bar for bar in figure.axes[0].patches if bar.get_y() == pytest.approx(-0.35)]  # of the first task
    assert [bar.get_width() for bar in bars] == pytest.approx([counts[part] / N for part in changed_answers.PARTS])
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx((N - counts["unchanged"]) / N)
    plt.close(figure)


def test_gradient_norms_by_layer_are_medians_over_steps() -> None:
    (record, *_) = a_grid()
    steps = gradient_norms.norms(record, "joint")
    table = gradient_norms.by_layer([record]).set_index(["method", "layer"]).loc[("joint", 2)]
    assert table["median"] == pytest.approx(np.median(steps[:, 2]))
    assert table["first_quarter"] == pytest.approx(np.median(steps[:2, 2]))
    assert table["last_quarter"] == pytest.approx(np.median(steps[-2:, 2]))
    figure = gradient_norms.draw_lines(gradient_norms.by_layer([record]))
    assert [ax.get_title("left").split(": ")[1] for ax in figure.axes] == [
        figures.ARMS[m].label for m in ("standard", "joint")
    ]
    plt.close(figure)


def test_layout_has_the_printed_cells_and_ours() -> None:
    for number, cells in ((1, 36), (2, 42)):
        table = paper_tables.beside(number, list(a_grid()))
        assert len(table) == cells
        ours = table[table["task"] != "average"]
        np.testing.assert_allclose(ours["difference"], ours["value"] - ours["published"])
        assert not ours["value"].isna().any()
    accuracy = table_1_cell("ICL Accuracy")
    assert accuracy == pytest.approx(100 * 100 / N)


def test_tables_say_their_sizes_once_and_where_they_differ() -> None:
    table = paper_tables.left_out(a_grid())
    sizes = paper_tables.left_out_laid_out(table, 3).loc["seeds × questions"]
    assert list(sizes.index) == [MODEL] and set(sizes.loc[MODEL]) == {f"3 × {N}"}
    fewer = table["task"].eq("cb") & table["row"].eq(table["row"].iloc[0])
    table.loc[fewer, ["n_seeds", "n"]] = [2, 7]
    shown = paper_tables.left_out_laid_out(table, 3)
    assert shown.loc["seeds × questions"].loc[MODEL, "CB"] == f"2 to 3 × 7 to {N}"


def table_1_cell(row: str) -> float:
    table = paper_tables.beside(1, list(a_grid()))
    return table[(table["row"] == row) & (table["task"] == "sst2")]["value"].item()


# ------------------------------------------------------------------------------------------------- sweeps, downloads
def test_gate_is_an_interval_above_zero_on_training_rows() -> None:
    def rates(low: float | None) -> dict[tuple[str, str], dict[str, Any]]:
        found = {"value": 0.1, "interval": [low, 0.3], "n": 200}
        return {("m", "sst2"): {"gate": {"in_context_minus_zero_shot": found}}}

    assert selection.gate(rates(0.01), "m", "sst2") is True
    assert selection.gate(rates(0.0), "m", "sst2") is False
    assert selection.gate(rates(None), "m", "sst2") is None
    assert selection.gate(rates(0.01), "m", "cb") is None and selection.gate({("m", "cb"): {}}, "m", "cb") is None


def test_sweeps_are_found_by_kind(tmp_path: Path) -> None:
    for kind, task in (("rates", "cb"), ("rates", "mr"), ("clips", "mr")):
        storage.write_json(tmp_path / f"{kind}-m-{task}.json", {"kind": kind, "model": "m", "task": task})
    assert set(selection.sweeps("rates", tmp_path)) == {("m", "cb"), ("m", "mr")}
    assert selection.sweeps("rates", tmp_path / "absent") == {}


def test_a_point_of_a_sweep_is_an_effect_and_sweeps_of_older_helpers_are_named() -> None:
    sweep = {"points": [{"sim_aou": {"value": None, "interval": [None, None]}}], "engine": "another"}
    assert np.isnan(selection.point_effect(sweep["points"][0], "sim_aou")).all()
    (line,) = [line for line in selection.notes([], rates={(MODEL, "cb"): sweep}, clips={}) if "Sweeps" in line]
    assert line.endswith(f"(1): rates of {MODEL} on CB.")
    current = sweep | {"engine": provenance.engine_hash()}
    assert not any("Sweeps" in line for line in selection.notes([], rates={(MODEL, "cb"): current}))


def test_download_holds_the_table_and_is_written_where_tables_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = pd.DataFrame({"a": [0.1234567, np.nan], "b": ["x, y", "“z”"]})
    link = tables.download(frame, "some", tmp_path / "absent").data
    text = base64.b64decode(re.search(r"base64,([^\"]+)", link)[1]).decode()
    assert text == 'a,b\n0.123457,"x, y"\n,“z”\n' and 'download="some.csv"' in link
    tables.download(frame, "some", tmp_path)
    assert (tmp_path / "some.csv").read_text() == text and not (tmp_path / "absent").exists()
    monkeypatch.delenv("ICLGD_TABLES", raising=False)
    monkeypatch.chdir(tmp_path)
    tables.download(frame, "other")
    assert not list(tmp_path.rglob("other.csv"))
    monkeypatch.setenv("ICLGD_TABLES", str(tmp_path))
    tables.download(frame, "other")
    assert (tmp_path / "other.csv").read_text() == text
