"""Formats of the prompt: the engine behind its shared prefix equals whole sequences that stock transformers read."""

import copy
from dataclasses import replace

import naive
import pytest
from conftest import Material

from iclgd_helpers.data import chat as chat_module
from iclgd_helpers.data.token_layout import Layout
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.finetune import Settings
from iclgd_helpers.engine.observe import Arm, observe

RATE = 0.02
TEXT = "Answer true, false or neither."
FORMATS = {
    "a text between": {"separator": " ### "},
    "an empty line between": {"separator": "\n\n"},
    "no blank before the label": {"label_prefix": ""},
    "a line break before the label": {"label_prefix": "\n"},
    "words before the label": {"label_prefix": " it is "},
    "an instruction": {"instruction": TEXT},
    "all of them": {"separator": "\n", "label_prefix": "\n", "instruction": TEXT},
}
WITH_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)
WITHOUT_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "{{ ('<s>ask\n' if m['role'] == 'user' else '<s>say\n') + m['content'] | trim + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>say\n' }}{% endif %}"
)
CHATS = {
    "a system's turn": (WITH_SYSTEM, TEXT),
    "no instruction": (WITH_SYSTEM, None),
    "no system's turn": (WITHOUT_SYSTEM, TEXT),
}


def with_template(tokenizer, template: str):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def in_format(given: Material, **form) -> Material:
    task = given.layout.task
    return replace(given, layout=Layout.make(given.model.tokenizer, task, form.pop("separator", "eos"), **form))


def in_chat(given: Material, kind: str) -> Material:
    template, instruction = CHATS[kind]
    tokenizer = with_template(given.model.tokenizer, template)
    return replace(given, layout=Layout.make(tokenizer, given.layout.task, "eos", instruction=instruction, chat=True))


def equal_to_naive(given: Material, expected_tokens, n_shown: int) -> None:
    """Every query behind the first demonstrations, against whole sequences; `expected_tokens` says what is read."""
    shown = given.demonstrations[:n_shown]
    prefix, stock = given.layout.prefix(shown), naive.stock(given.model)
    queries = given.queries()
    for indices, seen in observe(given.model, queries, {"arm": Arm(prefix)}, batch_tokens=150):
        for place, i in enumerate(indices):
            whole, labels = expected_tokens(shown, given.examples[i].prompt)
            trunk = queries[i].tokens[: queries[i].predict + 1]
            assert [*prefix, *trunk] == whole
            found = naive.observe(stock, whole[: len(prefix)], whole[len(prefix) :], labels)
            n_read = found["attention_scores"].shape[-1]
            given.close(seen["arm"].label_log_probabilities[place], found["label_log_probabilities"])
            given.close(seen["arm"].lens_log_odds[place], found["lens"])
            given.close(seen["arm"].attention_output[place], found["attention_output"])
            given.close(seen["arm"].attention_scores[place][..., :n_read], found["attention_scores"])


def by_parts(given: Material, form: dict):
    """Tokens of a whole sequence by the naive reading."""

    def tokens(shown, prompt):
        before, question, labels = naive.asked(given.model.tokenizer, given.layout.task, shown, prompt, **form)
        return [*before, *question], labels

    return tokens


def by_template(given: Material, kind: str):
    def tokens(shown, prompt):
        tokenizer, instruction = given.layout.tokenizer, CHATS[kind][1]
        return naive.conversed(tokenizer, given.layout.task, shown, prompt, instruction, "no system's" not in kind)

    return tokens


@pytest.mark.parametrize("n_shown", [0, 3])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_equals_naive(double: Material, name: str, n_shown: int):
    form = FORMATS[name]
    equal_to_naive(in_format(double, **form), by_parts(double, form), n_shown)


@pytest.mark.parametrize("n_shown", [0, 3])
@pytest.mark.parametrize("kind", CHATS)
def test_a_chat_equals_naive(double: Material, kind: str, n_shown: int):
    given = in_chat(double, kind)
    equal_to_naive(given, by_template(given, kind), n_shown)


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("name", FORMATS)
def test_control_another_format_is_not_equal(double: Material, name: str):
    """The protocol's format, taken for the one that was asked for."""
    with pytest.raises(AssertionError):
        equal_to_naive(double, by_parts(double, FORMATS[name]), 3)


FAULTS = {
    "special tokens of the template are letters": ("pieces", lambda self, text: (text,)),
    "the instruction is lost": ("start", property(lambda self: self.pieces(self.head.replace("SLOT0SLOT", "")))),
}


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["a system's turn", "no system's turn"])
def test_control_a_fault_of_the_chat_is_seen(double: Material, monkeypatch, kind: str, fault: str):
    monkeypatch.setattr(chat_module.Chat, *FAULTS[fault])
    given = in_chat(double, kind)
    with pytest.raises(AssertionError):
        equal_to_naive(given, by_template(given, kind), 3)


# ------------------------------------------------------------------------------------------------ finetuning
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("loss", ["all", "label", "label_space"])
@pytest.mark.parametrize("name", ["all of them", "a system's turn"])
def test_finetuning_equals_naive(double: Material, name: str, loss: str):
    """A step reads what a question without demonstrations reads, and the example's own label."""
    is_chat = name in CHATS
    given = in_chat(double, name) if is_chat else in_format(double, **FORMATS[name])
    tokens = by_template(given, name) if is_chat else by_parts(given, FORMATS[name])
    sequences = []
    for example in given.demonstrations[:2]:
        whole, labels = tokens([], example.prompt)
        sequences.append(naive.Sequence(whole, labels[example.label], labels, example.label))
    ours = given.sequences[:2]
    assert [list(one.tokens) for one in ours] == [[*one.trunk, *one.answer] for one in sequences]
    result, stock = finetune.finetune(given.model, ours, "joint", Settings(RATE, loss)), naive.stock(given.model)
    losses, norms = naive.finetune(stock, sequences, "joint", RATE, loss)
    given.close(result.losses, losses)
    given.close(result.gradient_norms, norms)
    values = (parameter for layer in range(given.model.n_layers) for _n, parameter in naive.key_values(stock, layer))
    for mine, theirs in zip(result.update.values, values, strict=True):
        given.close(mine, theirs.data)
