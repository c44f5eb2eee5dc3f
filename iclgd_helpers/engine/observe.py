"""What a model does on a set of queries, arm by arm: label log-probabilities, attention outputs, attention scores."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine.models import KVUpdate, LanguageModel, enough_memory
from iclgd_helpers.engine.prefix_attention import Call, Packing, Prefix, precise_dtype
from iclgd_helpers.errors import InputError

BATCH_TOKENS = {"cpu": 1536}  # padded query tokens in a batch; large enough for wide matrix products


@dataclass(frozen=True)
class Arm:
    """A way to present the queries: the tokens before them, and the weights of the K/V projections."""

    prefix: tuple[int, ...]
    update: KVUpdate | None = None


@dataclass(frozen=True)
class Observation:
    """
    One arm on one batch of queries; metrics read these in float32 or better.

    Attributes
    ----------
    label_log_probabilities
        `[query, class]`, nats: the score of each label, see `Layout.label_score`; every token's probability is
        normalised over the whole vocabulary.
    lens_log_odds
        `[query, layer, class]`, logit of each label's first token at each layer's output (logit lens), with all that
        the model does behind its head.
    attention_output
        `[query, layer, d_model]` at the read position, after the output projection, before the residual.
    attention_scores
        `[query, layer, head, token]`, as they enter the softmax (scaled, capped, with what ALiBi adds to a key more
        than to the token's own), of the read position over the query's own tokens (BOS and demonstrations left out); 0
        for tokens that it does not see: those behind it, and other labels.
    """

    label_log_probabilities: Tensor
    lens_log_odds: Tensor
    attention_output: Tensor
    attention_scores: Tensor

    def of(self, places: Sequence[int]) -> Observation:
        """That of some queries of the batch."""
        return Observation(**{name: values[list(places)] for name, values in vars(self).items()})


def batches(queries: Sequence[Query], batch_tokens: int) -> list[list[int]]:
    """Indices of `queries` in batches of similar length, longest first, at most `batch_tokens` padded tokens each."""
    order = sorted(range(len(queries)), key=lambda i: (-len(queries[i].tokens), i))
    result: list[list[int]] = []
    for index in order:
        longest = len(queries[result[-1][0]].tokens) if result else 0
        if result and longest * (len(result[-1]) + 1) <= batch_tokens:
            result[-1].append(index)
        else:
            result.append([index])
    return result


@torch.no_grad()
def observe(
    language_model: LanguageModel,
    queries: Sequence[Query],
    arms: Mapping[str, Arm],
    batch_tokens: int | None = None,
) -> Iterator[tuple[list[int], dict[str, Observation]]]:
    """
    Yield, batch by batch, the indices of the queries and every arm's observation of them.

    Each arm's prefix is run once, whatever the number of queries; memory is bounded by the batch. Where the device's
    memory is too small for a batch, smaller ones are used and a line says so: the numbers stay the same.

    Parameters
    ----------
    arms
        name -> arm. Each is applied to the same batch, so that comparisons need nothing but the batch.
    batch_tokens
        padded query tokens in a batch; by default `BATCH_TOKENS` of the device.

    Raises
    ------
    InputError
        if the memory is too small even for one query, or the model's own weights give no finite numbers.
    """
    batch_tokens = batch_tokens or BATCH_TOKENS.get(language_model.device.type, 2**14)
    prefixes = {}
    for name, arm in arms.items():
        with language_model.using(arm.update), enough_memory(f"the {len(arm.prefix)} tokens before the queries"):
            prefixes[name] = language_model.prefix(arm.prefix)
    waiting = batches(queries, batch_tokens)
    while waiting:
        indices = waiting.pop(0)
        batch, observations = [queries[i] for i in indices], {}
        try:
            with enough_memory("one query") if len(indices) == 1 else nullcontext():
                for name, arm in arms.items():
                    observations[name] = _observe_arm(language_model, batch, name, arm, prefixes[name])
        except torch.OutOfMemoryError:
            batch_tokens = len(batch) * len(batch[0].tokens) // 2
            rest = sorted(chain(indices, *waiting))
            waiting = [[rest[i] for i in smaller] for smaller in batches([queries[i] for i in rest], batch_tokens)]
            print(f"memory is short: going on with batches of {batch_tokens} tokens, same numbers", file=sys.stderr)
            continue
        yield indices, observations


def _observe_arm(
    language_model: LanguageModel, batch: Sequence[Query], name: str, arm: Arm, prefix: Prefix
) -> Observation:
    """Only finetuning may diverge: a model's own weights give numbers, or the run ends here."""
    with language_model.using(arm.update):
        seen = observe_batch(language_model, batch, prefix)
    if arm.update is None and not bool(seen.label_log_probabilities.isfinite().all()):
        raise InputError(
            f"model {language_model.name!r} gives no finite log-probabilities in {language_model.dtype} ({name}): pass "
            "dtype=float32 or dtype=bfloat16"
        )
    return seen


@torch.no_grad()
def observe_batch(language_model: LanguageModel, batch: Sequence[Query], prefix: Prefix) -> Observation:
    """One forward pass of `batch` behind `prefix`, with what the metrics need and no more."""
    device = language_model.device
    packing = Packing.of([query.tree for query in batch], device)
    tokens = _on_device([token for query in batch for token in query.tokens], device)
    read = _on_device([query.read for query in batch], device)
    predict = _on_device([query.predict for query in batch], device)
    call = Call(prefix=prefix, packing=packing, read=read)
    at_read, at_predict = packing.start + read, packing.start + predict
    with (
        _recording(language_model.outputs, at_read) as outputs,
        _recording(language_model.layers, at_predict) as states,
    ):
        hidden = language_model.hidden(tokens[None], start=prefix.length, call=call)[0]
    precise = precise_dtype(hidden)
    return Observation(
        label_log_probabilities=_label_scores(language_model, hidden, batch, packing),
        lens_log_odds=_label_logits(language_model, torch.stack(states, 1), batch).to(precise),
        attention_output=torch.stack(outputs, 1).to(precise),
        attention_scores=torch.stack([call.scores[i] for i in range(language_model.n_layers)], 1),
    )


def _label_scores(language_model: LanguageModel, hidden: Tensor, batch: Sequence[Query], packing: Packing) -> Tensor:
    """Score of each label, `[query, class]`; the head reads the positions at which a label's token is predicted."""
    longest = max(len(label) for query in batch for label in query.labels)
    rows: dict[tuple[int, int], int] = {}  # (query, place) -> row of the head's product; first all first tokens
    for number, query in enumerate(batch):
        rows[number, query.predict] = number
    row, word, counted = [], [], []
    for number, query in enumerate(batch):
        for label, places in zip(query.labels, query.tree.places, strict=True):
            padding = [0] * (longest - len(label))
            row += [*(rows.setdefault((number, place), len(rows)) for place in places), *padding]
            word += [*label, *padding]
            counted += [*[1 / len(label) if query.label_score == "mean" else 1.0 for _token in label], *padding]
    device, shape = hidden.device, (len(batch), -1, longest)
    at = packing.start[_on_device([number for number, _place in rows], device)]
    logits = language_model.logits(hidden[at + _on_device([place for _number, place in rows], device)])
    log_probabilities = torch.log_softmax(logits.to(precise_dtype(logits)), -1)  # [row, vocabulary]
    chosen = log_probabilities[_on_device(row, device), _on_device(word, device)].view(shape)
    weights = torch.tensor(counted, dtype=chosen.dtype, device=device).view(shape)
    return chosen.mul(weights).masked_fill(weights == 0, 0.0).sum(-1)


def _label_logits(language_model: LanguageModel, states: Tensor, batch: Sequence[Query]) -> Tensor:
    """Logit lens with the rows of the head of the labels' first tokens only; `[query, layer, class]`."""
    lens = language_model.lens(states)
    firsts = [tuple(label[0] for label in query.labels) for query in batch]
    logits = lens.new_empty((*lens.shape[:2], len(firsts[0])))
    for first in dict.fromkeys(firsts):  # the same for all queries, unless a tokenizer merges prompt and label
        which = [number for number, other in enumerate(firsts) if other == first]
        logits[which] = language_model.logits(lens[which], first)
    return logits


def _on_device(values: Sequence[int], device: torch.device) -> Tensor:
    """`values` as a tensor; the copy to a GPU does not wait."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@contextmanager
def _recording(modules: Iterable[nn.Module], positions: Tensor) -> Iterator[list[Tensor]]:
    """Collect each module's output `[query, d_model]` at `positions` (`[query]`) of the packed token axis."""
    collected: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        collected.append(tensor[0, positions])

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
