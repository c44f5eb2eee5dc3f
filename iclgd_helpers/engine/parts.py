"""
The parts of a causal language model, found and not listed: layers, attention, projections, what follows the layers.

`find` looks at the modules, for which no weights are needed. `measure` runs a few tokens through the model and sees
which entries of a projection become keys and values. What is not found ends in one line that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from iclgd_helpers.engine.families import HELP
from iclgd_helpers.engine.own_attention import FORWARDS
from iclgd_helpers.engine.prefix_attention import NAME, Call, Prefix
from iclgd_helpers.errors import InputError

LEAF = 1e-2  # size of random outputs of projections; so small that no family clips them


@dataclass(frozen=True)
class Parts:
    """
    What can be seen without a pass.

    Attributes
    ----------
    owner
        the module that runs the layers and what follows them.
    layers
        the blocks, from the bottom to the top.
    attentions
        of each layer, the module that holds the projections.
    projections
        names of those children of each attention module whose outputs become keys and values.
    head
        from final states to logits.
    """

    owner: nn.Module
    layers: nn.ModuleList
    attentions: list[nn.Module]
    projections: tuple[str, ...]
    head: nn.Linear


@dataclass(frozen=True)
class Measured:
    """
    What a pass shows.

    Attributes
    ----------
    makes_kv
        of each layer: name of a projection -> `[output]`, True where an output becomes a key or a value.
    outputs
        of each layer, the last projection of its attention.
    after
        the modules that follow the last layer, in the order in which they run; the first is the final norm.
    windows
        of each layer, how many tokens a token sees, None for all.
    """

    makes_kv: list[dict[str, Tensor]]
    outputs: list[nn.Module]
    after: list[nn.Module]
    windows: list[int | None]


def missing(part: str, name: str, kind: str) -> InputError:
    """The error that says which part of a model was not found."""
    return InputError(f"model {name!r} is a {kind!r}, whose {part} cannot be found: {HELP}")


def find(model: transformers.PreTrainedModel, name: str) -> Parts:
    """
    The parts of `model`, called `name` in errors.

    Raises
    ------
    InputError
        naming the part that was not found.
    """
    kind, n_layers = model.config.model_type, getattr(model.config, "num_hidden_layers", None)
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers)
    layers = next(lists, None)
    if layers is None:
        raise missing("list of layers", name, kind)
    found = [_attention(layer) for layer in layers]
    if any(part is None for part in found):
        raise missing("attention with K and V projections, or a fused one", name, kind)
    attentions, projections = zip(*(part for part in found if part is not None), strict=True)
    if len(set(projections)) > 1:
        raise missing("one kind of K and V projections in all layers", name, kind)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise missing("head, a linear layer,", name, kind)
    owner = next(m for m in model.modules() if any(child is layers for child in m.children()))
    return Parts(owner, layers, list(attentions), projections[0], head)


def _attention(layer: nn.Module) -> tuple[nn.Module, tuple[str, ...]] | None:
    """The attention module of a layer and the names of its projections to keys and values, if there is one."""
    for module in layer.modules():
        children = linear_children(module)
        if {"k_proj", "v_proj"} <= children.keys():
            return module, ("k_proj", "v_proj")
        if "Attention" in type(module).__name__ and len(children) == 2:
            fused, out = sorted(children, key=lambda child: -n_outputs(children[child]))
            if n_outputs(children[fused]) > n_outputs(children[out]):
                return module, (fused,)
    return None


def linear_children(module: nn.Module) -> dict[str, nn.Module]:
    """Name -> child that multiplies with a matrix."""
    return {name: child for name, child in module.named_children() if isinstance(child, nn.Linear | Conv1D)}


def n_outputs(projection: Any) -> int:
    """How many numbers it makes of a token."""
    return int(projection.nf if isinstance(projection, Conv1D) else projection.out_features)


def route(model: transformers.PreTrainedModel, attentions: Sequence[Any]) -> None:
    """Let the attention layers of `model` use `prefix_attention`, those of `own_attention` by another forward pass."""
    own = [type(module).__name__ in FORWARDS for module in attentions]
    if not any(own):
        model.set_attn_implementation(NAME)
    for layer, module in enumerate(attentions):
        if own[layer]:
            module.layer_idx = layer
            module.forward = MethodType(FORWARDS[type(module).__name__], module)  # of this one alone


@torch.enable_grad()
def measure(model: transformers.PreTrainedModel, parts: Parts, run: Callable[[Call], Tensor], name: str) -> Measured:
    """
    What a pass of a few tokens shows of a model that `route` has changed; `run(call)` gives its final hidden states.

    Every projection of an attention layer gives random numbers instead of its own. Their gradients show where they go.

    Raises
    ------
    InputError
        naming the part that was not found.
    """
    kind, call = model.config.model_type, Call(capture=Prefix(), queries={})
    with _random_outputs(parts.attentions) as leaves, _after(parts) as (after, last):
        states = run(call)
    n_layers = len(parts.layers)
    if sorted(call.windows) != list(range(n_layers)):
        asking = type(parts.attentions[0]).__name__
        raise missing(f"attention function ({asking} asks no interface for one)", name, kind)
    with torch.no_grad():
        expected = last[0]
        for module in after:
            expected = module(expected)
    if expected.shape != states.shape or not torch.allclose(expected, states, 1e-3, 1e-5, equal_nan=True):
        raise missing("final norm", name, kind)
    makes_kv = [_makes_kv(call, layer, leaves[layer]) for layer in range(n_layers)]
    for found in makes_kv:
        if found is None or set(found) != set(parts.projections):
            raise missing("K and V projections that make nothing else", name, kind)
    outputs = [getattr(m, list(leaves[layer])[-1]) for layer, m in enumerate(parts.attentions)]
    windows = [call.windows[layer] for layer in range(n_layers)]
    return Measured([found for found in makes_kv if found is not None], outputs, after, windows)


@contextmanager
def _random_outputs(attentions: Sequence[nn.Module]) -> Iterator[list[dict[str, Tensor]]]:
    """The linear children of each attention module give leaves of the graph; yields them by name, in order of calls."""
    generator = torch.Generator().manual_seed(0)
    leaves: list[dict[str, Tensor]] = [{} for _ in attentions]

    def hook(layer: int, child: str) -> Callable[..., Tensor]:
        def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            drawn = torch.randn(output.shape, generator=generator, dtype=torch.float32) * LEAF
            leaves[layer][child] = drawn.to(output).requires_grad_()
            return leaves[layer][child].clone()  # some families clip it where it lies

        return replace

    handles = [
        child.register_forward_hook(hook(layer, name))
        for layer, module in enumerate(attentions)
        for name, child in linear_children(module).items()
    ]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _after(parts: Parts) -> Iterator[tuple[list[nn.Module], list[Tensor]]]:
    """Collects the modules that run after the last layer, and that layer's output."""
    after: list[nn.Module] = []
    last: list[Tensor] = []

    def end(_module: nn.Module, _inputs: object, output: Any) -> None:
        last[:] = [(output[0] if isinstance(output, tuple) else output).detach()]

    def note(module: nn.Module, _inputs: object, _output: object) -> None:
        if last:
            after.append(module)

    others = [child for child in parts.owner.children() if child is not parts.layers]
    handles = [parts.layers[-1].register_forward_hook(end), *(child.register_forward_hook(note) for child in others)]
    try:
        yield after, last
    finally:
        for handle in handles:
            handle.remove()


def _makes_kv(call: Call, layer: int, leaves: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """
    Name of a projection -> its outputs that become keys or values; of those only that make any.

    None where an output becomes part of a query as well, or a projection with keys in it has outputs without a use.
    """
    assert call.queries is not None and call.capture is not None
    into_q = _reached([call.queries[layer]], leaves)
    into_kv = _reached([call.capture.keys[layer], call.capture.values[layer]], leaves)
    for name, outputs in into_kv.items():
        if bool(outputs.any()) and bool((outputs == into_q[name]).any()):
            return None
    return {name: outputs for name, outputs in into_kv.items() if bool(outputs.any())}


def _reached(tensors: Sequence[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name -> `[output]`, True where a leaf's output has an effect on one of `tensors`."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float32).to(t) for t in tensors]
    total = torch.stack([(t * w).sum() for t, w in zip(tensors, weights, strict=True)]).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros(leaf.shape[-1], dtype=torch.bool, device=leaf.device)
        if gradient is None
        else (gradient != 0).flatten(0, -2).any(0)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }
