"""Token layout: special tokens, labels, read positions, and which demonstrations fit."""

import copy
from dataclasses import replace

import naive
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iclgd_helpers.data.sources import load_task
from iclgd_helpers.data.synthetic import tiny_tokenizer
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
