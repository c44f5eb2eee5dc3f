"""All verdicts in one table: a sentence a statement; for each model and reading a word, a colour, an interval."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from IPython.display import HTML

from iclgd_helpers import storage
from iclgd_helpers.measures import hierarchical
from iclgd_helpers.measures.hierarchical import EQUIVALENT, NOT_JUDGED, REFUTED, REPRODUCED, UNDECIDED
from iclgd_helpers.pages.decisions import EXPLORATORY
from iclgd_helpers.pages.statements import BY_ID, STATEMENTS
from iclgd_helpers.pages.verdict_tables import AT_THRESHOLD, in_a_word
from iclgd_helpers.paths import resolve_path

Row = Mapping[str, Any]  # of `decisions.decide`
SIGNS = {REPRODUCED: "▲", REFUTED: "▼", EQUIVALENT: "=", AT_THRESHOLD: "=", UNDECIDED: "?"}
CLASSES = {
    REPRODUCED: "reproduced",
    REFUTED: "refuted",
    EQUIVALENT: "none",
    AT_THRESHOLD: "none",
    UNDECIDED: "undecided",
}
REACH = 5.0  # bounds to either side of the axis; what lies further off is drawn at its end
WIDTH, HEIGHT, MARGIN = 100, 14, 5  # of the axis; a dot at its end is drawn whole
STORED = "results/verdicts.json"


def table(rows: Sequence[Row], rate: str = "protocol", caption: str = "") -> HTML:
    """
    One line a statement, one column a model and reading.

    A statement about attention or gradients has one reading, and its cell spans both. The axis of every interval is in
    units of the statement's bound, which is drawn as a band. So a statement about shares and one about similarities can
    be read side by side. A hollow dot describes all tasks together where the gate leaves too few to judge.
    """
    mine = [row for row in rows if row["rate"] == rate]
    models = list(dict.fromkeys(row["model"] for row in mine))
    head = "".join(f'<th scope="colgroup" colspan="2">{html.escape(model)}</th>' for model in models)
    second = "".join('<th scope="col">raw</th><th scope="col">calibrated</th>' for _model in models)
    found = {(row["id"], row["model"], row["reading"]): row for row in mine}
    lines = []
    for statement in STATEMENTS:
        cells = [_cells(found, statement.id, model) for model in models]
        said = f'<th scope="row"><b>{statement.id}</b> {html.escape(statement.says)} <i>{statement.kind}</i></th>'
        named = f' id="{place(statement.id)}"' if rate == "protocol" else ""  # links lead to one table alone
        lines.append(f"<tr{named}>{said}{''.join(cells)}</tr>")
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    first = '<th scope="col" rowspan="2">statement</th>'
    return HTML(
        f'<div class="verdicts"><table>{title}<thead><tr>{first}{head}</tr><tr>{second}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def place(name: str) -> str:
    """Where links to a statement lead: its line in the table at the protocol's learning rate."""
    return f"statement-{name}"


def _cells(found: Mapping[tuple[str, str, str], Row], name: str, model: str) -> str:
    readings = [found.get((name, model, reading)) for reading in ("raw", "calibrated")]
    if readings[1] is None:
        return _cell(readings[0], f"{model}, both readings", span=2)
    return "".join(_cell(row, f"{model}, {row['reading']}") for row in readings if row)


def _cell(row: Row | None, label: str, span: int = 1) -> str:
    """A chip above its interval; `label` is what a narrow screen shows for the column's head."""
    start = f'<td colspan="{span}" data-label="{html.escape(label)}">'
    if row is None or row["effect"] is None:
        described = row and row["without_the_gate"]
        picture = drawn(described, BY_ID[row["id"]].bound, "described") if row and described else ""
        return f'{start}<span class="chip">{NOT_JUDGED}</span>{picture}</td>'
    chip = f'<span class="chip {CLASSES[in_a_word(row)]}">{worded(row)}</span>'
    numbers = [row["effect"], row["low"], row["high"]]
    return f"{start}{chip}{drawn(numbers, BY_ID[row['id']].bound, 'effect')}</td>"


def drawn(numbers: Sequence[float], bound: float, kind: str) -> str:
    """
    An effect and its interval on an axis in units of the bound, as a picture that can be read aloud.

    `kind` is `effect`, or `described` for all tasks together where the gate lets too few through.
    """
    names = ("effect", "low", "high")
    place = {
        name: WIDTH / 2 + min(1, max(-1, value / bound / REACH)) * (WIDTH / 2 - MARGIN)
        for name, value in zip(names, numbers, strict=True)
    }
    band, middle = (WIDTH / 2 - MARGIN) / REACH, HEIGHT / 2
    words = "{:+.3f}, 95 % interval {:+.3f} to {:+.3f}".format(*numbers)
    words += ", all tasks, a description" if kind == "described" else ""
    line = f'<line x1="{place["low"]:.1f}" x2="{place["high"]:.1f}" y1="{middle}" y2="{middle}" class="interval"/>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="{words}">'
        f"<title>{words}</title>"
        f'<rect x="{WIDTH / 2 - band:.1f}" width="{2 * band:.1f}" y="0" height="{HEIGHT}" class="bound"/>'
        f'<line x1="{WIDTH / 2}" x2="{WIDTH / 2}" y1="0" y2="{HEIGHT}" class="zero"/>{line}'
        f'<circle cx="{place["effect"]:.1f}" cy="{middle}" r="3.5" class="{kind}"/></svg>'
    )


def worded(row: Row) -> str:
    """The verdict with its sign, or that there was nothing to judge."""
    return NOT_JUDGED if row["effect"] is None else f"{SIGNS[in_a_word(row)]} {in_a_word(row)}"


def stored() -> list[dict[str, Any]]:
    """The verdicts in `results/verdicts.json`, which `python -m tools.verdicts` writes from the records."""
    found: list[dict[str, Any]] = storage.parse_json(resolve_path(STORED).read_bytes())
    return found


def finding(rows: Sequence[Row], *ids: str) -> list[tuple[str, str]]:
    """
    What came out of some statements, at the protocol's learning rate: a lead and the rest of a line for each.

    One last line names those that are not judged for any model or reading, and why.
    """
    said, nowhere = [], []
    for name in ids:
        mine = [row for row in rows if row["id"] == name and row["rate"] == "protocol"]
        words = [f"{row['model']}, {_reading(row)}: {_in_words(row)}" for row in mine if row["effect"] is not None]
        left = len(mine) - len(words)
        if words:
            words += [f"{left} of {len(mine)} pairs of model and reading {NOT_JUDGED}"] if left else []
            said.append((f"{name} {BY_ID[name].says}", "; ".join(words) + "."))
        else:
            nowhere.append(name)
    if nowhere:
        names = "; ".join(f"{BY_ID[name].says[:-1]} ({name})" for name in nowhere)
        said.append((_not_judged(rows, nowhere), f"{names}."))
    return said


def _not_judged(rows: Sequence[Row], ids: Sequence[str]) -> str:
    """A lead, with the reasons that there are: the gate withholds what is there, or too little was recorded."""
    mine = [row for row in rows if row["id"] in ids]
    withheld = [row["without_the_gate"] is not None for row in mine]
    is_whole = all(withheld) and {row["id"] for row in mine}.issuperset(ids)
    reasons = ["the gate opens on too few tasks"] if any(withheld) else []
    reasons += [] if is_whole else ["too few records have what is asked"]
    return f"Not judged for any model or reading, because {' or '.join(reasons)}:"


def _reading(row: Row) -> str:
    statement = BY_ID[row["id"]]
    reading = f"{row['reading']} reading" if statement.answers or statement.gated else "both readings"
    return reading if row["part"] != EXPLORATORY else f"{reading}, exploratory rows"


def _in_words(row: Row) -> str:
    return f"{in_a_word(row)}, effect {row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def counted(rows: Iterable[Row]) -> dict[str, int]:
    """How many verdicts of each kind, all of the words named."""
    said = [in_a_word(row) for row in rows]
    return {word: said.count(word) for word in SIGNS}


def lines(rows: Sequence[Row], n_runs: Mapping[str, tuple[int, int]]) -> list[tuple[str, str]]:
    """
    The outcome at the protocol's learning rate in a few sentences, as pairs of a lead and the rest.

    Parameters
    ----------
    n_runs : model -> how many of its runs there are, and how many there should be.
    """
    rows, said = [row for row in rows if row["rate"] == "protocol"], []
    for model, (there, wanted) in n_runs.items():
        mine = [row for row in rows if row["model"] == model and row["effect"] is not None]
        parts = {row["part"] for row in rows if row["model"] == model} - {EXPLORATORY}
        where = "" if parts else f" on exploratory rows (confirmatory runs: {there} of {wanted})"
        counts = ", ".join(f"{n} {word}" for word, n in counted(mine).items())
        explored = dict.fromkeys(row["id"] for row in mine if row["part"] == EXPLORATORY) if parts else {}
        beside = f" ({', '.join(explored)} on exploratory rows)" if explored else ""
        said.append((f"{model}:", f"{counts}, of {len(mine)} verdicts, one a statement and reading{beside}{where}."))
    for word in (REPRODUCED, REFUTED, EQUIVALENT, AT_THRESHOLD):
        if names := always(rows, word):
            lead = f"{word.capitalize()} wherever judged, at the protocol's learning rate:"
            said.append((lead, "; ".join(f"{BY_ID[n].says[:-1]} ({n})" for n in names) + "."))
    judged = {row["id"] for row in rows if row["effect"] is not None}
    if nowhere := [one.id for one in STATEMENTS if one.id not in judged]:
        said.append(
            (_not_judged(rows, nowhere), f"{len(nowhere)} of {len(STATEMENTS)} statements ({', '.join(nowhere)}).")
        )
    said += withheld(rows)
    if names := bias_only(rows):
        said.append(("Raw and calibrated differ in sign or verdict:", ", ".join(names) + "."))
    return said


def withheld(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """
    What the gate withholds of a model and reading in which in-context learning beats zero-shot (R1), in words.

    The gate asks single tasks, on few training texts, so it may be closed where the mean over tasks is clear.
    """
    said = []
    for model, reading in [(r["model"], r["reading"]) for r in rows if r["id"] == "R1" and r["verdict"] == REPRODUCED]:
        mine = [row for row in rows if (row["model"], row["reading"], row["effect"]) == (model, reading, None)]
        words = {row["id"]: _ungated(row) for row in mine if row["without_the_gate"]}
        alike = {word: ", ".join(name for name in words if words[name] == word) for word in SIGNS}
        lead = f"{model}, {reading} reading: R1 is reproduced, yet the gate withholds {len(words)} statements."
        rest = "Without the gate, and not adjusted for their number, the rule would say"
        named = "; ".join(f"{word}: {names}" for word, names in alike.items() if names)
        said += [(lead, f"{rest} {named}. These are no verdicts.")] if words else []
    return said


def _ungated(row: Row) -> str:
    """The rule's word without the gate; where p is not adjusted, it is below the level if the interval leaves out 0."""
    value, low, high = row["without_the_gate"]
    found = hierarchical.Estimate(value, low, high, float(low <= 0 <= high), math.inf, {})
    return in_a_word({**row, "verdict": hierarchical.verdict(found, found.p, BY_ID[row["id"]].bound)})


def always(rows: Sequence[Row], word: str) -> list[str]:
    """Statements whose every verdict is that word, wherever they are judged."""
    judged = [row for row in rows if row["effect"] is not None]
    return [one.id for one in STATEMENTS if {in_a_word(r) for r in judged if r["id"] == one.id} == {word}]


def bias_only(rows: Sequence[Row]) -> list[str]:
    """Statements that are decided otherwise in the one reading than in the other, for a model and learning rate."""
    said: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        said.setdefault((row["id"], row["model"], row["rate"]), set()).add(row["verdict"])
    differing = {name for (name, _model, _rate), words in said.items() if len(words - {UNDECIDED, NOT_JUDGED}) > 1}
    return [one.id for one in STATEMENTS if one.id in differing]
