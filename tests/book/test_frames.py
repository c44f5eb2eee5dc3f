"""What the build adds to a page: its run line and places; what it folds, and what stays in view."""

import re

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from iclgd_helpers.pages import claims
from tools import book_pages, claims_pages, page_frames

PAGE = next(path for path in book_pages.notebooks() if path.stem.startswith("03_"))
CHECK = "nbval-check-output"


def a_page():
    def code(name, source, *tags):
        return new_code_cell(source, id=name, metadata={"tags": list(tags)})

    cells = [new_markdown_cell("# T\n\nLevel: easy. Cost: measured, see the status page of the book.", id="title")]
    cells += [new_markdown_cell("**After this page**", id="goals"), code("setup", "colab")]
    cells += [code("parameters", "seed = 0", "parameters"), code("imports", "import x"), new_markdown_cell("## A")]
    cells += [code("draw", "figures.show(figure)"), code("check", "figures.show(f)", CHECK), code("sum", "1 + 1")]
    return new_notebook(cells=[*cells, code("provenance", "theory_run(p)", "hide-input")])


def test_a_page_is_framed():
    cells = page_frames.framed(a_page(), PAGE, {"seconds": 33.2, "peak_gb": 0.84}).cells
    assert [cell.id for cell in cells][:4] == ["title", "frame", "goals", cells[3].id] and cells[3].source == "## A"
    assert [cell.id for cell in cells][-4:] == ["signed-off", "parameters", "imports", "provenance"]
    assert "setup" not in [cell.id for cell in cells] and "ost" not in cells[0].source
    shown = {cell.id: page_frames.tags(cell) for cell in cells if cell.cell_type == "code"}
    assert all(shown[name] & {"hide-cell"} for name in ("parameters", "imports", "provenance"))
    assert shown["draw"] == {"hide-input"} and shown["check"] == {CHECK} and shown["sum"] == set()
    assert (
        "33 seconds" in cells[1].source and "0.8 GB" in cells[1].source and "iclgd run 03 -p seed 3" in cells[1].source
    )
    assert "dropdown" in cells[2].source and "After this page" in cells[2].source


@pytest.mark.parametrize("path", book_pages.notebooks(), ids=lambda path: path.stem)
def test_a_page_names_its_claims_and_no_others(path):
    said = page_frames.belongings(path)
    mine = {claims_pages.anchor(entry["id"]) for entry in claims.load() if entry["notebook"] == path.stem}
    assert set(re.findall(r"\(#(claim-[a-z0-9-]+)\)", said)) == mine
    assert ("**Verdicts:**" in said) == bool(page_frames.statements_of(path))


def test_the_cost_line_goes_and_what_follows_it_stays():
    for cost, left in {
        "CPU. *Measured cost:* see the [status page](../book/status.md); pages share it.": "CPU. Pages share it.",
        "Any. Cost: measured on every build, see the status page of the book. More.": "Any. More.",
        "*Cost:* seconds; the drawings took minutes.": "*Cost:* seconds; the drawings took minutes.",
    }.items():
        page = a_page()
        page.cells[0].source = cost
        assert page_frames.framed(page, PAGE, {}).cells[0].source == left


def test_every_page_says_how_it_is_run():
    for path in book_pages.notebooks():
        line = page_frames.run_line(path, {})
        assert f"iclgd run {path.stem[:2]}" in line and ("seed" in line) == (
            "seed" in page_frames.page_parameters(path)
        )
