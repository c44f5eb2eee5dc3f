"""
A Sphinx extension: the ePub. Its formulas are MathML and its pages XHTML, since its readers run no script.

Sphinx writes pages and lists; what outputs of notebooks hold is HTML, which a reader of XHTML refuses, and some entries
of the lists are wrong for a book whose first page lies in a folder.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup
from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.builders.epub3 import Epub3Builder

PICTURES = (".svg", ".png")  # of prose; the theme's are small
STYLES = ("pygments.css", "reading.css")  # the second is ours
PAGE = re.compile(r'(<item id="epub-[^>]*href="([^"]+\.xhtml)" media-type="[^"]*")')
DOCTYPE = re.compile(r"<!DOCTYPE[^>]*>")
LETTER = re.compile(r"\\(math(?:bb|cal|bf))\s*([A-Za-z])(?![A-Za-z])")
ROWS = {"aligned": "align*", "gathered": "matrix"}
NO_SHAPE = re.compile(r"<path (?![^>]*\bd=)")  # matplotlib's of a space


def mathml(formula: str, display: str) -> str:
    """
    A formula's MathML, set `inline` or as a `block`.

    The converter knows rows under other names, and letters of another kind where they stand in braces.
    """
    known = re.sub(r"\{(aligned|gathered)\}", lambda rows: f"{{{ROWS[rows[1]]}}}", formula)
    return str(convert(LETTER.sub(r"\\\1{\2}", known), display=display))


def inline(translator: Any, node: nodes.Element) -> None:
    """A formula in a line."""
    translator.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def display(translator: Any, node: nodes.Element) -> None:
    """A formula set apart."""
    translator.body.append(translator.starttag(node, "div", CLASS="math"))
    translator.body.append(mathml(node.astext(), "block"))
    translator.body.append("</div>")
    raise nodes.SkipNode


class Builder(Epub3Builder):
    """Sphinx's own, with lists that name what is there."""

    def get_toc(self) -> None:
        """Addresses of the table of contents as the list of files writes them."""
        super().get_toc()
        for entry in self.refnodes:
            entry["refuri"] = posixpath.normpath(entry["refuri"])

    def build_content(self) -> None:
        """
        The list of files: no scripts and letters of the website's, and which pages hold formulas or drawings.

        An ePub may not name files elsewhere, as the first line of matplotlib's drawings does.
        """
        folder = Path(self.outdir)
        for file in folder.joinpath("_static").rglob("*"):
            if file.is_file() and file.name not in STYLES and file.suffix not in PICTURES:
                file.unlink()
        for file in folder.rglob("*.svg"):
            drawn = file.read_text(encoding="utf-8")
            file.write_text(NO_SHAPE.sub('<path d="" ', DOCTYPE.sub("", drawn)), encoding="utf-8")
        super().build_content()
        listed = folder / "content.opf"
        listed.write_text(PAGE.sub(self._with_properties, listed.read_text(encoding="utf-8")), encoding="utf-8")

    def toc_metadata(self, level: int, navpoints: list[Any]) -> dict[str, Any]:
        """Of the older table of contents, which names the book as the list of files does."""
        metadata: dict[str, Any] = super().toc_metadata(level, navpoints)
        return metadata | {"uid": self.config.epub_identifier}

    def _with_properties(self, entry: re.Match[str]) -> str:
        """The entry of a page, with what its readers have to be able to show."""
        page = Path(self.outdir, entry[2]).read_text(encoding="utf-8")
        held = [name for name, tag in (("mathml", "<math"), ("svg", "<svg")) if tag in page]
        return f'{entry[1]} properties="{" ".join(held)}"' if held else entry[1]


def as_xhtml(body: str) -> str:
    """A page's HTML without scripts, styles and files in links; every tag closed, and a name space for drawings."""
    page: Any = BeautifulSoup(body, "html5lib").body
    for element in page.select("script, style, summary > .expanded, .headerlink, a[href^='data:']"):
        element.decompose()
    for paragraph in page.select("summary > p"):
        paragraph.name = "span"
    for drawing in page.select("svg"):
        drawing["xmlns"] = "http://www.w3.org/2000/svg"
    for cell in page.select("th, td"):  # of pandas; XHTML leaves both to the style
        del cell["valign"], cell["halign"]
    for link in page.select("a[href*='.html']:not([href*='://'])"):
        link["href"] = link["href"].replace(".html", ".xhtml")
    seen: set[str] = set()
    for element in page.select("[id]"):  # sphinx-proof gives all proofs one name
        if element["id"] in seen:
            del element["id"]
        else:
            seen.add(element["id"])
    return str(page.decode_contents())


def on_page(app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: nodes.document | None) -> None:
    """What Sphinx calls before it writes a page."""
    if app.builder.name == "epub":
        context["css_files"] = [sheet for sheet in context["css_files"] if Path(sheet.filename).name in STYLES]
        if "body" in context:
            context["body"] = as_xhtml(context["body"])


def choose(app: Sphinx) -> None:
    """Take MathML, and no buttons to launch a page, where the ePub is written."""
    if app.builder.name == "epub":
        app.config.html_math_renderer = "mathml"
        app.config.html_theme_options.pop("launch_buttons", None)


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_builder(Builder, override=True)
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.connect("builder-inited", choose)
    app.connect("html-page-context", on_page, priority=900)  # after those that add to the page
    return {"parallel_read_safe": True, "parallel_write_safe": True}
