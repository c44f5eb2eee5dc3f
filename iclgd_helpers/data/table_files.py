"""
Tables of labelled texts in files: `.csv` and `.jsonl` (either may be packed with gzip: `.csv.gz`), and `.parquet`.

Here other libraries' parsers meet a reader's file, and only here: whatever they raise becomes one line. "Row N" counts
the rows of data from 1: the header of a CSV file is no row, and neither are blank lines. Values stay as they are.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from iclgd_helpers.errors import InputError, reason, shortened

Columns = dict[str, list[Any]]  # name -> one value a row
T = TypeVar("T")

KINDS = (".parquet", ".csv", ".jsonl", ".csv.gz", ".jsonl.gz")
# Larger tables are refused before they fill the memory; an experiment draws a few thousand rows.
MAX_BYTES = 2**29  # of the file, unpacked; of a Parquet file, the columns that are read
MAX_ROWS = 2_000_000
MAX_ROW_BYTES = 2**24

_QUOTES = ": close every quotation mark, and write one inside a quoted text twice"


def read_columns(path: Path, names: Sequence[str]) -> Columns:
    """
    Some columns of a table. Of a link its own name counts, not that of the file it leads to.

    Parameters
    ----------
    path
        a file whose name ends in one of `KINDS`, in small letters or capitals.
    names
        the columns to read; the last one holds the labels.

    Raises
    ------
    InputError
        if there is no such file, it cannot be read or is too large, or a column is missing or there twice.
    """
    kind = next((kind for kind in KINDS if path.name.lower().endswith(kind)), None)
    if kind is None or not os.path.isfile(path):
        raise InputError(f"no table at {shortened(str(path))}: name a file that ends in {', '.join(KINDS)}")
    if kind == ".parquet":
        return _read_parquet(path, names)
    content = _parsed(_called(path), _unpacked, path, kind.endswith(".gz"))
    _check_content(_called(path), content)
    return (_read_csv if ".csv" in kind else _read_jsonl)(_called(path), content, names)


def places(where: str, found: Sequence[str], names: Sequence[str]) -> dict[str, int]:
    """
    Places of the columns `names` among those `found`: by the exact name, else by the name without blanks around it.

    Raises
    ------
    InputError
        if a column is missing, or there are two of that name.
    """
    result = {}
    for name in names:
        exact = [place for place, other in enumerate(found) if other == name]
        same = exact or [place for place, other in enumerate(found) if other.strip() == name.strip()]
        if not same:
            raise InputError(f"{where}: no column {shortened(repr(name))} among {shortened(str(list(found[:100])))}")
        if len(same) > 1:
            raise InputError(f"{where}: {len(same)} columns are called {name!r}: rename all but one")
        result[name] = same[0]
    return result


def _called(path: Path) -> str:
    return f"{shortened(path.name)} in {shortened(repr(str(path.parent)))}"


def _parsed(what: str, parser: Callable[..., T], *arguments: object, way: str = "") -> T:
    """
    What another library's parser returns. It may raise anything, whatever the file holds, so any exception is caught.

    `parser` only calls libraries: a fault of the helpers must not be taken for one of the file.
    """
    try:
        return parser(*arguments)
    except Exception as error:
        raise InputError(f"{what} cannot be read ({reason(error)}){way}") from error


def _check_rows(what: str, rows: int) -> None:
    if rows > MAX_ROWS:
        raise InputError(f"{what} has more than {MAX_ROWS:,} rows: keep fewer")


# ------------------------------------------------------------------------------------------------------- CSV and JSONL
def _unpacked(path: Path, packed: bool) -> bytes:
    """The content of a file, up to one byte more than is allowed: a small packed file may unpack to any size."""
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        return file.read(MAX_BYTES + 1)


def _check_content(what: str, content: bytes) -> None:
    """Refuse content that is too large or no UTF-8, before a parser spends memory and time on it."""
    if len(content) > MAX_BYTES:
        raise InputError(f"{what} holds more than {MAX_BYTES >> 20} MiB: keep fewer rows")
    start = 0
    while len(content) - start > MAX_ROW_BYTES:  # to the last end of a line within reach, as long as there is one
        end = content.rfind(b"\n", start, start + MAX_ROW_BYTES + 1)
        if end < 0:
            line = content.count(b"\n", 0, start) + 1
            raise InputError(f"line {line} of {what} is longer than {MAX_ROW_BYTES >> 20} MiB: shorten it")
        start = end + 1
    # In UTF-16, one of the first two characters has a zero byte even where the mark at the beginning is missing.
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise InputError(f"{what} is not UTF-8; it looks like UTF-16: save it as UTF-8")
    try:
        content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        likely = "a binary file" if b"\0" in content else "Latin-1 or Windows-1252"
        raise InputError(f"{what} is not UTF-8 in line {line}; it looks like {likely}: save it as UTF-8") from None


def _read_csv(what: str, content: bytes, names: Sequence[str]) -> Columns:
    before = csv.field_size_limit(MAX_ROW_BYTES)  # of the whole process, and by default less than a long text has
    try:
        return _csv_columns(what, content, names)
    finally:
        csv.field_size_limit(before)


def _csv_columns(what: str, content: bytes, names: Sequence[str]) -> Columns:
    """
    Columns of a CSV file whose rows all have as many fields as its header.

    Where the numbers differ, other readers take the first column for an index, fill up or cut off, and so give texts
    their neighbours' labels.
    """
    records = _records(what, content)
    header, _ = next(records, ([], False))
    found = places(what, header, names)
    columns: Columns = {name: [] for name in found}
    wanted = [(columns[name], place) for name, place in found.items()]
    of_several_lines = []
    for row, (fields, several_lines) in enumerate(records, 1):
        _check_rows(what, row)
        if len(fields) != len(header):
            said = f"row {row} of {what} has another number of fields ({len(fields)}) than the header ({len(header)})"
            raise InputError(f"{said}: write one for each column, with quotation marks around a text that holds commas")
        for column, place in wanted:
            column.append(fields[place])
        if several_lines:
            of_several_lines.append((row, fields))
    labels = {text.strip() for text in columns[names[-1]]} - {""}
    for row, fields in of_several_lines:
        if _holds_rows(fields, found[names[-1]], labels):
            said = f"row {row} of {what} goes over lines that look like rows of their own"
            raise InputError(f"{said}{_QUOTES} (or write the table as .jsonl)")
    return columns


def _records(what: str, content: bytes) -> Iterator[tuple[list[str], bool]]:
    """The header and the rows of a CSV file, without blank lines, each with whether it goes over several lines."""
    reader = csv.reader(io.TextIOWrapper(io.BytesIO(content), "utf-8-sig", newline=""), strict=True)
    row = line = 0
    while True:
        fields = _parsed(f"row {row} of {what}" if row else f"the header of {what}", next, reader, None, way=_QUOTES)
        if fields is None:
            return
        if len(fields) > 1 or "".join(fields).strip():
            yield fields, reader.line_num > line + 1
            row += 1
        line = reader.line_num


def _holds_rows(fields: Sequence[str], label: int, labels: Container[str]) -> bool:
    """
    Whether the lines of one row are rows themselves, which a stray quotation mark made one text.

    A text may have several lines, with commas. But two lines that have as many commas as a row, and a label where rows
    have it, are rows.
    """
    lines = [line.split(",") for line in ",".join(fields).split("\n")]
    return sum(len(parts) == len(fields) and parts[label].strip() in labels for parts in lines) > 1


def _read_jsonl(what: str, content: bytes, names: Sequence[str]) -> Columns:
    """Columns of a file with one JSON object a line; what a row leaves out is None."""
    decode = json.JSONDecoder(object_pairs_hook=_different_keys).decode
    stripped = {name.strip() for name in names}
    header: dict[str, None] = {}
    rows: list[dict[str, Any]] = []
    for line in content.removeprefix(codecs.BOM_UTF8).splitlines():
        if not line.strip():
            continue
        this = f"row {len(rows) + 1} of {what}"
        values = _parsed(this, decode, line.decode())
        if not isinstance(values, dict):
            raise InputError(f"{this} is no JSON object: write the names of the columns and their values in braces")
        _check_rows(what, len(rows) + 1)
        header.update(dict.fromkeys(values))
        rows.append({key: value for key, value in values.items() if key.strip() in stripped})
    keys = list(header)
    return {name: [row.get(keys[place]) for row in rows] for name, place in places(what, keys, names).items()}


def _different_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one key, the parser would take the last without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("it gives two values for one name")
    return values


# ------------------------------------------------------------------------------------------------------------- Parquet
def _read_parquet(path: Path, names: Sequence[str]) -> Columns:
    """Columns of a Parquet file, by its own schema: what pandas notes in it about indices and types is not needed."""
    what = _called(path)
    header, kinds, _ = _parsed(what, _opened, path, [])
    found = places(what, header, names)
    for name, place in found.items():
        if not _parsed(what, _has_simple_values, kinds[place]):
            raise InputError(f"column {name!r} of {what} holds {shortened(str(kinds[place]))}: write texts or numbers")
    stored = [header[place] for place in found.values()]
    _, _, content = _parsed(what, _opened, path, stored)
    rows, size = _parsed(what, _size, content.metadata, stored)
    _check_rows(what, rows)
    if size > MAX_BYTES:
        raise InputError(f"{what} holds more than {MAX_BYTES >> 20} MiB: keep fewer rows")
    table = _parsed(what, content.read, stored, False)  # without threads: they gain nothing here
    return {name: _parsed(what, _values, table.column(header[place])) for name, place in found.items()}


def _opened(path: Path, texts: list[str]) -> tuple[list[str], list[Any], Any]:
    """
    Names and types of all columns, and the file, whose columns `texts` keep each different text once.

    Without that, a small file that repeats a long text a million times would fill the memory.
    """
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path, read_dictionary=texts)
    return file.schema_arrow.names, file.schema_arrow.types, file


def _has_simple_values(kind: Any) -> bool:
    """Whether values of a type of Arrow are texts, numbers or the like: none is longer than it is in the file."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    texts = str(kind) in ("string", "large_string", "string_view")  # the last is not known to every version
    return texts or types.is_primitive(kind) or types.is_decimal(kind) or types.is_null(kind)


def _size(metadata: Any, columns: Container[str]) -> tuple[int, int]:
    """
    How many rows a file has, and how many bytes the columns have at most when unpacked, according to the file.

    Columns are asked one by one only where all together are too large. Arrow ends the whole process, with no exception,
    where the entries of a damaged file on one column contradict each other.
    """
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    size = sum(group.total_byte_size for group in groups)
    if size > MAX_BYTES:
        chunks = [group.column(i) for group in groups for i in range(metadata.num_columns)]
        size = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)
    return max(metadata.num_rows, sum(group.num_rows for group in groups)), size


def _values(column: Any) -> list[Any]:
    """The values of a column of Arrow; equal texts are the same object."""
    values: list[Any] = []
    for chunk in column.chunks:
        if hasattr(chunk, "dictionary"):
            texts = chunk.dictionary.to_pylist()
            values += [None if i is None else texts[i] for i in chunk.indices.to_pylist()]
        else:
            values += chunk.to_pylist()
    return values
