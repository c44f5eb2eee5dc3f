"""
Attention layers that multiply their matrices themselves, routed through the attention of this package.

transformers lets most models ask an interface for attention. The classes named in `FORWARDS` never ask it. Each
function below makes queries, keys and values as its class does, and hands them to `shared_prefix_attention`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iclgd_helpers.engine.prefix_attention import n_positions, shared_prefix_attention

Forward = Callable[..., tuple[Tensor, None]]
# Name of an attention class -> its forward pass. An entry for another class makes its family known.
FORWARDS: dict[str, Forward] = {}


def forward_of(name: str) -> Callable[[Forward], Forward]:
    """Decorator of a function that is the forward pass of the attention class called `name`."""

    def register(function: Forward) -> Forward:
        FORWARDS[name] = function
        return function

    return register


def _heads(projected: Tensor, head_dim: int) -> Tensor:
    """`[batch, token, head * head_dim]` as `[batch, head, token, head_dim]`."""
    return projected.view(*projected.shape[:-1], -1, head_dim).transpose(1, 2)


def _alibi(module: Any, states: Tensor) -> Tensor:
    """What transformers adds to scores of keys, `[head, position]`, by its own function: some slopes are rounded."""
    stock = sys.modules[type(module).__module__]
    each = torch.ones(1, n_positions(states), dtype=torch.long, device=states.device)
    alibi: Tensor = stock.build_alibi_tensor(each, module.num_heads, states.dtype)
    return alibi[:, 0]


@forward_of("XGLMAttention")
def xglm_attention(module: Any, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
    """The class of XGLM and of the fairseq dense models."""
    query = _heads(module.q_proj(hidden_states) * module.scaling, module.head_dim)
    key, value = (_heads(project(hidden_states), module.head_dim) for project in (module.k_proj, module.v_proj))
    output, _weights = shared_prefix_attention(module, query, key, value, scaling=1.0)
    return module.out_proj(output.reshape(hidden_states.shape)), None


@forward_of("GPTNeoSelfAttention")
def gpt_neo_attention(module: Any, hidden_states: Tensor, **_: object) -> tuple[Tensor, None]:
    """GPT-Neo: products are not scaled; local layers have a sliding window."""
    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (_heads(project(hidden_states), module.head_dim) for project in projections)
    window = module.config.window_size if module.attention_type == "local" else None
    output, _weights = shared_prefix_attention(module, query, key, value, scaling=1.0, sliding_window=window)
    return module.out_proj(output.flatten(2)), None


@forward_of("GPTJAttention")
def gptj_attention(
    module: Any, hidden_states: Tensor, position_ids: Tensor | None = None, **_: object
) -> tuple[Tensor, None]:
    """GPT-J: rotary positions, in pairs of neighbours, on the first entries of a head."""
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb

    projections = (module.q_proj, module.k_proj, module.v_proj)
    query, key, value = (_heads(project(hidden_states), module.head_dim) for project in projections)
    turns = module.embed_positions.to(hidden_states.device)[position_ids].to(key.dtype)
    sin, cos = turns.chunk(2, dim=-1)  # [batch, token, rotary_dim / 2]
    rotary = module.rotary_dim or module.head_dim

    def turned(states: Tensor) -> Tensor:
        first = apply_rotary_pos_emb(states[..., :rotary].transpose(1, 2), sin, cos).transpose(1, 2)
        return torch.cat([first, states[..., rotary:]], -1)

    output, _weights = shared_prefix_attention(module, turned(query), turned(key), value)
    return module.out_proj(output.flatten(2)), None


@forward_of("FalconAttention")
def falcon_attention(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None = None,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Falcon: one key/value head, groups, or one a query head; rotary positions or ALiBi."""
    from transformers.models.falcon.modeling_falcon import apply_rotary_pos_emb

    parts = module._split_heads(module.query_key_value(hidden_states))
    query, key, value = (part.transpose(1, 2) for part in parts)
    table = None
    if alibi is not None:  # the class scales products and positions alike; slopes differ from head to head
        table = _alibi(module, hidden_states) / module.head_dim**0.5
        key, value = (part.expand(query.shape) for part in (key, value))
    elif position_embeddings is not None:
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
    if table is None and module.new_decoder_architecture:  # its keys were copied for each head of a group
        group = module.num_heads // module.num_kv_heads
        key, value = key[:, ::group], value[:, ::group]
    output, _weights = shared_prefix_attention(module, query, key, value, alibi=table)
    return module.dense(output.flatten(2)), None


@forward_of("BloomAttention")
def bloom_attention(module: Any, hidden_states: Tensor, residual: Tensor, **_: object) -> tuple[Tensor, None]:
    """BLOOM: ALiBi; the class adds the residual itself."""
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    output, _weights = shared_prefix_attention(module, query, key, value, alibi=_alibi(module, hidden_states))
    return residual + module.dense(output.flatten(2)), None
