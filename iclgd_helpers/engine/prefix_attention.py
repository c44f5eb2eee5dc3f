"""
Causal attention behind one shared prefix, for every architecture.

All queries of a task follow the same demonstrations. Their keys and values are computed once (`Prefix`); each query
then costs a forward pass of its own tokens only. The queries of a batch lie one behind the other on one token axis
(`Packing`), so that no layer works on padding. The function below is registered with transformers' attention
interface: a family calls it with queries and keys as the model itself made them (biases, norms and rotary positions
applied). Families that never ask the interface are routed through it by `own_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from iclgd_helpers.data.token_layout import TokenTree

NAME = "iclgd"
# Where attention runs through the kernel behind scaled_dot_product_attention, which itself keeps the normaliser back.
FUSED_ON = ("cpu",)
SCORES_AT_ONCE = 2**26  # entries of the largest score matrix that is kept at a time where no fused kernel is used


@dataclass
class Prefix:
    """Keys and values of a token sequence that precedes every query: one `[kv_head, prefix, head_dim]` a layer."""

    length: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Packing:
    """
    Where the tokens of each query lie on the packed token axis.

    Attributes
    ----------
    start
        `[query]`, its first token.
    take
        `[query, token]`, its tokens, the last one repeated as padding.
    place
        `[packed_token]`, position of each packed token in the flattened `take`.
    positions
        `[packed_token]`, position of each token within its query: how many tokens come before it where it is read.
    length
        the number of positions of the longest query.
    distance
        `[query, 1, token, token]`, see `tree_distance`; None where no query branches.
    """

    start: Tensor
    take: Tensor
    place: Tensor
    positions: Tensor
    length: int
    distance: Tensor | None = None

    @classmethod
    def of(cls, trees: Sequence[TokenTree], device: torch.device) -> Packing:
        """Packing of queries with these tokens, in this order."""
        length = torch.tensor([len(tree.tokens) for tree in trees])
        start = length.cumsum(0) - length
        column = torch.arange(int(length.max()))
        take = start[:, None] + torch.minimum(column, length[:, None] - 1)
        within = column < length[:, None]
        place = within.flatten().nonzero()[:, 0]
        depth = torch.tensor([position for tree in trees for position in tree.depth])
        distance = None
        if any(tree.is_branched for tree in trees):
            branch = torch.tensor([number for tree in trees for number in tree.branch])
            distance = tree_distance(depth[take], branch[take])
            distance = distance.masked_fill(~within[:, None], -1)[:, None].to(device)  # nobody sees padding
        longest = int(depth.max()) + 1
        return cls(start.to(device), take.to(device), place.to(device), depth.to(device), longest, distance)


def tree_distance(depth: Tensor, branch: Tensor) -> Tensor:
    """
    How many positions a token lies behind another one that it sees, `[…, token, token]`; -1 where it sees it not.

    `depth` and `branch` (`[…, token]`) are those of a `TokenTree`.
    """
    distance = depth[..., :, None] - depth[..., None, :]
    same = (branch[..., None, :] == 0) | (branch[..., None, :] == branch[..., :, None])
    return torch.where(same, distance, -1)


@dataclass
class Call:
    """What one forward pass wants of the attention layers, beside their output."""

    prefix: Prefix = field(default_factory=Prefix)  # what packed queries attend to first
    packing: Packing | None = None  # where the queries behind the prefix lie; without it, sequences of their own
    tree: TokenTree | None = None  # of which kind those sequences are, if they branch
    capture: Prefix | None = None  # store the keys and values of this (single) sequence here
    read: Tensor | None = None  # [query] position (within the query) whose scores are recorded
    scores: dict[int, Tensor] = field(default_factory=dict)  # layer -> [query, head, query_token]
    queries: dict[int, Tensor] | None = None  # if a dictionary: layer -> [batch, head, token, head_dim], unscaled
    windows: dict[int, int | None] = field(default_factory=dict)  # layer -> how many tokens one sees, None for all
    positions: Tensor | None = None  # [token] where each token stands; by default one behind the other, from 0

    def distance(self, device: torch.device) -> Tensor | None:
        """See `tree_distance`; None where nothing branches."""
        if self.packing is not None:
            return self.packing.distance
        if self.tree is None or not self.tree.is_branched:
            return None
        return tree_distance(torch.tensor(self.tree.depth), torch.tensor(self.tree.branch)).to(device)

    def positions_of(self, query: Tensor) -> Tensor:
        """Where the tokens of `query` (`[batch, head, token, head_dim]`) stand, `[sequence, token]`."""
        if self.positions is None:
            return torch.arange(query.shape[2], device=query.device)[None]
        return self.positions[None] if self.packing is None else self.positions[self.packing.take]

    def keep(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Store what was asked for of a layer's queries, keys and values, as the layer is given them."""
        if self.capture is not None:
            self.capture.keys[layer], self.capture.values[layer] = key[0].contiguous(), value[0].contiguous()
        if self.queries is not None:
            self.queries[layer] = query


# What the forward pass under way wants: no family has to hand it on from the model to its attention layers.
_PRESENT: ContextVar[Call | None] = ContextVar("call", default=None)


@contextmanager
def present(call: Call) -> Iterator[None]:
    """Attention layers that run within see this call."""
    token = _PRESENT.set(call)
    try:
        yield
    finally:
        _PRESENT.reset(token)


def n_positions(states: Tensor) -> int:
    """How many positions the tokens of the pass under way take, those before them included; `[batch, token, …]`."""
    call = _PRESENT.get()
    return states.shape[1] if call is None or call.positions is None else int(call.positions.max()) + 1


@dataclass(frozen=True)
class Scoring:
    """
    How a family makes attention weights of products of queries and keys.

    Attributes
    ----------
    scaling
        factor on the products.
    window
        a token sees itself and the `window - 1` tokens before it; None for all.
    softcap
        scaled products `x` become `softcap * tanh(x / softcap)`.
    alibi
        `[head, position]`, what a key adds to its scores where it stands; each head has keys of its own then.
    sink
        `[head]`, a score that takes its share of every softmax and has no value.
    """

    scaling: float
    window: int | None = None
    softcap: float | None = None
    alibi: Tensor | None = None
    sink: Tensor | None = None

    def capped(self, scores: Tensor) -> Tensor:
        """Scaled products, after the cap if there is one."""
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def bias(self, positions: Tensor) -> Tensor | None:
        """What keys at `positions` (`[sequence, token]`) add to their scores, `[sequence, head, token]`."""
        return None if self.alibi is None else self.alibi[:, positions].transpose(0, 1)

    def without_sink(self, output: Tensor, normaliser: Tensor) -> Tensor:
        """
        What is left of attention `[…, head, token, head_dim]` when the sink has taken its share.

        `normaliser` (`[…, head, token]`) is the logarithm of the sum over the tokens.
        """
        if self.sink is None:
            return output
        return output * torch.sigmoid(normaliser - self.sink[:, None])[..., None].to(output.dtype)


def shared_prefix_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    alibi: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """
    Causal softmax attention: of plain sequences, or of packed queries that all follow the same prefix.

    `attention_mask` is ignored: causality says all that it could. What a pass wants beside is the `present` call.

    Parameters
    ----------
    query
        `[batch, head, token, head_dim]`; a batch of 1 with packed queries behind a prefix.
    key, value
        `[batch, kv_head, token, head_dim]`; consecutive heads share a key/value head.
    scaling, sliding_window, softcap, s_aux, alibi
        see `Scoring`, `s_aux` is the sink; `head_dim ** -0.5` and nothing else by default.

    Returns
    -------
    attention output before the output projection, `[batch, token, head, head_dim]`, and no weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scoring = Scoring(scaling, sliding_window, softcap, alibi, s_aux)
    shared = _PRESENT.get() or Call()
    layer, packing = module.layer_idx, shared.packing
    shared.keep(layer, query, key, value)
    shared.windows[layer] = sliding_window
    bias = scoring.bias(shared.positions_of(query)) if alibi is not None else None
    packed_query = query[0]
    if packing is not None:
        query, key, value = (_unpacked(tensor[0], packing) for tensor in (query, key, value))
    distance = shared.distance(query.device)
    if shared.read is not None:
        shared.scores[layer] = _scores_at(shared.read, query, key, scoring, bias, distance)
    if packing is None:
        return _self_attention(query, key, value, scoring, bias, distance).transpose(1, 2), None
    own = _over_own_tokens(query, key, value, scoring, bias, distance)
    keys, values = shared.prefix.keys[layer], shared.prefix.values[layer]
    prefix = _over_prefix(packed_query, keys, values, packing.positions, scoring)
    return _gated(own, prefix, packing, scoring).transpose(0, 1)[None], None


AttentionInterface.register(NAME, shared_prefix_attention)


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that metrics and softmax use for `tensor`: its own, but float32 for half precision."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def _unpacked(tensor: Tensor, packing: Packing) -> Tensor:
    """`[head, packed_token, …]` as `[query, head, token, …]`."""
    rows = tensor.transpose(0, 1)[packing.take]
    return rows.transpose(1, 2)


def _packed(tensor: Tensor, packing: Packing) -> Tensor:
    """`[query, head, token, …]` as `[head, packed_token, …]`."""
    return tensor.transpose(1, 2).flatten(0, 1)[packing.place].transpose(0, 1)


def _gated(own: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor], packing: Packing, scoring: Scoring) -> Tensor:
    """
    Softmax attention over own tokens and prefix, `[head, packed_token, head_dim]`, from each one's and its normaliser.

    It is a gate between the two, a = Z_prefix / (Z_prefix + Z_own): the book's chapter 4.
    """
    within, own_normaliser = _packed(own[0], packing), _packed(own[1][..., None], packing)
    before, prefix_normaliser = prefix
    gate = torch.sigmoid(prefix_normaliser[..., None] - own_normaliser).to(within.dtype)
    both = torch.lerp(within, before, gate)
    return scoring.without_sink(both, torch.logaddexp(prefix_normaliser, own_normaliser[..., 0]))


def _scores_at(
    read: Tensor, query: Tensor, key: Tensor, scoring: Scoring, bias: Tensor | None, distance: Tensor | None
) -> Tensor:
    """Pre-softmax scores of one token a sequence over the query's tokens; 0 where it does not see."""
    each = torch.arange(len(read), device=read.device)
    rows = query[each, :, read]  # [batch, head, head_dim]
    grouped = rows.view(len(read), key.shape[1], -1, rows.shape[-1])
    scores = (torch.einsum("bkgd,bktd->bkgt", grouped, key) * scoring.scaling).flatten(1, 2)
    scores = scoring.capped(scores.to(precise_dtype(scores)))
    if bias is not None:  # softmax sees differences only: a token adds nothing to its own score
        scores = scores + (bias - bias[each, :, read][..., None]).to(scores.dtype)
    mask = _causal_mask(key.shape[2], scoring.window, read.device, distance)
    visible = mask[read] if distance is None else mask[each, 0, read]
    return scores.masked_fill(~visible[:, None], 0.0)


def _causal_mask(n_tokens: int, window: int | None, device: torch.device, distance: Tensor | None = None) -> Tensor:
    """
    `[…, query_token, key_token]`, True where seen: the token itself and those before it, at most `window` in all.

    `distance` as `tree_distance` has it, for tokens that branch.
    """
    if distance is None:
        distance = torch.arange(n_tokens, device=device)[:, None] - torch.arange(n_tokens, device=device)
    return (distance >= 0) & (distance < (window or n_tokens))


def _self_attention(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None, distance: Tensor | None
) -> Tensor:
    """Attention within each sequence; `[batch, head, token, head_dim]`."""
    n_tokens, window = query.shape[2], scoring.window
    if scoring.softcap is not None or scoring.sink is not None or bias is not None:  # no kernel knows of these
        mask = _additive(_causal_mask(n_tokens, window, query.device, distance), query)
        output, normaliser = _attend_in_parts(query, *_for_each_head(query, key, value), scoring, bias, mask)
        return scoring.without_sink(output, normaliser)
    masked = distance is not None or (window is not None and n_tokens > window)
    seen = _causal_mask(n_tokens, window, query.device, distance) if masked else None
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, is_causal=not masked, scale=scoring.scaling, enable_gqa=True
    )


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of each query head, `[batch, head, token, head_dim]`."""
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    return key, value


def _over_own_tokens(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None, distance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of each query's tokens to themselves, `[query, head, token, head_dim]`, and its log-normaliser."""
    seen = _causal_mask(query.shape[2], scoring.window, query.device, distance)
    return _attend(query, *_for_each_head(query, key, value), scoring, bias, seen)


def _over_prefix(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """
    Attention of all packed tokens to the prefix, `[head, packed_token, head_dim]`, and its log-normaliser.

    All tokens, and all heads that share a key/value head, take part in one product: the prefix is never copied.
    """
    n_heads, n_tokens, head_dim = query.shape
    n_kv_heads, n_prefix = keys.shape[:2]
    grouped = query.reshape(1, n_kv_heads, -1, head_dim)  # rows: [head of the group, packed token]
    window, seen, first = scoring.window, None, 0
    if window is not None and n_prefix + int(positions.max()) >= window:
        first = max(0, n_prefix + 1 - window)  # what no query can see need not be multiplied
        keys, values = keys[:, first:], values[:, first:]
        seen = n_prefix + positions[:, None] - torch.arange(first, n_prefix, device=query.device) < window
        seen = seen.repeat(n_heads // n_kv_heads, 1)
        if first >= n_prefix:  # a window of one token: nothing before a query is seen
            return torch.zeros_like(query), query.new_full((n_heads, n_tokens), -torch.inf, dtype=precise_dtype(query))
    bias = scoring.bias(torch.arange(first, n_prefix, device=query.device)[None])
    output, normaliser = _attend(grouped, keys[None], values[None], scoring, bias, seen)
    return output.reshape(n_heads, n_tokens, head_dim), normaliser.reshape(n_heads, n_tokens)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """
    Softmax attention and the logarithm of its normaliser, `[batch, head, token]`.

    `bias`: `[batch, head, key_token]`, see `Scoring.bias`. `seen`: `[…, token, key_token]`, or None for everything; a
    token that sees nothing gets 0 and -inf.
    """
    mask = None if seen is None else _additive(seen, query)
    if query.device.type in FUSED_ON and scoring.softcap is None and bias is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        output, normaliser = kernel(query, key, value, 0.0, False, attn_mask=mask, scale=scoring.scaling)
    else:
        output, normaliser = _attend_in_parts(query, key, value, scoring, bias, mask)
    if seen is not None:
        normaliser = normaliser.masked_fill(~seen.any(-1), -torch.inf)
    return output, normaliser


def _additive(seen: Tensor, query: Tensor) -> Tensor:
    """0 where a token sees and -inf where it does not, in the dtype of `query`."""
    return torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, -torch.inf)


def _attend_in_parts(
    query: Tensor, key: Tensor, value: Tensor, scoring: Scoring, bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same without a fused kernel; the scores of some tokens at a time are kept."""
    at_once = max(1, SCORES_AT_ONCE // (query.shape[0] * query.shape[1] * key.shape[2]))
    outputs, normalisers = [], []
    for start in range(0, query.shape[2], at_once):
        rows = slice(start, start + at_once)
        scores = query[:, :, rows] @ key.transpose(2, 3) * scoring.scaling
        scores = scoring.capped(scores.to(precise_dtype(scores)))
        scores = scores if bias is None else scores + bias[:, :, None].to(scores.dtype)
        scores = scores if mask is None else scores + mask[..., rows, :]
        outputs.append(torch.softmax(scores, -1).nan_to_num().to(value.dtype) @ value)
        normalisers.append(scores.logsumexp(-1))
    return torch.cat(outputs, 2), torch.cat(normalisers, 2)
