"""Cells of a notebook, by id: their code, and the names after some of them were executed."""

import ast
import linecache
from functools import cache
from typing import Any

import nbformat

from tools.book_pages import ROOT


@cache
def sources(slug: str) -> dict[str, str]:
    """Code of the cells of `notebooks/<slug>.ipynb`."""
    cells = nbformat.read(ROOT / "notebooks" / f"{slug}.ipynb", as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


def run(slug: str, *ids: str, changes: tuple[tuple[str, str], ...] = (), **given: Any) -> dict[str, Any]:
    """
    Names after the cells `ids` were executed, `given` being there before.

    Each of `changes` (old, new) is made beforehand; AssertionError unless all of them find their text exactly once.
    """
    names = {"__name__": slug} | given
    for old, _new in changes:
        assert sum(sources(slug)[name].count(old) for name in ids) == 1, f"{old!r} is not there, or not once"
    for name in ids:
        code, file = sources(slug)[name], f"<{slug} {name}>"
        for old, new in changes:
            code = code.replace(old, new)
        linecache.cache[file] = (len(code), None, code.splitlines(keepends=True), file)  # for inspect.getsource
        exec(compile(code, file, "exec", dont_inherit=True), names)
    return names


def whole_page(slug: str, **given: Any) -> dict[str, Any]:
    """
    Names after all cells of the page were executed with the parameters `given` that it has.

    What a cell ends in is turned into what a reader sees, so that a table that cannot be drawn is an error here, too.
    """
    names: dict[str, Any] = {"__name__": slug, "display": _shown}
    for name, source in sources(slug).items():
        if name == "setup":
            continue
        cell, last = ast.parse(source), None
        if cell.body and isinstance(cell.body[-1], ast.Expr):
            last = ast.Expression(cell.body.pop().value)
        exec(compile(cell, f"<{slug} {name}>", "exec", dont_inherit=True), names)
        if last:
            _shown(eval(compile(last, f"<{slug} {name}>", "eval", dont_inherit=True), names))
        if source.startswith("preset = "):
            names |= {key: value for key, value in given.items() if key in names}
    return names


def _shown(value: Any) -> None:
    if hasattr(value, "_repr_html_"):
        value._repr_html_()
