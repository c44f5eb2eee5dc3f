"""Where things are: the checkout, paths that a reader gives, and the environment variables that name folders."""

from __future__ import annotations

import os
from pathlib import Path

from iclgd_helpers.errors import InputError, shortened

PACKAGE = Path(__file__).parent


def repository_root() -> Path:
    """Folder that relative paths resolve against: the checkout, or the working directory without one."""
    checkout = PACKAGE.parent
    return checkout if (checkout / "_toc.yml").exists() else Path.cwd()


def resolve_path(path: str | os.PathLike[str], base: Path | None = None) -> Path:
    """
    Absolute form of `path`, a relative one taken from `base` (the repository root). A link keeps its own name.

    Raises
    ------
    InputError
        if nothing can be there: an unknown user, too long a name, a circle of links, odd characters, a folder
        without permission to read.
    """
    try:
        os.fspath(path).encode()  # notebooks and records hold paths, so they have to be text
        full = (base or repository_root()) / Path(path).expanduser()
        found = full.parent.resolve() / full.name if full.name not in ("", "..") else full.resolve()
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the path {shortened(repr(os.fspath(path)))} cannot be used ({reason})") from None
    return found


def resolve_here(path: str | os.PathLike[str]) -> Path:
    """The same for a path that is typed in a shell: a relative one is taken from the working directory."""
    try:
        here = Path.cwd()
    except OSError:
        raise InputError("the working directory is no longer there: change to another one") from None
    return resolve_path(path, here)


def data_folder() -> Path | None:
    """`$ICLGD_DATA`: the folder of the six tasks, if it is set."""
    value = os.environ.get("ICLGD_DATA")
    return resolve_path(value) if value else None


def records_folder() -> Path:
    """Where records are kept: `$ICLGD_RECORDS`, else `_runs/records`."""
    return resolve_path(os.environ.get("ICLGD_RECORDS") or "_runs/records")


def cache_folder() -> Path:
    """
    `$ICLGD_CACHE`, else `iclgd` in the user's cache folder; made when it is missing.

    Raises
    ------
    InputError
        if it cannot be made.
    """
    user = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "iclgd"
    folder = resolve_path(os.environ.get("ICLGD_CACHE") or user, Path.cwd())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"the cache folder {str(folder)!r} cannot be made ({error.strerror})"
        raise InputError(f"{reason}: set ICLGD_CACHE to another one") from error
    return folder
