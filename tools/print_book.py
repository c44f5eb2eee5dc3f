"""
The whole book in one file: `python -m tools.print_book pdf` or `epub`, from the root.

Chromium prints the PDF from one page that holds all others, because it sets the formulas, tables and figures as the
book does; LaTeX would need its own form of every table that a page computes. Sphinx writes the ePub, with MathML.
It prints what the last `make book` has built.
"""

from __future__ import annotations

import datetime
import io
import posixpath
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pypdf

from iclgd_helpers import storage
from iclgd_helpers.errors import CellError, InputError
from tools import browser, build_book
from tools.book_pages import ROOT

BUILD = ROOT / "_build"
NAME = "in-context-learning-as-gradient-descent"
PAPER = 717  # pixels: A4 between the margins of the browser
FOOTER = (
    '<div style="font-size:8px;width:100%;text-align:center;color:#555">'
    '<span class="title"></span> &middot; <span class="pageNumber"></span></div>'
)
READY = """(async () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
  for (const image of document.images) { image.loading = "eager"; if (!image.complete) await image.decode(); }
})()"""
HEADINGS = """[...document.querySelectorAll("h1, h2, h3, h4, h5, h6, [role=heading]")]
  .filter(heading => heading.checkVisibility()).map(heading => {
    const words = heading.cloneNode(true);
    for (const formula of words.querySelectorAll(".math")) formula.remove(); // no bookmark has one
    return words.textContent;
  })"""


def pdf() -> Path:
    """
    Print all pages, one after the other, with bookmarks and links between them; the file.

    Raises
    ------
    InputError
        without a browser, or if a heading of the book is no bookmark of what was printed.
    """
    if browser.path() is None:
        raise InputError("no Chromium found: install the package chromium, or set ICLGD_BROWSER to its path")
    built = _rendered("singlehtml")
    whole = (built / "book" / "index.html").read_text(encoding="utf-8")
    whole = whole.replace('href="book/index.html#', 'href="#')  # links within the page, which stay so in the file
    (built / "index.html").write_text(whole, encoding="utf-8")  # where its links to pictures are right
    with tempfile.TemporaryDirectory() as profile, browser.Server(built) as server:
        with browser.Page(Path(profile), limit=900) as tab:
            tab.open(f"{server.address}/index.html")
            tab.run(READY)
            options = {"displayHeaderFooter": True, "headerTemplate": "<span></span>", "footerTemplate": FOOTER}
            options |= {"generateDocumentOutline": True, "generateTaggedPDF": True}
            printed = tab.paper(marginTop=0.6, marginBottom=0.7, **options)
            with tab.printing(PAPER):  # some headings are on paper only, others on the screen
                headings = tab.run(HEADINGS)
    if lost := first_without_bookmark(printed, headings):
        raise InputError(f"the PDF has fewer sections than the book: its bookmarks end or part before {lost!r}")
    storage.write_bytes(BUILD / f"{NAME}.pdf", printed)
    return BUILD / f"{NAME}.pdf"


def _rendered(builder: str) -> Path:
    """The pages as a builder makes them; they say that they are the book in one file."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    storage.write_text(BUILD / build_book.DOWNLOADS, f"This is the whole book in one file, written {now}.\n")
    return build_book.render(BUILD, builder)


def first_without_bookmark(printed: bytes, headings: list[str]) -> str:
    """The first heading that is not the next bookmark of a PDF; empty if all are, in order."""
    marks = iter(bookmarks(pypdf.PdfReader(io.BytesIO(printed)).outline))
    return next((heading for heading in headings if not marks_it(next(marks, ""), heading)), "")


def marks_it(bookmark: str, heading: str) -> bool:
    """Whether a bookmark is of a heading; of one that has moved to the next page the browser says some lines twice."""
    mark, letters = plain(bookmark), plain(heading)
    return bool(letters) and mark.endswith(letters) and letters.startswith(mark.removesuffix(letters))


def bookmarks(outline: Sequence[object]) -> Iterator[str]:
    """Titles of bookmarks, each before those below it."""
    for mark in outline:
        if isinstance(mark, list):
            yield from bookmarks(mark)
        else:
            yield str(mark.title)  # type: ignore[attr-defined]  # pypdf's Destination


def plain(heading: str) -> str:
    """A heading's letters and digits: all that a browser's bookmark keeps of every heading."""
    return "".join(filter(str.isalnum, heading))


def epub() -> Path:
    """Write the ePub; the file. Raises InputError if a page of it cannot be read."""
    built = _rendered("epub")
    (file,) = built.glob("*.epub")
    if fault := first_fault(file):
        raise InputError(f"a reader of ePubs would refuse the book: {fault}")
    storage.write_bytes(BUILD / f"{NAME}.epub", file.read_bytes())
    return BUILD / f"{NAME}.epub"


def first_fault(book: Path) -> str:
    """
    What is wrong with an ePub, empty if nothing is.

    A page is no XML; one who turns the pages does not come to it; the table of contents lacks it; what it links to or
    shows is not there.
    """
    trees = {}
    with zipfile.ZipFile(book) as packed:
        files = set(packed.namelist())
        for name in (name for name in packed.namelist() if name.endswith((".xhtml", ".opf"))):
            try:
                trees[name] = ElementTree.fromstring(packed.read(name))
            except ElementTree.ParseError as error:
                return f"{name} is no XHTML ({error})"
    listed = trees.pop("content.opf")
    hrefs = {item.get("id"): item.get("href") for item in listed.findall(".//{*}item")}
    order = [page for page in listed.findall(".//{*}itemref") if page.get("linear") != "no"]
    links = {name: set(_links(name, tree)) for name, tree in trees.items()}
    turned = {hrefs.get(page.get("idref")) for page in order}
    for page in trees.keys() - {"nav.xhtml"}:
        if page not in turned:
            return f"{page} is not in the order of pages"
        if page not in links["nav.xhtml"]:
            return f"{page} is not in the table of contents"
        if lost := links[page] - files:
            return f"{page} leads to {lost.pop()}, which is not in the book"
    return ""


def _links(page: str, tree: ElementTree.Element) -> Iterator[str]:
    """The files of the book that a page links to or shows."""
    for element in tree.iter():
        address = urllib.parse.urlsplit(element.get("href") or element.get("src") or "")
        if address.path and not address.scheme:
            yield posixpath.normpath(posixpath.join(posixpath.dirname(page), urllib.parse.unquote(address.path)))


def main(arguments: list[str]) -> int:
    """Exit status 2 for another word than `pdf` or `epub`, 1 where the book cannot be built."""
    makers = {"pdf": pdf, "epub": epub}
    if len(arguments) != 1 or arguments[0] not in makers:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        if not (BUILD / "html").is_dir():
            raise InputError("there is no built book to print: run `make book` first")
        file = makers[arguments[0]]()
        build_book.html(BUILD)
    except (CellError, InputError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{file} ({file.stat().st_size / 2**20:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
