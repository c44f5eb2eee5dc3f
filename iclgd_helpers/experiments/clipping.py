"""Joint finetuning under every kind and bound of clipping, beside unclipped and standard finetuning."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from iclgd_helpers.engine import finetune
from iclgd_helpers.engine.finetune import Learner, Settings
from iclgd_helpers.engine.models import KVUpdate
from iclgd_helpers.errors import InputError
from iclgd_helpers.experiments import protocol, sweeps
from iclgd_helpers.experiments.runs import Run


def is_whole(sweep: Mapping[str, Any]) -> bool:
    """Whether a stored comparison tried every kind and bound of the protocol."""
    tried = {(point["clip"], point["factor"]) for point in sweep["points"] if point["clip"] != "none"}
    return tried == set(itertools.product(protocol.CLIP_KINDS, protocol.CLIP_FACTORS))


def compare(run: Run) -> dict[str, Any]:
    """
    The comparison as it is stored: read on evaluation rows; bounds are multiples of the unclipped run's median norm.

    Raises
    ------
    InputError
        if the unclipped run diverges: there is no typical norm then.
    """
    given = run.parameters
    examples = [run.layout.training_sequence(example) for example in run.training]
    free = [Learner(examples, Settings(given.learning_rate, given.loss))]
    (unclipped,) = finetune.finetune_together(run.model, free, "joint")
    (standard,) = finetune.finetune_together(run.model, free, "standard")
    if unclipped.diverged:
        raise InputError(f"joint finetuning diverges at learning_rate={given.learning_rate}: there is no typical norm")
    typical = typical_norms(run, unclipped.gradient_norms)
    tried = itertools.product(protocol.CLIP_KINDS, protocol.CLIP_FACTORS)
    bounds = {(kind, factor): typical[kind] * factor for kind, factor in tried}
    learners = [
        Learner(examples, Settings(given.learning_rate, given.loss, kind, bound))
        for (kind, _factor), bound in bounds.items()
    ]
    clipped = finetune.finetune_together(run.model, learners, "joint")
    updates: dict[Any, KVUpdate] = {key: one.update for key, one in zip(bounds, clipped, strict=True)}
    updates |= {"joint": unclipped.update, "standard": standard.update}
    points = []
    for key, point in sweeps.compare(run, run.queries, updates).items():
        if key in bounds:
            about = {"method": "joint", "clip": key[0], "factor": key[1], "clip_value": bounds[key]}
        else:
            about = {"method": key, "clip": "none", "clip_value": None}
        points.append({**about, "learning_rate": given.learning_rate, **point})
    rows = [query.row for query in run.queries]
    return {**sweeps.content("clips", run, points), "rows": rows, "typical_norms": typical}


def typical_norms(run: Run, norms: torch.Tensor) -> dict[str, float]:
    """Median of what each kind of clipping bounds; `norms` is `[step, layer]`."""
    trainables = run.model.trainables
    n_entries = sum(float(t.masked(torch.ones_like(t.parameter)).sum()) for t in trainables) / run.model.n_layers
    of_layer = float(norms.quantile(0.5))
    whole = float(norms.square().sum(1).sqrt().quantile(0.5))
    return {"global": whole, "per_layer": of_layer, "elementwise": of_layer / n_entries**0.5}
