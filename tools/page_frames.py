"""What a notebook wears in the book, and not in its file: a run line, its place in the web of claims, folded cells."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_markdown_cell

from iclgd_helpers import storage
from iclgd_helpers.experiments.notebook_files import parameters_cell
from iclgd_helpers.pages.claims import Entry, load
from iclgd_helpers.pages.statements import STATEMENTS
from tools import claims_pages, page_costs
from tools.book_pages import ROOT

SET_UP = {  # ids of cells that prepare a page and sign it off, and what a reader opens
    "parameters": "Parameters",
    "imports": "Imports",
    "resolve": "Values in use",
    "stamp": "Versions",
    "provenance": "Provenance",
}
OPEN_OR_FOLDED = {"nbval-check-output", "hide-cell"}  # cells that draw and whose code is a check, or folded already
FINDING = ("finding-md", "finding")  # ids of cells with what the page found
SIGNED_OFF = (
    "## How this page was run\n\nParameters, imports, versions and the provenance of what is shown, in this order."
)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})(?!\d|\])")
NAMELESS_TABLE = re.compile(r"(<table[^>]*>)(?!\s*<caption)")
SLIDER = re.compile(r'<div id="frames-[^>]*>\s*<img src="[^"]*" alt="([^"]*)"')
DRAWS = re.compile(r"verdict_overview\.finding\(|\bfigures\.(?:show|show_vector|frames|axes)\(|\bdrawings\.")


def framed(notebook: nbformat.NotebookNode, path: Path, costs: dict[str, Any]) -> nbformat.NotebookNode:
    """
    `notebook` as the book shows it.

    Under the title come what the page found, wherever the notebook computes it, then the command that runs the page
    with another seed, what the page costs, and where its claims, proofs, errata and results are. What one learns is
    folded, and so is code that only draws; solutions open one by one. Tables get their captions and pictures their
    descriptions. What prepares a page and signs it off comes last.
    """
    title, *rest = notebook.cells
    found = [cell for cell in rest if cell.id in FINDING]
    for cell in rest:
        if cell.id == "goals":
            cell.source = folded("What this page teaches, and what it asks for", cell.source)
        if cell.id == "solutions":
            cell.source = solutions(cell.source)
        if cell.id == "references":
            cell.source = ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", cell.source)
        if cell.cell_type == "code" and DRAWS.search(cell.source) and not OPEN_OR_FOLDED & tags(cell):
            fold(cell, "hide-input", "Code of the figure" if "mystnb" in cell.metadata else "Code")
    set_up = [cell for cell in rest if cell.id in SET_UP or "parameters" in tags(cell)]
    for cell in set_up:
        fold(cell, "hide-cell", SET_UP.get(cell.id, "Parameters"))
    for cell in found:
        box(cell)
    for cell in rest:
        if cell.cell_type == "code":
            name_tables(cell)
            describe_pictures(cell)
    content = [cell for cell in rest if cell not in (*set_up, *found) and cell.id != "setup"]
    frame, end = new_markdown_cell(head(path, costs), id="frame"), new_markdown_cell(SIGNED_OFF, id="signed-off")
    notebook.cells = [title, *found, frame, *content, end, *set_up]
    return notebook


def tags(cell: nbformat.NotebookNode) -> set[str]:
    """The cell's tags."""
    return set(cell.metadata.get("tags", []))


def fold(cell: nbformat.NotebookNode, how: str, name: str) -> None:
    """Fold a cell's code, or all of it, under a name unless the cell has one."""
    cell.metadata["tags"] = sorted((tags(cell) - {"hide-input", "hide-cell"}) | {how})
    shown = cell.metadata.setdefault("mystnb", {})
    for prompt in ("code_prompt_show", "code_prompt_hide"):
        shown.setdefault(prompt, name)


def box(cell: nbformat.NotebookNode) -> None:
    """Show a cell of what the page found as a box: its text, or its output without the code."""
    if cell.cell_type == "markdown":
        fence = ":" * 8
        cell.source = f"{fence}{{div}} finding\n{cell.source}\n{fence}"
    else:
        cell.metadata["tags"] = sorted((tags(cell) - {"hide-input"}) | {"finding", "remove-input"})


def name_tables(cell: nbformat.NotebookNode) -> None:
    """Give tables the captions that the cell's metadata list under `captions`; the last one serves all that follow."""
    if not (captions := cell.metadata.get("captions")):
        return
    left = itertools.chain(captions, itertools.repeat(captions[-1]))
    for data in (output.data for output in cell.outputs if "text/html" in output.get("data", {})):
        data["text/html"] = NAMELESS_TABLE.sub(
            lambda start: f"{start[1]}<caption>{html.escape(next(left))}</caption>", data["text/html"]
        )


def describe_pictures(cell: nbformat.NotebookNode) -> None:
    """Put what a figure is, which the cell's metadata say, before what it shows, which was computed as it was drawn."""
    layout = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
    for output in cell.outputs:
        picture = output.get("metadata", {}).get("image/png", {})
        if slider := SLIDER.search(output.get("data", {}).get("text/html", "")):
            picture["alt"] = html.unescape(slider[1])  # whole: where no script runs, the picture stands for the slider
        elif "alt" in picture:
            picture["alt"] = f"{layout} {picture['alt']}".strip()


def folded(name: str, markdown: str) -> str:
    """A text that opens when it is asked for."""
    fence = ":" * 8
    return f"{fence}{{admonition}} {name}\n---\nclass: dropdown\n---\n{markdown}\n{fence}"


def solutions(markdown: str) -> str:
    """A fold for each solution, so that one does not show the next; they are numbered like the exercises (tested)."""
    stars = re.escape(markdown.partition("1")[0])
    parts = re.split(rf"(?m)^{stars}(\d+)\.{stars} ", markdown)[1:]
    return "\n\n".join(folded(f"Solution {n}", text.strip()) for n, text in zip(parts[::2], parts[1::2], strict=True))


def head(path: Path, costs: dict[str, Any]) -> str:
    """Markdown under the title: what the page costs, how it is run, what belongs to it."""
    return f"{run_line(path, costs)}\n\n{folded('This page in the book', belongings(path))}"


def run_line(path: Path, costs: dict[str, Any]) -> str:
    """What executing the page takes, and the command for it."""
    options = "-p seed 3" if "seed" in parameters_cell(path) else ""
    seconds = costs.get("seconds") or page_costs.reference(path)
    took = f"About {seconds:.0f} seconds on two cores" if seconds else "Not timed yet"
    took += f", {costs['peak_gb']:.1f} GB of memory" if "peak_gb" in costs else ""
    command = " ".join(filter(None, ["iclgd run", path.stem.partition("_")[0], options]))
    fence = ":" * 8
    said = f"{took}{'. With another seed' if options else ''}:"
    return f"{fence}{{div}} run-line\n{said}\n\n```bash\n{command}\n```\n{fence}"


def belongings(path: Path) -> str:
    """A list of what the book says about the page's claims: proofs, errata, verdicts, symbols."""
    claims = [entry for entry in load() if entry["notebook"] == path.stem]
    theorems = claims_pages.theorems((ROOT / "book" / "theorems.md").read_text(encoding="utf-8"))
    anchors = {claims_pages.anchor(entry["id"]) for entry in claims}
    proofs = [f"{{prf:ref}}`{label}`" for label, named in theorems.items() if anchors & set(named)]
    errata = sorted({number for entry in claims for number in claims_pages.errata(entry)})
    judged = statements_of(path)
    lines = {
        "Claims": ", ".join(map(claim_link, claims)),
        "Statements and proofs": ", ".join(proofs),
        "Errata": ", ".join(f"[{number}](#erratum-{number:02d})" for number in errata),
        "Verdicts": f"{', '.join(judged)} on {{doc}}`the page of results <../book/results>`" if judged else "",
        "Symbols and measures": "{doc}`../book/notation`, {doc}`../book/glossary`",
    }
    return "\n".join(f"- **{name}:** {content}" for name, content in lines.items() if content)


def claim_link(entry: Entry) -> str:
    """Link to a claim's entry in the ledger."""
    return f"[{entry['id']}](#{claims_pages.anchor(entry['id'])})"


def statements_of(path: Path) -> list[str]:
    """Statements of the reproduction whose verdicts the page shows."""
    source = "".join("".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"])
    named = set(re.findall(r"\"(R\d+b?)\"", source))
    return [statement.id for statement in STATEMENTS if statement.id in named]


def frame(target: Path, notebook: Path, costs: dict[str, Any], to: Path) -> None:
    """Write the executed copy `target` of `notebook`, framed, to `to`."""
    framed_copy = framed(nbformat.read(target, as_version=4), notebook, costs)
    storage.write_text(to, nbformat.writes(framed_copy) + "\n")
