"""Files of tables: what is read, and one line for whatever is wrong with a file, its labels, or the template."""

import csv
import gzip
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import in_one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_helpers.data import sources, table_files, tasks
from iclgd_helpers.data.sources import load_table
from iclgd_helpers.data.tasks import TaskData, label_text, own_task
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import parameters
from iclgd_helpers.experiments.inputs import task_data
from tools.book_pages import ROOT

FORMATS = (".csv", ".jsonl", ".parquet")
TEMPLATE, WORDS = "Review: {text} Sentiment:", "negative,positive"
ROWS = [("a door", 0), ("a lamp", 1), ("a song", 0), ("a river", 1)]
JSONL = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in ROWS)
CSV = "text,label\n" + "".join(f"{text},{label}\n" for text, label in ROWS)


def parquet(columns: dict | pa.Table, **options: object) -> bytes:
    """The bytes of a Parquet file."""
    file = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), file, **options)
    return file.getvalue()


def columns(**changed: object) -> dict:
    return {"text": [text for text, _ in ROWS], "label": [label for _, label in ROWS]} | changed


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., TaskData]:
    """A function that puts bytes into a file and reads it as a table."""

    def make(name: str, content: str | bytes, template: str = TEMPLATE, words: str = WORDS, **labels: str) -> TaskData:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return load_table(own_task(template, words, **labels), tmp_path / name)

    return make


def by_row(data: TaskData) -> list[tuple[str, int]]:
    """Prompt and class of each row, in the order of the file."""
    return [(e.prompt, e.label) for e in sorted((*data.train, *data.evaluation), key=lambda e: e.row)]


# ------------------------------------------------------------------------------------------------------ what is read
def with_pandas_notes(notes: bytes) -> bytes:
    return parquet(pa.table(columns()).replace_schema_metadata({b"pandas": notes}))


def by_pandas(index: list | None = None, **changed: object) -> bytes:
    return pd.DataFrame(columns(**changed), index).to_parquet()


LIES = {
    "index_columns": ["nowhere"],
    "columns": [{"name": "text", "field_name": "text", "pandas_type": "datetime", "numpy_type": "datetime64[ns]"}],
    "column_indexes": [{"name": None, "field_name": None, "pandas_type": "int64", "numpy_type": "int64"}],
}
NAMES = ["other", "negative", "positive"]
CATEGORY = pa.DictionaryArray.from_arrays([1, 2, 1, 2], NAMES)
SAME = {  # files that say what CSV above says
    "JSONL": ("mine.jsonl", JSONL),
    "Parquet": ("mine.parquet", parquet(columns())),
    "capitals": ("mine.CSV", CSV),
    "packed CSV": ("mine.csv.gz", gzip.compress(CSV.encode())),
    "packed JSONL": ("mine.JSONL.GZ", gzip.compress(JSONL.encode())),
    "blanks in the header": ("mine.csv", CSV.replace("text,label", " text , label ")),
    "blanks in the names of a JSONL file": ("mine.jsonl", JSONL.replace('"label"', '" label "')),
    "blank lines at the end": ("mine.jsonl", JSONL + "\n  \r\n"),
    "blank lines between rows": ("mine.jsonl", JSONL.replace("\n", "\n\n")),
    "blank lines in a CSV file": ("mine.csv", "\n" + CSV.replace("\n", "\n  \n\n")),
    "quoted fields": ("mine.csv", "".join(f'"{a}","{b}"\r\n' for a, b in [("text", "label"), *ROWS])),
    "a mark of UTF-8": ("mine.jsonl", "\ufeff" + JSONL),
    "a mark of UTF-8 in CSV": ("mine.csv", "\ufeff" + CSV),
    "other columns without a name": ("mine.csv", CSV.replace("\n", ",,\n")),
    "a category that no row has": ("mine.parquet", parquet(columns(label=CATEGORY))),
    "a category written by pandas": ("mine.parquet", by_pandas(label=pd.Categorical.from_codes([1, 2, 1, 2], NAMES))),
    "an index of its own": ("mine.parquet", by_pandas(index=["a", "b", "c", "d"])),
    "a category, by pandas": ("mine.parquet", parquet(columns(label=CATEGORY.cast(pa.string()).dictionary_encode()))),
    "categories of texts": ("mine.parquet", parquet(columns(text=pa.array(columns()["text"]).dictionary_encode()))),
    "large strings": ("mine.parquet", parquet(columns(text=pa.array(columns()["text"], pa.large_string())))),
    "small integers": ("mine.parquet", parquet(columns(label=pa.array([0, 1, 0, 1], pa.int8())))),
    "decimals": ("mine.parquet", parquet(columns(label=pa.array([0, 1, 0, 1], pa.decimal128(3, 1))))),
    "many groups of rows": ("mine.parquet", parquet(columns(), row_group_size=1)),
    "notes of pandas that lie": ("mine.parquet", with_pandas_notes(json.dumps(LIES).encode())),
    "notes of pandas that are broken": ("mine.parquet", with_pandas_notes(b"[1, 2")),
    "a nested column that nothing reads": ("mine.parquet", parquet(columns(other=[[1], [2, 3], [], [4]]))),
}


@pytest.mark.parametrize("what", SAME)
def test_the_same_table(read, what: str):
    reference = read("reference.csv", CSV)
    assert by_row(reference) == [(f"Review: {text} Sentiment:", label) for text, label in ROWS]
    assert read(*SAME[what]) == reference


TEXTS = ["", " ", "a\0b", 'he said "no", twice', "two\nlines", "two\r\nlines", "\u2028\x0b\x85"]
TEXTS += ["NA", "null", "007", "é😀"]


@pytest.mark.parametrize("suffix", FORMATS)
def test_texts_stay_as_they_are(tmp_path: Path, suffix: str):
    frame = pd.DataFrame({"text": TEXTS, "label": [0, 1] * 5 + [0]})
    path = tmp_path / f"mine{suffix}"
    write = {".csv": frame.to_csv, ".jsonl": frame.to_json, ".parquet": frame.to_parquet}[suffix]
    write(path, **({"orient": "records", "lines": True} if suffix == ".jsonl" else {"index": False}))
    prompts = [prompt for prompt, _ in by_row(load_table(own_task(TEMPLATE, WORDS), path))]
    assert prompts == [TEMPLATE.format(text=text) for text in TEXTS]


def test_lines_with_commas_in_a_text_are_no_rows(read):
    """The control of the rows that a stray quotation mark makes one text."""
    for text in ("Dear all,\nI like it, really\n1, 2 or 3 times", "I like it, really,\nor so"):
        assert by_row(read("mine.csv", f'text,label\n"{text}",1\nb,0\n'))[0] == (TEMPLATE.format(text=text), 1)


def test_the_limit_of_the_csv_module_is_put_back(read):
    before = csv.field_size_limit()
    assert len(by_row(read("mine.csv", CSV + "x" * (before + 1) + ",1\n"))) == 5
    in_one_line(read, "mine.csv", CSV + '"')
    assert csv.field_size_limit() == before


def test_a_link_counts_by_its_own_name(tmp_path: Path, read):
    """As DVC and git-annex leave it: the content lies under its hash."""
    reference = read("reference.csv", CSV)
    (tmp_path / "reference.csv").rename(tmp_path / "d41d8cd98f00b204")
    (tmp_path / "mine.csv").symlink_to("d41d8cd98f00b204")
    values = {"preset": "smoke", "data_file": str(tmp_path / "mine.csv"), "template": TEMPLATE, "verbalizers": WORDS}
    assert task_data(parameters.resolve(values)) == reference


# ----------------------------------------------------------------------------------------------------------- labels
EQUAL = [  # labels within one of these are the same label, across them they are different
    [0, -0, 0.0, -0.0, "0", "-0", "00", "0.0", "-0.0", "+0", "0e0", " 0 ", "0."],
    [1, 1.0, "1", "01", "1.0", "+1", "1.000000000000000000e+00"],
    [-1, -1.0, "-1", "-1.0", "-01"],
    [0.5, "0.5", "0.50", ".5", "5e-1"],
    [True, "True", "true", "TRUE", " true"],
    [False, "False", "false"],
    ["positive", " positive\n"],
    ["Positive"],
    ["1_0"],
    ["１"],  # a wide digit is no number
    [2**63, str(2**63)],
    [2**63 + 1, f"0{2**63 + 1}"],
    [None, float("nan"), "", "  "],
]


def test_which_labels_are_equal():
    texts = [{label_text(value) for value in group} for group in EQUAL]
    assert all(len(group) == 1 for group in texts), texts
    assert len(set.union(*texts)) == len(EQUAL)
    assert texts[-1] == {""}, "no label"


@pytest.mark.parametrize("end", ["", "x", ".", ".5x", "e", "e5"])
@pytest.mark.parametrize("digit", "01")
def test_a_long_label_is_compared_at_once(digit: str, end: str):
    started = time.perf_counter()
    label_text(digit * 10**6 + end)
    assert time.perf_counter() - started < 2


def labelled(labels: list, suffix: str) -> bytes:
    """A table of such labels; in CSV they are written as Python prints them."""
    if suffix == ".parquet":
        return parquet(columns(label=labels))
    rows = [{"text": text, "label": label} for (text, _), label in zip(ROWS, labels, strict=True)]
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    return ("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)).encode()


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("labels", "words", "values", "expected"),
    [
        ([0, 1, 0, 1], WORDS, None, [0, 1, 0, 1]),
        ([-0.0, 1.0, 0.0, 1.0], WORDS, None, [0, 1, 0, 1]),
        (["negative", "positive"] * 2, WORDS, None, [0, 1, 0, 1]),
        (["bad", "good"] * 2, WORDS, "bad,good", [0, 1, 0, 1]),
        (["bad", "good"] * 2, WORDS, "good,bad", [1, 0, 1, 0]),
        (["1", "2"] * 2, WORDS, "1,2", [0, 1, 0, 1]),
        (["N", "P"] * 2, WORDS, "N,P", [0, 1, 0, 1]),
        ([-1, 1, -1, 1], WORDS, "-1, 1", [0, 1, 0, 1]),
        ([1.0, 2.0, 1.0, 2.0], WORDS, "1,2", [0, 1, 0, 1]),
        (["00", "01", "-0", "1.0"], WORDS, None, [0, 1, 0, 1]),
        ([1, 2, 1, 2], WORDS, "01, 2.0", [0, 1, 0, 1]),
        (["01", "02", "01", "02"], WORDS, "01,02", [0, 1, 0, 1]),
        ([True, False, True, False], "True,False", None, [0, 1, 0, 1]),
        ([True, False, True, False], "true,false", None, [0, 1, 0, 1]),
        ([True, False, True, False], WORDS, "False,True", [1, 0, 1, 0]),
        (["true", "FALSE", "True", "false"], "Yes,No", "True,False", [0, 1, 0, 1]),
        ([1, 0, 1, 0], "1,0", None, [0, 1, 0, 1]),  # the verbalizers come first
        ([1, 0, 1, 0], "True,False", None, [1, 0, 1, 0]),
    ],
)
def test_one_rule_for_labels_in_every_format(read, suffix, labels, words, values, expected):
    data = read(f"mine{suffix}", labelled(labels, suffix), words=words, label_values=values)
    assert [label for _, label in by_row(data)] == expected


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    ("labels", "named"),
    [
        ([True, False] * 2, "'True' in row 1 is none of negative, positive (nor are all labels 0, 1)"),
        ([-1, 1] * 2, "'-1' in row 1 is none of 0, 1 (nor are all labels negative, positive)"),
        ([1, 2] * 2, "'2' in row 2 is none of 0, 1 (nor are all labels negative, positive)"),
        (["negative", "positive", "negative", "neutral"], "'neutral' in row 4 is none of negative, positive"),
        (["negative", "positive", "negative", "Negative"], "'Negative' in row 4 is none of negative, positive"),
        (["negative", "positive", "negative", "3"], "'3' in row 4 is none of negative, positive"),
    ],
)
def test_a_label_that_is_no_class_is_named_with_its_row(read, suffix: str, labels: list, named: str):
    """Not dropped, as the six tasks' rows with the label -1 are; and truth values are no numbers."""
    said = in_one_line(read, f"mine{suffix}", labelled(labels, suffix))
    assert f"column 'label': {named}" in said and "pass label_values" in said


@pytest.mark.parametrize("wrong", ["7", "maybe"])
@pytest.mark.parametrize(("kind", "other"), [("0,1", WORDS), (WORDS, "0,1")])
def test_the_exception_is_named_not_the_rule(read, kind: str, other: str, wrong: str):
    """One row of many says something else: it is named, whatever the first row says."""
    rows = "".join(f"sentence {i},{kind.split(',')[i % 2]}\n" for i in range(2000))
    said = in_one_line(read, "mine.csv", f"text,label\n{rows}x,{wrong}\n")
    none, nor = (", ".join(words.split(",")) for words in (kind, other))
    assert f"'{wrong}' in row 2001 is none of {none} (nor are all labels {nor}): correct it" in said


@pytest.mark.parametrize("values", ["1,01", "true,True", "a,", "0,-0"])
def test_values_that_are_the_same_label(values: str):
    said = in_one_line(own_task, TEMPLATE, WORDS, "label", values)
    assert "one different value for each of negative, positive" in said


# ----------------------------------------------------------------------------------------------------------- faults
DEEP = '{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
SPANNING = "goes over lines that look like rows of their own"
FAULTS = {  # name of the file, its content, what the line says
    "a comma more in every row": ("m.csv", "text,label\n1,a,0\n2,b,1\n", "row 1 of m.csv|(3) than the header (2)"),
    "a comma more at the end of every row": ("m.csv", "text,label\na,0,\nb,1,\n", "row 1 of m.csv|fields (3)"),
    "a comma more in one row": ("m.csv", CSV + "no, never,1\n", "row 5 of m.csv|fields (3)|quotation marks around"),
    "a field less": ("m.csv", CSV + "no\n", "row 5 of m.csv|number of fields (1)"),
    "a field less, the text last": ("m.csv", "label,text\n0,a\n1\n1,c\n", "row 2 of m.csv|number of fields (1)"),
    "blank lines are not counted": ("m.csv", "\ntext,label\n\na,0\n \nno\n", "row 2 of m.csv"),
    "a quote that opens and never closes": ("m.csv", CSV + '"a,0\nb,1\n', "row 5 of m.csv|close every quotation mark"),
    "a quote that swallows rows": ("m.csv", CSV + '"a,0\nb,1\nc",0\nd,1\n', f"row 5 of m.csv|{SPANNING}"),
    "a quote that swallows half a row": ("m.csv", CSV + '"a,0\nb",1\n', f"row 5 of m.csv|{SPANNING}"),
    "a quote that swallows, the text last": ("m.csv", 'label,text\n1,x\n0,"a\n1,b"\n', f"row 2 of m.csv|{SPANNING}"),
    "a quote that swallows up to a quoted row": ("m.csv", CSV + '"a,0\nb,1\n"c",0\n', "row 5 of m.csv|quotation mark"),
    "quotes inside a quoted text": ("m.csv", CSV + '"Good" he said,1\n', "row 5 of m.csv|inside a quoted text twice"),
    "a quote in the header": ("m.csv", '"text,label\na,0\n', "the header of m.csv|close every quotation mark"),
    "UTF-16": ("m.csv", CSV.encode("utf-16"), "it looks like UTF-16: save it as UTF-8"),
    "UTF-16 without a letter of ASCII": ("m.csv", "文字".encode("utf-16"), "it looks like UTF-16"),
    "UTF-16 without its mark": ("m.csv", CSV.encode("utf-16-le"), "it looks like UTF-16"),
    "UTF-16 the other way round": ("m.jsonl", JSONL.encode("utf-16-be"), "it looks like UTF-16"),
    "Latin-1": ("m.csv", (CSV + "café,1\n").encode("latin-1"), "in line 6; it looks like Latin-1 or Windows"),
    "Latin-1 in JSONL": ("m.jsonl", JSONL.encode() + b'{"text": "caf\xe9"}', "in line 5; it looks like Latin-1"),
    "another kind of file": ("m.csv", b"PK\x03\x04\x14\0\xff\0", "it looks like a binary file"),
    "not packed": ("m.csv.gz", CSV, "m.csv.gz in |cannot be read (Not a gzipped file"),
    "half packed": ("m.jsonl.gz", gzip.compress(JSONL.encode())[:-9], "cannot be read (Compressed file ended"),
    "a text column twice": ("m.csv", "text,text,label\na,b,0\nc,d,1\n", "2 columns are called 'text': rename"),
    "a column twice but for blanks": ("m.csv", "text ,label, text\na,0,b\n", "2 columns are called 'text'"),
    "a label column twice": ("m.parquet", parquet(pa.table([["a"], [0], [1]], ["text", "label", "label"])), "2 col"),
    "a key twice": ("m.jsonl", JSONL + '{"text": "a", "text": "b", "label": 1}\n', "row 5 of m.jsonl|two values"),
    "a list for a row": ("m.jsonl", JSONL + '["a", 1]\n', "row 5 of m.jsonl|is no JSON object"),
    "numbers for rows": ("m.jsonl", "1\n2\n", "row 1 of m.jsonl|is no JSON object"),
    "half an object": ("m.jsonl", JSONL + '\n{"text": ', "row 5 of m.jsonl|cannot be read (Expecting value"),
    "deep nesting": ("m.jsonl", JSONL + DEEP, "row 5 of m.jsonl|cannot be read (maximum recursion depth"),
    "a number of 5,000 digits": ("m.jsonl", JSONL + '{"text": "a", "label": ' + "9" * 5000 + "}", "row 5 of m.jsonl"),
    "a list for a label": ("m.jsonl", JSONL + '{"text": "a", "label": [1]}\n', "'[1]' in row 5 is none of 0, 1"),
    "no label": ("m.jsonl", JSONL + '{"text": "a", "label": NaN}\n', "no label in row 5"),
    "a label of a million letters": ("m.jsonl", JSONL + '{"text": "a", "label": "' + "y" * 10**6 + '"}', "y … y"),
    "half a character": ("m.jsonl", JSONL + '{"text": "a\\ud800", "label": 1}\n', "row 5 in column 'text' holds half"),
    "half a character for a label": ("m.jsonl", JSONL + '{"text": "a", "label": "\\ud800"}', r"'\ud800' in row 5 is"),
    "half a character in bytes": ("m.csv", CSV.encode() + b"a\xed\xa0\x80,1\n", "is not UTF-8 in line 6"),
    "lists for texts": ("m.parquet", parquet(columns(text=[["a"]] * 4)), "column 'text' of m.parquet in |holds list<"),
    "lists for labels": ("m.parquet", parquet(columns(label=[[0]] * 4)), "column 'label' of m.parquet in |holds list<"),
    "bytes for texts": ("m.parquet", parquet(columns(text=[b"a", b"b", b"c", b"\xff"])), "holds binary: write texts"),
    "numbers for texts": ("m.parquet", parquet(columns(text=[1, 2, 3, 4])), "column 'text' holds no text in row 1"),
    "a text missing": ("m.parquet", parquet(columns(text=["a", None, "c", "d"])), "holds no text in row 2"),
    "a long prompt": ("m.csv", CSV + "x " * 500_000 + ",1\n", "the prompt of row 5 is longer than 500,000 characters"),
    "a single row": ("m.csv", "text,label\na,0\n", "m.csv has 1 row: at least two are needed"),
    "no rows": ("m.csv", "text,label\n", "no row has a label"),
    "semicolons": ("m.csv", "text;label\na;0\n", "no column 'text' among ['text;label']"),
    "a list of all rows": ("m.jsonl", '[{"text": "a", "label": 0}]\n', "row 1 of m.jsonl"),
    "a number for a text": ("m.jsonl", JSONL + '{"text": 7, "label": 0}\n', "column 'text' holds no text in row 5"),
    "no text": ("m.jsonl", JSONL + '{"label": 1}\n', "column 'text' holds no text in row 5"),
    "a mark and no more": ("m.parquet", b"PAR1", "m.parquet in "),
    "nothing": ("m.csv", "", "m.csv in |no column 'text' among []"),
    "blank lines only": ("m.csv", "\n \n", "no column 'text' among []"),
    "many columns": ("m.csv", ",".join(f"c{i}" for i in range(100_000)) + "\n", "no column 'text' among ['c0', "),
    "a line break in a column's name": ("m.csv", '"te\nxt",label\na,0\n', r"among ['te\nxt', 'label']"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_file_is_one_line(read, fault: str):
    name, content, expected = FAULTS[fault]
    said = in_one_line(read, name, content)
    for part in expected.split("|"):
        assert part in said


def test_an_empty_prompt_is_refused(read):
    """There would be nothing to predict the label after; an empty text in a template with words is a prompt."""
    assert by_row(read("mine.csv", CSV + ",1\n"))[4] == ("Review:  Sentiment:", 1)
    said = in_one_line(read, "mine.csv", CSV + ",1\n", template="{text}")
    assert "the prompt of row 5 is empty" in said


def test_a_name_that_is_no_files(tmp_path: Path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "gone.csv").symlink_to("nowhere")
    for name in ("folder.csv", "gone.csv", "mine.tsv", "x" * 300 + ".csv", "nul\0.csv", "a\nb.csv"):
        assert "no table at" in in_one_line(load_table, own_task(TEMPLATE, WORDS), tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ sizes
def test_a_gigabyte_is_refused_at_once(tmp_path: Path):
    with open(tmp_path / "mine.csv", "wb") as file:
        file.write(CSV.encode())
        file.truncate(10**9)
    started = time.perf_counter()
    assert "holds more than 512 MiB: keep fewer rows" in in_one_line(
        load_table, own_task(TEMPLATE, WORDS), tmp_path / "mine.csv"
    )
    assert time.perf_counter() - started < 10


def test_a_text_that_stands_once_and_counts_often(read):
    """A small Parquet file whose texts would take a gigabyte."""
    rows, before = 100_000, pa.default_memory_pool().max_memory()
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["x" * 10_000])
    content = parquet({"text": texts, "label": [0, 1] * (rows // 2)}, row_group_size=rows, store_schema=False)
    assert len(content) < 100_000
    assert "the prompts are longer than 536,870,912 characters" in in_one_line(read, "mine.parquet", content)
    assert pa.default_memory_pool().max_memory() < max(before + 1, 2**28)


def test_a_small_file_with_many_rows_or_long_texts(read, monkeypatch):
    many = parquet({"text": pa.nulls(3_000_000, pa.string()), "label": pa.nulls(3_000_000, pa.int8())})
    assert "has more than 2,000,000 rows" in in_one_line(read, "mine.parquet", many)
    monkeypatch.setattr(table_files, "MAX_BYTES", 2**20)
    content = parquet(columns(text=["x" * 2**19] * 4), compression="zstd", use_dictionary=False)
    assert len(content) < 2**16
    assert "holds more than 1 MiB: keep fewer rows" in in_one_line(read, "mine.parquet", content)
    beside = parquet(columns(other=["x" * 2**19] * 4), use_dictionary=False)
    assert by_row(read("mine.parquet", beside)) == by_row(read("mine.csv", CSV)), "what is not read does not count"


@pytest.mark.parametrize(("name", "content"), [("m.csv", CSV), ("m.jsonl", JSONL), ("m.parquet", parquet(columns()))])
def test_each_limit_holds_for_each_format(read, monkeypatch, name: str, content: str | bytes):
    monkeypatch.setattr(table_files, "MAX_ROWS", 4)
    assert len(by_row(read(name, content))) == 4
    monkeypatch.setattr(table_files, "MAX_ROWS", 3)
    assert "has more than 3 rows" in in_one_line(read, name, content)


def test_a_packed_file_is_not_unpacked_further_than_needed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(table_files, "MAX_BYTES", 2**20)
    path = tmp_path / "mine.csv.gz"
    path.write_bytes(gzip.compress(CSV.encode() + b"x" * 2**26))
    assert len(table_files._unpacked(path, True)) == 2**20 + 1
    assert "holds more than 1 MiB" in in_one_line(load_table, own_task(TEMPLATE, WORDS), path)


@pytest.mark.parametrize("before", [0, 1, 63, 64, 65, 200])
def test_a_line_that_is_too_long_is_named(monkeypatch, before: int):
    monkeypatch.setattr(table_files, "MAX_ROW_BYTES", 64)
    lines = [b"a" * (i % 64) + b"\n" for i in range(before)]
    for after in (b"", b"\n", b"\nb\n" + b"c" * 64):
        table_files._check_content("it", b"".join(lines) + b"a" * 64 + after)
    for after in (b"", b"\n", b"\nb\n"):
        said = in_one_line(table_files._check_content, "it", b"".join(lines) + b"a" * 65 + after)
        assert said.startswith(f"line {before + 1} of it is longer")


def test_a_row_that_is_too_long_is_named(read, monkeypatch):
    """A quotation mark that never closes: the reader gives up early, and says where it opened."""
    monkeypatch.setattr(table_files, "MAX_ROW_BYTES", 100)
    said = in_one_line(read, "mine.csv", CSV + '"a,0\n' + "b,1\n" * 100)
    assert "row 5 of mine.csv" in said and "field larger than field limit (100)" in said


# --------------------------------------------------------------------------------------------------------- template
@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{text:1000000000}", "only a small number"),
        ("{text:>1000000000}", "only a small number"),
        ("{text:.1000000000}", "only a small number"),
        ("{text:٩٩٩٩٩٩٩٩}", "only a small number"),
        ("{text:" + "9" * 5000 + "}", "only a small number"),
        ("{text:400000}{text:400000}", "only a small number"),
        ("{text:{text}}", "only a small number"),
        ("{text}{label:{text}}", "only a small number"),
        ("{text:{text.__class__}}", "only a small number"),
        ("{text:{text:{text}}}", "only a small number"),
        ("x" * 600_000 + "{text}", "prompts of more than 500,000 characters"),
        ("{text!z}", "Unknown conversion specifier"),
        ("{text:d}", "Unknown format code"),
        ("{text.upper}", "needs the name of a text column"),
        ("{text[0]}", "needs the name of a text column"),
        ("{}", "needs the name of a text column"),
        ("{text}{}", "Replacement index 0"),
        ("{text", "expected '}'"),
        ("text}", "Single '}'"),
        ("{text}\ud800", "half a character"),
    ],
)
def test_a_template_that_cannot_be_filled_in(template: str, says: str):
    started = time.perf_counter()
    assert says in in_one_line(own_task, template, WORDS)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{text:.3} {{x}}", "a d {x}"),
        ("{text!r}:", "'a door':"),
        ("{text:>8}", "  a door"),
        ("{text}, {text}", "a door, a door"),
    ],
)
def test_a_template_may_cut_quote_and_pad(read, template: str, prompt: str):
    assert by_row(read("mine.csv", CSV, template=template))[0] == (prompt, 0)


def test_words_with_half_characters():
    for changed in ({"verbalizers": "a,\udc80"}, {"label_column": "\udc80"}, {"label_values": "a,\udc80"}):
        assert "half a character" in in_one_line(own_task, **({"template": TEMPLATE, "verbalizers": WORDS} | changed))


# ----------------------------------------------------------------------------------------------- anything whatever
PARSERS = {"m.csv.gz": "gzip.open", "m.jsonl": "json.JSONDecoder.decode", "m.parquet": "pyarrow.parquet.ParquetFile"}
KINDS_OF_ERRORS = [SystemError("x"), MemoryError(), RecursionError("a\nb"), KeyError("k"), BufferError()]


@pytest.mark.parametrize("error", KINDS_OF_ERRORS, ids=repr)
def test_whatever_a_parser_raises_is_one_line(read, monkeypatch, error: Exception):
    def fails(*_arguments: object, **_options: object) -> None:
        raise error

    for name, parser in PARSERS.items():
        with monkeypatch.context() as patch:
            patch.setattr(parser, fails)
            assert f"{name} in " in in_one_line(read, name, JSONL)


@pytest.mark.parametrize("helper", [(table_files, "places"), (table_files, "_check_rows"), (sources, "label_text")])
def test_a_fault_of_the_helpers_is_not_taken_for_one_of_the_file(tmp_path: Path, monkeypatch, helper: tuple):
    def fails(*_arguments: object) -> None:
        raise ValueError("a fault of the helpers")

    task = own_task(TEMPLATE, WORDS)
    monkeypatch.setattr(*helper, fails)
    for name, content in (("m.csv", CSV.encode()), ("m.jsonl", JSONL.encode()), ("m.parquet", parquet(columns()))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="a fault of the helpers") as caught:
            load_table(task, tmp_path / name)
        assert not isinstance(caught.value, InputError)


def answered(call: Callable, *arguments: object) -> None:
    """Assert that a call ends well or with one line, soon."""
    started = time.perf_counter()
    try:
        call(*arguments)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1500
    assert time.perf_counter() - started < 3


SOUND = {
    ".csv": CSV.encode(),
    ".csv.gz": gzip.compress(CSV.encode()),
    ".jsonl": JSONL.encode(),
    ".parquet": parquet(columns()),
}
PIECES = [b'"', b'"""', b",", b"\n", b"\r", b"\xff", b"\0", b"{", b"[", b"\xed\xa0\x80", b"\\ud800", b" ", b""]
CHANGES = st.tuples(st.floats(0, 1), st.integers(0, 9), st.sampled_from(PIECES) | st.binary(max_size=4))


@settings(max_examples=400)
@given(st.sampled_from(sorted(SOUND)), st.lists(CHANGES, max_size=5))
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path_factory, suffix: str, changes: list):
    content = SOUND[suffix]
    for place, removed, put in changes:
        at = int(place * len(content))
        content = content[:at] + put + content[at + removed :]
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(content)
    answered(load_table, own_task(TEMPLATE, WORDS), path)


EVERY_BYTE = """
import pathlib, sys
from iclgd_helpers import errors
from iclgd_helpers.data import sources, tasks
path, task = pathlib.Path(sys.argv[1]), tasks.own_task("{text}", "a,b")
content = path.read_bytes()
for place in range(content.rindex(b"PAR1") - 4 - int.from_bytes(content[-8:-4], "little"), len(content)):
    for changed in (0, content[place] ^ 2):
        path.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        try:
            sources.load_table(task, path)
        except errors.InputError as error:
            assert len(str(error).splitlines()) == 1
"""


def test_no_byte_of_a_parquet_files_end_ends_the_process(tmp_path: Path):
    """Arrow may do so (SIGABRT) where it is asked for sizes of a column that do not fit together."""
    path = tmp_path / "damaged.parquet"
    path.write_bytes(parquet(columns()))
    done = subprocess.run([sys.executable, "-c", EVERY_BYTE, str(path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-1000:]


def joined(*pieces: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(pieces), max_size=9).map("".join)


TEMPLATES = joined(
    "{text}", "{text", "{", "}", ":", "!", "r", ".", "9", "99999", "[", "]", "<", "=", "label", "\n", ","
)
LABELS = joined("a", "b", ",", "1", "0", "-", " ", "True", "true", "\n", "\ud800", ".", "e")


@settings(max_examples=400)
@given(TEMPLATES, LABELS, LABELS | st.none())
def test_templates_and_words_are_taken_or_refused_in_one_line(tmp_path_factory, template, words, values):
    path = tmp_path_factory.getbasetemp() / "sound.csv"
    path.write_text(CSV)
    answered(lambda: load_table(own_task(template, words, "label", values), path))


def test_the_guide_states_the_limits():
    guide = " ".join((ROOT / "book" / "how_to_use.md").read_text(encoding="utf-8").split())
    file, row = table_files.MAX_BYTES >> 20, table_files.MAX_ROW_BYTES >> 20
    assert f"{file} MiB unpacked, two million rows, {row} MiB a row" in guide and table_files.MAX_ROWS == 2_000_000
    assert f"{tasks.LONGEST_PROMPT:,} characters a prompt" in guide
