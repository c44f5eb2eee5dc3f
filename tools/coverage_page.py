"""The page of coverage: every item of the two papers with its page, its check and its verdict, from `coverage.yaml`."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import yaml

from iclgd_helpers.pages import verdict_overview
from iclgd_helpers.pages.claims import Entry, load, title
from tools import claims_pages
from tools.book_pages import ROOT

ITEMS = ROOT / "tools" / "coverage.yaml"
PAPERS = {"C": "Chen and others", "B": "Bar Natan and others"}


def items() -> dict[str, list[dict[str, Any]]]:
    """Of each paper, its items in their order."""
    found: dict[str, list[dict[str, Any]]] = yaml.safe_load(ITEMS.read_text(encoding="utf-8"))
    return found


def link(page: str) -> str:
    """Markdown link to a notebook, or to a page of the book or a place on it (`results#table-3-clipping`)."""
    if (ROOT / "notebooks" / f"{page}.ipynb").is_file():
        return f"[{title(page).partition(' ')[0]}](../notebooks/{page}.ipynb)"
    name, _, place = page.partition("#")
    return f"[{name}]({name}.md#{place})" if place else f"{{doc}}`{name}`"


def judged(statement: str, verdicts: list[dict[str, Any]]) -> str:
    """How often a statement of the reproduction got which verdict, over models, readings and learning rates."""
    counts = Counter(verdict_overview.worded(v) for v in verdicts if v["id"] == statement)
    return f"{statement}: " + ", ".join(f"{word} {n} of {counts.total()}" for word, n in counts.items())


def outcomes(
    item: dict[str, Any], ledger: dict[str, Entry], proved: dict[str, list[str]], verdicts: list[Any]
) -> list[str]:
    """Markdown of what carries an item: statements with the kinds of their claims, verdicts, errata, a sentence."""
    found = []
    anchors = {claims_pages.anchor(name): entry for name, entry in ledger.items()}
    for name in item["by"]:
        if name in proved:
            kinds = sorted({anchors[a]["status"] for a in proved[name]})
            found.append(f"{{prf:ref}}`{name}`" + (f" ({', '.join(kinds)})" if kinds else ""))
        elif name in ledger:
            found.append(f"[{name}](#{claims_pages.anchor(name)}) ({ledger[name]['status']})")
        elif number := re.fullmatch(r"erratum-(\d\d)", name):
            found.append(f"[erratum {int(number[1])}](#{name})")
        elif any(v["id"] == name for v in verdicts):
            found.append(judged(name, verdicts))
        else:
            raise ValueError(f"{ITEMS.name}: {item['where']}: nothing is called {name}")
    return [*found, *([item["note"]] if "note" in item else [])]


def coverage_page() -> str:
    """Markdown of both papers' tables."""
    ledger = {entry["id"]: entry for entry in load()}
    proved = claims_pages.theorems((ROOT / "book" / "theorems.md").read_text(encoding="utf-8"))
    verdicts = verdict_overview.stored()
    lines = []
    for paper, found in items().items():
        lines += [
            f"## [{paper}], {PAPERS[paper]}",
            "",
            "| Where | Outcome | What it says | Page |",
            "|---|---|---|---|",
        ]
        for item in found:
            carried = outcomes(item, ledger, proved, verdicts)
            if not item["pages"] or not carried:
                raise ValueError(f"{ITEMS.name}: {item['where']} has no place")
            pages = ", ".join(map(link, item["pages"]))
            lines.append(f"| {item['where']} | {'; '.join(carried)} | {item['says']} | {pages} |")
        lines.append("")
    return "\n".join(lines)
