"""
Notebooks in files: the cells of a reader's `.ipynb`, looked at before anything runs.

Here a notebook's JSON meets the helpers, and only here. Jupyter's own library takes seconds to import and is asked
last, by `demand_valid`, when a notebook is to be executed.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from iclgd_helpers.errors import InputError, reason
from iclgd_helpers.paths import repository_root
from iclgd_helpers.storage import parse_json

MAX_BYTES = 10**8  # of a file; a page of this book with its figures has about a hundredth
KINDS = ("code", "markdown", "raw")
MAX_DEPTH = 100  # of lists and objects in one another; Jupyter's libraries call themselves at each
FORMAT = 4  # of Jupyter's notebooks, since 2015


@dataclass(frozen=True)
class Cell:
    """One cell: its text, its tags, and whether it is code."""

    source: str
    tags: tuple[str, ...]
    is_code: bool = True


def page(path: Path) -> Path:
    """The page of the book that a path such as `50` means where nothing lies; else the path."""
    if not path.name.isdecimal() or path.exists():
        return path
    return next((repository_root() / "notebooks").glob(f"{path.name}_*.ipynb"), path)


def read_cells(path: Path) -> list[Cell]:
    """
    The cells of a notebook.

    Raises
    ------
    InputError
        if the file is missing, too large, no notebook, or one of an older format.
    """
    if not os.path.isfile(path):
        raise InputError(f"no notebook at {path}: name an .ipynb file")
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes, and {MAX_BYTES:,} are read at most")
        return _cells(parse_json(path.read_bytes().decode()))
    except (OSError, ValueError) as error:
        raise _no_notebook(path, error) from None


def _no_notebook(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is no notebook ({reason(error)}): name another, or save it anew in Jupyter")


def library() -> ModuleType:
    """
    Jupyter's library of notebooks; whoever needs it later finds it imported.

    What checks its schemas would compile the grammar of international addresses, of which a notebook has none: that
    takes three quarters of the time.
    """
    grammar = "rfc3987_syntax"
    absent = grammar not in sys.modules
    if absent:
        sys.modules[grammar] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("nbformat")
    finally:
        if absent:
            del sys.modules[grammar]


def demand_valid(path: Path) -> None:
    """InputError unless Jupyter's own library finds every part of the notebook in its place."""
    nbformat = library()
    from nbformat.warnings import MissingIDFieldWarning

    warnings.filterwarnings("ignore", category=MissingIDFieldWarning)  # no fault, and said again by whoever reads it
    try:
        nbformat.validate(nbformat.read(path, as_version=FORMAT))
    except Exception as error:  # of that library alone, which raises many kinds for files of other kinds
        raise _no_notebook(path, error) from None


def _cells(content: Any) -> list[Cell]:
    """What `content` holds, every part of which is as the format demands; ValueError names the first that is not."""
    _demand(not _is_deeper(content, MAX_DEPTH), f"it is nested more than {MAX_DEPTH} times")
    numbers = [content.get(name) for name in ("nbformat", "nbformat_minor")] if isinstance(content, dict) else [None]
    _demand(all(type(number) is int for number in numbers), "it says no format")
    _demand(content["nbformat"] == FORMAT, f"it is of format {content['nbformat']}, and {FORMAT} is read")
    metadata = content.get("metadata")
    _demand(isinstance(metadata, dict) and isinstance(metadata.get("papermill", {}), dict), "it has no metadata")
    _demand(isinstance(content.get("cells"), list), "it has no list of cells")
    return [_cell(f"cell {number}", cell) for number, cell in enumerate(content["cells"], 1)]


def _cell(where: str, cell: Any) -> Cell:
    _demand(isinstance(cell, dict) and cell.get("cell_type") in KINDS, f"{where} is of no kind")
    source, metadata = cell.get("source"), cell.get("metadata")
    lines = [source] if isinstance(source, str) else source
    _demand(_is_list_of(lines, str), f"the text of {where} is none")
    _demand(isinstance(metadata, dict), f"{where} has no metadata")
    tags = metadata.get("tags", [])
    _demand(_is_list_of(tags, str), f"the tags of {where} are none")
    _demand(_is_list_of(cell.get("outputs", []), dict), f"the outputs of {where} are none")
    "".join(lines).encode()  # half a character could not be written again
    return Cell("".join(lines), tuple(tags), cell["cell_type"] == "code")


def _demand(condition: bool, fault: str) -> None:
    if not condition:
        raise ValueError(fault)


def _is_deeper(content: Any, levels: int) -> bool:
    holders = [content] if isinstance(content, (dict, list)) else []
    for _ in range(levels):
        items = (one for held in holders for one in (held.values() if isinstance(held, dict) else held))
        holders = [one for one in items if isinstance(one, (dict, list))]
    return bool(holders)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def is_output(path: Path) -> bool:
    """Whether papermill has written the notebook at `path`."""
    try:
        content = parse_json(path.read_bytes().decode())
    except (OSError, ValueError):
        return False
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(metadata, dict) and "papermill" in metadata


def parameters_cell(path: Path) -> dict[str, Any]:
    """
    Names and literal defaults in the cell of the notebook at `path` that is tagged `parameters`.

    Raises
    ------
    InputError
        as `read_cells`, or if that cell does more than assign literals, or there is not exactly one.
    """
    tagged = [cell for cell in read_cells(path) if "parameters" in cell.tags]
    if len(tagged) != 1:
        raise InputError(f"{path.name} has {len(tagged)} cells tagged 'parameters'; it needs exactly one")
    found = {}
    try:
        for statement in ast.parse(tagged[0].source).body:
            match statement:  # neither `a = b = 3` nor `a: int = 3`: papermill reads them otherwise
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    found[name] = ast.literal_eval(value)
                case _:
                    raise ValueError
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # of ast, for any text
        raise InputError(f"{path.name}: its cell of parameters may only hold lines such as seed = 3") from None
    return found
