"""
Parts of every page, in a small book of the same settings: tables, formulas, headings, code, icons, weight, buttons.

The pages of the book itself are tested in `test_book.py`.
"""

import gzip
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from bs4 import BeautifulSoup

from iclgd_helpers.pages import tables
from tools import api_page, browser, build_book, icons, print_book
from tools.book_pages import ROOT

PLAIN = """# A page without a formula

Some text.

```
iclgd run 50 -p seed 3
```

{doc}`how_to_use`, {doc}`api`, {doc}`formulas`
"""
FORMULAS = r"""# Formulas

## A section

### A part

Of `code` ($x$), then $W_0 + \sum_{i=1}^{T} e_i \xi_i^\top$, and for a $k$-step; with $\lVert W \rVert$: and
$z$ after a new line, last $y$.

| name | number | both |
|---|---|---|
| one | 1.5 | a |
| two | 20 | 7 |
"""
N_ROWS = 80
INDEX = pd.MultiIndex.from_product([["first", "second"], range(N_ROWS // 2)], names=["part", "row"])
LONG = pd.DataFrame({f"a column {i}": [i + 0.25 * n for n in range(N_ROWS)] for i in range(30)}, index=INDEX)
NARROW = LONG.iloc[:, :2].assign(said=["some words"] * N_ROWS, found=["0.712 [0.660, 0.764]"] * (N_ROWS - 1) + ["–"])
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
KERNEL |= {"language_info": {"name": "python"}}
PAGES = {"index": PLAIN, "how_to_use": PLAIN.replace("A page", "A second page"), "formulas": FORMULAS}


def shown(text: str) -> nbformat.NotebookNode:
    output = nbformat.v4.new_output("display_data", data={"text/html": text, "text/plain": "a table"})
    return nbformat.v4.new_code_cell("table", outputs=[output], execution_count=1)


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book with the real settings, styles and page of the helpers, built strictly."""
    build = tmp_path_factory.mktemp("small") / "_build"
    source = build / "source"
    for folder in ("_static", "_templates"):
        shutil.copytree(ROOT / "book" / folder, source / "book" / folder)
    for file in ("_config.yml", "book/references.bib", "book/api.md"):
        shutil.copy(ROOT / file, source / file)
    for name, text in PAGES.items():
        (source / "book" / f"{name}.md").write_text(text)
    (source / "book" / "_generated").mkdir()
    (source / "book" / "_generated" / "api.md").write_text(api_page.api_page())
    title = nbformat.v4.new_markdown_cell("# 01 Tables\n\n## Wide\n\nText.")
    of_helpers = [shown(tables.table(frame, caption="What it holds").data) for frame in (LONG, NARROW)]
    with pd.option_context("display.max_rows", None):
        others = [NARROW._repr_html_(), NARROW.style.to_html()]
    cells = [title, *of_helpers, *map(shown, others)]
    (source / "notebooks").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), source / "notebooks" / "01_tables.ipynb")
    files = [{"file": name} for name in ("book/how_to_use", "book/formulas", "book/api", "notebooks/01_tables")]
    toc = {"format": "jb-book", "root": "book/index", "parts": [{"caption": "All", "chapters": files}]}
    (source / "_toc.yml").write_text(yaml.safe_dump(toc))
    return build_book.render(build)


def test_the_epub_has_its_title_and_formulas_and_no_buttons(html: Path, tmp_path: Path) -> None:
    """Built strictly with the real settings: the theme would fail on the buttons that launch a notebook."""
    shutil.copytree(html.parent / "source", tmp_path / "_build" / "source")
    (book,) = build_book.render(tmp_path / "_build", "epub").glob("*.epub")
    with zipfile.ZipFile(book) as packed:
        about, formulas = (packed.read(name).decode() for name in ("content.opf", "book/formulas.xhtml"))
    assert f"<dc:title>{yaml.safe_load((ROOT / '_config.yml').read_text())['title']}</dc:title>" in about
    assert formulas.count("<math") >= 5 and "\\(" not in formulas
    assert print_book.first_fault(book) == ""
    held = dict(re.findall(r'href="book/(\w+)\.xhtml"[^>]*?(properties="[a-z ]+")?\s*/?>', about))
    assert (held["formulas"], held["index"]) == ('properties="mathml"', "")


@pytest.fixture(scope="session")
def pages(html: Path) -> dict[str, BeautifulSoup]:
    files = [path for path in html.rglob("*.html") if path != html / "index.html"]  # that one only leads on
    return {path.stem: BeautifulSoup(path.read_text(), "html.parser") for path in files}


@pytest.fixture
def show(html: Path, tab: browser.Page) -> Iterator[Callable[..., None]]:
    """A function that opens a page from its file, without a style or script that it is told to block."""

    def opened(page: str, blocked: str = "", **options: object) -> None:
        tab.call("Network.setBlockedURLs", urls=[f"*{blocked}*"] if blocked else [])
        tab.open((html / page).as_uri(), **options)

    yield opened
    tab.call("Network.setBlockedURLs", urls=[])


# ------------------------------------------------------------------------------------------------------------- tables
def faults(text: str) -> list[str]:
    """Header cells of a table that are empty, or do not say what they head."""
    heads = BeautifulSoup(text, "html.parser").select("th")
    kinds = {"col", "row", "colgroup", "rowgroup"}
    return [str(cell) for cell in heads if not cell.text.strip() or cell.get("scope") not in kinds]


def test_tables_of_the_helpers_say_what_heads_what() -> None:
    two = pd.MultiIndex.from_tuples([("accuracy", "raw"), ("accuracy", "calibrated"), ("index", "raw")])
    named = two.set_names(["quantity", "reading"])
    for columns in (two, named):
        frame = pd.DataFrame([[1.0, 2.0, 3.0]] * 4, columns=columns, index=INDEX[:4])
        text = tables.table_html(frame, "C")
        page = BeautifulSoup(text, "html.parser")
        assert faults(text) == [] and faults(frame.to_html())
        scopes = [cell["scope"] for cell in page.select("th")]
        assert [scopes.count(kind) for kind in ("colgroup", "rowgroup", "row")] == [1, 1, 4]
        assert page.select_one("th[scope=colgroup]")["colspan"] == "2"  # type: ignore[index]
        assert page.select_one("th[scope=rowgroup]")["rowspan"] == "4"  # type: ignore[index]
    assert [cell.text for cell in BeautifulSoup(tables.table_html(NARROW), "html.parser").select("thead th")] == [
        *("part", "row", *NARROW.columns)
    ]
    assert "<th" not in tables.table_html(NARROW, index=False).partition("<tbody>")[2]


TABLES = """(() => [...document.querySelectorAll(".bd-article table")].map(table => {
  const text = kind => [...table.querySelectorAll(kind)].map(cell => cell.textContent.trim());
  const last = [...table.tHead.rows].at(-1), left = cell => getComputedStyle(cell).textAlign == "left";
  const body = [...table.tBodies[0].rows[0].cells];
  return {
    empty: [...table.querySelectorAll("th")].filter(cell => !cell.textContent.trim() || !cell.scope).length,
    heads: [...last.cells].map(cell => cell.textContent.trim()), lines: table.tHead.rows.length,
    right: [...last.cells].filter(cell => !left(cell)).map(cell => cell.textContent.trim()),
    body: body.map(cell => left(cell) ? "left" : "right"),
    figures: getComputedStyle(table).fontVariantNumeric, border: getComputedStyle(table).borderTopWidth,
  };
}))()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_tables_look_alike(tab: browser.Page, show: Callable[..., None], theme: str) -> None:
    """Those of the helpers, of pandas (a frame, a styled one) and of Markdown."""
    show("notebooks/01_tables.html", theme=theme)
    wide, *narrow = tab.run(TABLES)
    show("book/formulas.html", theme=theme)
    (markdown,) = tab.run(TABLES)
    for one in narrow:
        assert one["heads"] == ["part", "row", *NARROW.columns] and one["lines"] == 1 and one["empty"] == 0
        assert one["right"] == ["a column 0", "a column 1", "found"]
        assert one["body"] == ["left", "left", "right", "right", "left", "right"]
    assert markdown["right"] == ["number"] and markdown["body"] == ["left", "right", "left"]
    assert wide["empty"] == 0 and len(narrow) == 3
    for one in (wide, *narrow, markdown):
        assert (one["figures"], one["border"]) == ("tabular-nums", "0px")
    show("notebooks/01_tables.html", blocked="book.js")
    assert tab.run(TABLES)[-1]["right"] != narrow[-1]["right"] and tab.run(TABLES)[-1]["empty"], "the control"


HEAD = """(which => { const head = document.querySelectorAll(".bd-article thead")[which].getBoundingClientRect();
  const seen = document.elementFromPoint(head.left + 20, head.top + head.height / 2);
  return [Math.round(head.top), Boolean(seen && seen.closest("thead"))]; })"""
SCROLL = """(() => { const box = document.querySelector(".bd-article .scrolls:has(> table)");
  box.scrollIntoView(); box.scrollTo(400, 900);
  return new Promise(done => setTimeout(() => {
    const outer = box.getBoundingClientRect(), rows = box.querySelectorAll("tbody tr");
    const name = rows[40].cells[0].getBoundingClientRect(), head = box.querySelector("thead").getBoundingClientRect();
    done({tab: box.tabIndex, role: box.getAttribute("role"), name: box.ariaLabel,
      shadow: getComputedStyle(box).backgroundImage, left: name.left - outer.left, top: head.top - outer.top,
      high: outer.height <= innerHeight, scrolled: [box.scrollLeft, box.scrollTop]});
  }, 300)); })()"""


def test_heads_and_names_of_rows_stay_in_view(tab: browser.Page, show: Callable[..., None]) -> None:
    show("notebooks/01_tables.html")
    box = tab.run(SCROLL)
    assert box["scrolled"] == [400, 900] and box["high"]
    assert abs(box["left"]) < 2 and abs(box["top"]) < 2
    assert box["tab"] == 0 and box["role"] == "region" and "What it holds" in box["name"]
    assert box["shadow"].count("linear-gradient") == 4
    for which in (1, 2, 3):  # they fit, so that their heads stay in the window
        tab.run(f"document.querySelectorAll('.bd-article tbody')[{which}].rows[50].scrollIntoView({{block: 'center'}})")
        tab.settle()
        assert tab.run(f"{HEAD}({which})") == [56, True]
    show("notebooks/01_tables.html", blocked="book.css")
    tab.run("document.querySelectorAll('.bd-article tbody')[1].rows[50].scrollIntoView()")
    assert tab.run(f"{HEAD}(1)")[0] < 0, "the control"


# ------------------------------------------------------------------------------------------- formulas, headings, code
BROKEN = """(() => [...document.querySelectorAll(".bd-article .together")].flatMap(group => {
  const formula = group.querySelector(".math").getBoundingClientRect(), middle = (formula.top + formula.bottom) / 2;
  return [...group.childNodes].filter(node => node.nodeType == Node.TEXT_NODE && node.data).filter(node => {
    const range = document.createRange();
    range.selectNode(node);
    const box = range.getBoundingClientRect();
    return box.bottom < middle || box.top > middle;
  }).map(node => node.data);
}))()"""


def test_no_line_begins_with_the_comma_behind_a_formula(tab: browser.Page, show: Callable[..., None]) -> None:
    show("book/formulas.html")

    def broken() -> set[str]:
        found = set()
        for width in range(320, 700, 4):
            tab.window(width)
            found |= set(tab.run(BROKEN))
        return found

    assert tab.run("document.querySelectorAll('.together').length") == 5 and broken() == set()
    tab.run("document.querySelectorAll('.together').forEach(group => group.style.whiteSpace = 'normal')")
    assert broken(), "the control"


def test_nothing_is_lost_beside_a_formula(pages: dict[str, BeautifulSoup]) -> None:
    said = " ".join(pages["formulas"].select_one(".bd-article section section p").text.split())  # type: ignore[union-attr]
    assert re.sub(r"\\\(.*?\\\)", "F", said) == (
        "Of code (F), then F, and for a F-step; with F: and F after a new line, last F."
    )


def test_a_heading_is_no_heavier_than_the_one_above_it(tab: browser.Page, show: Callable[..., None]) -> None:
    look = "(({fontWeight, fontSize}) => [+fontWeight, parseFloat(fontSize)])"
    of = f"['h1', 'h2', 'h3'].map(kind => {look}(getComputedStyle(document.querySelector('.bd-article ' + kind))))"
    show("book/formulas.html")
    found = tab.run(of)
    assert all(above[0] >= below[0] and above[1] > below[1] for above, below in zip(found, found[1:], strict=False))
    show("book/formulas.html", blocked="book.css")
    assert tab.run(of)[2][0] > tab.run(of)[1][0], "the control"


def test_code_without_a_language_is_for_the_shell(pages: dict[str, BeautifulSoup]) -> None:
    assert pages["index"].select(".highlight-bash") and not pages["index"].select(".highlight-default")


# ------------------------------------------------------------------------------------------------------------- weight
def loaded(tab: browser.Page, server: browser.Server, html: Path, page: str) -> dict[str, int]:
    """What a page loads, itself included, and how large each file is when compressed."""
    tab.open(f"{server.address}/{page}")
    names = tab.run("performance.getEntriesByType('resource').map(entry => entry.name)")
    files = {page, *(re.sub(r"\?.*", "", name.removeprefix(server.address + "/")) for name in names)}
    return {name: len(gzip.compress((html / name).read_bytes(), 6)) for name in files if (html / name).is_file()}


def test_a_page_without_a_formula_is_light(html: Path, tab: browser.Page) -> None:
    with browser.Server(html) as server:
        plain, formulas = (loaded(tab, server, html, f"book/{name}.html") for name in ("index", "formulas"))
    assert sum(plain.values()) < 250_000, plain
    assert not [name for name in plain if re.search("mathjax|fontawesome|searchindex", name)]
    assert [name for name in formulas if "tex-chtml" in name], "the control"
    theme = sum(len(gzip.compress(text.encode(), 6)) for text in [icons.theme_icons()])
    assert sum(plain.values()) + theme > 600_000, "the control: the icons of the theme"


def test_the_page_of_the_helpers_loads_no_mathematics(pages: dict[str, BeautifulSoup]) -> None:
    scripts = [script.get("src", "") for script in pages["api"].select("script")]
    assert not [name for name in scripts if "mathjax" in name] and len(pages["api"].select("dl")) > 500
    outside = {link["href"].partition("/blob/")[0] for link in pages["api"].select(".bd-article a[href^=http]")}
    assert outside == {yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]}


def undrawn(page: BeautifulSoup, style: str) -> set[str]:
    """Icons of a page that the style sheet does not have."""
    sizes = {"fa-solid", "fa-lg", "fa-brands", "fa-regular"}
    used = {name for one in page.select("[class*=fa-]") for name in one["class"] if name.startswith("fa-")} - sizes
    return {name for name in used if f".{name} {{" not in style}


def test_every_icon_is_drawn(pages: dict[str, BeautifulSoup]) -> None:
    style = icons.FILE.read_text()
    assert style == icons.style(), "run `python -m tools.icons`"
    for name, page in pages.items():
        assert undrawn(page, style) == set(), f"{name}: add them to `NAMES` of tools/icons.py"
    assert undrawn(BeautifulSoup("<i class='fas fa-cat fa-sun'>", "html.parser"), style) == {"fa-cat"}, "the control"


def test_icons_show(tab: browser.Page, show: Callable[..., None]) -> None:
    of = """(() => { const s = getComputedStyle(document.querySelector(".bd-header-article .fa-bars"), "::before");
      return [parseFloat(s.width), parseFloat(s.height), s.maskImage.startsWith("url(")]; })()"""
    for theme in ("light", "dark"):
        show("book/index.html", theme=theme)
        width, height, drawn = tab.run(of)
        assert width > 12 and height > 12 and drawn
    show("book/index.html", blocked="icons.css")
    assert not tab.run(of)[2], "the control"


# ------------------------------------------------------------------------------------------ search, indices, buttons
def test_search_finds_a_page(html: Path, tab: browser.Page) -> None:
    with browser.Server(html) as server:
        tab.open(f"{server.address}/search.html?q=formula")
        tab.settle()
        assert "Formulas" in tab.run("document.querySelector('#search-results').textContent")


def test_there_is_no_index_of_nothing(html: Path, pages: dict[str, BeautifulSoup]) -> None:
    assert not [name for name in pages if "genindex" in name or "modindex" in name or name == "prf-prf"]
    assert not [name for name, page in pages.items() if page.select("link[rel=index]")]


def test_a_notebook_opens_where_the_settings_say(pages: dict[str, BeautifulSoup]) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    links = json.dumps([link["href"] for link in pages["01_tables"].select(".article-header-buttons a")])
    for start in (config["launch_buttons"]["colab_url"], config["launch_buttons"]["binderhub_url"]):
        assert f"{start}/" in links
    assert config["repository"]["url"] in links and config["repository"]["branch"] in links
