"""Token layout of the original code: demonstrations, query and label, and which positions are read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iclgd_helpers.data.tasks import Example, Task
from iclgd_helpers.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenTree:
    """
    A trunk of tokens, and labels that continue it: each label sees the trunk and its own tokens, no other label.

    Attributes
    ----------
    tokens
        the trunk, then the labels one behind the other.
    depth
        `[token]`, how many tokens come before it where it is read: its position behind the start of the trunk.
    branch
        `[token]`, 0 for the trunk, `c + 1` for the label of class `c`.
    places
        `[class][token of its label]`, index of the token at which it is predicted.
    """

    tokens: tuple[int, ...]
    depth: tuple[int, ...]
    branch: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, trunk: Sequence[int], labels: Sequence[Sequence[int]], whole: Sequence[int] = ()) -> TokenTree:
        """
        The tree in which every token of every label is predicted.

        A label's last token predicts nothing, so it is left out. `whole`, which begins with the label of class 0,
        stands in that one's place.
        """
        tokens, branch = list(trunk), [0] * len(trunk)
        depth, places = list(range(len(trunk))), []
        for number, label in enumerate(labels):
            shown = whole if number == 0 and whole else label[:-1]
            places.append((len(trunk) - 1, *range(len(tokens), len(tokens) + len(label) - 1)))
            depth += range(len(trunk), len(trunk) + len(shown))
            branch += [number + 1] * len(shown)
            tokens += shown
        return cls(tuple(tokens), tuple(depth), tuple(branch), tuple(places))

    @property
    def is_branched(self) -> bool:
        """Whether two labels have tokens in it; else it is a plain sequence."""
        return len(set(self.branch) - {0}) > 1


@dataclass(frozen=True)
class Query:
    """
    One example to be labelled: its prompt, the label of class 0 (the same for every example and arm), and the others.

    Attributes
    ----------
    tree
        the tokens behind the prefix.
    labels
        `[class][token]`, the tokens of each label that are scored.
    label_score
        how their log-probabilities make one of the label, see `Layout.label_score`.
    label, row
        the right class; the row in the source split.
    predict
        index of the last prompt token, where a label's first token is predicted.
    read
        where attention is compared: the last token of the label of class 0 (the original code), or `predict` (the
        papers' text).
    is_merged
        whether the tokenizer merges the prompt's end with a label.
    """

    tree: TokenTree
    labels: tuple[tuple[int, ...], ...]
    label_score: str
    label: int
    row: int
    predict: int
    read: int
    is_merged: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Of the tree, the trunk first."""
        return self.tree.tokens

    @property
    def length(self) -> int:
        """How many positions it takes behind the prefix."""
        return max(self.tree.depth) + 1


@dataclass(frozen=True)
class TrainingSequence:
    """
    What one finetuning step sees: BOS and the prompt (`trunk`), then the example's own label, whole (`answer`).

    `labels` and `label_score` are as in `Query`; `label` is the example's class.
    """

    trunk: tuple[int, ...]
    answer: tuple[int, ...]
    labels: tuple[tuple[int, ...], ...]
    label_score: str
    label: int

    @property
    def tokens(self) -> tuple[int, ...]:
        """One plain sequence."""
        return (*self.trunk, *self.answer)

    @property
    def tree(self) -> TokenTree | None:
        """In which every label is predicted, for a loss over the classes; None where the trunk predicts them all."""
        several = any(len(label) > 1 for label in self.labels)
        return TokenTree.of(self.trunk, self.labels) if several else None

    def length(self, loss: str) -> int:
        """How many tokens a step reads."""
        tree = self.tree if loss == "label_space" else None
        return len(self.tokens if tree is None else tree.tokens)


@dataclass(frozen=True)
class Layout:
    """
    How text becomes tokens for one tokenizer and task.

    The score of a label with tokens `w_1 … w_t` behind a prompt is, by `label_score`, `sum`: log p(w_1) + … +
    log p(w_t), each given what comes before it, which is the log-probability of the whole label; `mean`: that divided
    by `t` (the original code); `first`: log p(w_1). For labels of one token the three are the same.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    bos: int
    separator: tuple[int, ...]
    label_score: str = "sum"

    @classmethod
    def make(cls, tokenizer: PreTrainedTokenizerBase, task: Task, separator: str, label_score: str = "sum") -> Layout:
        """
        Look up the special tokens, and whether the labels can be told apart.

        Raises
        ------
        InputError
            if the tokenizer has neither BOS nor EOS, no EOS for the separator `eos`, or gives two labels such tokens
            that their scores cannot be compared.
        """
        eos = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        if bos is None or (separator == "eos" and eos is None):
            raise InputError("the tokenizer has no BOS or EOS token: pass another model, or separator=newline")
        between = (eos,) if separator == "eos" else tuple(_encode(tokenizer, "\n")[0])
        if separator == "newline" and tokenizer.decode(between) != "\n":
            raise InputError("the tokenizer has no newline: pass separator=eos, or another model")
        layout = cls(tokenizer, task, bos, between, label_score)
        layout._demand_different()
        return layout

    def _demand_different(self) -> None:
        labels = self.labels
        for (word, one), (other_word, other) in itertools.permutations(
            zip(self.task.verbalizers, labels, strict=True), 2
        ):
            both = f"the labels {word!r} and {other_word!r} of task {self.task.name!r}"
            if one == other:
                raise InputError(f"{both} are the same tokens: reword one of them")
            if self.label_score == "first" and one[0] == other[0]:
                raise InputError(f"{both} begin with the same token: pass label_score=sum or label_score=mean")
            if self.label_score == "sum" and other[: len(one)] == one:
                raise InputError(
                    f"{both}: the first begins the second, so its sum is never lower: reword one of them, or pass "
                    "label_score=mean"
                )

    @functools.cached_property
    def labels(self) -> tuple[tuple[int, ...], ...]:
        """`[class][token]`, each label whole, as it is read behind the template without text."""
        _trunk, labels, _is_merged = self._split(self.task.template.format(**dict.fromkeys(self.task.text_columns, "")))
        return labels

    def _split(self, prompt: str) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], bool]:
        """
        Tokens of a prompt, of each label behind it, and whether the tokenizer merges the two.

        Prompt and label are read as one text. Where a token reaches over the boundary, the label begins at the first
        token that differs from those of the prompt alone: so the model reads what the text is.
        """
        alone, *wholes = _encode(self.tokenizer, prompt, *(f"{prompt} {word}" for word in self.task.verbalizers))
        n = len(alone)
        is_merged = any(whole[:n] != alone or len(whole) == n for whole in wholes)
        if is_merged:
            n = min(_n_shared(alone, whole[:-1]) for whole in wholes)
        return wholes[0][:n], tuple(whole[n:] for whole in wholes), is_merged

    def _scored(self, labels: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(label[:1] for label in labels) if self.label_score == "first" else labels

    def query(self, example: Example, token_read: str) -> Query:
        """
        Tokens and read positions of an example behind a prefix.

        Raises
        ------
        InputError
            if the prompt has no token: there would be no position at which its label is predicted.
        """
        trunk, labels, is_merged = self._split(example.prompt)
        if not trunk:
            raise InputError(
                f"the prompt of row {example.row + 1} is empty: fill in its text, or add words to the template"
            )
        predict, scored = len(trunk) - 1, self._scored(labels)
        read = predict + len(labels[0]) if token_read == "label" else predict
        tree = TokenTree.of(trunk, scored, whole=labels[0])
        return Query(tree, scored, self.label_score, example.label, example.row, predict, read, is_merged)

    def demonstration(self, example: Example) -> tuple[int, ...]:
        """Prompt and label tokens, without BOS or separator."""
        trunk, labels, _is_merged = self._split(example.prompt)
        return (*trunk, *labels[example.label])

    def training_sequence(self, example: Example, before: Sequence[int] = ()) -> TrainingSequence:
        """What one finetuning step sees: BOS or the tokens `before`, then prompt and label."""
        trunk, labels, _is_merged = self._split(example.prompt)
        start = tuple(before) or (self.bos,)
        return TrainingSequence(
            (*start, *trunk), labels[example.label], self._scored(labels), self.label_score, example.label
        )

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


def _encode(tokenizer: PreTrainedTokenizerBase, *texts: str) -> list[tuple[int, ...]]:
    """Tokens of each text; where it spells a special token, such as `</s>`, these are letters like others."""
    found = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return [tuple(tokens) for tokens in found]


def _n_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _pair in pairs)
