"""What the build adds to a page: its run line and places; what it folds, and what stays in view."""

import json
import re
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from iclgd_helpers.experiments import notebook_files
from iclgd_helpers.experiments.notebook_files import parameters_cell
from iclgd_helpers.pages import claims, figures
from tools import book_pages, claims_pages, idea_drawing, page_frames

PAGE = next(path for path in book_pages.notebooks() if path.stem.startswith("03_"))
CHECK = "nbval-check-output"


def a_page():
    def code(name, source, *tags):
        return new_code_cell(source, id=name, metadata={"tags": list(tags)})

    cells = [new_markdown_cell("# T\n\nLevel: easy.", id="title")]
    cells += [new_markdown_cell("**After this page**", id="goals"), code("setup", "colab")]
    cells += [code("parameters", "seed = 0", "parameters"), code("imports", "import x"), new_markdown_cell("## A")]
    cells += [code("draw", "figures.show(figure)"), code("check", "figures.show(f)", CHECK), code("sum", "1 + 1")]
    cells += [code("long", "figures.show(f)", "hide-cell"), new_markdown_cell("*1.* Two.", id="solutions")]
    cells += [code("finding", "tables.share()", "hide-input"), code("provenance", "theory_run(p)", "hide-input")]
    return new_notebook(cells=cells)


@pytest.mark.parametrize("stars", ["", "*", "**"])
def test_one_solution_does_not_show_the_next(stars):
    first, second = f"{stars}1.{stars} A list:\n\n{' ' if stars else '   '}1. one", f"{stars}2.{stars} Two."
    folds = page_frames.solutions(f"{first}\n\n{second}").split("{admonition}")[1:]
    texts = [fold.split("---\n")[2] for fold in folds]
    assert len(texts) == 2 and "1. one" in texts[0] and "Two." not in texts[0] and "Two." in texts[1]


SOLVED = [path for path in book_pages.notebooks() if any(c.id == "solutions" for c in book_pages.read(path).cells)]


@pytest.mark.parametrize("path", SOLVED, ids=lambda path: path.stem)
def test_each_exercise_has_its_solution(path):
    cells = {cell.id: cell.source for cell in book_pages.read(path).cells}
    exercises = re.findall(r"^(\d+)\. ", cells["exercises"], flags=re.M)
    folds = re.findall(r"Solution (\d+)$", page_frames.solutions(cells["solutions"]), flags=re.M)
    assert folds and folds == exercises == [str(n + 1) for n in range(len(folds))]


def test_what_a_page_found_comes_first_wherever_it_was_computed():
    page = a_page()
    page.cells.insert(-2, new_markdown_cell("It falls.", id="finding-md"))
    cells = page_frames.framed(page, PAGE, {}).cells
    assert [cell.id for cell in cells][:4] == ["title", "finding-md", "finding", "frame"]
    assert "{div} finding\nIt falls." in cells[1].source
    assert page_frames.tags(cells[2]) == {"finding", "remove-input"}
    assert [cell.id for cell in cells].count("finding") == 1


@pytest.mark.parametrize("path", book_pages.notebooks(), ids=lambda path: path.stem)
def test_every_page_has_its_finding(path):
    ids = [cell["id"] for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    assert ids.count("finding") == 1


def test_a_page_is_framed():
    page = a_page()
    page.cells = [cell for cell in page.cells if cell.id != "finding"]
    cells = page_frames.framed(page, PAGE, {"seconds": 33.2, "peak_gb": 0.84}).cells
    assert [cell.id for cell in cells][:4] == ["title", "frame", "goals", cells[3].id] and cells[3].source == "## A"
    assert [cell.id for cell in cells][-4:] == ["signed-off", "parameters", "imports", "provenance"]
    assert "setup" not in [cell.id for cell in cells]
    shown = {cell.id: page_frames.tags(cell) for cell in cells if cell.cell_type == "code"}
    assert all(shown[name] & {"hide-cell"} for name in ("parameters", "imports", "provenance"))
    assert shown["draw"] == {"hide-input"} and shown["check"] == {CHECK} and shown["sum"] == set()
    assert shown["long"] == {"hide-cell"}
    (solutions,) = (cell for cell in cells if cell.id == "solutions")
    assert "Solution 1\n---\nclass: dropdown\n---\nTwo." in solutions.source
    assert (
        "33 seconds" in cells[1].source and "0.8 GB" in cells[1].source and "iclgd run 03 -p seed 3" in cells[1].source
    )
    assert "dropdown" in cells[2].source and "After this page" in cells[2].source


def with_output(data, **metadata):
    outputs = [new_output("display_data", data, metadata=metadata.pop("shown", {}))]
    return new_code_cell("t", id="t", metadata=metadata, outputs=outputs)


def framed_output(cell):
    page = a_page()
    page.cells.insert(6, cell)
    (found,) = (cell for cell in page_frames.framed(page, PAGE, {}).cells if cell.id == "t")
    return found.outputs[0]


def test_tables_get_the_captions_of_their_cell():
    tables = "<table border=1><tr/></table><table><caption>own</caption></table><table/><table/>"
    html = framed_output(with_output({"text/html": tables}, captions=["A <row>.", "B."])).data["text/html"]
    assert re.findall("<caption>(.*?)</caption>", html) == ["A &lt;row&gt;.", "own", "B.", "B."]
    assert framed_output(with_output({"text/html": tables})).data["text/html"] == tables


def test_a_picture_is_described_by_what_it_is_and_by_what_it_shows():
    described = {"mystnb": {"image": {"alt": "Two lines."}}}
    output = framed_output(with_output({"image/png": ""}, shown={"image/png": {"alt": "a 1."}}, **described))
    assert output.metadata["image/png"]["alt"] == "Two lines. a 1."
    output = framed_output(with_output({"image/png": ""}, **described))  # as stored without it: the page says its own
    assert "image/png" not in output.metadata


def test_the_picture_that_stands_for_a_slider_tells_what_it_shows(monkeypatch):
    """A reader of ePubs runs no script, and has the picture without the page's text."""
    shown = []
    monkeypatch.setattr(figures, "display", lambda data, metadata, raw: shown.append((data, metadata)))
    figure, ax = figures.axes()
    ax.plot([1, 2], [3, 4], label="a")
    figures.frames([figure], ["first & only"], "A line")
    ((data, metadata),) = shown
    output = framed_output(with_output(data | {"image/png": ""}, shown=metadata))
    told = output.metadata["image/png"]["alt"]
    assert told.startswith("A line. first & only. ") and "from 3 to 4" in told


@pytest.mark.parametrize("path", book_pages.notebooks(), ids=lambda path: path.stem)
def test_every_table_has_a_caption(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        shown = ["".join(o["data"].get("text/html", "")) for o in cell.get("outputs", ()) if "data" in o]
        n_tables = sum(len(page_frames.NAMELESS_TABLE.findall(text)) for text in shown)
        captions = cell["metadata"].get("captions", [])
        # One caption serves all tables of a loop; else there are as many as tables.
        assert len(captions) == n_tables or (n_tables > 1 == len(captions)), cell["id"]


@pytest.mark.parametrize("path", book_pages.notebooks(), ids=lambda path: path.stem)
def test_a_page_names_its_claims_and_no_others(path):
    said = page_frames.belongings(path)
    mine = {claims_pages.anchor(entry["id"]) for entry in claims.load() if entry["notebook"] == path.stem}
    assert set(re.findall(r"\(#(claim-[a-z0-9-]+)\)", said)) == mine
    assert ("**Verdicts:**" in said) == bool(page_frames.statements_of(path))


def test_no_two_pages_write_one_table():
    """A page that was refreshed later would take the other's place in `results/tables`."""
    written = {path: set(re.findall(r"Download (\w+)\.csv", path.read_text())) for path in book_pages.notebooks()}
    names = [name for found in written.values() for name in found]
    assert len(names) > 20 and len(names) == len(set(names)), sorted(n for n in names if names.count(n) > 1)


def test_every_page_says_how_it_is_run():
    """The command's number leads to the page, from whichever folder."""
    for path in book_pages.notebooks():
        line = page_frames.run_line(path, {})
        number = re.search(r"iclgd run (\d+)", line)[1]
        assert notebook_files.page(Path("anywhere", number)) == path
        assert ("seed" in line) == ("seed" in parameters_cell(path))
    assert notebook_files.page(Path("5")) == Path("5") and notebook_files.page(PAGE) == PAGE


def test_the_landing_pages_drawing_is_what_its_script_draws():
    figure = idea_drawing.drawn()
    assert idea_drawing.FILE.read_text(encoding="utf-8") == figures.svg(figure), "run `python -m tools.idea_drawing`"
    other = idea_drawing.drawn()
    other.axes[0].texts[0].set_text("another word")
    assert figures.svg(other) != figures.svg(idea_drawing.drawn())
