"""The book's pages as files: what the table of contents names, notebooks read and written, settings of the book."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import yaml

from iclgd_helpers import storage
from iclgd_helpers.errors import InputError, reason
from iclgd_helpers.experiments.notebook_files import parameters_cell
from iclgd_helpers.paths import repository_root

ROOT = repository_root()
TABLES = "results/tables"  # the data of the tables that pages show, written by `refresh`


def read(notebook: Path) -> nbformat.NotebookNode:
    """The notebook, in the current format."""
    found: nbformat.NotebookNode = nbformat.read(notebook, as_version=4)
    return found


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write whole or not at all, the way Jupyter does."""
    storage.write_text(path, nbformat.writes(notebook) + "\n")


def settings(name: str) -> dict[str, Any]:
    """What one of the book's YAML files holds; InputError if it is damaged."""
    path = ROOT / name
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names")
        return content
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read ({reason(error)}): correct it") from None


def pages() -> list[Path]:
    """What the table of contents names in notebooks/, in its order: notebooks, and prose if there is any."""

    def files(node: Any) -> Iterator[str]:
        children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if isinstance(node, dict) and "file" in node:
            yield str(node["file"])
        for child in children:
            yield from files(child)

    named = (ROOT / name for name in files(settings("_toc.yml")) if name.startswith("notebooks/"))
    return [_page(path) for path in named]


def _page(path: Path) -> Path:
    """The file that an entry of the table of contents means, which may leave out its ending."""
    endings = (".ipynb", ".md")
    files = [path] if path.suffix in endings else [path.with_name(path.name + ending) for ending in endings]
    return next(filter(Path.is_file, files), files[0])


def notebooks() -> list[Path]:
    """The notebooks of the book, in the order of its table of contents."""
    return [path for path in pages() if path.suffix == ".ipynb"]


def preset_values(notebook: Path, preset: str) -> dict[str, Any]:
    """What to inject for `preset`: nothing for the notebooks' own default, or where a page has no presets."""
    own = parameters_cell(notebook).get("preset", preset)
    return {} if own == preset else {"preset": preset}


def repository() -> tuple[str, str]:
    """Address and release tag; they stand in `_config.yml` only."""
    entry = settings("_config.yml")["repository"]
    return entry["url"], entry["branch"]
