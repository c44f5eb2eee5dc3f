"""What a reader calls things — models, tables, columns, labels, tasks — is never taken for HTML or for a formula."""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot as plt

from iclgd_helpers import cli
from iclgd_helpers.data.synthetic import generate_rows
from iclgd_helpers.data.tasks import TASKS
from iclgd_helpers.engine import models
from iclgd_helpers.pages import figures, tables
from tools import book_pages
from tools.book_pages import ROOT

TAG, FORMULA = "<img src=x onerror=alert(1)>", r"$\frac{$"
HOSTILE = f"{TAG} {FORMULA}"
ALLOWED = set("a b br caption code details div em i img input li output p script span style summary ul".split()) | set(
    "table thead tbody tfoot tr th td".split()
)


def markup(page: str) -> list[str]:
    """What of `page` was taken for markup though it is part of a name."""
    tags = BeautifulSoup(page, "html.parser").find_all(True)
    return [str(tag)[:80] for tag in tags if tag.name not in ALLOWED or "onerror" in tag.attrs or tag.get("src") == "x"]


# ---------------------------------------------------------------------------------------------------- the boundaries
def hostile_frame() -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples([(HOSTILE, "a"), (HOSTILE, TAG)], names=[TAG, "b"])
    return pd.DataFrame({HOSTILE: [1.5, TAG], "lines": [f"{TAG}\n{TAG}\nn 3", "C:\\new"]}, index=index)


def test_tables_and_lists_hold_names_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(tables, "display", lambda data, **_: shown.append(data["text/html"]))
    table = tables.table(hostile_frame(), (hostile_frame(), "some"), caption=HOSTILE)
    tables.share("some", TAG, [TAG, (TAG, HOSTILE)], table, folded=HOSTILE)
    (page,) = shown
    assert not markup(page) and "base64" in page
    text = BeautifulSoup(page, "html.parser").text
    assert text.count(TAG) == 13 and "C:\\new" in text, "all of them are to be read"
    assert page.count("<b>") == 2, "the first of several lines, and the lead of a list's item"


def test_control_markup_is_seen() -> None:
    assert len(markup(hostile_frame().to_html(escape=False))) == 7
    assert markup(f"<p>{TAG}</p>") and markup("<iframe></iframe>") and not markup("<table><td>1<br>2</td></table>")


def hostile_figure() -> plt.Figure:
    figure, ax = figures.axes()
    ax.plot([1, 2, 3], [1e-3, 1, 1e3], label=HOSTILE)
    ax.set(title=HOSTILE, xlabel=HOSTILE, ylabel=HOSTILE, yscale="log")
    ax.set_xticks([1, 2, 3], [HOSTILE, "$x^2$", r"$\mathdefault{"])
    ax.annotate(HOSTILE, (1, 1))
    figures.legend_below(figure)
    return figure


def test_figures_write_names_out(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = hostile_figure()
    assert figures.png(figure).startswith(b"\x89PNG")
    formulas = {text.get_text() for text in figure.findobj(figures.Text) if text.get_parse_math()}
    assert not {HOSTILE, "$x^2$"} & formulas and r"$\mathdefault{10^{-3}}$" in formulas, "powers are matplotlib's own"
    monkeypatch.setattr(figures, "_take_literally", lambda figure: None)
    with pytest.raises(ValueError, match="frac"):  # the control
        figures.png(hostile_figure())
    plt.close("all")


def test_formulas_of_a_page_are_set_where_it_says_so() -> None:
    def drawn(**options: bool) -> bytes:
        figure, ax = figures.axes()
        ax.set_title("$x^2$")
        return figures.png(figure, **options)

    assert drawn(formulas=True) != drawn()


def test_frames_take_no_label_for_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(figures, "display", lambda data, **_: shown.append(data["text/html"]))
    figures.frames([figures.axes()[0], hostile_figure()], [HOSTILE, f"</script>{TAG}"], HOSTILE)
    (page,) = shown
    assert not markup(page) and page.count("</script>") == 1
    assert BeautifulSoup(page, "html.parser").output.text == HOSTILE


def html_made_by_hand(sources: dict[str, str]) -> list[str]:
    """Names of sources that make HTML otherwise than through these boundaries."""
    made = re.compile(r"to_html\(|\bHTML\(|text/html|</?(b|i|li|ul|br|p|td|span|strong)>")
    return [name for name, source in sources.items() if made.search(source)]


def test_html_is_made_in_one_place() -> None:
    sources = {path.stem: path.read_text() for path in (ROOT / "iclgd_helpers").rglob("*.py")}
    for path in book_pages.notebooks():
        sources |= {f"{path.stem} {c.id}": c.source for c in book_pages.read(path).cells if c.cell_type == "code"}
    assert set(html_made_by_hand(sources)) == {"tables", "figures", "verdict_overview"}
    assert not any("escape=False" in source for source in sources.values())
    assert html_made_by_hand({"the control": 'share("x", "<b>" + model + "</b>")'})


# -------------------------------------------------------------------------------------------------------- whole page
def test_a_page_shows_a_readers_names_as_they_are(tmp_path: Path, records_folder: Path) -> None:
    """Model, table, columns and labels of hostile names: the page of one's own model runs, and shows them as text."""
    name = HOSTILE.replace("{", "")
    column, labels = f"<b>text</b> {name}", [f"<i>bad</i> {FORMULA}", "$good$"]
    frame = pd.DataFrame(generate_rows(TASKS["snippets"], 40)).rename(columns={"text": column, "label": name})
    frame.assign(**{name: [labels[label] for label in frame[name]]}).to_csv(tmp_path / f"{name}.csv", index=False)
    tiny = models.tiny_model("tiny-llama")
    for part in (tiny.model, tiny.tokenizer):
        part.save_pretrained(tmp_path / name)
    given = {"model": tmp_path / name, "data_file": tmp_path / f"{name}.csv", "template": f"{{{column}}} it is"}
    given |= {"verbalizers": "negative,positive", "label_column": name, "label_values": ",".join(labels)}
    options = [word for pair in given.items() for word in ("-p", pair[0], str(pair[1]))]
    options += ["--preset", "smoke", "-p", "n_demonstrations", "4", "-p", "max_examples", "6"]
    page = ROOT / "notebooks" / "90_your_own_model.ipynb"
    assert cli.main(["run", str(page), "--output", str(tmp_path / "out"), *options]) == 0
    cells = nbformat.read(tmp_path / "out" / page.name, as_version=4).cells
    pages = [output["data"]["text/html"] for cell in cells for output in cell.get("outputs", []) if "data" in output
             and "text/html" in output["data"]]  # fmt: skip
    assert any(name in BeautifulSoup(page, "html.parser").text for page in pages)
    assert not [fault for page in pages for fault in markup(page)]
