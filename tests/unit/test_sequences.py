"""Token layout: special tokens, labels, read positions, and which demonstrations fit."""

import copy
from dataclasses import replace

import naive
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from iclgd_helpers.data.sources import load_task
from iclgd_helpers.data.synthetic import SPECIAL_TOKENS, tiny_tokenizer
from iclgd_helpers.data.tasks import TASKS, Example
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import experiment, parameters, runs
from iclgd_helpers.measures import intervals

TASK = TASKS["agnews"]


def tokenizer_with(**special):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    for name, value in special.items():
        setattr(tokenizer, name, value)
    return tokenizer


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return load_task("agnews", "generated").train[:12]


def test_query_and_its_two_positions(examples: list[Example]):
    layout = Layout.make(tiny_tokenizer(), TASK, "eos")
    prompt = naive.encode(layout.tokenizer, examples[1].prompt)
    at_label, at_prompt = layout.query(examples[1], "label"), layout.query(examples[1], "prompt")
    for query in (at_label, at_prompt):  # class 0's token for every example, whatever its own label
        assert list(query.tokens) == [*prompt, naive.encode(layout.tokenizer, " World")[0]]
        assert query.predict == len(prompt) - 1 and (query.label, query.row) == (examples[1].label, examples[1].row)
    assert examples[1].label != 0
    assert at_label.read == len(prompt) and at_prompt.read == len(prompt) - 1


def test_training_sequence_is_bos_prompt_label(examples: list[Example]):
    layout = Layout.make(tiny_tokenizer(), TASK, "eos")
    for example in examples:
        text = layout.tokenizer.decode(layout.training_sequence(example).tokens)
        assert text == f"<s>{example.prompt} {TASK.verbalizers[example.label]}"


@pytest.mark.parametrize("separator", ["eos", "newline"])
def test_bos_that_is_eos(examples: list[Example], separator: str):
    """As in GPT-2 and OPT: one token begins the text and, as separator, ends each demonstration."""
    tokenizer = tokenizer_with(bos_token="</s>")
    layout = Layout.make(tokenizer, TASK, separator)
    tokens = layout.prefix(examples[:3])
    assert list(tokens) == naive.context(tokenizer, TASK, examples[:3], separator)
    assert tokens[0] == tokenizer.eos_token_id
    assert tokens.count(tokenizer.eos_token_id) == (4 if separator == "eos" else 1)


def test_no_bos_falls_back_on_eos(examples: list[Example]):
    tokenizer = tokenizer_with(bos_token=None)
    assert tokenizer.bos_token_id is None
    layout = Layout.make(tokenizer, TASK, "eos")
    assert layout.prefix() == (tokenizer.eos_token_id,)
    assert list(layout.prefix(examples[:2])) == naive.context(tokenizer, TASK, examples[:2], "eos")


def test_missing_special_tokens():
    neither = tokenizer_with(bos_token=None, eos_token=None)
    for separator in ("eos", "newline"):
        with pytest.raises(InputError, match="no BOS or EOS"):
            Layout.make(neither, TASK, separator)
    no_eos = tokenizer_with(eos_token=None)
    with pytest.raises(InputError, match="separator=newline"):
        Layout.make(no_eos, TASK, "eos")
    assert Layout.make(no_eos, TASK, "newline").bos == no_eos.bos_token_id


def test_labels_have_any_number_of_tokens():
    words = ("World", "unfathomable")
    for task in (TASK, replace(TASK, verbalizers=words)):
        labels = Layout.make(tiny_tokenizer(), task, "eos").labels
        assert [tiny_tokenizer().decode(label) for label in labels] == [f" {word}" for word in task.verbalizers]
    assert len(labels[0]) == 1 < len(labels[1])
    with pytest.raises(InputError, match="'World' and 'World' of task 'agnews' are the same tokens"):
        Layout.make(tiny_tokenizer(), replace(TASK, verbalizers=("World", "World")), "eos")


def fitting_as_the_original(lengths: list[int], longest: int, limit: int) -> int:
    """Rule of the original code: `lengths` of demonstrations with separator, `longest` query with its own BOS."""
    context, kept = 1, 0
    for length in lengths:
        if context + length + longest < limit:
            context, kept = context + length, kept + 1
        else:
            break
    return kept


@given(limit=st.integers(20, 700), longest=st.integers(10, 60))
def test_demonstrations_that_do_not_fit_are_dropped_in_order(examples: list[Example], limit: int, longest: int):
    layout, demonstrations = Layout.make(tiny_tokenizer(), TASK, "newline"), list(examples)
    demonstrations[3] = replace(demonstrations[3], prompt=demonstrations[3].prompt * 4)  # one long one in the middle
    lengths = [len(naive.context(layout.tokenizer, TASK, [d], "newline")) - 1 for d in demonstrations]
    expected = fitting_as_the_original(lengths, 1 + longest, limit)
    if expected == 0:
        with pytest.raises(InputError, match="shorten the texts"):
            layout.fitting(demonstrations, longest, limit)
    else:
        assert layout.fitting(demonstrations, longest, limit) == demonstrations[:expected]


def test_query_longer_than_the_context():
    layout = Layout.make(tiny_tokenizer(), TASK, "eos")
    with pytest.raises(InputError, match="longest query has 64 tokens, the context holds 64"):
        layout.fitting([], 64, 64)
    assert layout.fitting([], 63, 64) == []


def test_number_that_fitted_is_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 5)
    given = {"preset": "smoke", "task": "agnews", "max_context": 150, "max_examples": 2, "controls": False}
    full = runs.prepare(parameters.resolve(given | {"max_context": 2048}))
    both = runs.prepare(parameters.resolve(given))
    unequal = runs.prepare(parameters.resolve(given | {"equal_demonstrations": False}))
    assert len(full.demonstrations) == full.parameters.n_demonstrations == 32
    n = len(both.demonstrations)
    assert 1 < n < 32 and both.demonstrations == full.demonstrations[:n]
    assert len(both.layout.prefix(both.demonstrations)) < 150
    record = experiment.compute(both, progress=False).json
    assert (record["n_demonstrations"], record["n_training_demonstrations"]) == (n, n)
    assert record["parameters"]["n_demonstrations"] == 32
    assert record["prefix_tokens"] == len(both.layout.prefix(both.demonstrations))
    assert len(record["finetuning"]["standard"]["losses"]) == n
    assert unequal.demonstrations == both.demonstrations and len(unequal.training) == 32


# -------------------------------------------------------------------------------------------------- the boundary
def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2's: a blank goes before every text, unknown characters are bytes, and " word" alone has one more."""
    alphabet = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    letters = [*"▁abcdefghijklmnopqrstuvwxyz.:", "▁negative", "▁positive", "▁neg", "ative"]
    vocabulary = dict(zip(SPECIAL_TOKENS, range(3), strict=True)) | alphabet
    vocabulary |= {piece: 259 + place for place, piece in enumerate(letters)}
    merges = []
    for word in ("▁neg", "ative", "▁positive"):
        for end in range(2, len(word) + 1):
            vocabulary.setdefault(word[:end], len(vocabulary))
            merges.append((word[: end - 1], word[end - 1]))
    merges.append(("▁neg", "ative"))
    model = tokenizer_models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def merging() -> PreTrainedTokenizerFast:
    """One whose tokens reach over blanks: ": a" is one token."""
    pieces = [*SPECIAL_TOKENS, *"abc: ", ": ", ": a"]
    model = tokenizer_models.BPE({piece: place for place, piece in enumerate(pieces)}, [(":", " "), (": ", "a")])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), bos_token="<s>", eos_token="</s>")


def test_a_blank_before_every_text_is_no_token_of_the_label():
    tokenizer = sentencepiece()
    assert len(naive.encode(tokenizer, " negative")) == 2 and len(naive.encode(tokenizer, "is it: negative")) > 2
    task = replace(TASK, template="{text} is:", verbalizers=("negative", "positive", "grün"))
    layout = Layout.make(tokenizer, task, "eos")
    assert tokenizer.convert_ids_to_tokens([label[0] for label in layout.labels[:2]]) == ["▁negative", "▁positive"]
    assert len(layout.labels[2]) == 6  # blank and letters, and two bytes for the one that it does not know
    query = layout.query(Example("all is:", 1, 0), "label")
    assert not query.is_merged and list(query.tokens[: query.predict + 1]) == naive.encode(tokenizer, "all is:")


def test_a_token_over_the_boundary_belongs_to_the_label():
    tokenizer = merging()
    task = replace(TASK, template="{text}:", verbalizers=("aa", "b"))
    layout = Layout.make(tokenizer, task, "eos")
    query = layout.query(Example("cab:", 0, 0), "label")
    assert query.is_merged
    assert tokenizer.convert_ids_to_tokens(query.tokens[: query.predict + 1]) == ["c", "a", "b"]
    assert [tokenizer.convert_ids_to_tokens(label) for label in query.labels] == [[": a", "a"], [": ", "b"]]
    sequence = layout.training_sequence(Example("cab:", 1, 0))
    assert sequence.tokens == (layout.bos, *layout.demonstration(Example("cab:", 1, 0)))


TOKENIZERS = {"byte-level": tiny_tokenizer, "SentencePiece": sentencepiece, "merging": merging}


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text("abc: .é\n", min_size=1), label=st.text("abc :é", min_size=1).map(str.strip).filter(bool))
def test_prompt_and_label_are_the_tokens_of_the_whole_text(kind: str, text: str, label: str):
    tokenizer = TOKENIZERS[kind]()
    task = replace(TASK, template="{text}", verbalizers=(label, "other label"))
    layout = Layout(tokenizer, task, 0, (2,))
    for number, word in enumerate(task.verbalizers):
        assert list(layout.demonstration(Example(text, number, 0))) == naive.encode(tokenizer, f"{text} {word}")
    alone = naive.encode(tokenizer, text)
    trunk, _labels, is_merged = layout._split(text)
    assert is_merged == (list(trunk) != alone)
