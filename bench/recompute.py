"""The way of the original experiments, every prompt recomputed, beside the engine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bench.measuring import differences, score, timed
from bench.setting import Bench
from iclgd_helpers.data.token_layout import Layout, Query
from iclgd_helpers.engine import parts
from iclgd_helpers.engine.models import LanguageModel
from iclgd_helpers.engine.observe import Arm, Observation, observe
from iclgd_helpers.experiments import inputs

LABELS = ("clearly a failure", "rather a failure", "rather a success", "clearly a success")  # three tokens each


class _Stock:
    """The stock model with transformers' own attention; notes scores and attention outputs of one position."""

    NAME = "bench_recording"

    def __init__(self, model: LanguageModel) -> None:
        self.model = copy.deepcopy(model.model)
        self.read, self.scores, self.outputs = 0, [], []
        AttentionInterface.register(self.NAME, self._attention)
        AttentionMaskInterface.register(self.NAME, sdpa_mask)  # without this there would be no causal mask
        self.model.set_attn_implementation(self.NAME)
        for attention in parts.find(self.model, model.name).attentions:
            attention.register_forward_hook(self._keep)

    def _attention(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
        keys = key[0].repeat_interleave(query.shape[1] // key.shape[1], 0)
        self.scores.append((keys @ query[0, :, self.read, :, None])[..., 0] * options["scaling"])
        return sdpa_attention_forward(module, query, key, value, mask, **options)

    def _keep(self, _module: nn.Module, _inputs: tuple, output: tuple) -> None:
        self.outputs.append(output[0][0, self.read])

    @torch.no_grad()
    def observe(self, prefix: Sequence[int], query: Query, rows: int = 0) -> tuple[Tensor, ...]:
        """One query as the original treats it: the whole prompt, the head at every position (`rows`=0) or the last."""
        start = len(prefix)
        self.read, self.scores, self.outputs = start + query.read, [], []
        tokens = torch.tensor([[*prefix, *query.tokens]])
        logits = self.model(tokens, use_cache=False, logits_to_keep=rows).logits[0]
        position = start + query.predict - tokens.shape[1]  # from the end
        log_probabilities = torch.log_softmax(logits[position].float(), -1)[[label[0] for label in query.labels]]
        scores = torch.stack(self.scores)[:, :, start:]  # [layer, head, token]
        return log_probabilities, torch.stack(self.outputs), scores

    @torch.no_grad()
    def label_log_probabilities(self, prefix: Sequence[int], query: Query) -> Tensor:
        """Of labels of several tokens, `[class]`: the whole prompt once for each, as the original's way would be."""
        prompt, found = [*prefix, *query.tokens[: query.predict + 1]], []
        for label in query.labels:
            self.read, self.scores, self.outputs = len(prompt) - 1, [], []
            logits = self.model(torch.tensor([[*prompt, *label]]), use_cache=False).logits[0, -len(label) - 1 : -1]
            log_probabilities = torch.log_softmax(logits.float(), -1)
            found.append(log_probabilities[torch.arange(len(label)), list(label)].sum())
        return torch.stack(found)


def recompute(bench: Bench) -> dict[str, Any]:
    """The original's way: every prompt from its first token, one at a time; and the engine on all queries."""
    cell, setting = bench.cell, bench.setting
    stock, prefix = _Stock(cell.model), bench.in_context.prefix
    order = sorted(range(len(cell.queries)), key=lambda i: len(cell.queries[i].tokens))
    chosen = order[:: max(1, len(order) // (setting.recomputed * setting.recompute_rounds))]
    rounds = [chosen[i :: setting.recompute_rounds][: setting.recomputed] for i in range(setting.recompute_rounds)]
    engine = {}
    for indices, seen in observe(cell.model, cell.queries, {"arm": bench.in_context}):
        engine |= {i: (seen["arm"], row) for row, i in enumerate(indices)}
    gaps, seconds, tokens = [], {"recomputed": [], "recomputed_needed_rows": [], "engine": []}, 0
    stock.observe(prefix, cell.queries[0])
    for indices in rounds:
        start, found = time.perf_counter(), {}
        for i in indices:
            found[i] = stock.observe(prefix, cell.queries[i])
        seconds["recomputed"].append((time.perf_counter() - start) / len(indices))
        few = indices[:: max(1, len(indices) // 5)]
        one = timed(lambda few=few: [stock.observe(prefix, cell.queries[i], rows=2) for i in few])
        seconds["recomputed_needed_rows"].append(one / len(few))
        whole = timed(lambda: score(cell.model, bench.some(setting.engine_queries), bench.in_context))
        seconds["engine"].append(whole / setting.engine_queries)
        for i, theirs in found.items():
            gaps.append(_gaps(*engine[i], theirs, len(cell.queries[i].tokens), cell.queries[i].read))
            tokens += len(prefix) + len(cell.queries[i].tokens)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    largest = {name: max(gap[name] for gap in gaps) for name in gaps[0]}
    n = sum(map(len, rounds))
    return {
        "ratio_vs_recompute": medians["recomputed"] / medians["engine"],
        "ratio_with_needed_rows_only": medians["recomputed_needed_rows"] / medians["engine"],
        "largest_differences": largest,
        "same_numbers": max(largest.values()) < 1e-4,
        "seconds_a_query": seconds,
        "n_queries_recomputed": n,
        "n_queries_engine": setting.engine_queries,
        "mean_prompt_tokens": tokens / n,
        "counts": "the engine's time includes its prefix",
    }


def labels(bench: Bench) -> dict[str, Any]:
    """Four labels of three tokens: the original's way computes the prompt once for each, the engine once for all."""
    cell, setting = bench.cell, bench.setting
    task = replace(cell.layout.task, verbalizers=LABELS)
    layout = Layout.make(cell.layout.tokenizer, task, setting.separator)
    examples = inputs.task_data(cell.parameters).evaluation[: len(cell.queries)]
    queries = [layout.query(example, cell.parameters.token_read) for example in examples]
    arm = Arm(layout.prefix(cell.demonstrations))
    stock, ours = _Stock(cell.model), score(cell.model, queries, arm)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i].tokens))
    chosen = order[:: max(1, len(order) // setting.recomputed)][: setting.recomputed]
    rounds = [chosen[i :: setting.recompute_rounds] for i in range(setting.recompute_rounds)]
    seconds: dict[str, list[float]] = {"recomputed": [], "engine": []}
    theirs: dict[int, np.ndarray] = {}
    stock.label_log_probabilities(arm.prefix, queries[0])
    many = [queries[i % len(queries)] for i in range(setting.engine_queries)]
    for indices in filter(None, rounds):
        start = time.perf_counter()
        theirs |= {i: stock.label_log_probabilities(arm.prefix, queries[i]).double().numpy() for i in indices}
        seconds["recomputed"].append((time.perf_counter() - start) / len(indices))
        seconds["engine"].append(timed(lambda: score(cell.model, many, arm)) / len(many))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    apart = differences(ours[list(theirs)], np.stack(list(theirs.values())))
    return {
        "ratio_vs_recompute": medians["recomputed"] / medians["engine"],
        "same_numbers": apart["largest_log_probability_difference"] < 1e-3,
        "differences": apart,
        "seconds_a_query": seconds,
        "label_tokens": [len(label) for label in layout.labels],
        "n_queries_recomputed": len(theirs),
        "n_queries_engine": len(many),
        "counts": "the engine's time includes its prefix",
    }


def _gaps(ours: Observation, row: int, theirs: tuple[Tensor, ...], tokens: int, read: int) -> dict[str, float]:
    """Largest differences of what was recorded, relative to the largest entry where that is above 1."""
    scores = ours.attention_scores[row][..., : read + 1]
    pairs = {
        "label_log_probability": (ours.label_log_probabilities[row], theirs[0]),
        "attention_output": (ours.attention_output[row], theirs[1]),
        "attention_score": (scores, theirs[2][..., : read + 1]),
    }
    return {k: float((a - b).abs().max() / max(1.0, float(b.abs().max()))) for k, (a, b) in pairs.items()}
