"""The grid of the reproduction: its records and sweeps as tables with two uncertainties, and what is missing."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from numpy.typing import NDArray

from iclgd_helpers import storage
from iclgd_helpers.experiments import parameters, records
from iclgd_helpers.experiments.parameters import ExperimentParameters
from iclgd_helpers.experiments.protocol import MODELS, SEEDS
from iclgd_helpers.experiments.records import Record
from iclgd_helpers.measures import intervals
from iclgd_helpers.pages import figures
from iclgd_helpers.paths import resolve_path

# The six tasks in the order of the paper's Table 2, as it prints them.
TASKS = {"sst2": "SST2", "sst5": "SST5", "mr": "MR", "subj": "Subj", "agnews": "AGNews", "cb": "CB"}
# What may differ between cells of the grid. Any other parameter has to be the protocol's.
FREE = set("preset model task seed data_source data_folder max_examples max_compared device dtype".split()) | set(
    "controls chosen_rates conditioning".split()
)
LONG = ("model", "task", "seed", "value", "low", "high", "n", "id")
CELL = ("model", "task", "seed")
BREAK = "\N{LINE SEPARATOR}"  # of lines in a cell; pandas writes \n out

# What is read from a record: (value, low, high, n), the interval being over examples.
Quantity = Callable[[Record], tuple[float | None, float | None, float | None, int]]


# --------------------------------------------------------------------------------------------------------- selection
def cell(record: Record) -> tuple[str, str, int]:
    """Model, task and seed of a record."""
    given = record.json["parameters"]
    return given["model"], given["task"], given["seed"]


def short(model: str) -> str:
    """A model's name: of a folder on this machine its last part, of any other id the whole."""
    return Path(model).name if Path(model).is_absolute() else model


@cache
def _protocol(task: str) -> dict[str, Any]:
    return parameters.resolve({"preset": "quick", "task": task, "data_source": "generated"}).model_dump(exclude=FREE)


def in_grid(record: Record, **variant: Any) -> bool:
    """Whether it is of one of the six tasks, at one of its seeds, with the protocol's settings or the given ones."""
    given = record.json["parameters"]
    if given["task"] not in TASKS or given["seed"] not in SEEDS[given["task"]]:
        return False
    fields = ExperimentParameters.model_fields  # a parameter that came later has its default in older records
    wanted = _protocol(given["task"]) | variant
    return all(given.get(name, fields[name].default) == value for name, value in wanted.items())


def grid() -> list[Record]:
    """The stored records of the grid: see `select`."""
    return select(records.load_all("results/records"))


def select(loaded: Iterable[Record], **variant: Any) -> list[Record]:
    """
    Of some records those of the grid, one for each (model, task, seed), whatever the model.

    Of several records of a cell the present helpers' comes first, then the one with more rows. `variant` asks for
    cells that were run with other parameters than the protocol's (`n_demonstrations=16`, …).
    """
    chosen: dict[tuple[str, str, int], Record] = {}
    for record in (r for r in loaded if in_grid(r, **variant)):
        other = chosen.setdefault(cell(record), record)
        if _rank(record) > _rank(other):
            chosen[cell(record)] = record
    places = {task: place for place, task in enumerate(TASKS)}
    return [chosen[key] for key in sorted(chosen, key=lambda key: (key[0], places[key[1]], key[2]))]


def _rank(record: Record) -> tuple[Any, ...]:
    found = record.json
    chosen = bool(found["parameters"].get("chosen_rates"))
    return record.is_current, found["n_compared"], found["n_examples"], chosen, found["created"], found["id"]


def is_evidence(record: Record) -> bool:
    """Whether it tells something of a trained model on real text; only such records enter verdicts."""
    return mark(record) == short(record.json["parameters"]["model"])


def mark(record: Record) -> str:
    """The model's name as tables show it, with a warning where the record is no evidence."""
    name, given = short(record.json["parameters"]["model"]), record.json["parameters"]
    if name.startswith(("random-", "tiny-")):
        return f"{name} (random weights)"
    return f"{name} (generated text)" if given["data_source"] == "generated" else name


def notes(found: Sequence[Record]) -> list[str]:
    """Lines that say which cells are missing, of older helpers, or of random weights."""
    have = set(map(cell, found))
    wanted = [(model, task, seed) for model in MODELS for task in TASKS for seed in SEEDS[task]]
    missing = [key for key in wanted if key not in have]
    lines = [f"{len(wanted) - len(missing)} of {len(wanted)} cells of the grid are recorded."]
    if missing:
        lines.append("Missing: " + "; ".join(_grouped(missing)) + ".")
    older = [record for record in found if not record.is_current]
    if older:
        names = "; ".join(_grouped((short(m), task, seed) for m, task, seed in map(cell, older)))
        lines.append(f"Computed by an older version of the helpers than this page's ({len(older)}): {names}.")
    if diverged := [record for record in found if record.diverged]:
        named = "; ".join(
            f"{mark(record)}, run {record.json['id']}: {', '.join(record.diverged)}" for record in diverged
        )
        lines.append(f"Diverged, so without values and without part in a verdict: {named}.")
    empty = [record for record in found if not is_evidence(record)]
    if empty:
        names = ", ".join(sorted({f"{mark(record)}, run {record.json['id']}" for record in empty}))
        lines.append(f"No evidence, shown but never part of a verdict: {names}.")
    return lines


def _grouped(keys: Iterable[tuple[str, str, int]]) -> list[str]:
    groups: dict[str, dict[str, list[str]]] = {}
    for model, task, seed in keys:
        groups.setdefault(model, {}).setdefault(TASKS[task], []).append(str(seed))
    return [f"{m}: " + ", ".join(f"{t} (seed {', '.join(s)})" for t, s in tasks.items()) for m, tasks in groups.items()]


# ------------------------------------------------------------------------------------------------------------ tables
def quantity(name: str) -> Quantity:
    """
    The reader of `accuracy/<arm>` or `<metric>/<comparison>` (`sim_aou/joint`, `jaccard_all_code/standard`, …).

    It raises KeyError for a record without that arm or comparison.
    """
    metric, _, arm = name.partition("/")

    def read(record: Record) -> tuple[float | None, float | None, float | None, int]:
        if metric == "accuracy":
            found = record.json["arms"][arm]
            return found["accuracy"], *found["accuracy_interval"], found["n"]
        found = record.json["comparisons"][arm][metric]
        return found.get("mean", found.get("value")), *found["interval"], record.json["n_compared"]

    return read


def table(found: Iterable[Record], what: str | Quantity) -> pd.DataFrame:
    """
    Long table of one quantity: a row for each record that has it, with its 95 % interval over examples.

    Columns: model (as `mark` names it), task, seed, value, low, high, n (examples), id (of the run).
    """
    read, rows = quantity(what) if isinstance(what, str) else what, []
    for record in found:
        try:
            values = read(record)
        except KeyError:
            continue  # this cell was run without that arm
        _model, task, seed = cell(record)
        rows.append((mark(record), task, seed, *values, record.json["id"]))
    frame = pd.DataFrame(rows, columns=list(LONG))
    return frame.astype({name: float for name in ("value", "low", "high")})


def over_seeds(long: pd.DataFrame) -> pd.DataFrame:
    """
    One row for each model and task of a long table.

    Columns: value (mean over seeds), seeds_low, seeds_high (Student's t over seeds; NaN for one seed), n_seeds,
    examples_low, examples_high (ends of the intervals over examples, averaged over seeds: what one seed's examples
    leave open), n (fewest examples of a seed), ids. The two intervals answer different questions and are not pooled.
    """
    rows = []
    for (model, task), group in long.dropna(subset="value").groupby(["model", "task"], sort=False):
        seeds = intervals.over_seeds(group["value"].tolist())
        rows.append({
            "model": model, "task": task, "value": seeds["mean"],
            "seeds_low": seeds["interval"][0], "seeds_high": seeds["interval"][1], "n_seeds": seeds["n"],
            "examples_low": group["low"].mean(), "examples_high": group["high"].mean(),
            "n": int(group["n"].min()), "ids": " ".join(group["id"]),
        })  # fmt: skip
    names = "model task value seeds_low seeds_high n_seeds examples_low examples_high n ids".split()
    return pd.DataFrame(rows, columns=names)


def runs(found: Iterable[Record]) -> pd.DataFrame:
    """The run ids behind the tables: one row a record."""
    rows = [
        dict(zip(CELL, (mark(r), TASKS[cell(r)[1]], cell(r)[2]), strict=True))
        | {"demonstrations": r.json["n_demonstrations"], "n": r.json["n_compared"], "run": r.json["id"]}
        | {"helpers": "current" if r.is_current else "older"}
        for r in found
    ]
    return pd.DataFrame(rows, columns=[*CELL, "demonstrations", "n", "run", "helpers"])


# ----------------------------------------------------------------------------------------------- draws and orders
def variance_between(right: NDArray) -> tuple[float, NDArray]:
    """
    Variance of accuracy between cells, without what the choice of questions adds to it.

    The plain variance of measured accuracies grows with the number of questions that cells answer differently, also
    where all cells are equally good. This estimate multiplies different questions only, and so is unbiased.

    Parameters
    ----------
    right : `[cell, question]`, whether the answer is right; at least two cells, the same questions for all.

    Returns
    -------
    The estimate, which may be negative; and `[question]`, what it is without one question (for `jackknife`).
    """
    deviation = right - np.mean(right, axis=0)
    n, sums, squares = deviation.shape[1], deviation.sum(1), (deviation**2).sum(1)

    def estimate(sums: NDArray, squares: NDArray, n: int) -> NDArray:
        return (sums**2 - squares).sum(0) / (n * (n - 1) * (len(right) - 1))

    without = estimate(sums[:, None] - deviation, squares[:, None] - deviation**2, n - 1)
    return float(estimate(sums, squares, n)), without


def jackknife(value: float, without: NDArray) -> tuple[float, float, float]:
    """Value, and ends of its 95 % interval from `[question]` values that leave out one question each."""
    n = len(without)
    half = NormalDist().inv_cdf((1 + intervals.LEVEL) / 2) * np.sqrt((n - 1) * np.var(without))
    return value, float(value - half), float(value + half)


def signed_root(variances: Sequence[float]) -> tuple[float, ...]:
    """Roots that keep the sign: variances, and differences of them, in the unit of accuracy."""
    return tuple(float(np.sign(one) * np.sqrt(abs(one))) for one in variances)


# ------------------------------------------------------------------------------------------------------------ sweeps
def sweeps(kind: str, folder: str | Path = "results/sweeps") -> dict[tuple[str, str], dict[str, Any]]:
    """The sweeps of one kind (`rates`, `clips`) by (model, task)."""
    paths = sorted(resolve_path(folder).glob(f"{kind}-*.json"))
    found = [storage.read_json(path) for path in paths]
    return {(sweep["model"], sweep["task"]): sweep for sweep in found}


def gate(rates: Mapping[tuple[str, str], Mapping[str, Any]], model: str, task: str) -> bool | None:
    """
    Whether in-context learning beats zero-shot on training rows: the 95 % interval of the difference lies above 0.

    None where it was not measured.
    """
    sweep = rates.get((model, task))
    if not sweep or not sweep.get("gate"):
        return None
    low = sweep["gate"]["in_context_minus_zero_shot"]["interval"][0]
    return None if low is None else low > 0


# ------------------------------------------------------------------------------------------------------------- pages
def table_html(frame: pd.DataFrame, caption: str = "", **options: Any) -> str:
    """
    `frame` as an HTML table under `caption`; `options` are `to_html`'s.

    Nothing in it is taken for markup, whatever a reader's models, tasks and labels are called. Of a cell of several
    lines the first is set in bold; short lines are not broken.
    """
    marked = frame.map(lambda cell: cell.replace("\n", BREAK) if isinstance(cell, str) else cell)
    with pd.option_context("display.max_colwidth", None):  # sentences are not cut off
        text = marked.to_html(escape=True, **options)
    text = re.sub(f"<td>([^<]*{BREAK}[^<]*)</td>", _lines, text)
    head = f">\n  <caption>{html.escape(caption)}</caption>" if caption else ">"
    return f"<div>{text.replace('>', head, 1)}</div>"  # as pandas does: a box to scroll in


def _lines(cell: re.Match[str]) -> str:
    first, *others = cell[1].split(BREAK)
    whole = ' style="white-space:nowrap"' if max(map(len, [first, *others])) < 25 else ""
    return "<br>".join([f"<td{whole}><b>{first}</b>", *others]) + "</td>"


def html_of(*parts: HTML | str | Iterable[str | tuple[str, str]]) -> str:
    """HTML of what is HTML, of sentences, and of lists (of sentences, or of pairs of a lead in bold and the rest)."""
    made = []
    for part in parts:
        if isinstance(part, HTML):  # from `download` or `grid_plots.table`
            made.append(part.data)
        elif isinstance(part, str):
            made.append(f"<p>{html.escape(part)}</p>")
        else:
            pairs = [("", line) if isinstance(line, str) else line for line in part]
            items = [f"<b>{html.escape(lead)}</b> {html.escape(rest)}" for lead, rest in pairs]
            made.append("<ul>" + "".join(f"<li>{item}</li>" for item in items).replace("<b></b> ", "") + "</ul>")
    return "\n".join(made)


def share(name: str, *parts: HTML | str | Iterable[str | tuple[str, str]], folded: str = "") -> None:
    """
    Display the parts (see `html_of`) in a notebook, and let other pages show them under that name (MyST-NB's `glue`).

    With `folded`, a line that says what they are, they are shown when a reader opens it.
    """
    content = html_of(*parts)
    if folded:
        content = f"<details><summary>{html.escape(folded)}</summary>{content}</details>"
    data = {"text/html": content, "text/plain": f"<{name}>"}
    display(data, metadata={"scrapbook": {"name": name, "mime_prefix": ""}}, raw=True)


def share_figure(name: str, figure: Figure, alt: str) -> None:
    """Display and close a figure as `figures.show` does, and let other pages show it, described by `alt`."""
    png, width = figures.png(figure), round(figure.get_figwidth() * 96)
    display(Image(png, width=width))
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    picture = f'<img src="{source}" alt="{html.escape(alt)}" width="{width}" style="max-width:100%;height:auto">'
    prefix = "application/papermill.record/"  # kept in the notebook, not shown there
    display({prefix + "text/html": picture}, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}}, raw=True)


def download(frame: pd.DataFrame, name: str, folder: str | Path | None = None) -> HTML:
    """
    A link that saves `frame` as `<name>.csv`; it holds the data itself, so that it works offline and in Colab.

    The file is written to `folder` too, else to $ICLGD_TABLES, which is set only where pages are stored (so that a
    run with other parameters leaves the stored tables alone); to neither where it does not exist.
    """
    folder = folder or os.environ.get("ICLGD_TABLES")
    text = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    target = resolve_path(folder or "absent") / f"{name}.csv"
    if folder and target.parent.is_dir() and not (target.is_file() and target.read_text(encoding="utf-8") == text):
        part = target.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(target)
    data = base64.b64encode(text.encode()).decode()
    link = f'<a download="{html.escape(name)}.csv" href="data:text/csv;base64,{data}">'
    return HTML(f"{link}Download {html.escape(name)}.csv</a> ({len(frame)} rows)")
