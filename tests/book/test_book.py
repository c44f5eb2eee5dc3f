"""The built book: strict, complete, self-contained; readable on a phone, in the dark, by keyboard, and on paper."""

import gzip
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
import PIL.Image
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient

from iclgd_helpers import pinned_downloads
from iclgd_helpers.errors import InputError
from tools import book_pages, browser, build_book, print_book

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "embed": "src"}
LOADING_LINKS = {"stylesheet", "preload", "icon", "shortcut", "modulepreload"}


@pytest.fixture(scope="session")
def html(tmp_path_factory) -> Path:
    """The book built strictly from the outputs that are stored in the notebooks."""
    return build_book.book(tmp_path_factory.mktemp("book"), stored=True)


@pytest.fixture(scope="session")
def pages(html) -> dict[Path, BeautifulSoup]:
    return {path: BeautifulSoup(path.read_text(), "html.parser") for path in sorted(html.rglob("*.html"))}


def is_external(address: str) -> bool:
    return bool(urlparse(address).netloc) or urlparse(address).scheme in {"http", "https"}


def test_every_notebook_is_a_page_with_its_outputs(html, pages):
    assert (html / "index.html").exists()
    for notebook in book_pages.notebooks():
        page = pages[html / "notebooks" / f"{notebook.stem}.html"]
        assert page.select(".cell_output") and "PASS" in page.text
        stored = {
            out
            for cell in book_pages.read(notebook).cells
            for o in cell.get("outputs", [])
            for out in o.get("data", {})
        }
        assert bool(page.select(".cell_output img")) == bool(stored & {"image/png", "image/svg+xml"})


def test_the_whole_book_can_be_read_as_an_epub(html, tmp_path):
    shutil.copytree(html.parent / "source", tmp_path / "_build" / "source")
    (book,) = build_book.render(tmp_path / "_build", "epub").glob("*.epub")
    assert print_book.first_fault(book) == ""
    with zipfile.ZipFile(book) as packed:
        pages = [packed.read(name).decode() for name in packed.namelist() if name.endswith(".xhtml")]
    formulas = [formula for page in pages for formula in re.findall("<math.*?</math>", page)]
    assert len(formulas) > 1000 and not [one for one in formulas if "\\" in one or "linebreak" in one]


def test_status_page_says_what_was_built(html, pages):
    assert "torch" in pages[html / "book" / "status.html"].text


def test_links_between_pages_resolve(html, pages):
    names = {path: {element["id"] for element in page.select("[id]")} for path, page in pages.items()}
    for path, page in pages.items():
        for link in page.select("a[href]"):
            address = urlparse(link["href"])
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            assert target.is_file(), f"{path.name}: {link['href']}"
            if address.fragment and target in pages:
                assert unquote(address.fragment) in names[target], f"{path.name}: {link['href']}"


def undescribed(page: BeautifulSoup) -> list[str]:
    """Images whose alternative text is short, or says no more than their caption."""
    found = []
    for image in page.select(".bd-article img"):
        figure, alt = image.find_parent("figure"), " ".join(image.get("alt", "").split())
        captions = [" ".join(one.text.split()).rstrip("#¶") for one in figure.select(".caption-text")] if figure else []
        if len(alt) < 20 or alt in captions:
            found.append(image["src"][:60])
    return found


def misplaced_headings(page: BeautifulSoup) -> list[str]:
    """Headings that leave a level out, and titles after the first; a page without any."""
    levels = [(int(heading.name[1]), heading.text) for heading in page.select(".bd-article :is(h1,h2,h3,h4,h5,h6)")]
    if not levels or levels[0][0] != 1:
        return ["no title first"]
    pairs = zip(levels, levels[1:], strict=False)
    return [text for (above, _), (level, text) in pairs if level > above + 1 or level == 1]


def test_headings_come_in_order(html, pages):
    contents = [path for path in pages if path.parent.name in ("book", "notebooks")]
    assert len(contents) > 30
    for path in contents:
        assert misplaced_headings(pages[path]) == [], path.name
    for wrong in ("<h2>A</h2>", "<h1>A</h1><h3>B</h3>", "<h1>A</h1><h2>B</h2><h1>C</h1>", ""):
        assert misplaced_headings(BeautifulSoup(f"<div class='bd-article'>{wrong}</div>", "html.parser"))


def test_a_description_says_more_than_its_caption():
    text = "Accuracy of the arms with intervals, in context highest"
    for alt, caption, good in ((text, "Accuracy", True), (text, text, False), ("", "Accuracy", False)):
        figure = f"<figure><img src='a.png' alt='{alt}'><span class='caption-text'>{caption}</span></figure>"
        assert (undescribed(BeautifulSoup(f"<div class='bd-article'>{figure}</div>", "html.parser")) == []) == good


def test_images_are_there_and_described(pages):
    for path, page in pages.items():
        assert undescribed(page) == [], path.name
        for image in page.select(".bd-article img"):
            assert image["src"].startswith("data:image/") or (path.parent / unquote(image["src"])).is_file()


def weight(file: Path) -> int:
    """Bytes that a host sends for a page or what it shows, compressed unless it is already."""
    content = file.read_bytes()
    return len(content if file.suffix in (".png", ".webp") else gzip.compress(content, 6))


def too_heavy(path: Path, page: BeautifulSoup, most: int) -> bool:
    """Whether a page weighs more with all that it loads, now or later; without the letters of formulas and icons."""
    sources = [element.get("src") or element["href"] for element in page.select("[src], link[rel~=stylesheet]")]
    sources += re.findall(r'"([^"]+\.webp)"', str(page))
    files = {path.parent / unquote(source).partition("?")[0] for source in sources if not source.startswith("data:")}
    return weight(path) + sum(map(weight, files)) > most


def test_no_page_is_too_heavy_for_a_phone(html, pages):
    contents = {path: page for path, page in pages.items() if path.parent.name in ("book", "notebooks")}
    assert not [path.name for path, page in contents.items() if too_heavy(path, page, 1_500_000)]
    index = html / "book" / "index.html"
    assert not too_heavy(index, pages[index], 400_000)
    assert too_heavy(index, pages[html / "notebooks" / "70_layer_causal_finetuning.html"], 600_000), "the control"


def test_a_page_fetches_pictures_and_frames_when_they_are_looked_at(html, pages, tab):
    n_pictures = 0
    for path, page in pages.items():
        assert str(page).count("data:image/") == len(page.select("[id^=frames-] img[src^='data:image/']")), path.name
        for image in page.select(".bd-article img[src^='../_images/'][src$='.png']"):
            width, height = PIL.Image.open(path.parent / image["src"]).size
            assert image["loading"] == "lazy"
            assert int(image["height"]) == pytest.approx(int(image["width"]) * height / width, abs=1)
            n_pictures += 1
    assert n_pictures > 80
    tab.open((html / "notebooks" / "03_what_the_step_does_not_say.html").as_uri())
    picture, slider = (f"document.querySelector('[id^=frames-] {kind}')" for kind in ("img", "input"))
    before = tab.run(f"{picture}.currentSrc")
    tab.run(f"{slider}.value = 3; {slider}.oninput(); {picture}.decode()")
    assert before != (after := tab.run(f"{picture}.currentSrc")) and after.endswith(".webp")
    assert tab.run(f"{picture}.naturalWidth") > 300


def test_figures_have_numbered_captions(html, pages):
    for notebook in book_pages.notebooks():
        page = pages[html / "notebooks" / f"{notebook.stem}.html"]
        for image in page.select(".cell_output img"):
            assert image.find_parent("figure").select_one(".caption-number"), image["src"]


def test_nothing_is_loaded_from_elsewhere(html, pages):
    for path, page in pages.items():
        for tag, attribute in LOADING.items():
            for element in page.select(f"{tag}[{attribute}]"):
                assert not is_external(element[attribute]), f"{path.name}: {element}"
        for link in page.select("link[href]"):
            assert not (LOADING_LINKS & set(link["rel"]) and is_external(link["href"])), f"{path.name}: {link}"
    for sheet in html.rglob("*.css"):
        text = sheet.read_text()
        for start in ("url(http", "url('http", 'url("http', "url(//", "@import url(http", '@import "http'):
            assert start not in text, sheet


# A path with at least two folders of which the first is one that machines have.
ABSOLUTE = re.compile(
    r"(?<![\w.~:/-])/(?:home|root|Users|usr|opt|work|workspace|tmp|var|private|mnt)/[\w.@-]+|\b[A-Z]:\\\\[\w.]+"
)


def test_no_page_names_a_folder_of_the_machine(html):
    texts = {
        path: path.read_text() for path in [*book_pages.notebooks(), *html.rglob("*.html"), *html.rglob("*.ipynb")]
    }
    for path, text in texts.items():
        assert not ABSOLUTE.findall(re.sub(r"base64,[\w+/=]+", "", text)), path.name
    for path in ("/".join(["at ", "home", "me", "auto.py:21"]), "in (/tmp/x)", "at /usr/lib"):
        assert ABSOLUTE.search(path), "the control"


def test_the_first_cells_of_a_page_warn_of_nothing():
    """Its rendered page and the notebook behind it hold what a cell writes to stderr, with paths of the machine."""
    page = book_pages.read(book_pages.ROOT / "notebooks" / "78_results_of_the_reproduction.ipynb")
    first = nbformat.v4.new_notebook(
        cells=[cell for cell in page.cells if cell.id in ("parameters", "imports", "stored")]
    )
    NotebookClient(first, kernel_name="python3", timeout=300).execute(cwd=str(book_pages.ROOT))
    assert [output.get("name") for output in first.cells[-1].outputs] == ["stdout"]


# ---------------------------------------------------------------------------------------------------- in the browser
# Before anything else runs in a page: collects its errors.
PROBE = """
window.seen = {errors: []};
const failed = e => e.message || "cannot load " + (e.target.src || e.target.href);
addEventListener("error", e => seen.errors.push(failed(e)), true);
addEventListener("unhandledrejection", e => seen.errors.push("rejected: " + e.reason));
for (const level of ["error", "warn"]) {
  const original = console[level];
  console[level] = (...words) => { seen.errors.push(words.join(" ")); original(...words); };
}
"""

REPORT = """(() => {
  const root = document.documentElement;
  const count = selector => document.querySelectorAll(selector).length;
  const loaded = performance.getEntriesByType("resource");
  return {
    ...seen, width: root.clientWidth, content: root.scrollWidth, theme: root.dataset.theme,
    background: getComputedStyle(document.body).backgroundColor,
    raw: count(".math") - count(".math:has(mjx-container)"), mathematics: count("mjx-container"),
    wrong: count("mjx-merror, mjx-mtext[style*='color: red']"),
    spoken: count("mjx-container > mjx-assistive-mml > math"), stops: count("mjx-container[tabindex]"),
    outside: loaded.map(r => r.name).filter(name => !name.startsWith(location.origin)),
    broken: loaded.filter(r => r.responseStatus >= 400).map(r => r.name),
  };
})()"""

# Text of a page whose contrast with what lies behind it is below WCAG's 4.5 (3 for large letters).
PALE = """(() => {
  const parse = colour => { const v = colour.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = colour => colour.map(c => c / 255).map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => !element ? [255, 255, 255] :
    over(parse(getComputedStyle(element).backgroundColor), ground(element.parentElement));
  const pale = [];
  const walker = document.createTreeWalker(document.querySelector(".bd-article"), NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const element = node.parentElement;
    if (!node.data.trim() || element.closest("mjx-assistive-mml, style, script")) continue;
    if (!element.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const style = getComputedStyle(element), below = ground(element);
    const [a, b] = [light(over(parse(style.color), below)), light(below)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) pale.push(`${ratio.toFixed(2)} ${node.data.trim().slice(0, 40)}`);
  }
  return pale;
})()"""

# What is wrong with tables and scrolling boxes for who cannot see or point.
UNNAMED = """(() => {
  const heads = document.querySelectorAll(".bd-article th:not([scope]), .bd-article th:empty");
  const found = [...heads].map(e => e.outerHTML);
  const boxes = [...document.querySelectorAll(".bd-article *")].filter(box =>
    box.checkVisibility() && box.scrollWidth > box.clientWidth + 1 &&
    ["auto", "scroll"].includes(getComputedStyle(box).overflowX));
  for (const box of boxes)
    if (box.tabIndex != 0 || (box.matches(":has(table), .math") && !(box.role == "region" && box.ariaLabel)))
      found.push(box.outerHTML.slice(0, 200));
  const names = boxes.map(box => box.ariaLabel).filter(name => name);
  return new Set(names).size < names.length ? [...found, "one name twice"] : found;
})()"""

# Equations and code that scroll sideways.
WIDE = """[...document.querySelectorAll(".bd-article :is(div.math, pre)")]
  .filter(box => box.checkVisibility() && box.scrollWidth > box.clientWidth + 1)
  .map(box => box.textContent.slice(0, 80))
"""

# What paper would lose, or show twice: boxes that cut their content, content beyond the edge, cells that cover each
# other, what formulas say to a screen reader.
LOST = """(() => {
  const lost = [], edge = document.documentElement.clientWidth + 1;
  for (const e of document.querySelectorAll(".bd-article *")) {
    if (!e.checkVisibility() || e.closest("span.math, mjx-container, svg")) continue;
    const cut = e.clientWidth && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX != "visible";
    if (cut || e.getBoundingClientRect().right > edge) lost.push(e.outerHTML.slice(0, 120));
  }
  for (const formula of document.querySelectorAll(".bd-article mjx-math"))
    if (formula.getBoundingClientRect().right > edge) lost.push(formula.textContent);
  for (const spoken of document.querySelectorAll(".bd-article mjx-assistive-mml"))
    if (getComputedStyle(spoken).position != "absolute") lost.push("shown twice: " + spoken.textContent);
  for (const row of document.querySelectorAll(".bd-article tr")) {
    const boxes = [...row.cells].map(cell => cell.getBoundingClientRect());
    if (boxes.some((box, i) => i && box.left < boxes[i - 1].right - 1)) lost.push("covered: " + row.textContent);
  }
  return lost;
})()"""
# What axe-core calls serious or critical, as "rule: element". Contrast and scrolling boxes have checks of their own.
AXE = """(async () => {
  const others = ["color-contrast", "scrollable-region-focusable"];
  const off = Object.fromEntries(others.map(rule => [rule, {enabled: false}]));
  const seen = await axe.run(document, {resultTypes: ["violations"], rules: off});
  return seen.violations.filter(one => ["serious", "critical"].includes(one.impact))
    .flatMap(one => one.nodes.map(node => `${one.id}: ${node.target.join(" ")} ${node.html.slice(0, 120)}`));
})()"""
AXE_WHEEL = pinned_downloads.Package(
    "axe-playwright-python",  # holds axe-core 4.12.1; the rest of it is not used
    "0.1.8",
    "axe_playwright_python-0.1.8-py3-none-any.whl",
    "fdd263c998388f1a8e67cad02677e612d946248bd44d163be5e8650ea31f95f8",
    1,
)
RESULTS = "book/results.html"
PHONE, LAPTOP, DESK = 375, 1280, 1440  # pixels


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """The script of axe-core."""
    try:
        wheel = pinned_downloads.fetch(AXE_WHEEL, tmp_path_factory.mktemp("axe"), "no such test")
    except InputError as error:
        if os.environ.get("ICLGD_REQUIRE_DATA") == "1":  # as in .ci/run: there it must not be skipped
            raise
        pytest.skip(f"needs a download: {error}")
    return pinned_downloads.read_member(wheel, "axe_playwright_python/axe.min.js").decode()


@pytest.fixture(scope="session")
def reports(html, tab) -> dict[str, dict]:
    """What the browser finds on each page: at two widths, in light and dark, and on paper."""
    names = [
        str(p.relative_to(html)) for folder in ("book", "notebooks") for p in sorted((html / folder).glob("*.html"))
    ]
    found, probe = {}, tab.before(PROBE)
    with browser.Server(html) as server:
        for name in names:
            tab.open(f"{server.address}/{name}", PHONE, theme="dark")
            for width in (PHONE, LAPTOP, DESK):
                tab.window(width)
                for theme in ("light", "dark"):
                    tab.run(f"for (const key of ['mode', 'theme']) document.documentElement.dataset[key] = '{theme}'")
                    seen = tab.run(REPORT) | {"unnamed": tab.run(UNNAMED)}
                    if seen["unnamed"]:  # the theme makes boxes stops of the Tab key 0.3 s after a change of width
                        seen["unnamed"] = tab.run(f"new Promise(done => setTimeout(() => done({UNNAMED}), 600))")
                    seen["pale"] = tab.run(PALE) if width == PHONE else []  # no width changes a colour
                    seen["wide"] = tab.run(WIDE) if width == DESK else []
                    found[f"{name} {width} {theme}"] = seen
            with tab.printing(print_book.PAPER):
                found[f"{name} {width} {theme}"]["lost"] = tab.run(LOST)
    tab.forget(probe)
    return found


def test_browser_sees_no_error(reports):
    assert len(reports) >= 6 * (len(book_pages.notebooks()) + 3)
    for name, seen in reports.items():
        assert seen["errors"] == [], name
        assert seen["outside"] == [] and seen["broken"] == [], name


def test_mathematics_is_set_and_spoken_and_no_stop_of_the_tab_key(reports):
    for name, seen in reports.items():
        assert seen["raw"] == seen["wrong"] == seen["stops"] == 0, name
        assert seen["spoken"] == seen["mathematics"], name
    assert sum(seen["mathematics"] for seen in reports.values()) > 100


def test_no_page_is_wider_than_a_phone(reports):
    for name, seen in reports.items():
        assert seen["content"] <= seen["width"], f"{name}: {seen['content']} px on {seen['width']} px"


def test_dark_mode_is_dark(reports):
    for name, seen in reports.items():
        channels = [int(x) for x in seen["background"].strip("rgba()").split(",")[:3]]
        assert (max(channels) < 60) == name.endswith("dark"), f"{name}: {seen['background']}"


@pytest.mark.parametrize("fault", ["pale", "unnamed", "lost", "wide"])
def test_every_page_can_be_read(reports, fault: str):
    """Contrast; names and stops of tables and boxes that scroll; nothing is lost on paper or scrolls on a desk."""
    found = {name: seen[fault] for name, seen in reports.items() if seen.get(fault)}
    assert not found, {name: (len(faults), faults[:3]) for name, faults in found.items()}


BROKEN = "document.querySelector('.bd-article').insertAdjacentHTML('beforeend', '<button></button><img src=x.png>')"


def test_axe_finds_nothing_serious(html, tab, axe):
    found = {}
    with browser.Server(html) as server:
        for path in sorted(p for folder in ("book", "notebooks") for p in (html / folder).glob("*.html")):
            tab.open(f"{server.address}/{path.relative_to(html)}")
            tab.run(f"{axe}; 0")
            if faults := tab.run(AXE):
                found[path.name] = len(faults), faults[:5]
        tab.run(BROKEN)
        assert {fault.split(":")[0] for fault in tab.run(AXE)} >= {"button-name", "image-alt"}, "the control"
    assert not found, found


@pytest.fixture
def show(html, tab) -> Iterator[Callable[..., None]]:
    """A function that opens a page from its file, after what it is told to break."""
    undo = []

    def opened(page: str = RESULTS, before: str = "", blocked: str = "", **options: object) -> None:
        if before:
            undo.append(tab.before(before))
        tab.call("Network.setBlockedURLs", urls=[blocked] if blocked else [])
        tab.open((html / page).as_uri(), **options)

    yield opened
    tab.call("Network.setBlockedURLs", urls=[])
    for name in undo:
        tab.forget(name)


@pytest.mark.parametrize(("script", "without"), [(PALE, "book.css"), (UNNAMED, "book.js")])
def test_control_a_page_without_our_style_or_script_has_the_fault(tab, show, script: str, without: str):
    for blocked in ("", f"*{without}*"):
        show("notebooks/80_cost_and_speed.html", blocked=blocked, width=375, theme="dark")
        assert bool(tab.run(script)) == bool(blocked)


def test_control_code_without_our_style_scrolls_on_a_desk(tab, show):
    for blocked in ("", "*book.css*"):
        show("book/mutations.html", blocked=blocked, width=DESK)
        assert bool(tab.run(WIDE)) == bool(blocked)
    show("book/theorems.html", width=DESK)
    tab.run("document.querySelector('div.math').style.cssText = 'width: 1rem; min-width: 0'")
    assert len(tab.run(WIDE)) == 1


def test_control_on_paper_nothing_is_shown_twice(tab, show):
    show("book/notation.html")
    with tab.printing(print_book.PAPER):
        assert not tab.run(LOST)
        tab.run("document.querySelector('td mjx-assistive-mml').style.setProperty('position', 'static', 'important')")
        assert any("shown twice" in fault for fault in tab.run(LOST))


def test_control_paper_without_our_style_loses_columns(tab, show):
    for blocked in ("", "*book.css*"):
        show(blocked=blocked)
        with tab.printing(print_book.PAPER):
            assert bool(tab.run(LOST)) == bool(blocked)


# ------------------------------------------------------------------------------------------------ keyboard and mouse
SHOWN = """(selector => {
  const box = [...document.querySelectorAll(selector)].filter(e => e.checkVisibility({visibilityProperty: true}))
    .map(e => e.getBoundingClientRect()).find(box => box.width && box.left >= 0 && box.right <= innerWidth);
  return Boolean(box);
})"""
LINKS = {
    "primary": "#pst-primary-sidebar-modal a[href$='how_to_use.html'], .bd-sidebar-primary a[href$='how_to_use.html']"
}
LINKS["secondary"] = "a.nav-link[href='#numbers']"
# A bar like the theme's above the page, with buttons of the same kinds, hidden; there before the theme's scripts run.
BAR = """document.addEventListener("readystatechange", () => document.body.insertAdjacentHTML("afterbegin",
  ["primary", "secondary"].map(name => `<button hidden class="${name}-toggle"></button>`).join("")), {once: true})"""


def toggles(tab: browser.Page, which: str) -> bool:
    """Whether a click on the menu's button shows the links that did not show, or hides those that did."""
    before = tab.run(f"{SHOWN}({LINKS[which]!r})")
    tab.click(f".{which}-toggle")
    tab.settle()
    return tab.run(f"{SHOWN}({LINKS[which]!r})") != before


@pytest.mark.parametrize(
    ("which", "width"), [("primary", 375), ("secondary", 375), ("primary", 800), ("secondary", 800), ("primary", 1440)]
)
def test_the_menu_buttons_work(html, tab, show, which: str, width: int):
    show(width=width)
    assert toggles(tab, which)
    with browser.Server(html) as server:
        tab.open(f"{server.address}/{RESULTS}", width=width)
        assert toggles(tab, which)
    show(before=BAR, width=width)
    assert not toggles(tab, which), "the control: another button of this kind, above, takes the script"


def test_who_uses_the_keyboard_sees_where(tab, show):
    def without_ring() -> list[str]:
        """Labels of the page's own buttons and boxes that a Tab reaches and that show nothing of it."""
        missing, seen = [], 0
        for _ in range(150):
            tab.key("Tab")
            place, ring, style = tab.run(
                """(() => { const e = document.activeElement, s = getComputedStyle(e);
                return [e.closest('.bd-header-article button') ? 'button ' + e.title + e.ariaLabel :
                        e.matches('.scrolls') ? 'box ' + e.ariaLabel : null, s.outlineWidth, s.outlineStyle];
                })()"""
            )
            seen += bool(place)
            if place and (style == "none" or float(ring.removesuffix("px")) < 2):
                missing.append(place)
        assert seen > 5
        return missing

    show()
    assert without_ring() == []
    show(blocked="*book.css*")
    assert without_ring(), "the control"


def test_sliders_stand_under_their_figure(html, tab):
    tab.open((html / "notebooks" / "03_what_the_step_does_not_say.html").as_uri())
    boxes = "[...document.querySelectorAll('[id^=frames-]')]"

    def apart(side: str) -> list[float]:
        """Of each picture and its slider, pixels between their sides."""
        ends = f"['img', 'input'].map(kind => box.querySelector(kind).getBoundingClientRect().{side})"
        return [abs(a - b) for a, b in tab.run(f"{boxes}.map(box => {ends})")]

    assert len(apart("left")) >= 2 and max(apart("left") + apart("right")) < 2
    tab.run("document.querySelectorAll('figure').forEach(figure => figure.style.maxWidth = 'none')")
    tab.run(f"{boxes}.forEach(box => Object.assign(box.style, {{display: 'block', width: 'auto'}}))")
    assert min(apart("left")) > 50, "the control"


def test_a_slider_that_is_touched_fetches_its_frames_and_no_others(html, tab):
    boxes = "[...document.querySelectorAll('[id^=frames-]')]"
    named = f"{boxes}.map(box => box.querySelector('script').textContent.match(/[^\"/]+[.]webp/g))"
    loaded = "performance.getEntriesByType('resource').map(one => one.name.split('/').pop())"
    later = f"new Promise(done => setTimeout(() => done({loaded}), 500))"
    with browser.Server(html) as server:
        tab.open(f"{server.address}/notebooks/03_what_the_step_does_not_say.html")
        touched, *others = map(set, tab.run(named))
        assert others and len(touched) > 2 and len(touched & set(tab.run(later))) <= 1, "the one that shows"
        tab.run(f"{boxes}[0].dispatchEvent(new FocusEvent('focusin', {{bubbles: true}}))")
        found = set(tab.run(later))
    assert touched <= found and all(len(frames & found) <= 1 for frames in others)


@pytest.mark.parametrize(("width", "smallest"), [(375, 9), (DESK, 12)])
def test_letters_in_figures_are_large_enough(show, tab, width: int, smallest: int):
    """They are 9 pt, so 12 pixels at the width that the notebook asks for."""
    pictures = "[...document.querySelectorAll('.cell_output img')].filter(image => image.checkVisibility())"
    asked = "parseFloat((image.style.width ? image : image.closest('[id^=frames-]'))?.style.width)"
    sizes = f"{pictures}.map(image => 12 * image.getBoundingClientRect().width / {asked}).filter(size => size)"
    for page in ("03_what_the_step_does_not_say", "72_gradient_norms_and_clipping"):
        show(f"notebooks/{page}.html", width=width)
        found = tab.run(sizes)
        assert len(found) >= 3 and min(found) >= smallest, (page, found)
    if width < DESK:
        show(f"notebooks/{page}.html", width=width, blocked="*book.css*")
        assert min(tab.run(sizes)) < smallest, "the control"


def test_a_page_can_be_read_before_all_of_its_formulas_are_set(show, tab):
    count = "document.querySelectorAll('mjx-container').length"
    early = f"addEventListener('load', () => {{ window.early = {count}; }})"
    show("book/theorems.html", before=early)
    at_first, all_of_them = tab.run(f"[window.early, {count}]")
    assert at_first < all_of_them / 2 and all_of_them > 500
    show("book/theorems.html", blocked="*book.js*")
    assert tab.run(count) == 0, "the control: nothing else sets them"


def test_a_wide_equation_shows_its_beginning(show, tab):
    boxes = "[...document.querySelectorAll('div.math:has(> mjx-container)')].filter(box => box.checkVisibility())"
    side = "getBoundingClientRect().left"
    before = f"Math.min(...{boxes}.map(box => box.querySelector('mjx-container').{side} - box.{side}))"
    show("book/theorems.html", width=375)
    assert tab.run(f"{boxes}.some(box => box.scrollWidth > box.clientWidth + 1)") and tab.run(before) > -1
    tab.run(f"{boxes}.forEach(box => box.style.flexDirection = 'row-reverse')")
    assert tab.run(before) < -20, "the control: the theme's order"
