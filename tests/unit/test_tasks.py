"""Tasks: prompts, sources, the protocol's order, demonstrations, and one clear error for each bad input."""

import gzip
import html
import os
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iclgd_helpers import pinned_downloads
from iclgd_helpers.data import sources
from iclgd_helpers.data.demonstrations import select_demonstrations, shuffle_labels
from iclgd_helpers.data.sources import load_task, split_snippets
from iclgd_helpers.data.synthetic import tiny_tokenizer
from iclgd_helpers.data.tasks import TASKS, Example
from iclgd_helpers.errors import InputError

# columns, train rows, evaluation rows, a row of text and its prompt (protocol.md 1.1)
PROTOCOL = {
    "cb": (("premise", "hypothesis"), 250, 56, "A B Question: C D. True, False, or Neither? Answer:"),
    "sst2": (("sentence",), 67349, 872, "Sentence: A B Label:"),
    "sst5": (("text",), 8544, 1101, "Sentence: A B Label:"),
    "subj": (("text",), 8000, 2000, "Input: A B Type:"),
    "mr": (("text",), 8530, 1066, "Review: A B Sentiment:"),
    "agnews": (
        ("text",),
        9776,
        2000,
        "Classify the news articles into the categories of World, Sports, Business, "
        "and Technology. Article: A B Answer:",
    ),
    "snippets": (("text",), 5077, 2000, "Review: A B Sentiment:"),
}


def need_real_data(available: bool, reason: str) -> None:
    """Skip where real data is not at hand, unless ICLGD_REQUIRE_DATA=1 says that this must not be skipped."""
    if not available and os.environ.get("ICLGD_REQUIRE_DATA") != "1":
        pytest.skip(reason)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with a small `mr` task."""
    (tmp_path / "mr").mkdir()
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(12)], "label": [0, 1] * 6})
    for split in ("train", "validation"):
        frame.to_parquet(tmp_path / "mr" / f"{split}.parquet")
    return tmp_path


@pytest.fixture(autouse=True)
def no_data_folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real" not in request.node.name:
        monkeypatch.delenv("ICLGD_DATA", raising=False)


def rewrite(folder: Path, **columns: list) -> None:
    pd.DataFrame(columns).to_parquet(folder / "mr" / "train.parquet")


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_the_protocols(name):
    columns, _, _, prompt = PROTOCOL[name]
    task = TASKS[name]
    assert task.text_columns == columns
    texts = ("A B",) if len(columns) == 1 else ("A B", "C D")
    assert task.template.format(**dict(zip(columns, texts, strict=True))) == prompt
    assert all(word == word.strip() and word for word in task.verbalizers)


def test_two_blanks_stand_before_the_label_of_sst2():
    assert TASKS["sst2"].template.format(sentence="so good ") == "Sentence: so good  Label:"


@pytest.mark.parametrize("name", TASKS)
def test_generated_text_is_deterministic_balanced_and_tells_its_label(name):
    data, again = load_task(name, "generated"), load_task(name, "generated")
    assert data == again
    assert not {e.prompt for e in data.train} & {e.prompt for e in data.evaluation}
    counts = Counter(example.label for example in data.train)
    assert len(set(counts.values())) == 1 and len(counts) == len(data.task.verbalizers)
    words = [{w for e in data.train if e.label == label for w in e.prompt.split()} for label in counts]
    assert all(words[i] != words[j] for i in counts for j in counts if i != j)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
def test_folder_formats_give_the_same_data(folder, tmp_path, suffix):
    texts = ["null", 'a "quoted", text', "12", " blanks  kept ", "{braces}", "é"]
    frame = pd.DataFrame({"text": texts, "label": [0, 1] * 3})
    other = tmp_path / "other" / "mr"
    other.mkdir(parents=True)
    for split in ("train", "validation"):
        frame.to_parquet(folder / "mr" / f"{split}.parquet")
        target = other / f"{split}.{suffix}"
        {
            "parquet": lambda f, t: f.to_parquet(t),
            "csv": lambda f, t: f.to_csv(t, index=False),
            "jsonl": lambda f, t: f.to_json(t, orient="records", lines=True),
        }[suffix](frame, target)
    data = load_task("mr", "folder", other.parent)
    assert data == load_task("mr", "folder", folder)
    assert [e.prompt for e in data.train] == [f"Review: {text} Sentiment:" for text in texts]


def test_evaluation_is_shuffled_with_seed_1_and_capped(folder):
    rows = 2500
    frame = pd.DataFrame({"text": [str(i) for i in range(rows)], "label": [0, 1] * (rows // 2)})
    frame.to_parquet(folder / "mr" / "validation.parquet")
    data = load_task("mr", "folder", folder)
    expected = datasets.Dataset.from_pandas(frame).shuffle(seed=1)[:2000]["text"]
    assert [e.prompt for e in data.evaluation] == [f"Review: {text} Sentiment:" for text in expected]
    assert [str(e.row) for e in data.evaluation] == list(expected)
    assert [e.label for e in data.evaluation] == [e.row % 2 for e in data.evaluation]
    assert [e.row for e in data.train] == list(range(12))


def test_data_folder_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("ICLGD_DATA", str(folder))
    assert load_task("mr", "folder") == load_task("mr", "folder", folder)


def test_rows_without_a_label_are_dropped(folder):
    rewrite(folder, text=["a", "b", "c", "d"], label=[0.0, -1.0, None, 1.0])
    assert [(e.row, e.label) for e in load_task("mr", "folder", folder).train] == [(0, 0), (3, 1)]


@pytest.mark.parametrize("none", ["", " ", "-1", "-1.0", "-01"])
def test_a_label_of_a_csv_file_may_be_left_out(folder, none):
    (folder / "mr" / "train.parquet").unlink()
    (folder / "mr" / "train.csv").write_text(f"text,label\na,0\nb,{none}\nc,1\n")
    assert [(e.row, e.label) for e in load_task("mr", "folder", folder).train] == [(0, 0), (2, 1)]


@pytest.mark.parametrize("name", ["train.csv", "train.CSV", "train.csv.gz", "train.JSONL", "train.jsonl.gz"])
def test_a_folder_holds_every_kind_of_table(folder, name):
    expected = load_task("mr", "folder", folder)
    frame = pd.read_parquet(folder / "mr" / "train.parquet")
    (folder / "mr" / "train.parquet").unlink()
    csv = frame.to_csv(index=False) if ".csv" in name.lower() else frame.to_json(orient="records", lines=True)
    (folder / "mr" / name).write_bytes(gzip.compress(csv.encode()) if name.endswith(".gz") else csv.encode())
    assert load_task("mr", "folder", folder) == expected


def test_checksum_names_the_content_and_not_the_place(folder, tmp_path):
    first = load_task("mr", "folder", folder)
    (tmp_path / "elsewhere").mkdir()
    (folder / "mr").rename(tmp_path / "elsewhere" / "mr")
    moved = load_task("mr", "folder", tmp_path / "elsewhere")
    assert moved.checksum == first.checksum
    frame = pd.read_parquet(tmp_path / "elsewhere" / "mr" / "train.parquet")
    frame.loc[3, "text"] += "."
    frame.to_parquet(tmp_path / "elsewhere" / "mr" / "train.parquet")
    assert load_task("mr", "folder", tmp_path / "elsewhere").checksum != first.checksum


def test_checksum_depends_on_the_verbalizers(folder):
    shutil.copytree(folder / "mr", folder / "snippets")  # same template, columns and label ids; " negative"
    (folder / "snippets" / "validation.parquet").rename(folder / "snippets" / "evaluation.parquet")
    mr, snippets = (load_task(name, "folder", folder) for name in ("mr", "snippets"))
    assert mr.train == snippets.train and mr.evaluation == snippets.evaluation
    assert mr.checksum != snippets.checksum


def delete(path: str):
    return lambda folder: (folder / "mr" / path).unlink()


def damage(folder: Path) -> None:
    (folder / "mr" / "train.parquet").write_bytes(b"PAR1 no more")


def damage_jsonl(folder: Path) -> None:
    (folder / "mr" / "train.parquet").unlink()
    (folder / "mr" / "train.jsonl").write_text('{"text": "a", "label": 0}\n{"text": ')


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (delete("validation.parquet"), "no validation.parquet, .csv, .jsonl"),
        (damage, "train.parquet .* cannot be read"),
        (damage_jsonl, "train.jsonl .* cannot be read"),
        (lambda f: rewrite(f, txt=["a"], label=[0]), r"no column 'text' among \['txt', 'label'\]"),
        (lambda f: rewrite(f, text=["a"], labels=[0]), "no column 'label'"),
        (lambda f: rewrite(f, text=["a", "b"], label=[0, 2]), "'2' in row 2 is none of 0, 1: correct it"),
        (lambda f: rewrite(f, text=["a", "b"], label=[0, -2]), "'-2' in row 2 is none of"),
        (lambda f: rewrite(f, text=["a", "b"], label=[0, 0.5]), "'0.5' in row 2 is none of"),
        (lambda f: rewrite(f, text=["a", "b"], label=["0", "positive"]), "'positive' in row 2 is none of"),
        (lambda f: rewrite(f, text=["a", "b"], label=[-1, -1]), "no row has a label"),
        (lambda f: rewrite(f, text=["a", None], label=[0, 1]), "column 'text' holds no text in row 2"),
        (lambda f: rewrite(f, text=[1, 2], label=[0, 1]), "column 'text' holds no text in row 1"),
        (lambda f: rewrite(f, text=["a", "b"], label=[True, False]), "'True' in row 1 is none of 0, 1"),
    ],
)
def test_bad_files_are_one_clear_line(folder, spoil, says):
    spoil(folder)
    with pytest.raises(InputError, match=says) as caught:
        load_task("mr", "folder", folder)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_errors(folder):
    with pytest.raises(InputError, match="unknown task 'nonsense'; the tasks are cb"):
        load_task("nonsense", "generated")
    with pytest.raises(InputError, match="'mr' has no data_source=pypi; it has hub, folder, generated"):
        load_task("mr", "pypi")
    with pytest.raises(InputError, match="'snippets' has no data_source=hub"):
        load_task("snippets", "hub")
    with pytest.raises(InputError, match="no folder 'cb' in the data folder"):
        load_task("cb", "folder", folder)
    with pytest.raises(InputError, match="needs data_folder, or the environment variable ICLGD_DATA"):
        load_task("mr", "folder")


@pytest.fixture(params=[True, False], ids=["reachable", "unreachable"])
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the hub answers."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: request.param)
    return request.param


def test_hub_reads_both_splits(hub, monkeypatch):
    def load_dataset(hub_id, config, split):
        assert (hub_id, config, split) == ("SetFit/subj", None, ["train", "test"])
        assert datasets.config.HF_HUB_OFFLINE is not hub
        return [datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1], "idx": [5, 6]})] * 2

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    read = [Example("Input: a Type:", 0, 0), Example("Input: b Type:", 1, 1)]
    assert load_task("subj", "hub").train == read


@pytest.mark.parametrize("error", [ConnectionError("no route"), ValueError("none"), OSError("offline")])
def test_no_hub_names_the_ways_out(hub, monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(error))
    with pytest.raises(InputError, match="'nyu-mll/glue' .* check the network, or pass data_source=folder"):
        load_task("sst2", "hub")


def test_an_unreachable_hub_is_said_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(sources, "hub_is_reachable", lambda: False)
    started = time.perf_counter()
    with pytest.raises(InputError, match="'nyu-mll/glue' could not be had from the hub"):
        load_task("sst2", "hub")
    assert time.perf_counter() - started < 5
    assert not datasets.config.HF_HUB_OFFLINE and not huggingface_hub.constants.HF_HUB_OFFLINE


def examples(labels: list[int]) -> list[Example]:
    return [Example(f"prompt {row}", label, row) for row, label in enumerate(labels)]


LABELS = st.lists(st.integers(0, 3), min_size=1, max_size=60)


@settings(deadline=None)
@given(LABELS, st.integers(0, 99), st.data())
def test_demonstrations_are_the_first_of_the_shuffled_split(labels, seed, data):
    n = data.draw(st.integers(1, len(labels)))
    shuffled = datasets.Dataset.from_dict({"row": range(len(labels))}).shuffle(seed=seed)[:n]["row"]
    assert [e.row for e in select_demonstrations(examples(labels), n, seed, False)] == list(shuffled)


@settings(deadline=None)
@given(LABELS, st.integers(0, 99), st.data())
def test_balanced_demonstrations(labels, seed, data):
    train, counts = examples(labels), Counter(labels)
    n = data.draw(st.integers(1, len(labels)))
    share, left_over = divmod(n, len(counts))
    if min(counts.values()) < share or sum(c > share for c in counts.values()) < left_over:
        with pytest.raises(InputError, match="cannot be balanced"):
            select_demonstrations(train, n, seed, True)
        return
    chosen = select_demonstrations(train, n, seed, True)
    taken = Counter(e.label for e in chosen)
    assert len(chosen) == n and all(taken[label] - share in (0, 1) for label in counts)
    order = select_demonstrations(train, len(train), seed, False)
    assert [e for e in order if e in set(chosen)] == chosen  # in the shuffled order
    for label in counts:  # and of each class the first ones
        assert [e for e in order if e.label == label][: taken[label]] == [e for e in chosen if e.label == label]


def test_more_demonstrations_than_rows():
    with pytest.raises(InputError, match=r"n_demonstrations=4 is larger than the training split \(3 rows\): pass .*=3"):
        select_demonstrations(examples([0, 1, 0]), 4, 0, False)


@pytest.mark.parametrize("labels", [[0] * 9 + [1], [0] * 9 + [1, 1], [0, 1, 1, 2, 2, 2], [0, 0, 1, 1]])
def test_a_rare_class_says_how_many_demonstrations_there_may_be(labels):
    with pytest.raises(InputError, match="label 0 has|label 1 has") as caught:
        select_demonstrations(examples(labels + [0] * 9), len(labels) + 8, 0, True)
    assert "balanced=False" in str(caught.value) and "add rows" in str(caught.value)
    most = int(re.search(r"n_demonstrations=(\d+) or less", str(caught.value))[1])
    for n in range(1, most + 1):
        assert len(select_demonstrations(examples(labels + [0] * 9), n, 0, True)) == n
    with pytest.raises(InputError, match="cannot be balanced"):
        select_demonstrations(examples(labels + [0] * 9), most + 1, 0, True)


@settings(deadline=None)
@given(LABELS, st.integers(0, 99))
def test_shuffled_labels_differ_and_stay_the_same_multiset(labels, seed):
    before, after = examples(labels), shuffle_labels(examples(labels), seed)
    assert [(e.prompt, e.row) for e in after] == [(e.prompt, e.row) for e in before]
    assert Counter(e.label for e in after) == Counter(labels)
    assert (after == before) == (len(set(labels)) == 1)
    assert after == shuffle_labels(before, seed)


def test_snippets_are_cleaned_and_split_by_a_fixed_rule(monkeypatch):
    monkeypatch.setattr(sources, "SNIPPET_EVALUATION_PER_CLASS", 1)
    texts = ["''Fun''    &amp; games", "fun games!", "weak", "strong", "awful", "bad"]
    valence = [1.5, -3.0, 1.49, 3.0, -1.5, -2.0]
    lines = [f"{i}\t{v}\t{text}" for i, (v, text) in enumerate(zip(valence, texts, strict=True), 1)]
    train, evaluation = split_snippets("\r\n".join(lines) + "\r\n")
    rows = {tuple(row) for part in (train, evaluation) for row in part.itertuples(index=False)}
    assert rows == {('"Fun" & games', 1), ("strong", 1), ("awful", 0), ("bad", 0)}
    assert sorted(evaluation["label"]) == [0, 1]
    again = split_snippets("\n".join(lines))
    assert train.equals(again[0]) and evaluation.equals(again[1])


def test_tokenizer_is_deterministic_and_has_fairseqs_special_tokens():
    tokenizer = tiny_tokenizer()
    again = tiny_tokenizer.__wrapped__()
    assert tokenizer.backend_tokenizer.to_str() == again.backend_tokenizer.to_str()
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) <= 1000


@pytest.mark.parametrize("name", TASKS)
def test_each_verbalizer_is_one_token(name):
    tokens = [tiny_tokenizer()(" " + word)["input_ids"] for word in TASKS[name].verbalizers]
    assert all(len(token) == 1 for token in tokens) and len({token[0] for token in tokens}) == len(tokens)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_round_trips(text):
    tokenizer = tiny_tokenizer()
    if not any(special in text for special in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("name", [name for name in TASKS if name != "snippets"])
def test_real_data_folder(name):
    folder = os.environ.get("ICLGD_DATA")
    need_real_data(bool(folder), "the environment variable ICLGD_DATA names no data folder")
    assert folder, "set ICLGD_DATA"
    data = load_task(name, "folder", Path(folder))
    columns, train, evaluation, _ = PROTOCOL[name]
    assert (len(data.train), len(data.evaluation)) == (train, evaluation)
    assert {e.label for e in data.train} == set(range(len(data.task.verbalizers)))
    if name == "sst2":
        assert all(e.prompt.endswith("  Label:") for e in data.train + data.evaluation)


def test_real_snippets():
    at_hand = (pinned_downloads.cache_folder() / "movieReviewSnippets.tsv").is_file()
    need_real_data(at_hand, "the snippets have not been fetched")
    data = load_task("snippets", "pypi")
    assert (len(data.train), len(data.evaluation)) == PROTOCOL["snippets"][1:3]
    assert Counter(e.label for e in data.evaluation) == {0: 1000, 1: 1000}
    assert Counter(e.label for e in data.train) == {0: 2450, 1: 2627}
    keys = [re.sub(r"\W", "", e.prompt.casefold()) for e in data.train + data.evaluation]
    assert len(set(keys)) == len(keys)
    assert all(html.unescape(e.prompt) == e.prompt and "  " not in e.prompt for e in data.train)
