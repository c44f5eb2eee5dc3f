"""
Causal attention behind one shared prefix, for every architecture.

All queries of a task follow the same demonstrations. Their keys and values are computed once (`Prefix`); each query
then costs a forward pass of its own tokens only. The function below is registered with transformers' attention
interface, so that every family calls it with queries and keys as the model itself made them (biases, norms and rotary
positions applied).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

NAME = "iclgd"
# Scores computed at once: on a CPU they should stay in its cache.
SCORES_AT_ONCE = {"cpu": 2**20}


@dataclass
class Prefix:
    """Keys and values of a token sequence that precedes every query: one `[kv_head, prefix, head_dim]` a layer."""

    length: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Call:
    """What one forward pass wants of the attention layers, beside their output."""

    prefix: Prefix | None = None  # attend to these keys and values first
    capture: Prefix | None = None  # store the keys and values of this (single) sequence here
    read: Tensor | None = None  # [batch] position whose scores are recorded
    scores: dict[int, Tensor] = field(default_factory=dict)  # layer -> [batch, head, query_token]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    shared: Call | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """
    Causal softmax attention of right-padded sequences, each preceded by the same prefix.

    Causality alone keeps real tokens from seeing the padding behind them, so no mask is needed; the one that
    transformers may pass is ignored.

    Parameters
    ----------
    query
        `[batch, head, token, head_dim]`.
    key, value
        `[batch, kv_head, token, head_dim]`; consecutive heads share a key/value head.
    scaling
        factor on query-key products; `head_dim ** -0.5` by default.
    sliding_window
        a token sees itself and the `sliding_window - 1` tokens before it; unlimited by default.
    shared
        prefix to attend to, and what to record.

    Returns
    -------
    attention output before the output projection, `[batch, token, head, head_dim]`, and no weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    shared = shared or Call()
    layer = module.layer_idx
    if shared.capture is not None:
        shared.capture.keys[layer], shared.capture.values[layer] = key[0].contiguous(), value[0].contiguous()
    if shared.read is not None:
        shared.scores[layer] = _scores_at(shared.read, query, key, scaling, sliding_window)
    if shared.prefix is None:
        output = _self_attention(query, key, value, scaling, sliding_window)
    else:
        keys, values = shared.prefix.keys[layer], shared.prefix.values[layer]
        each = query[0, ..., 0].numel() * (keys.shape[1] + query.shape[2])
        at_once = max(1, SCORES_AT_ONCE.get(query.device.type, 2**26) // each)
        parts = zip(query.split(at_once), key.split(at_once), value.split(at_once), strict=True)
        output = torch.cat([_prefixed_attention(*part, keys, values, scaling, sliding_window) for part in parts])
    return output.transpose(1, 2), None


AttentionInterface.register(NAME, shared_prefix_attention)


def precise_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that metrics and softmax use for `tensor`: its own, but float32 for half precision."""
    return torch.float32 if tensor.dtype.itemsize < 4 else tensor.dtype


def _scores_at(read: Tensor, query: Tensor, key: Tensor, scaling: float, window: int | None) -> Tensor:
    """Scaled pre-softmax scores of one token a sequence over the query's tokens; 0 where it does not see."""
    rows = query[torch.arange(len(read), device=read.device), :, read]  # [batch, head, head_dim]
    grouped = rows.view(len(read), key.shape[1], -1, rows.shape[-1])
    scores = (torch.einsum("bkgd,bktd->bkgt", grouped, key) * scaling).flatten(1, 2)
    distance = read[:, None] - torch.arange(key.shape[2], device=read.device)
    visible = (distance >= 0) & (distance < (window or key.shape[2]))
    return scores.to(precise_dtype(scores)).masked_fill(~visible[:, None], 0.0)


def _window_mask(n_queries: int, n_keys: int, sliding_window: int, device: torch.device) -> Tensor:
    """`[query, key]`, True where seen: causal, and at most `sliding_window` tokens back; both end at the same token."""
    rows = torch.arange(n_keys - n_queries, n_keys, device=device)[:, None]
    columns = torch.arange(n_keys, device=device)
    return (columns <= rows) & (rows - columns < sliding_window)


def _self_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
    """Attention within each sequence; `[batch, head, token, head_dim]`."""
    n_tokens = query.shape[2]
    masked = window is not None and n_tokens > window
    mask = _window_mask(n_tokens, n_tokens, window, query.device) if masked else None
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not masked, scale=scaling, enable_gqa=True
    )


def _prefixed_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, scaling: float, window: int | None
) -> Tensor:
    """
    Attention over the prefix and then over each sequence itself; `[batch, head, token, head_dim]`.

    The prefix takes part in one matrix product for the whole batch: it is never copied for each query.
    """
    batch, n_heads, n_tokens, head_dim = query.shape
    n_kv_heads, group = keys.shape[0], n_heads // keys.shape[0]
    if window is not None:  # what no query can see need not be multiplied
        first = max(0, keys.shape[1] + 1 - window)
        keys, values = keys[:, first:], values[:, first:]
    n_prefix = keys.shape[1]
    grouped = (query * scaling).view(batch, n_kv_heads, group, n_tokens, head_dim)
    by_head = grouped.transpose(0, 1).reshape(n_kv_heads, -1, head_dim)  # [kv_head, batch*group*token, head_dim]
    scores = query.new_empty(n_kv_heads, batch, group, n_tokens, n_prefix + n_tokens)
    scores[..., :n_prefix] = torch.bmm(by_head, keys.transpose(1, 2)).view(*scores.shape[:-1], n_prefix)
    scores[..., n_prefix:] = torch.einsum("bkgtd,bksd->kbgts", grouped, key)
    seen = _window_mask(n_tokens, n_prefix + n_tokens, window or n_prefix + n_tokens, query.device)
    if window is None:
        scores[..., n_prefix:].masked_fill_(~seen[:, n_prefix:], -torch.inf)
    else:
        scores.masked_fill_(~seen, -torch.inf)
    weights = torch.softmax(scores, -1, dtype=precise_dtype(scores)).to(value.dtype)
    over_prefix = torch.bmm(weights[..., :n_prefix].reshape(n_kv_heads, -1, n_prefix), values)
    output = over_prefix.view(n_kv_heads, batch, group, n_tokens, head_dim)
    output = output + torch.einsum("kbgts,bksd->kbgtd", weights[..., n_prefix:], value)
    return output.transpose(0, 1).reshape(batch, n_heads, n_tokens, head_dim)


def xglm_attention(module: nn.Module, hidden_states: Tensor, shared: Call | None = None, **_: object):
    """
    Forward pass of transformers' `XGLMAttention`, the class of the fairseq dense models, through the function above.

    The stock class multiplies matrices itself and never asks the attention interface.
    """
    shape = (*hidden_states.shape[:-1], module.num_heads, module.head_dim)
    query = (module.q_proj(hidden_states) * module.scaling).view(shape).transpose(1, 2)
    key = module.k_proj(hidden_states).view(shape).transpose(1, 2)
    value = module.v_proj(hidden_states).view(shape).transpose(1, 2)
    output, _weights = shared_prefix_attention(module, query, key, value, scaling=1.0, shared=shared)
    return module.out_proj(output.reshape(hidden_states.shape)), None
