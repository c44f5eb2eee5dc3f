"""Each factor of the engine's speed, taken back in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.measuring import in_turn, score
from bench.setting import Bench
from iclgd_helpers.data.token_layout import Query, TokenTree, TrainingSequence
from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm


def ablations(bench: Bench) -> dict[str, Any]:
    """Each factor switched off in turn; seconds a query (or a step), beside everything on."""
    cell, setting = bench.cell, bench.setting
    queries, model, arm = bench.some(setting.growth_rows), bench.cell.model, bench.in_context
    whole = [prompt_and_query(arm.prefix, query) for query in queries[:: max(1, len(queries) // setting.recomputed)]]
    bare = Arm(cell.layout.prefix())

    def every_position() -> None:
        with head_everywhere(model):
            score(model, queries, arm)

    seconds = in_turn(
        2,
        all_on=lambda: score(model, queries, arm),
        shared_prefix=lambda: score(model, whole, bare),
        batching=lambda: score(model, queries, arm, batch_tokens=1),
        needed_rows=every_position,
    )
    sizes = {"shared_prefix": len(whole)}
    scoring_loop = {name: min(values) / sizes.get(name, len(queries)) for name, values in seconds.items()}
    sequence = cell.layout.training_sequence(cell.training[0])
    steps = in_turn(
        max(3, setting.rounds),
        kv_only=lambda: gradient(model, sequence, False),
        all_parameters=lambda: gradient(model, sequence, True),
    )
    return {
        "ablations": {
            "seconds_a_query": scoring_loop,
            "seconds_a_gradient": {name: statistics.median(values) for name, values in steps.items()},
            "gradient_bytes": {"kv_only": 4 * bench.shape.n_stored, "all_parameters": 4 * bench.shape.n_parameters},
        },
        "n_queries": {name: sizes.get(name, len(queries)) for name in seconds},
        "rounds": 2,
    }


def prompt_and_query(prefix: Sequence[int], query: Query) -> Query:
    """The query with all of the prefix but BOS as its own tokens."""
    more = tuple(prefix[1:])
    trunk = more + query.tokens[: query.predict + 1]
    tree = TokenTree.of(trunk, query.labels, query.tokens[query.predict + 1 :][: len(query.labels[0])])
    return replace(query, tree=tree, predict=query.predict + len(more), read=query.read + len(more))


@contextmanager
def head_everywhere(model: LanguageModel) -> Iterator[None]:
    """The vocabulary projection at every position, as a stock forward pass makes it."""
    plain = model.hidden

    def hidden(*arguments: Any, **options: Any) -> Tensor:
        states = plain(*arguments, **options)
        model.head(states)
        return states

    model.hidden = hidden
    try:
        yield
    finally:
        del model.hidden


def gradient(model: LanguageModel, sequence: TrainingSequence, everything: bool) -> None:
    """Loss and gradients of one training sequence: of the K/V projections, or of every parameter."""
    chosen = list(model.model.parameters()) if everything else [t.parameter for t in model.trainables]
    targets = finetune.Targets.of([sequence], "all", model.device)
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        states = model.hidden(targets.tokens)
        if everything:  # as the original code does: the head's gradient, too
            loss = nn.functional.cross_entropy(model.head(states[0, :-1]), targets.words[0])
        else:
            loss = finetune.sequence_loss(model, states, targets)
        torch.autograd.grad(loss, chosen)
    finally:
        for parameter in chosen:
            parameter.requires_grad_(False)
