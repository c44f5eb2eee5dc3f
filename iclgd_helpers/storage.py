"""
One way to write what must last, and to read it back: files appear whole or not at all, JSON carries its checksum.

What a killed process leaves behind begins with `.part-`, the machine and its process number; whoever writes beside it
later removes it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iclgd_helpers.errors import InputError, reason, shortened

CHECKSUM = "json_sha256"
PROBE_BYTES = 2**16  # written to see whether a folder takes anything
OLD = 24 * 3600  # seconds after which another machine's leftovers are nobody's
_MACHINE = re.sub(r"\W", "", platform.node())[:20] or "machine"
_numbers = itertools.count()


# -------------------------------------------------------------------------------------------------------------- writing
def part(folder: Path, suffix: str = "") -> Path:
    """A new name in `folder` for something half-written; no other process or call makes the same."""
    return folder / f".part-{_MACHINE}-{os.getpid()}-{next(_numbers)}{suffix}"


def remove_leftovers(folder: Path) -> None:
    """Remove from `folder` what processes that have ended left half-written."""
    for path in folder.glob(".part-*"):
        _, machine, process, *_ = [*path.name.split("-"), "", ""]
        try:
            ended = machine == _MACHINE and process.isdigit() and not _is_running(int(process))
            if ended or time.time() - path.stat().st_mtime > OLD:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError:
            continue  # somebody else removed it, or owns it


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


@contextmanager
def writing(what: object, way_out: str = "free space, or make it writable") -> Iterator[None]:
    """The system's error against writing, as one line; only code that writes belongs inside."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {what} ({error.strerror or reason(error)}): {way_out}") from None


def write_bytes(path: Path, content: bytes) -> None:
    """
    Write a file; it appears whole or not at all.

    Raises
    ------
    InputError
        if the disk is full or not writable.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        half = part(path.parent)
        try:
            _write_through(half, content)
            half.replace(path)
        except BaseException:
            half.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8."""
    write_bytes(path, text.encode())


def write_folder(folder: Path, files: Mapping[str, bytes], way_out: str) -> None:
    """
    Write a folder of files; it appears whole or not at all, and takes the place of one that is there.

    Raises
    ------
    InputError
        if the disk is full or not writable.
    """
    parent = folder.parent
    with writing(folder, way_out):
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        half, replaced = part(parent), part(parent)
        try:
            half.mkdir()
            for name, content in files.items():
                _write_through(half / name, content)
            if folder.exists():
                folder.rename(replaced)
            half.rename(folder)
        finally:
            for left in (half, replaced):
                shutil.rmtree(left, ignore_errors=True)


def _write_through(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # a rename must not outlive the content when the power fails


def require_writable(folder: Path) -> None:
    """
    Make `folder`, and write to it: before anything is computed that could not be stored there.

    Raises
    ------
    InputError
        if that fails.
    """
    with writing(f"to {folder}", "needed is a folder that can be written and has space"):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        probe = part(folder)
        try:
            _write_through(probe, bytes(PROBE_BYTES))
        finally:
            probe.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------- JSON
def plain(value: Any) -> Any:
    """`value` as JSON holds it: NaN becomes null, tuples become lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of `content`, however its file is laid out; without indentation, which only slow code can write."""
    compact = json.dumps(content, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return hashlib.sha256(compact.encode()).hexdigest()


_NUMBER = r"(?:-?\d[-+.\deE]*|null)"
_NUMBERS = re.compile(rf"\[\n\s+({_NUMBER}(?:,\n\s+{_NUMBER})*)\n\s+\]")


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """`content` with its checksum: keys in order, a list of numbers on one line (a fifth of the size is saved)."""
    held: dict[str, Any] = plain(content)
    text = json.dumps(held | {CHECKSUM: checksum(held)}, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text).encode()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content`, NaN as null, with its checksum; errors as for `write_bytes`."""
    write_bytes(path, json_bytes(content))


def parse_json(text: str | bytes) -> Any:
    """
    What `text` holds.

    Raises
    ------
    ValueError
        if it is no JSON, nested too deeply, or holds NaN or infinity, which JSON does not know.
    """

    def refuse(name: str) -> None:
        raise ValueError(f"it holds {name}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def checked_json(text: bytes) -> dict[str, Any]:
    """
    What `json_bytes` made, without the checksum.

    Raises
    ------
    ValueError
        if it is something else, or was changed.
    """
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError("it holds no names")
    if CHECKSUM not in content:
        raise ValueError("it has no checksum")
    if content.pop(CHECKSUM) != checksum(content):
        raise ValueError("it does not match its checksum")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """
    What `write_json` wrote.

    Raises
    ------
    InputError
        if the file cannot be read, or its checksum does not match.
    """
    try:
        return checked_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({shortened(str(error), 100)}): delete it and run again") from None
