"""How time grows with the sizes of a run, beside how the counted operations do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from bench import peers, steps
from bench.measuring import score, timed, useful
from bench.setting import Bench
from iclgd_helpers.data.demonstrations import select_demonstrations
from iclgd_helpers.data.token_layout import Query
from iclgd_helpers.engine import finetune, parts
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, observe
from iclgd_helpers.experiments import cost

Points = dict[str, list[dict[str, Any]]]


def growth(bench: Bench) -> dict[str, Any]:
    """Time of scoring and of a finetuning step against each size, beside the counted operations."""
    found = of_scoring(bench) | {"arms": of_arms(bench)} | of_a_step(bench)
    return {"growth": found, "rows_of_the_task": len(bench.cell.queries)}


def of_scoring(bench: Bench) -> Points:
    """Against the number of queries, of demonstrations and of layers."""
    cell, setting = bench.cell, bench.setting
    few = bench.some(setting.growth_rows)

    def point(x: int, model: LanguageModel, shape: cost.Shape, queries: Sequence[Query], arm: Arm) -> dict[str, Any]:
        rounds = 1 if len(queries) > setting.queries else 2
        seconds = min(timed(lambda: score(model, queries, arm)) for _ in range(rounds))
        flops = useful(shape, queries, len(arm.prefix))
        return {"x": x, "seconds": seconds, "flops": flops, "n_queries": len(queries), "prefix": len(arm.prefix)}

    model, shape, arm = cell.model, bench.shape, bench.in_context
    train, most = peers.task_data(cell).train, max(setting.growth_demonstrations)
    data = select_demonstrations(train, most, cell.parameters.seed, cell.parameters.balanced)
    arms = {k: Arm(cell.layout.prefix(data[:k])) for k in setting.growth_demonstrations}
    result: Points = {
        "queries": [point(n, model, shape, bench.some(n), arm) for n in setting.growth_queries],
        "demonstrations": [point(k, model, shape, few, arm) for k, arm in arms.items()],
        "layers": [],
    }
    for n in layers(bench):
        with truncated(model, n) as shorter:
            result["layers"].append(point(n, shorter, shape.truncated(n), few, arm))
    return result


def of_arms(bench: Bench) -> list[dict[str, Any]]:
    """
    Against the number of arms that are observed together; `one_arm` is the time of the first alone.

    As in a run, the arms have K/V weights of their own and no demonstrations; the first is the unchanged model.
    """
    cell, setting = bench.cell, bench.setting
    bare, queries = cell.layout.prefix(), bench.some(setting.growth_arm_rows)
    several = {"arm 0": Arm(bare)}
    for seed in range(1, max(setting.growth_arms)):
        several[f"arm {seed}"] = Arm(bare, finetune.random_update(cell.model, seed, 1.0))

    def seconds(n: int) -> float:
        arms = dict(list(several.items())[:n])
        return min(timed(lambda: list(map(len, observe(cell.model, queries, arms)))) for _ in range(2))

    one, flops = seconds(1), useful(bench.shape, queries, len(bare))
    common = {"one_arm": one, "n_queries": len(queries), "prefix": len(bare)}
    return [
        {"x": n, "seconds": one if n == 1 else seconds(n), "flops": n * flops, **common} for n in setting.growth_arms
    ]


def of_a_step(bench: Bench) -> Points:
    """Against tokens, learners side by side, and layers; each for every method."""
    setting, typical = bench.setting, bench.setting.step_tokens
    result: Points = {"step_tokens": [], "step_learners": [], "step_layers": []}
    for method in finetune.METHODS:
        result["step_tokens"] += [{"x": n, **steps.point(bench, method, n)} for n in setting.growth_tokens]
        result["step_learners"] += [{"x": n, **steps.point(bench, method, typical, n)} for n in setting.growth_learners]
        for n in layers(bench):
            with truncated(bench.cell.model, n) as shorter:
                shape = bench.shape.truncated(n)
                found = steps.point(bench, method, typical, model=shorter, shape=shape)
                result["step_layers"].append({"x": n, **found})
    return result


def layers(bench: Bench) -> list[int]:
    """The numbers of layers that are measured."""
    return sorted({max(1, round(share * bench.shape.n_layers)) for share in bench.setting.growth_layers})


@contextmanager
def truncated(model: LanguageModel, n_layers: int) -> Iterator[LanguageModel]:
    """The model with its first layers only."""
    owner, config = parts.find(model.model, model.name).owner, model.model.config
    (name,) = (name for name, child in owner.named_children() if child is model.layers)
    layers, before = model.layers, config.num_hidden_layers
    try:
        setattr(owner, name, nn.ModuleList(layers[:n_layers]))
        config.num_hidden_layers = n_layers
        yield LanguageModel(model.model, model.tokenizer, model.name)
    finally:
        setattr(owner, name, layers)
        config.num_hidden_layers = before
