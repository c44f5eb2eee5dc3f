"""Cells of a notebook, by id: their code, and the names after some of them were executed."""

import linecache
from functools import cache
from typing import Any

import nbformat

from iclgd_helpers.pipeline import ROOT


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
