"""The modules of the package and what each imports, read from their sources."""

from __future__ import annotations

import ast
from collections.abc import Collection
from functools import cache

from iclgd_helpers.paths import PACKAGE


@cache
def imports() -> dict[str, set[str]]:
    """Module (`engine/models`) -> the modules of the package that it imports, anywhere in its text."""
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
    return {name: imported(path.read_text(encoding="utf-8"), files) - {name} for name, path in files.items()}


def imported(source: str, known: Collection[str]) -> set[str]:
    """The modules, of those that are known, that a source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "iclgd_helpers":
            module = "/".join((node.module or "").split(".")[1:])
            inside = {f"{module}/{alias.name}".lstrip("/") for alias in node.names}
            found |= {name for name in (*inside, module) if name in known}
    return found


def reached(module: str, without: Collection[str] = ()) -> set[str]:
    """What a module imports, directly or through others, but through none of `without`."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = imports()[waiting.pop()] - found - set(without) - {module}
        found |= new
        waiting += new
    return found
