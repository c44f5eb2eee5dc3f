"""The page of the helpers: what is public has its entry, once, in the order of the rooms, and as it is written."""

import ast
import re
from pathlib import Path

import pytest

from tools import api_page
from tools.book_pages import ROOT

PACKAGE = ROOT / "iclgd_helpers"
MODULE = '''"""What it holds, of {n} names."""


class Pair(NamedTuple):
    """Two numbers; `total` adds them."""

    first: int
    second: int = 0
    _hidden: int = 0

    @property
    def swapped(self) -> "Pair":
        """The other way round."""

    def _secret(self) -> None:
        """Not shown."""


def total(
    pair: Pair,  # both
    scale: float = 1.0,
    sizes: tuple[int, ...] = (1,),
) -> float:
    """
    Sum of a `Pair`, times $2^{s}$; *stars*, <tags> and $HOME stay.

    Parameters
    ----------
    pair
        what is added, as `other.made` gives it,
        or `added_up` does.
    scale : factor.

    Returns
    -------
    A number.
    """


def added_up() -> Pair:
    """Of everything."""


def _private() -> None:
    """Not shown."""
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    for room in filter(None, api_page.ROOMS):
        (tmp_path / "iclgd_helpers" / room).mkdir(parents=True)
        (tmp_path / "iclgd_helpers" / room / "__init__.py").write_text(f'"""Of {room}."""')
    (tmp_path / "iclgd_helpers" / "__init__.py").write_text('"""All."""')
    (tmp_path / "iclgd_helpers" / "data" / "some.py").write_text(MODULE)
    (tmp_path / "iclgd_helpers" / "pages" / "other.py").write_text('"""O."""\n\n\ndef made() -> None:\n    """M."""\n')
    return tmp_path


def test_entries_say_what_the_docstring_says(package: Path) -> None:
    page = api_page.api_page(package)
    assert "`class Pair(first: int, second: int = 0)`\n: Two numbers; `total` adds them.\n\n  `swapped -> " in page
    signature = "`total(pair: Pair, scale: float = 1.0, sizes: tuple[int, ...] = (1,)) -> float`"
    said = r": Sum of a [`Pair`](#api-data-some-class-pair), times `2^{s}`; \*stars\*, \<tags> and \$HOME stay."
    assert f"(api-data-some-total)=\n\n{signature}\n{said}\n" in page
    to = "[`other.made`](#api-pages-other-made) gives it, or [`added_up`](#api-data-some-added-up) does."
    assert f"  **Parameters**\n\n  - `pair`: what is added, as {to}\n  - `scale`: factor.\n\n  **Returns**\n" in page
    assert "\n  A number.\n" in page
    assert "secret" not in page and "hidden" not in page and "private" not in page


def names(tree: ast.Module) -> list[str]:
    defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    public = [node for node in defined if not node.name.startswith("_")]
    return ["class-" * isinstance(node, ast.ClassDef) + node.name for node in public]


def missing(page: str) -> set[str]:
    """Public names, as `module.name`, that have not exactly one entry."""
    entries = re.findall(r"^\(api-(\S+)\)=$", page, re.M)
    lost = set()
    for path in PACKAGE.rglob("*.py"):
        room = "" if path.parent == PACKAGE else f"{path.parent.name}."
        for name in names(ast.parse(path.read_text())) if path.stem not in api_page.COMMANDS else ():
            full = f"{room}{path.stem}.{name}"
            if entries.count(re.sub(r"[^a-z0-9]+", "-", full.lower())) != 1:
                lost.add(full)
    return lost


@pytest.fixture(scope="session")
def page() -> str:
    return api_page.api_page()


def test_all_that_is_public_is_there_once_and_in_order(page: str) -> None:
    assert missing(page) == set()
    assert re.findall(r"^## `(\w+)`$", page, re.M) == list(api_page.ROOMS[:-1])
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(api_page.ROOMS[:-1]), "a new room needs its place on the page"
    without = page.replace("(api-measures-metrics-cosine)=", "")
    assert missing(without) == {"measures.metrics.cosine"}, "the control"


def test_links_lead_to_entries(page: str) -> None:
    places, links = set(re.findall(r"^\((api-\S+)\)=$", page, re.M)), set(re.findall(r"\]\(#(api-[^)]*)\)", page))
    assert len(links) > 20 and links <= places
