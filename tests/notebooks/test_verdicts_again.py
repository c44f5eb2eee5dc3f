"""The stored verdicts, once more: from the Parquet files alone, in a few lines that share nothing with the helpers."""

import itertools
import json
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from iclgd_helpers import storage
from iclgd_helpers.paths import repository_root
from tools import verdicts

ROOT = repository_root()
STORED = ROOT / "results" / "verdicts.json"
# Statement -> effect of one task from answers `[arm][seed, question]`, or from columns; whether it is gated, its bound.
ANSWERS: dict[str, tuple[Any, bool]] = {
    "R1": (lambda a, y, end: right(a, "in_context", y) - right(a, "zero_shot", y), False),
    "R2": (lambda a, y, end: right(a, "standard" + end, y) - right(a, "zero_shot", y), False),
    "R3": (lambda a, y, end: right(a, "in_context", y) - right(a, "standard" + end, y), True),
    "R4": (lambda a, y, end: moved(a, "in_context") - moved(a, "standard" + end), True),
}
COLUMNS = {
    "R13": ("sim_aou/joint*", "sim_aou/standard*"),
    "R15": ("sim_am_direct/standard*", "sim_am_direct/joint*"),
}


def right(answers: Any, arm: str, y: Any) -> Any:
    return (answers[arm] == y).astype(float)


def moved(answers: Any, arm: str) -> Any:
    return (answers[arm] != answers["zero_shot"]).astype(float)


SEEDS = {"sst2": (2, 3, 4), "subj": (4, 5, 6), "mr": (5, 6, 7), "sst5": (5, 6, 7), "cb": (3, 4, 5), "agnews": (3, 4, 5)}
WHOLE = 26  # confirmatory runs of a model


@cache
def records() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """(model, task) -> its runs, confirmatory where a model has them all: tables and a seed each."""
    new, known = of_folder("confirmation"), of_folder("records")
    counts = defaultdict(int, {m: sum(len(r) for (o, _t), r in new.items() if o == m) for m, _task in new})
    whole = {key: runs for key, runs in new.items() if counts[key[0]] == WHOLE}
    return whole | {key: runs for key, runs in known.items() if counts[key[0]] != WHOLE}


def of_folder(name: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found = defaultdict(list)
    for folder in sorted((ROOT / "results" / name).glob("*/")):
        given = json.loads((folder / "record.json").read_text())["parameters"]
        if name == "records" and (given["order"] or not given.get("equal_demonstrations", True)):
            continue
        if name == "records" and given["seed"] not in SEEDS[given["task"]]:
            continue
        run = {path.stem: pd.read_parquet(path) for path in folder.glob("*.parquet")}
        found[given["model"], given["task"]].append(run | {"seed": given["seed"]})
    return {key: sorted(runs, key=lambda run: run["seed"]) for key, runs in found.items()}


def answers(runs: list[dict[str, Any]], table: str, reading: str) -> tuple[dict[str, Any], Any, list[Any]]:
    """Predictions `[arm][seed, row]` with all arms that every seed has, labels, and rows of each seed."""
    found, rows = defaultdict(list), []
    for run in runs:
        asked = texts_of(run) if table == "calibration" else run["examples"]
        rows.append(asked["row"].tolist())
        for name in (name for name in asked if name.startswith("log_probability/")):
            scores = np.stack(asked[name].dropna().tolist()).astype(float)
            if reading == "calibrated":
                texts = np.stack(texts_of(run)[name].tolist()).astype(float)
                shares = np.exp(texts - texts.max(1, keepdims=True))
                scores -= np.log((shares / shares.sum(1, keepdims=True)).mean(0))
            found[name.split("/")[1]].append(scores.argmax(1))
    whole = {arm: one for arm, one in found.items() if len(one) == len(runs)}
    return whole, runs[0]["examples"]["label"].to_numpy(), rows


def texts_of(run: dict[str, Any]) -> pd.DataFrame:
    return run["calibration"][run["calibration"]["row"] >= 0]


def variance(x: Any) -> list[tuple[float, int]]:
    """Of the mean of `[seed, question]`: parts with their degrees of freedom."""
    s, q = x.shape
    a, b = x.mean(1), x.mean(0)
    e = ((x - a[:, None] - b + x.mean()) ** 2).sum() / ((s - 1) * (q - 1))
    by = (max(q * a.var(ddof=1), e), s - 1), (max(s * b.var(ddof=1), e), q - 1), (-e, (s - 1) * (q - 1))
    return [(size / x.size, degrees) for size, degrees in by]


def estimate(tasks: list[Any]) -> tuple[float, float, float]:
    parts = [(size / len(tasks) ** 2, degrees) for x in tasks for size, degrees in variance(x)]
    whole = sum(size for size, _ in parts)
    degrees = whole**2 / sum(size**2 / degrees for size, degrees in parts)
    value, half = np.mean([x.mean() for x in tasks]), stats.t.ppf(0.975, degrees) * np.sqrt(whole)
    return float(value), float(value - half), float(value + half)


def is_open(model: str, task: str, reading: str) -> bool:
    runs = records()[model, task]
    if "calibration" not in runs[0]:
        sweep = json.loads((ROOT / "results" / "sweeps" / f"rates-{model}-{task}.json").read_text())
        return sweep["gate"]["in_context_minus_zero_shot"]["interval"][0] > 0
    found, _labels, rows = answers(runs, "calibration", reading)
    shared = set.intersection(*map(set, rows))
    gain = []
    for i, run in enumerate(runs):
        texts = texts_of(run)
        y, kept = texts["label"].to_numpy(), texts["row"].isin(shared).to_numpy()
        gain.append(((found["in_context"][i] == y) * 1.0 - (found["zero_shot"][i] == y))[kept])
    return estimate([np.array(gain)])[1] > 0


def again(name: str, model: str, reading: str, end: str, gate: bool = True) -> tuple[float, float, float] | None:
    tasks = []
    for task in ("sst2", "sst5", "mr", "subj", "agnews", "cb"):
        runs = records().get((model, task), [])
        if len(runs) < 2 or (reading == "calibrated" and "calibration" not in runs[0]):
            continue
        gated = gate and (name not in ANSWERS or ANSWERS[name][1])
        if gated and not is_open(model, task, reading):
            continue
        if name in ANSWERS:
            found, y, _rows = answers(runs, "examples", reading)
            x = ANSWERS[name][0]({arm: np.array(one) for arm, one in found.items()}, y, end)
        else:
            over, under = (
                np.array(
                    [[np.nanmean(np.array(v, float)) for v in run["examples"][c.replace("*", end)]] for run in runs]
                )
                for c in COLUMNS[name]
            )
            x = over - under
        tasks.append(x[:, ~np.isnan(x).any(0)])
    return estimate(tasks) if len(tasks) >= 3 else None


def test_verdicts_are_those_of_the_parquet_files() -> None:
    rows = {(r["id"], r["model"], r["reading"], r["rate"]): r for r in json.loads(STORED.read_text())}
    compared = 0
    models = {model for model, _task in records()}
    for name, model, reading, rate in itertools.product(
        [*ANSWERS, *COLUMNS], models, ("raw", "calibrated"), ("protocol", "chosen")
    ):
        if (row := rows.get((name, model, reading, rate))) is None:
            continue
        end = {"protocol": "", "chosen": "_chosen"}[rate]
        if (described := row["without_the_gate"]) is not None:  # where the gate lets too few through, too
            assert described == pytest.approx(again(name, model, reading, end, gate=False), abs=2e-3)
            compared += row["effect"] is None
        found = again(name, model, reading, end)
        if found is None:
            assert row["effect"] is None, (name, model, reading, rate)
            continue
        assert (row["effect"], row["low"], row["high"]) == pytest.approx(
            found, abs=2e-3
        )  # similarities: half precision
        compared += 1
        word = row["verdict"]
        if word == "equivalent to none":
            assert max(-found[1], found[2]) < (0.05 if name in ANSWERS else 0.02)
        elif word != "undecided":
            assert (found[1] > 0) == (word == "reproduced") and (found[2] < 0) == (word == "refuted")
    numbers = [key for key, row in rows.items() if (row["effect"] or row["without_the_gate"]) is not None]
    assert compared == sum(key[0] in (*ANSWERS, *COLUMNS) and key[1] in models for key in numbers) >= 20


def test_the_stored_file_is_what_the_records_give() -> None:
    """`python -m tools.verdicts` would write the same."""
    stored, made = json.loads(STORED.read_text()), json.loads(json.dumps(storage.plain(verdicts.verdicts())))
    numbers = ("effect", "low", "high", "p", "adjusted_p", "new_seeds", "by_task")
    assert len(stored) == len(made) > 100
    for one, other in zip(stored, made, strict=True):
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        for name in ("effect", "low", "high"):
            assert one[name] == other[name] or one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6)


def test_control_answers_of_another_arm_give_other_numbers() -> None:
    """The comparison above could not pass with the wrong arms."""
    x = np.random.default_rng(0).random((5, 40))
    assert estimate([x, x + 0.1])[0] == pytest.approx(x.mean() + 0.05)
    assert estimate([x])[2] - estimate([x])[1] > estimate([x.repeat(4, 0)])[2] - estimate([x.repeat(4, 0)])[1]
