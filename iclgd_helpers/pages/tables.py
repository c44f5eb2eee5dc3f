"""Tables, lists and downloads as pages show them. HTML is made here, and nothing in it is taken for markup."""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from iclgd_helpers.experiments import readings
from iclgd_helpers.experiments.arms import ARMS
from iclgd_helpers.experiments.records import Record, is_current
from iclgd_helpers.pages import figures
from iclgd_helpers.pages.figures import DIVERGED
from iclgd_helpers.pages.selection import TASKS, cell, mark
from iclgd_helpers.paths import resolve_path

BREAK = "\N{LINE SEPARATOR}"  # of lines in a cell; pandas writes \n out
CELL = ("model", "task", "seed")


def table_html(frame: pd.DataFrame, caption: str = "", **options: Any) -> str:
    """
    `frame` as an HTML table under `caption`; `options` are `to_html`'s.

    Nothing in it is taken for markup, whatever a reader's models, tasks and labels are called. Of a cell of several
    lines the first is set in bold; short lines are not broken. Head cells name what they head, a column or a row.
    The names of the index have no line of their own: they head its columns.
    """
    marked = frame.map(lambda cell: cell.replace("\n", BREAK) if isinstance(cell, str) else cell)
    with pd.option_context("display.max_colwidth", None):  # sentences are not cut off
        text = marked.to_html(escape=True, border=0, **options)
    text = re.sub(f"<td>([^<]*{BREAK}[^<]*)</td>", _lines, text)
    start, head, body = re.split("(?<=<thead>)|(?=</thead>)", text, maxsplit=2)
    head = _head(head, frame.index.nlevels if options.get("index", True) else 0, frame.columns.nlevels)
    text = start + head + re.sub("<th.*?</th>", lambda cell: _scoped(cell[0], "row"), body, flags=re.S)
    title = f">\n  <caption>{html.escape(caption)}</caption>" if caption else ">"
    return f"<div>{text.replace('>', title, 1)}</div>"  # as pandas does: a box to scroll in


def _head(lines: str, n_names: int, n_levels: int) -> str:
    """The lines of a head, with the names of the index over its columns if pandas leaves the places there blank."""
    rows = [re.findall("<th.*?</th>", row, re.S) for row in re.findall("<tr.*?</tr>", lines, re.S)]
    if len(rows) > n_levels and all(cell == "<th></th>" for row in rows[:-1] for cell in row[:n_names]):
        names = rows.pop()[:n_names]
        rows[-1] = names + rows[-1][n_names:]
    cells = ("".join(_scoped(cell, "col") for cell in row) for row in rows)
    return "".join(f"\n    <tr>{row}</tr>" for row in cells) + "\n  "


def _scoped(cell: str, kind: str) -> str:
    """A head cell that says whether it heads a column or a row, or a group of them; a blank one heads nothing."""
    start, _, text = cell.removesuffix("</th>").partition(">")
    span = " ".join(["", *re.findall(r'\w+span="\d+"', start)])
    return f'<th scope="{kind}{"group" if span else ""}"{span}>{text}</th>' if text.strip() else f"<td{span}></td>"


def _lines(cell: re.Match[str]) -> str:
    first, *others = cell[1].split(BREAK)
    whole = ' style="white-space:nowrap"' if max(map(len, [first, *others])) < 25 else ""
    return "<br>".join([f"<td{whole}><b>{first}</b>", *others]) + "</td>"


def table(frame: pd.DataFrame, *downloads: tuple[pd.DataFrame, str], caption: str = "", **options: object) -> HTML:
    """`table_html` above links to CSV files."""
    links = "<br>".join(download(*one).data for one in downloads)
    return HTML(table_html(frame, caption, **options) + links)


def html_of(*parts: HTML | str | Iterable[str | tuple[str, str]]) -> str:
    """HTML of what is HTML, of sentences, and of lists (of sentences, or of pairs of a lead in bold and the rest)."""
    made = []
    for part in parts:
        if isinstance(part, HTML):  # from `download` or `table`
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

    With `folded`, a line that describes them, they are shown when a reader opens it.
    """
    content = html_of(*parts)
    if folded:
        content = f"<details><summary>{html.escape(folded)}</summary>{content}</details>"
    data = {"text/html": content, "text/plain": f"<{name}>"}
    display(data, metadata={"scrapbook": {"name": name, "mime_prefix": ""}}, raw=True)


def share_figure(name: str, figure: Figure, alt: str) -> None:
    """
    Display and close a figure as `figures.show` does, and let other pages show it, described by `alt` and its numbers.

    The picture is stored once. Other pages, which are one folder down in the book, show the file that MyST-NB writes
    for it, named by its hash.
    """
    display(image := figures.image(figure))
    source = f"../_images/{hashlib.sha256(image.data).hexdigest()}.png"
    said = html.escape(f"{alt} {image.alt or ''}".strip())
    picture = f'<img src="{source}" alt="{said}" width="{image.width}" style="max-width:100%;height:auto"/>'
    prefix = "application/papermill.record/"  # kept in the notebook, not shown there
    display({prefix + "text/html": picture}, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}}, raw=True)


def download(frame: pd.DataFrame, name: str, folder: str | Path | None = None) -> HTML:
    """
    A link that saves `frame` as `<name>.csv`; it holds the data itself, so that it works offline and in Colab.

    The file is written to `folder` too, else to $ICLGD_TABLES, and to neither where it does not exist. The variable is
    set only where pages are stored, so that a run with other parameters leaves the stored tables alone.
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


def direction(interval: Sequence[float]) -> str:
    """`higher` or `lower` if a difference's interval excludes zero; `undecided` if it does not, or has no width."""
    low, high = interval
    return "higher" if 0 < low < high else "lower" if low < high < 0 else "undecided"


def with_interval(
    value: float | None, interval: Sequence[float | None], digits: int = 3, missing: str = "undefined"
) -> str:
    """`0.712 [0.660, 0.764]`; `missing` for None or NaN."""
    if pd.isna(value):
        return missing
    if any(map(pd.isna, interval)):
        return f"{value:.{digits}f} [undefined]"
    return f"{value:.{digits}f} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def accuracy_table(record: Record) -> pd.DataFrame:
    """Of every arm at the protocol's learning rate: n, accuracy with interval or "diverged", spread of predictions."""
    arms = record.json["arms"]
    rows = {
        ARMS[name].label: {
            "n": arm["n"],
            "accuracy [95 % interval]": with_interval(arm["accuracy"], arm["accuracy_interval"], missing=DIVERGED),
            "predicted classes": " / ".join(map(str, arm["predicted"])),
            "prediction entropy, bits": "" if arm["accuracy"] is None else round(arm["prediction_entropy_bits"], 3),
        }
        for name, arm in ((name, arms[name]) for name in ARMS if name in arms)
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(f"run {record.json['id']}")


def both_readings(record: Record) -> pd.DataFrame:
    """
    What is read from predictions, raw and calibrated side by side; an arm a row, with 95 % intervals over questions.

    Columns: accuracy, largest share of one class; of arms that are compared with in-context learning, the Jaccard index
    of changed answers and Rec2FTP. A record without priors has the raw ones alone.
    """
    kinds = [kind for kind in readings.READINGS if kind == readings.RAW or readings.has_priors(record)]
    rows: dict[str, dict[tuple[str, str], str]] = {}
    for kind in kinds:
        read = readings.read(record, kind).json
        for name in (name for name in ARMS if name in read["arms"]):
            row, arm = rows.setdefault(ARMS[name].label, {}), read["arms"][name]
            row["accuracy", kind] = with_interval(arm["accuracy"], arm["accuracy_interval"], 2, DIVERGED)
            row["largest share", kind] = f"{max(arm['predicted']) / arm['n']:.2f}" if arm["predicted"] else ""
            compared = read["comparisons"].get(name)
            for index, title in (("jaccard_all_code", "Jaccard"), ("rec2ftp", "Rec2FTP")) if compared else ():
                row[title, kind] = with_interval(compared[index]["value"], compared[index]["interval"], 2)
    order = [(what, kind) for what in ("accuracy", "largest share", "Jaccard", "Rec2FTP") for kind in kinds]
    table = pd.DataFrame.from_dict(rows, orient="index").reindex(columns=pd.MultiIndex.from_tuples(order)).fillna("")
    return table.rename_axis(f"run {record.json['id']}")


def records_table(records: Sequence[Record], columns: Mapping[str, Callable[[Record], Any]]) -> pd.DataFrame:
    """One row a record: what it is, whether the present helpers computed it, then `columns`; may be empty."""
    named = ("model", "task", "seed")
    rows = [
        {name: r.json["parameters"][name] for name in named}
        | {heading: value(r) for heading, value in columns.items()}
        | {"run": r.json["id"], "helpers": "current" if is_current(r) else "older"}
        for r in records
    ]
    return pd.DataFrame(rows, columns=[*named, *columns, "run", "helpers"])


def runs(found: Iterable[Record]) -> pd.DataFrame:
    """The run ids behind the tables: one row a record."""
    rows = [
        dict(zip(CELL, (mark(r), TASKS[cell(r)[1]], cell(r)[2]), strict=True))
        | {"demonstrations": r.json["n_demonstrations"], "n": r.json["n_compared"], "run": r.json["id"]}
        | {"helpers": "current" if is_current(r) else "older"}
        for r in found
    ]
    return pd.DataFrame(rows, columns=[*CELL, "demonstrations", "n", "run", "helpers"])
