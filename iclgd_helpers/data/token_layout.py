"""Token layout of the original code: demonstrations, query and label, and which positions are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iclgd_helpers.data.tasks import Example, Task
from iclgd_helpers.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Query:
    """
    One example to be labelled: prompt tokens, then the token of class 0 (the same for every example and arm).

    `predict` is the position of the last prompt token, where the label is predicted; `read` is where attention is
    compared: the label token (the original code) or the last prompt token (the papers' text).
    """

    tokens: tuple[int, ...]
    label: int
    row: int
    predict: int
    read: int


@dataclass(frozen=True)
class Layout:
    """How text becomes tokens for one tokenizer and task."""

    tokenizer: PreTrainedTokenizerBase
    task: Task
    bos: int
    separator: tuple[int, ...]
    labels: tuple[int, ...]

    @classmethod
    def make(cls, tokenizer: PreTrainedTokenizerBase, task: Task, separator: str) -> Layout:
        """
        Look up the special tokens and the one token of each verbalizer.

        Raises
        ------
        InputError
            if the tokenizer has neither BOS nor EOS, no EOS for the separator `eos`, or splits a verbalizer.
        """
        eos = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        if bos is None or (separator == "eos" and eos is None):
            raise InputError("the tokenizer has no BOS or EOS token: pass another model, or separator=newline")
        between = (eos,) if separator == "eos" else tuple(_encode(tokenizer, "\n"))
        if separator == "newline" and tokenizer.decode(between) != "\n":
            raise InputError("the tokenizer has no newline: pass separator=eos, or another model")
        labels = []
        for word in task.verbalizers:
            tokens = _encode(tokenizer, " " + word)
            if len(tokens) != 1:
                raise InputError(f"verbalizer {word!r} of task {task.name!r} is {len(tokens)} tokens, one is needed")
            labels.append(tokens[0])
        if len(set(labels)) < len(labels):
            raise InputError(f"two verbalizers of task {task.name!r} are the same token: {task.verbalizers}")
        return cls(tokenizer, task, bos, between, tuple(labels))

    def query(self, example: Example, token_read: str) -> Query:
        """
        Tokens and read positions of an example behind a prefix.

        Raises
        ------
        InputError
            if the prompt has no token: there would be no position at which its label is predicted.
        """
        prompt = _encode(self.tokenizer, example.prompt)
        if not prompt:
            raise InputError(
                f"the prompt of row {example.row + 1} is empty: fill in its text, or add words to the template"
            )
        predict = len(prompt) - 1
        read = predict + 1 if token_read == "label" else predict
        return Query((*prompt, self.labels[0]), example.label, example.row, predict, read)

    def demonstration(self, example: Example) -> tuple[int, ...]:
        """Prompt and label tokens, without BOS or separator."""
        return (*_encode(self.tokenizer, example.prompt), self.labels[example.label])

    def training_sequence(self, example: Example) -> tuple[int, ...]:
        """BOS, prompt and label: what one finetuning step sees."""
        return (self.bos, *self.demonstration(example))

    def prefix(self, demonstrations: Sequence[Example] = ()) -> tuple[int, ...]:
        """BOS, then each demonstration followed by the separator. Zero-shot: BOS alone."""
        tokens = [self.bos]
        for example in demonstrations:
            tokens.extend((*self.demonstration(example), *self.separator))
        return tuple(tokens)

    def fitting(self, demonstrations: Sequence[Example], longest_query: int, limit: int) -> list[Example]:
        """
        The first demonstrations that leave room for every query within `limit` tokens.

        As in the original code the sum, in which BOS counts twice, has to stay below the limit.

        Raises
        ------
        InputError
            if not even one demonstration, or the longest query alone, fits.
        """
        if 1 + longest_query > limit:
            raise InputError(
                f"the longest query has {longest_query} tokens, the context holds {limit}: shorten the texts"
            )
        fitting: list[Example] = []
        length = 1
        for example in demonstrations:
            length += len(self.demonstration(example)) + len(self.separator)
            if length + 1 + longest_query >= limit:
                break
            fitting.append(example)
        if demonstrations and not fitting:
            raise InputError(
                f"no demonstration fits beside a query of {longest_query} tokens in {limit}: shorten the texts"
            )
        return fitting


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a text; where it spells a special token, such as `</s>`, these are letters like others."""
    tokens: list[int] = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return tokens
