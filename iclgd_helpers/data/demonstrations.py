"""Demonstrations: which rows of the training split, in which order, with which labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from iclgd_helpers.data.tasks import Example
from iclgd_helpers.errors import InputError

SET_ASIDE_SEED = 2022  # of the order of `set_aside`; no demonstrations are drawn with it in the protocol


def select_demonstrations(train: Sequence[Example], n: int, seed: int, balanced: bool) -> list[Example]:
    """
    The first `n` examples of the training split in the protocol's shuffled order, which `seed` determines.

    If `balanced`, each of the C classes gets n // C places. The n % C places left over go to the classes that first ask
    for one more. The shuffled order is kept.

    Raises
    ------
    InputError
        if there are not so many examples, or, for `balanced`, not of each class.
    """
    if n > len(train):
        what = f"n_demonstrations={n} is larger than the training split ({_rows(len(train))})"
        raise InputError(f"{what}: pass n_demonstrations={len(train)} or less, or add rows")
    drawn = (train[i] for i in shuffled(len(train), seed))
    if not balanced:
        return [next(drawn) for _ in range(n)]
    classes = Counter(example.label for example in train)
    share, left_over = divmod(n, len(classes))
    taken: Counter[int] = Counter()
    selected = []
    for example in drawn:
        if taken[example.label] == share and left_over:
            left_over -= 1
        elif taken[example.label] >= share:
            continue
        taken[example.label] += 1
        selected.append(example)
    if len(selected) < n:
        label, rows = min(classes.items(), key=lambda item: item[1])
        most = rows * len(classes) + sum(count > rows for count in classes.values())
        what = f"n_demonstrations={n} cannot be balanced: label {label} has {_rows(rows)} in the training split"
        raise InputError(f"{what}; pass n_demonstrations={most} or less, balanced=False, or add rows of that label")
    return selected


def _rows(count: int) -> str:
    return f"{count} row" + "s" * (count != 1)


def reordered(demonstrations: Sequence[Example], order: int) -> list[Example]:
    """The same demonstrations in another order, which the number determines; 0 leaves them as drawn."""
    if order == 0:
        return list(demonstrations)
    return [demonstrations[i] for i in np.random.default_rng(order).permutation(len(demonstrations))]


def set_aside(train: Sequence[Example], drawn: Sequence[Example]) -> Iterator[Example]:
    """Training rows that were not drawn, in an order that is the same for every draw."""
    shown = {example.row for example in drawn}
    return (train[i] for i in shuffled(len(train), SET_ASIDE_SEED) if train[i].row not in shown)


def shuffle_labels(demonstrations: Sequence[Example], seed: int) -> list[Example]:
    """The same prompts with their labels permuted; the labels change unless all are the same."""
    labels = [example.label for example in demonstrations]
    generator = np.random.default_rng(seed)
    permuted = labels
    while permuted == labels and len(set(labels)) > 1:
        permuted = [labels[i] for i in generator.permutation(len(labels))]
    return [replace(example, label=label) for example, label in zip(demonstrations, permuted, strict=True)]


def shuffled(rows: int, seed: int) -> list[int]:
    """Row numbers in the order of `datasets.Dataset.shuffle(seed)`, the protocol's shuffle (a test compares)."""
    order: list[int] = np.random.default_rng(seed).permutation(rows).tolist()
    return order
