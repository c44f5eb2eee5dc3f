"""The book in one file: every section of the PDF has its bookmark, in order; mistakes of who asks for it."""

from pathlib import Path

import pytest

from iclgd_helpers.errors import InputError
from tools import browser, build_book, print_book

BOOK = """<!doctype html><title>T</title><style>@media print {nav {display: none}} @media screen {div {display: none}}
b {clip: rect(1px, 1px, 1px, 1px); height: 1px; overflow: hidden; position: absolute; width: 1px}
</style><article><nav><h2>Menu</h2></nav><h1>A book</h1>
<div><h2>Contents</h2><p role="heading" aria-level="2">Part</p></div><h2>1. First &amp; foremost
<span class="math"><b><math><mi>x</mi></math></b></span></h2><p>Text.</p>
<h3>A <em>part</em></h3><h2>2. Second</h2><details><summary>More</summary><h3>Folded</h3></details>
<h4 hidden>Never shown</h4><p><a href="book/index.html#x">link</a></p><p id="x">There.</p></article>"""
HEADINGS = ["A book", "Contents", "Part", "1. First & foremost", "A part", "2. Second", "Folded"]


def small_book(build: Path, builder: str) -> Path:
    """What stands for Sphinx: one page that holds all others."""
    (build / builder / "book").mkdir(parents=True)
    (build / builder / "book" / "index.html").write_text(BOOK, encoding="utf-8")
    return build / builder


@pytest.mark.skipif(browser.path() is None, reason="no chromium found: install it, or set ICLGD_BROWSER to its path")
def test_every_section_is_a_bookmark_of_the_pdf(tmp_path, monkeypatch):
    monkeypatch.setattr(print_book, "BUILD", tmp_path)
    monkeypatch.setattr(build_book, "render", small_book)
    printed = print_book.pdf().read_bytes()
    assert b"127.0.0.1" not in printed, "links within the book lead to the server that it was printed from"
    assert print_book.first_without_bookmark(printed, HEADINGS) == ""
    assert print_book.first_without_bookmark(printed, [*HEADINGS, "Lost"]) == "Lost"
    assert print_book.first_without_bookmark(printed, [HEADINGS[0], *HEADINGS[2:]]) == "Part"


@pytest.mark.skipif(browser.path() is None, reason="no chromium found: install it, or set ICLGD_BROWSER to its path")
def test_a_pdf_that_lacks_sections_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(print_book, "BUILD", tmp_path)
    monkeypatch.setattr(build_book, "render", small_book)
    monkeypatch.setattr(print_book, "HEADINGS", '["A book", "Of a page that was not printed"]')
    with pytest.raises(InputError, match="before 'Of a page that was not printed'"):
        print_book.pdf()
    assert list(tmp_path.glob("*.pdf")) == []


def test_a_heading_is_marked_in_its_own_words_once_or_twice():
    for mark, same in (
        ("A part", True),
        ("Apart", True),
        ("A partA part", True),
        ("AA part", True),
        ("A part A", False),
        ("B part", False),
        ("", False),
    ):
        assert print_book.marks_it(mark, "A part") == same
    assert not print_book.marks_it("", "")


def test_without_a_browser_or_a_built_book_it_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(print_book, "BUILD", tmp_path)
    assert print_book.main(["pdf"]) == 1 and "make book" in capsys.readouterr().err
    (tmp_path / "html").mkdir()
    monkeypatch.setattr(browser, "path", lambda: None)
    assert print_book.main(["pdf"]) == 1 and "chromium" in capsys.readouterr().err
    assert print_book.main(["docx"]) == 2
