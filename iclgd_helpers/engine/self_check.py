"""
A model of a type that no test covers must show, when it is loaded, that it computes what transformers computes.

Compared are the log-probabilities of every word at every place of a short text. transformers' own model reads each of
two sequences as a whole. The engine reads what both begin with once, and their ends side by side behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import Tensor

from iclgd_helpers.engine.families import HELP
from iclgd_helpers.engine.prefix_attention import NAME
from iclgd_helpers.errors import InputError, reason

BEFORE, ENDS = 7, (9, 6)  # tokens that both sequences begin with, and of each one's end
CLOSE = {8: 1e-6, 4: 1e-3, 2: 0.15}  # bytes of a number -> largest difference, relative to the largest log-probability
KNOWN = ("full_attention", "sliding_attention")


def _sequences(model: transformers.PreTrainedModel) -> list[list[int]]:
    """Two texts with a common beginning, of words from all over the vocabulary."""
    words = [(7919 * i + 11) % model.config.vocab_size for i in range(BEFORE + sum(ENDS))]
    return [words[: BEFORE + ENDS[0]], words[:BEFORE] + words[BEFORE + ENDS[0] :]]


@contextmanager
def only_exact(model: transformers.PreTrainedModel, name: str) -> Iterator[None]:
    """Whatever fails while the parts of an untested type are tried out, in one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise _refused(model.config.model_type, name, f"a pass fails, {reason(error)}") from None


@torch.no_grad()
def stock_logits(model: transformers.PreTrainedModel) -> list[Tensor] | None:
    """What transformers' own code makes of the two sequences, `[token, word]`; None for a model that was routed."""
    if model.config._attn_implementation == NAME:
        return None
    device = next(model.parameters()).device
    sequences = [torch.tensor([tokens], device=device) for tokens in _sequences(model)]
    return [model(input_ids=tokens, use_cache=False).logits[0] for tokens in sequences]


@torch.no_grad()
def check(
    model: transformers.PreTrainedModel,
    name: str,
    read: Callable[[list[int], list[list[int]]], list[Tensor]],
    expected: Sequence[Tensor] | None,
    windows: Sequence[int | None],
) -> None:
    """
    Compare what the engine reads with what `stock_logits` gave.

    Parameters
    ----------
    read
        the engine's logits `[token, word]` of each of several ends behind one beginning.
    windows
        those that the attention layers asked for.

    Raises
    ------
    InputError
        naming the difference.
    """
    kind = model.config.model_type
    _check_windows(kind, name, model.config, windows)
    if expected is None:
        return
    first, second = _sequences(model)
    for found, stock in zip(read(first[:BEFORE], [first[BEFORE:], second[BEFORE:]]), expected, strict=True):
        ours, theirs = found.double().log_softmax(-1), stock[BEFORE:].double().log_softmax(-1)
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1))
        if not difference <= CLOSE[found.dtype.itemsize]:
            raise _refused(kind, name, f"log-probabilities differ from transformers' by {difference:.1g}")


def _check_windows(kind: str, name: str, config: transformers.PretrainedConfig, windows: Sequence[int | None]) -> None:
    """A window is wider than the compared text: each layer that has one must have asked for it."""
    types = getattr(config, "layer_types", None) or []
    for layer, (window, kept) in enumerate(zip(windows, types, strict=False)):
        if kept not in KNOWN:
            raise _refused(kind, name, f"layer {layer} has {kept}")
        if kept == "sliding_attention" and window is None:
            raise _refused(kind, name, f"layer {layer} does not hand on its sliding window")
    if not types and getattr(config, "sliding_window", None) and not any(windows):
        raise _refused(kind, name, "its layers do not hand on the sliding window")


def _refused(kind: str, name: str, why: str) -> InputError:
    return InputError(
        f"model {name!r} is a {kind!r}, which no test covers, and it cannot be exact here ({why}): {HELP}"
    )
