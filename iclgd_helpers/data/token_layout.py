"""Token layout of the original code: demonstrations, query and label, and which positions are read."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from iclgd_helpers.data.chat import Chat, Pieces
from iclgd_helpers.data.tasks import Example, Task
from iclgd_helpers.errors import InputError, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
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
        replaces that one.
        """
        shown = [tuple(whole if number == 0 and whole else label[:-1]) for number, label in enumerate(labels)]
        lengths = tuple(map(len, labels)), tuple(map(len, shown))
        return cls((*trunk, *itertools.chain(*shown)), *_shape(len(trunk), *lengths))

    @property
    def is_branched(self) -> bool:
        """Whether two labels have tokens in it; else it is a plain sequence."""
        return len(set(self.branch) - {0}) > 1


@functools.cache  # questions of one length keep it once
def _shape(
    trunk: int, labels: tuple[int, ...], shown: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Depth, branch and places of a `TokenTree`, by the lengths of trunk and labels, and of each label's kept part."""
    depth, branch, places = list(range(trunk)), [0] * trunk, []
    for number, (n_label, n_shown) in enumerate(zip(labels, shown, strict=True), 1):
        places.append((trunk - 1, *range(len(depth), len(depth) + n_label - 1)))
        depth += range(trunk, trunk + n_shown)
        branch += [number] * n_shown
    return tuple(depth), tuple(branch), tuple(places)


@dataclass(frozen=True, slots=True)
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

    A prefix is BOS, the instruction closed by the separator if there is one, then each demonstration (prompt, label)
    closed by the separator. A question and its labels follow. A chat template's text takes the place of BOS and
    separator (`Chat`). Prompt and label are read as one text, with `label_prefix` between them. Its last blank counts
    as the label's, the rest as the prompt's. Instruction and separator are read by themselves.

    `label_score` scores a label with tokens `w_1 … w_t` behind a prompt. `sum` is log p(w_1) + … + log p(w_t), each
    given what comes before it: the log-probability of the whole label. `mean` is that divided by `t` (the original
    code), and `first` is log p(w_1). For labels of one token the three are the same.
    """

    tokenizer: PreTrainedTokenizerBase
    task: Task
    bos: int
    separator: tuple[int, ...]
    label_score: str = "sum"
    blank: str = " "  # between a prompt and its label, and the label's
    start: tuple[int, ...] = ()  # before the first prompt; if empty, BOS
    answer: Pieces = ()  # between a demonstration's prompt and its label, and the prompt's
    ask: Pieces = ()  # the same of a question
    chat: Chat | None = None

    @classmethod
    def make(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        separator: str,
        label_score: str = "sum",
        *,
        label_prefix: str = " ",
        instruction: str | None = None,
        chat: bool = False,
    ) -> Layout:
        """
        Look up the special tokens, and whether the labels can be told apart.

        `separator` is `eos` (the token), `newline`, or any text.

        Raises
        ------
        InputError
            if the tokenizer has neither BOS nor EOS, no EOS for the separator `eos`, or no chat template. Also if it
            does not give the separator back, or gives two labels such tokens that their scores cannot be compared.
        """
        eos = tokenizer.eos_token_id
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else eos
        if bos is None or (separator == "eos" and eos is None and not chat):
            raise InputError("the tokenizer has no BOS or EOS token: pass another model, or separator=newline")
        if chat:
            layout = cls._of_chat(tokenizer, task, bos, label_score, Chat.of(tokenizer, instruction))
        else:
            between = (eos,) if separator == "eos" else _separator(tokenizer, separator)
            before = (bos, *_encode(tokenizer, (instruction,))[0], *between) if instruction else ()
            stem, blank = label_prefix.removesuffix(" "), label_prefix[-1:] if label_prefix.endswith(" ") else ""
            pieces = (stem,) if stem else ()
            layout = cls(tokenizer, task, bos, between, label_score, blank, before, pieces, pieces)
        layout._demand_different()
        return layout

    @classmethod
    def _of_chat(cls, tokenizer: PreTrainedTokenizerBase, task: Task, bos: int, label_score: str, chat: Chat) -> Layout:
        start, after = _encode(tokenizer, chat.start, chat.pieces(chat.after))
        answer, ask = chat.pieces(chat.answer), chat.pieces(chat.ask)
        return cls(tokenizer, task, bos, after, label_score, "", start, answer, ask, chat)

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
        token that differs from those of the prompt alone. So the model reads the text as it is.
        """
        before = (self._text(prompt), *self.ask)
        alone, *wholes = _encode(
            self.tokenizer, before, *((*before, self.blank + word) for word in self.task.verbalizers)
        )
        n = len(alone)
        is_merged = any(whole[:n] != alone or len(whole) == n for whole in wholes)
        if is_merged:
            n = min(_n_shared(alone, whole[:-1]) for whole in wholes)
        return wholes[0][:n], tuple(whole[n:] for whole in wholes), is_merged

    def _read(self, example: Example) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], bool]:
        """The same of an example's prompt, which a chat template may not change."""
        if self.chat:
            self.chat.demand([], self._text(example.prompt))
        return self._split(example.prompt)

    def _text(self, prompt: str) -> str:
        return prompt.strip() if self.chat else prompt

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
        trunk, labels, is_merged = self._read(example)
        if not trunk:
            raise InputError(
                f"the prompt of row {example.row + 1} is empty: fill in its text, or add words to the template"
            )
        predict, scored = len(trunk) - 1, _shared(self._scored(labels))
        read = predict + len(labels[0]) if token_read == "label" else predict
        tree = TokenTree.of(trunk, scored, whole=labels[0])
        return Query(tree, scored, self.label_score, example.label, example.row, predict, read, is_merged)

    def demonstration(self, example: Example) -> tuple[int, ...]:
        """Prompt and label tokens, without BOS or separator."""
        word = self.task.verbalizers[example.label]
        return _encode(self.tokenizer, (self._text(example.prompt), *self.answer, self.blank + word))[0]

    def training_sequence(self, example: Example, before: Sequence[int] = ()) -> TrainingSequence:
        """
        What one finetuning step sees: the tokens `before`, then prompt and label.

        Without `before`, it is what a question sees that has no demonstrations: BOS, the instruction if there is one.
        """
        trunk, labels, _is_merged = self._read(example)
        start = tuple(before) or self.prefix()
        return TrainingSequence(
            (*start, *trunk), labels[example.label], self._scored(labels), self.label_score, example.label
        )

    def prefix(self, demonstrations: Sequence[Example] = ()) -> tuple[int, ...]:
        """BOS (and instruction), then each demonstration followed by the separator. Zero-shot: without these."""
        if self.chat and demonstrations:
            texts = [(self._text(one.prompt), self.task.verbalizers[one.label]) for one in demonstrations]
            self.chat.demand(texts, "")
        tokens = list(self.start or (self.bos,))
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
        fitting: list[Example] = []
        length = len(self.prefix())
        if length + longest_query > limit:
            raise InputError(
                f"the longest query has {longest_query} tokens, the context holds {limit}: shorten the texts, or pass "
                "too_long=drop"
            )
        for example in demonstrations:
            length += len(self.demonstration(example)) + len(self.separator)
            if length + 1 + longest_query >= limit:
                break
            fitting.append(example)
        if demonstrations and not fitting:
            raise InputError(
                f"no demonstration fits beside a query of {longest_query} tokens in {limit}: shorten the texts, or "
                "pass too_long=drop"
            )
        return fitting

    def room(self, limit: int) -> int:
        """Tokens that a text may have so that two of them, a demonstration and a question, fit into the context."""
        return (limit - len(self.prefix()) - len(self.separator) - 2) // 2


def _separator(tokenizer: PreTrainedTokenizerBase, separator: str) -> tuple[int, ...]:
    """Tokens of a separator that is a text; InputError if the tokenizer would lose or change it."""
    text = "\n" if separator == "newline" else separator
    (tokens,) = _encode(tokenizer, (text,))
    found = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    if found != text:
        what = "no newline" if separator == "newline" else f"no {text!r}, it reads {shortened(repr(found))}"
        raise InputError(f"the tokenizer has {what}: pass separator=eos, another text, or another model")
    return tokens


def _encode(tokenizer: PreTrainedTokenizerBase, *several: Pieces) -> list[tuple[int, ...]]:
    """Tokens of each; texts side by side are read as one, and spell no special token such as `</s>`."""
    joined = [list(_joined(pieces)) for pieces in several]
    texts = [piece for pieces in joined for piece in pieces if isinstance(piece, str)]
    read = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    found = iter(read)
    return [
        tuple(_shared(token) for piece in pieces for token in (next(found) if isinstance(piece, str) else (piece,)))
        for pieces in joined
    ]


@functools.cache
def _shared(value: T) -> T:
    """The first of all equal values: many thousand texts repeat a few tokens and labels."""
    return value


def _joined(pieces: Pieces) -> Iterator[str | int]:
    for is_text, group in itertools.groupby(pieces, lambda piece: isinstance(piece, str)):
        if not is_text:
            yield from group
        elif text := "".join(map(str, group)):
            yield text


def _n_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the start are the same."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _pair in pairs)
