"""
The icons of the book's buttons: `python -m tools.icons` writes `book/_static/icons.css`.

The theme brings all of Font Awesome, as a script of 1.5 MB, which the template `layout.html` leaves out. The icons in
use become masks in a style sheet. Any other would still be drawn, from the theme's font.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError
from tools.book_pages import ROOT

FILE = ROOT / "book" / "_static" / "icons.css"
NAMES = (
    "angle-left angle-right arrow-up bars circle-half-stroke download expand file file-pdf github lightbulb list "
    "magnifying-glass moon rocket sun"
).split()
HEAD = """/* Written by tools/icons.py. Icons: Font Awesome Free 6 by Fonticons, Inc., fontawesome.com, CC BY 4.0. */
:is({names}) {{
  font-family: inherit; /* else the theme's font is fetched to measure an empty line */
}}
:is({names})::before {{
  background: currentcolor;
  content: "";
  display: inline-block;
  forced-color-adjust: none;
  height: 1em;
  mask: var(--icon) center / contain no-repeat;
  vertical-align: -0.125em;
  width: var(--icon-width);
}}
/* What the theme says of the pictures that its script makes. */
.search-button-field > .fa-solid {{
  display: flex;
}}
.bd-header-article .btn .fa-lg {{
  font-size: 1em;
  line-height: 1;
  vertical-align: baseline;
}}
"""


def theme_icons() -> str:
    """The script of the theme that holds all icons."""
    place = find_spec("pydata_sphinx_theme")
    if place is None or place.origin is None:
        raise InputError("the theme is not installed: run `make environment`")
    static = Path(place.origin).parent / "theme" / "pydata_sphinx_theme" / "static"
    return (static / "scripts" / "fontawesome.js").read_text(encoding="utf-8")


def outline(name: str, script: str) -> tuple[int, int, str]:
    """Width, height and path of an icon; the solid form where there are several, which the script has last."""
    found = re.findall(rf'[{{,]"?{re.escape(name)}"?:\[(\d+),(\d+),\[[^\]]*\],"[0-9a-f]+","([^"]+)"\]', script)
    if not found:
        raise InputError(f"the theme has no icon {name!r}: correct `NAMES` of tools/icons.py")
    width, height, path = found[-1]
    return int(width), int(height), path


def style(names: Sequence[str] = NAMES) -> str:
    """The style sheet."""
    script = theme_icons()
    rules = [HEAD.format(names=", ".join(f".fa-{name}" for name in names))]
    for name in names:
        width, height, path = outline(name, script)
        picture = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}'><path d='{path}'/></svg>"
        address = picture.replace("<", "%3C").replace(">", "%3E")
        icon = f'  --icon: url("data:image/svg+xml,{address}");\n  --icon-width: {width / height:.4g}em;\n'
        rules.append(f".fa-{name} {{\n{icon}}}\n")
    return "".join(rules)


if __name__ == "__main__":
    storage.write_text(FILE, style())
    print(FILE)
