"""A Sphinx extension: what touches a formula in a line stays on its line; a browser may break on either side of one."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

MOST = 12  # characters that stay with a formula, on either side; a longer word may break from it
BEFORE, AFTER = re.compile(rf"\S{{1,{MOST}}}\Z"), re.compile(rf"\A\S{{1,{MOST}}}")


class Together(SphinxPostTransform):
    """Put each formula and the characters that touch it into an element of the class `together`."""

    default_priority = 900  # after all texts are there
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """What Sphinx calls."""
        for formula in list(self.document.findall(nodes.math)):
            hold(formula)


def hold(formula: nodes.math) -> None:
    """Wrap one formula, if a text touches it."""
    parent = formula.parent
    at = parent.index(formula)
    before = cut(parent, at - 1, BEFORE)
    after = cut(parent, at + 1, AFTER)
    if not before and not after:
        return
    group = nodes.inline(classes=["together"])
    at = parent.index(formula)
    parent[at] = group
    group.extend([nodes.Text(before)] * bool(before) + [formula] + [nodes.Text(after)] * bool(after))


def cut(parent: nodes.Element, at: int, pattern: re.Pattern[str]) -> str:
    """Take what matches out of a child of `parent`, if that is a text."""
    child = parent[at] if 0 <= at < len(parent) else None
    found = pattern.search(child) if isinstance(child, nodes.Text) else None
    if child is None or found is None:
        return ""
    parent[at] = nodes.Text(child[: found.start()] + child[found.end() :])
    return found[0]


def setup(app: Sphinx) -> dict[str, bool]:
    """What Sphinx calls."""
    app.add_post_transform(Together)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
