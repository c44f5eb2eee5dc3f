"""The claims ledger (`results/claims.json`) as Markdown: the page of claims, and what each erratum costs."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

from iclgd_helpers import storage
from iclgd_helpers.pages import published
from iclgd_helpers.pages.claims import ROOT, Entry, load, title, worded

ERRATA = range(1, 31)


def anchor(identity: str) -> str:
    """Name of a claim's place on the page of claims."""
    return "claim-" + re.sub(r"[^a-z0-9]+", "-", identity.lower())


def theorems(page: str) -> dict[str, list[str]]:
    """From the source of the theorems page: label of each statement -> anchors of the claims that it names."""
    parts = re.split(r"^:label: (\S+)$", page, flags=re.M)
    return {
        label: re.findall(r"\(#(claim-[a-z0-9-]+)\)", text)
        for label, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def number(value: float) -> str:
    """Two digits, as mathematics."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"${value:.0f}$" if value == 0 or abs(value) >= 10 else f"${value:#.2g}$"
    mantissa, exponent = f"{value:.1e}".split("e")
    return rf"${mantissa}\cdot10^{{{int(exponent)}}}$"


def interval(ends: list[float]) -> str:
    """An interval, three digits."""
    return f"[{ends[0]:.3g}, {ends[1]:.3g}]"


def found(claim: Entry) -> str:
    """What the check found, and what was drawn for it how often."""
    draws = f" Drawn at random: {claim['drawn']}; {claim['seeds']} seeds." if claim["drawn"] else " Nothing is drawn."
    if claim["residual"] is not None:
        tolerance = number(claim["tolerance"]).replace(r"1.0\cdot", "")
        return f"Residual {number(claim['residual'])}, tolerance {tolerance}.{draws}"
    ends = f"{interval(claim['interval'])}, {claim['side']} each control's"
    return f"Measured {ends} (level {claim['level']:g}, $n={claim['n']}$).{draws}"


def failed(control: dict[str, Any]) -> str:
    """What one control did."""
    if "error" in control:
        return f"Control: {control['text']}; error {number(control['error'])}."
    return f"Control: {control['text']}; {interval(control['interval'])}."


def errata(claim: Entry) -> list[int]:
    """Numbers of the errata whose printed forms are controls of a claim."""
    return sorted({number for control in claim["controls"] for number in control["erratum"]})


def claims_page(ledger: list[Entry], theorems_page: str) -> str:
    """Markdown of all claims, grouped by chapter."""
    proved = theorems(theorems_page)
    lines = []
    for notebook, claims in groupby(ledger, key=lambda claim: claim["notebook"]):
        lines += [f"## {title(notebook)}", f"[Open the notebook](../notebooks/{notebook}.ipynb)."]
        for claim in claims:
            name = anchor(claim["id"])
            places = [f"{{prf:ref}}`{label}`" for label, named in proved.items() if name in named]
            places += [f"[erratum {n}](#erratum-{n:02d})" for n in errata(claim)]
            items = [found(claim), *map(failed, claim["controls"]), f"Source: {claim['source']}."]
            items += [f"See {', '.join(places)}."] if places else []
            items.append(f"Check: `{claim['test'].partition('::')[2]}`")
            head = f"**{claim['id']}** ({claim['status']}). {worded(claim).rstrip('.')}."
            lines += [f"({name})=\n{head}\n\n" + "\n".join(f"- {item}" for item in items)]
    return "\n\n".join(lines) + "\n"


def summary(ledger: list[Entry]) -> str:
    """One line: how many claims of which status, how many controls, and in how many claims nothing is drawn."""
    counts: dict[str, int] = {}
    for claim in ledger:
        counts[claim["status"]] = counts.get(claim["status"], 0) + 1
    kinds = ", ".join(f"{n} {status}" for status, n in counts.items())
    controls, fixed = sum(len(c["controls"]) for c in ledger), sum(not c["drawn"] for c in ledger)
    return f"{len(ledger)} claims ({kinds}) with {controls} controls; in {fixed} of them nothing is drawn at random.\n"


def erratum(ledger: list[Entry], which: int) -> str:
    """Markdown of the controls that show one erratum."""
    lines = []
    for claim in ledger:
        for control in claim["controls"]:
            if which in control["erratum"]:
                place = f"[{title(claim['notebook'])}](../notebooks/{claim['notebook']}.ipynb)"
                corrected = found(claim)
                lines.append(f"- {failed(control)} Corrected: {corrected[0].lower()}{corrected[1:]}")
                lines.append(f"  Claim [{claim['id']}](#{anchor(claim['id'])}), page {place}.")
    return "\n".join(lines or ["- No check carries this erratum."]) + "\n"


def printed_gap(table_1: pd.DataFrame | None = None) -> str:
    """Markdown of erratum 26: the mean distance of finetuning and in-context learning in [B]'s Table 1."""
    cells = published.table(1) if table_1 is None else table_1
    accuracy = cells[cells["quantity"] == "accuracy"].pivot(index="task", columns="arm", values="value")
    points = (accuracy["in_context"] - accuracy["standard"]).abs()
    relative = 100 * points / accuracy["zero_shot"]
    return (
        f"- From the printed accuracies of the {len(accuracy)} tasks: {relative.mean():.2f} percent of the "
        f"zero-shot accuracy on average, {points.mean():.2f} points.\n"
    )


def write_pages(folder: Path) -> None:
    """All generated Markdown, for the pages of `book/` to include."""
    ledger = load()
    page = ROOT / "book" / "theorems.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    made = {"claims": claims_page(ledger, text), "claims-summary": summary(ledger)}
    made |= {f"erratum-{n:02d}": erratum(ledger, n) for n in ERRATA}
    made["erratum-26"] = printed_gap()
    for name, content in made.items():
        storage.write_text(folder / f"{name}.md", content)
