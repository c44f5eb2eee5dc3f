"""Links that the build makes: on a tiny book with one of each, in three builders and in the browser."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx
from sphinx.util.docutils import docutils_namespace

from iclgd_helpers.pages import verdict_overview
from iclgd_helpers.pages.statements import STATEMENTS
from tools import book_pages, browser, cross_links

CONFIG = yaml.safe_load((book_pages.ROOT / "_config.yml").read_text())["sphinx"]["config"]
LEDGER = [
    {"id": "T3.1", "status": "identity", "refutes": "", "statement": "One step is attention. " + "It is long. " * 30},
    {"id": "T3.1-svd", "status": "refuted here", "refutes": "All are needed.", "statement": "Fewer do."},
    {"id": "T9-absent", "status": "identity", "refutes": "", "statement": "It has no place on the page of claims."},
]
SOURCES = {
    "index.md": "# Book\n\n```{toctree}\n" + "\n".join(
        ["book/claims", "book/glossary", "book/results", "book/references", "notebooks/04_softmax", "notebooks/50_both"]
    ) + "\n```\n",
    "book/claims.md": "# Claims\n\n(claim-t3-1)=\n**T3.1** (identity). The step of T3.1.\n\n- See T3.1-svd.\n\n"
    "(claim-t3-1-svd)=\n**T3.1-svd** (refuted here). Unlike T3.1.\n",
    "book/glossary.md": """# Glossary
:::{glossary}
linear attention
    Attention in a *prompt*, without $\\phi$ or $\\eta_{\\mathrm{crit}}$. It is linear attention.

prompt
    All tokens.

identity
    Holds for all weights.

base
    Where a step starts.

run
    One model and one task.
:::
""",
    "book/results.md": "# Results\n\nOf R5 first.\n\n"
    '<a id="statement-R5"></a> <a id="statement-R18b"></a>\n',
    "book/references.md": "# References\n\n{cite:t}`natan` is [B].\n\n```{bibliography}\n```\n",
    "refs.bib": "@misc{natan, author = {Natan, Tomer}, title = {{On [B] and T3.1}}, year = {2023}}",
    "notebooks/04_softmax.md": """# 04 Softmax, T3.1

[Open in Colab](https://example.org)

*Level:* easy.

**Claim.** The *first* sentence. The second.

| T3.1 | head |
|---|---|
| T3.1 | a prompt |

:::{admonition} On T3.1
:class: dropdown
A prompt, by T3.1.
:::

Made: T3.1, T3.1-svd. Also `T3.1-svd` and **[B]**'s equation; see page 50 and pages 04, 50
and 77, after chapter 50's end; R5, R18b. The base rate of linear
attention. Linear attention again, and prompts; identities; the prompt's run; a run.

Left: T3.1-other, T3.1.2, UT3.1, R99, [D], T9-absent, page 99, page 500, page 5, prompt-free, Page. `T3.1 and more`
and $T3.1$ and [T3.1](https://example.org) and {doc}`T3.1 </book/results>`.

```python
T3.1  # [B], page 50
```

$$ T3.1 $$

:::{figure} picture.png
A caption of T3.1.

A legend of T3.1.
:::

## By [B]

## References

- **[B]** Natan, T3.1, page 50.
""",
}  # fmt: skip
PICTURE = book_pages.ROOT / "book" / "_static" / "page.png"


def notebook() -> str:
    """A notebook that names a claim in its text and in what its code prints."""
    printed = nbformat.v4.new_output("stream", text="T3.1 PASS\n")
    shown = nbformat.v4.new_output("display_data", data={"text/html": "<p>T3.1 in HTML</p>", "text/plain": "T3.1"})
    code = nbformat.v4.new_code_cell("print('T3.1')", outputs=[printed, shown], execution_count=1)
    text = nbformat.v4.new_markdown_cell("# 50 Both\n\n*A summary.*\n\nSee page 04, page 50 and T3.1 for a prompt.")
    python = {"language_info": {"name": "python"}}
    return str(nbformat.writes(nbformat.v4.new_notebook(cells=[text, code], metadata=python)))


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Iterator[Callable[..., Path]]:
    """A function that writes the tiny book with a builder, strictly, and returns its folder."""
    source = tmp_path_factory.mktemp("tiny")
    for name, text in (SOURCES | {"notebooks/50_both.ipynb": notebook()}).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    (source / "notebooks" / "picture.png").write_bytes(PICTURE.read_bytes())
    (source / "_static").mkdir()
    for name in ("book.css", "book.js"):
        (source / "_static" / name).write_bytes((PICTURE.parent / name).read_bytes())

    def built(builder: str, **config: object) -> Path:
        out = tmp_path_factory.mktemp(builder)
        config = {
            "extensions": ["myst_nb", "sphinxcontrib.bibtex", "tools.cross_links"],
            "nb_execution_mode": "off",
            "myst_enable_extensions": ["colon_fence", "dollarmath"],
            "bibtex_bibfiles": ["refs.bib"],
            "html_theme": "sphinx_book_theme",
            "html_static_path": ["_static"],
            "html_css_files": ["book.css"],
            "html_js_files": ["book.js"],
            "project": "Tiny",
            "version": "1",
            "copyright": "2026",
            "epub_show_urls": "no",
            "suppress_warnings": CONFIG["suppress_warnings"],
            "cross_links_papers": {"B": "natan"},
            "cross_links_statements": "book/results",
            "cross_links_forms": {"run": ["a run"]},
            "cross_links_pages": {"base": "book/"},
        } | config
        strict = {"status": None, "warningiserror": True, "keep_going": True}
        with docutils_namespace():
            app = Sphinx(source, None, out, out / ".doctrees", builder, config, **strict)
            app.build()
        assert app.statuscode == 0
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_links, "load", lambda: LEDGER)
        yield built


@pytest.fixture(scope="module")
def html(build) -> Path:
    return build("html")


def article(file: Path) -> Tag:
    """What is between the menus of a page."""
    return BeautifulSoup(file.read_text(), "html.parser").select_one("article.bd-article")


def made(element: Tag) -> list[tuple[str, str]]:
    """Text and address of the links that the build made."""
    return [(" ".join(link.text.split()), link["href"]) for link in element.select("a.cross")]


def paragraph(page: Tag, start: str) -> Tag:
    return next(p for p in page.select("p") if p.text.startswith(start))


CLAIM, PAPER, TERM, STATEMENT = (f"../book/{name}.html#" for name in ("claims", "references", "glossary", "results"))
PAGE = "50_both.html"


def test_names_become_links(html):
    links = made(paragraph(article(html / "notebooks" / "04_softmax.html"), "Made"))
    (paper,) = (address for text, address in links if text == "[B]")
    assert re.fullmatch(re.escape(PAPER) + r"id\d+", paper)
    assert sorted(links) == sorted([
        ("T3.1", CLAIM + "claim-t3-1"), ("T3.1-svd", CLAIM + "claim-t3-1-svd"), ("T3.1-svd", CLAIM + "claim-t3-1-svd"),
        ("[B]", paper), ("page 50", PAGE), ("50", PAGE), ("chapter 50", PAGE),
        ("R5", STATEMENT + "statement-R5"), ("R18b", STATEMENT + "statement-R18b"),
        ("linear attention", TERM + "term-linear-attention"), ("prompts", TERM + "term-prompt"),
        ("identities", TERM + "term-identity"), ("a run", TERM + "term-run"),
    ])  # fmt: skip


def test_code_that_is_a_name_becomes_a_link_with_code(html):
    (code,) = article(html / "notebooks" / "04_softmax.html").select("a.cross > code")
    assert code.text == "T3.1-svd"


def test_notebooks_are_linked_in_their_text_alone(html):
    page = article(html / "notebooks" / "50_both.html")
    assert [text for text, _ in made(page)] == ["page 04", "T3.1", "prompt"]
    assert page.text.count("T3.1") == 4, "text, code, and what it prints and shows"


def test_nothing_else_becomes_a_link(html):
    page = article(html / "notebooks" / "04_softmax.html")
    assert made(paragraph(page, "Left")) == []
    for where in ("h1", "h2", "th", "figcaption", ".admonition-title", "pre", ".math", "a", "#references li"):
        places = page.select(where)
        assert any("T3.1" in place.text or "[B]" in place.text for place in places), where
        assert not any(place.select("a.cross") for place in places), where
    assert made(page.select_one("td")) == [("T3.1", CLAIM + "claim-t3-1")], "the control: a table's body"
    (folded,) = page.select(".admonition p:not(.admonition-title)")
    assert [text for text, _ in made(folded)] == ["T3.1"], "a term's first place is not in what is folded"


def test_entries_do_not_link_to_themselves(html):
    claims = [("identity", "glossary.html#term-identity"), ("T3.1-svd", "#claim-t3-1-svd"), ("T3.1", "#claim-t3-1")]
    assert made(article(html / "book" / "claims.html")) == claims
    assert made(article(html / "book" / "glossary.html")) == [("prompt", "#term-prompt")]
    assert [text for text, _ in made(article(html / "book" / "results.html"))] == ["R5"]
    assert [text for text, _ in made(article(html / "book" / "references.html"))] == ["[B]"], "not in the list"


def test_previews_are_short_plain_texts(html):
    page = article(html / "notebooks" / "04_softmax.html")
    said = {link.text: link["title"] for link in page.select("a.cross")}
    assert said["T3.1-svd"] == "Claim (refuted here): “All are needed.” Correct: Fewer do."
    assert said["T3.1"].startswith("Claim (identity): One step is attention. It is long.") and said["T3.1"][-1] == "…"
    assert said["page 50"] == "50 Both. A summary."
    assert said["linear\nattention"] == "Attention in a prompt, without φ or η_crit. It is linear attention."
    assert "Natan" in said["[B]"] and "2023" in said["[B]"]
    assert said["R5"].startswith("R5 (paper): ")
    (back,) = article(html / "notebooks" / "50_both.html").select("a.cross-page")
    assert back["title"] == "04 Softmax, T3.1. The first sentence."
    assert all(0 < len(text) <= cross_links.LONGEST for text in said.values())


def test_without_places_names_stay_text(build):
    nowhere = {"cross_links_papers": {}, "cross_links_statements": "book/elsewhere"}
    folder = build("html", **nowhere, cross_links_pages={"prompt": "book/"}, cross_links_forms={"run": []})
    texts = {text for text, _ in made(article(folder / "notebooks" / "04_softmax.html"))}
    assert not texts & {"[B]", "R5", "prompts", "a run"} and texts >= {"T3.1", "page 50", "base"}


@pytest.mark.parametrize("builder", ["singlehtml", "epub"])
def test_other_builders_make_the_same_links(build, html, builder: str):
    def shown(folder: Path, ending: str) -> list[tuple[str, str]]:
        pages = [BeautifulSoup(file.read_text(), "html.parser") for file in sorted(folder.rglob(f"*.{ending}"))]
        return sorted((link.text, link["title"]) for page in pages for link in page.select("a.cross"))

    folder = build(builder)
    ending = "xhtml" if builder == "epub" else "html"
    assert shown(folder, ending) == shown(html, "html")
    for file in folder.rglob(f"*.{ending}"):
        for link in BeautifulSoup(file.read_text(), "html.parser").select("a.cross"):
            path, _, place = link["href"].partition("#")
            target = (file.parent / path if path else file).read_text()
            assert not place or f'id="{place}"' in target, link


def test_the_configured_names_exist():
    """A key that has gone would make no error, and no links."""
    heads = set(re.findall(r"^(?! |:)(.+)\n    ", (book_pages.ROOT / "book" / "glossary.md").read_text(), flags=re.M))
    assert {*CONFIG["cross_links_forms"], *CONFIG["cross_links_pages"]} <= heads and "learn" not in heads
    toc = re.findall(r"(?:file|root): (\S+)", (book_pages.ROOT / "_toc.yml").read_text())
    for pattern in CONFIG["cross_links_pages"].values():
        assert any(re.match(pattern, name) for name in toc), pattern
    entries = (book_pages.ROOT / "book" / "references.bib").read_text()
    assert all(f"{{{key}," in entries for key in CONFIG["cross_links_papers"].values())
    assert CONFIG["cross_links_statements"] in toc
    rows = BeautifulSoup(verdict_overview.table(verdict_overview.stored()).data, "html.parser").select("tr[id]")
    assert [row["id"] for row in rows] == [verdict_overview.place(said.id) for said in STATEMENTS]
    chosen = verdict_overview.table(verdict_overview.stored(), "chosen").data
    assert not BeautifulSoup(chosen, "html.parser").select("[id]")  # on the same page


# ---------------------------------------------------------------------------------------------------- in the browser
STATE = """(() => {
  const box = document.querySelector("#preview"), link = document.querySelector("a.cross[aria-describedby=preview]");
  return [box?.checkVisibility() ? box.textContent : "", Boolean(link && !link.title)];
})()"""
FIRST = "document.querySelector('a.cross-page')"


def point(tab: browser.Page, selector: str) -> None:
    """Move the mouse over the middle of an element, and wait until what was there before has gone."""
    place = f"document.querySelector({selector!r}).getBoundingClientRect()"
    x, y = tab.run(f"(box => [box.x + box.width / 2, box.y + box.height / 2])({place})")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    tab.settle()


SUMMARY = "04 Softmax, T3.1. The first sentence."


def test_preview_follows_mouse_and_keyboard_and_escape(html, tab):
    tab.open((html / "notebooks" / "50_both.html").as_uri())
    assert tab.run(STATE) == ["", False]
    point(tab, "a.cross-page")
    assert tab.run(STATE) == [SUMMARY, True]
    point(tab, "#preview")
    assert tab.run(STATE) == [SUMMARY, True], "one can point at it"
    point(tab, "h1")
    assert tab.run(STATE) == ["", False] and tab.run(f"{FIRST}.title") == SUMMARY
    tab.run(f"Object.assign({FIRST}.parentElement, {{tabIndex: -1}}).focus()")
    tab.key("Tab")
    assert tab.run(STATE) == [SUMMARY, True]
    tab.key("Escape")
    assert tab.run(STATE) == ["", True], "gone from sight, still said"
    tab.key("Tab")
    text, described = tab.run(STATE)
    assert text.startswith("Claim (identity)") and described


def test_preview_leaves_phones_alone(html, tab):
    tab.open((html / "notebooks" / "50_both.html").as_uri(), width=375)
    tab.run(f"{FIRST}.addEventListener('click', event => event.preventDefault())")
    x, y = tab.run(f"(box => [box.x + 5, box.y + 5])({FIRST}.getBoundingClientRect())")
    tab.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
    tab.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    tab.settle()
    assert tab.run(STATE) == ["", False]


CONTRAST = """(() => {
  const style = getComputedStyle(document.querySelector("#preview"));
  const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).map(part => (part / 255) ** 2.2);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05; };
  const [text, ground] = [light(style.color), light(style.backgroundColor)];
  return Math.max(text, ground) / Math.min(text, ground);
})()"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_preview_can_be_read(html, tab, theme: str):
    tab.open((html / "notebooks" / "50_both.html").as_uri(), theme=theme)
    point(tab, "a.cross-page")
    assert tab.run(CONTRAST) > 7
    assert tab.run("getComputedStyle(document.querySelector('a.cross-term')).textDecorationStyle") == "dotted"
    tab.run("document.querySelector('#preview').style.background = '#888'")
    assert tab.run(CONTRAST) < 7, "the control"
