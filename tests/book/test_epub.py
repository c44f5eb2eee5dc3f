"""The ePub: every page is XHTML that names what it needs, in the order of the book; formulas are MathML."""

import html
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from iclgd_helpers.errors import InputError
from tools import build_book, epub, print_book

OUTPUT = """<style scoped>.a {color: red}</style><table><tr><th halign="left" valign="top">a&nbsp;b</th></tr></table>
<p id="proof">One<br>two</p><p id="proof">three</p><input type="range" disabled><a href="claims.html#x:y">c</a>
<a href="data:text/csv;base64,YQ==">file</a>
<a href="https://a.org/b.html">d</a><svg viewBox="0 0 1 1"><path d="M0 0"></path></svg><script>if (1 < 2) {}</script>
<details><summary><p class="collapsed">Show</p><p class="expanded">Hide</p></summary>Folded</details>"""


def test_an_output_becomes_xhtml():
    with pytest.raises(ElementTree.ParseError):
        ElementTree.fromstring(f"<body>{OUTPUT}</body>")
    text = epub.as_xhtml(OUTPUT)
    page = ElementTree.fromstring(f"<body>{text}</body>")
    assert page.find("table//th").attrib == {} and page.find("table//th").text == "a\xa0b"
    assert [p.get("id") for p in page.findall("p")] == ["proof", None]
    assert [link.get("href") for link in page.findall("a")] == ["claims.xhtml#x:y", "https://a.org/b.html"]
    assert page.find("{http://www.w3.org/2000/svg}svg").get("viewBox") == "0 0 1 1"
    assert "script" not in text and "style" not in text and "Hide" not in text


@pytest.mark.parametrize(
    ("formula", "shown", "never"),
    [
        (r"\begin{aligned}a&=b\\c&=d\end{aligned}", "<mtable", "<mi>&"),
        (r"\begin{gathered}a\\b\end{gathered}", "<mtable><mtr>", "linebreak"),
        (r"\mathbb R^d", "<mi>ℝ</mi>", "mathvariant"),
        (r"\mathcal L", "<mi>ℒ</mi>", "mathvariant"),
        (r"\mathbf q", "<mi>𝐪</mi>", "mathvariant"),
    ],
)
def test_formulas_keep_their_lines_and_letters(formula: str, shown: str, never: str):
    assert shown in (found := html.unescape(epub.mathml(formula, "block"))) and never not in found


def packed(folder: Path, second: str = "<p/>", linear: str = "yes", contents: str = "ab") -> Path:
    """An ePub of two pages, as far as its lists and pages go."""
    items = "".join(f"<item id='{n}' href='book/{n}.xhtml'/>" for n in "ab")
    spine = f"<itemref idref='a'/><itemref idref='b' linear='{linear}'/>"
    with zipfile.ZipFile(folder / "book.epub", "w") as book:
        book.writestr("content.opf", f"<package xmlns='http://www.idpf.org/2007/opf'>{items}{spine}</package>")
        book.writestr("nav.xhtml", "<p>" + "".join(f"<a href='book/{n}.xhtml'/>" for n in contents) + "</p>")
        book.writestr("book/a.xhtml", "<p><a href='b.xhtml#x'/><a href='https://a.org/b'/></p>")
        book.writestr("book/b.xhtml", second)
    return folder / "book.epub"


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({}, ""),
        ({"second": "<p><br></p>"}, "book/b.xhtml is no XHTML"),
        ({"linear": "no"}, "book/b.xhtml is not in the order of pages"),
        ({"contents": "a"}, "book/b.xhtml is not in the table of contents"),
        ({"second": "<p><img src='../_images/c.png'/></p>"}, "book/b.xhtml leads to _images/c.png"),
    ],
)
def test_what_a_reader_would_refuse_is_named(tmp_path, broken: dict[str, str], said: str):
    found = print_book.first_fault(packed(tmp_path, **broken))
    assert found.startswith(said) and bool(found) == bool(said)


def test_an_epub_that_cannot_be_read_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(print_book, "BUILD", tmp_path / "_build")
    monkeypatch.setattr(build_book, "render", lambda _build, _builder: packed(tmp_path, "<p>").parent)
    with pytest.raises(InputError, match="b.xhtml is no XHTML"):
        print_book.epub()
    assert not list((tmp_path / "_build").glob("*.epub"))
