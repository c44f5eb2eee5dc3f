"""Page 11: what the record of small trained transformers separates, and the forward pass as a greedy sweep."""

import json
from functools import cache, reduce
from operator import getitem
from typing import Any

import torch
from torch import Tensor

from claims.registry import Control, Interval, chapter, mean_of
from iclgd_helpers.paths import resolve_path
from iclgd_helpers.theory.gradient_step import relative_error

claim = chapter("11_greedy_layers_and_fixed_prompts", drawn="", status="empirical")
RECORD = "results/theory/greedy_layers.json"


@cache
def record() -> dict[str, Any]:
    return json.loads(resolve_path(RECORD).read_text(encoding="utf-8"))


@claim(
    "G-forward",
    statement="The forward pass of linear attention layers is one greedy sweep from bottom to top, with one gradient "
    "step for each layer, whether trained or not.",
    source="[C] section 5 and Theorem 4.1, corrected",
    status="identity",
    controls=[
        Control("the base of the zero-shot pass", {"zero_shot_base": True}),
        Control("demonstrations that are not updated", {"update": False}),
        Control("twice the rate", {"rate": 2}),
    ],
)
def forward(seed: int, rate: float = 1, zero_shot_base: bool = False, update: bool = True) -> float:
    """Of the sweep, at `rate` times M, against the forward pass token by token."""
    g = torch.Generator().manual_seed(seed)
    d, M, N = 4 + seed % 5, 2 + seed % 11, 1 + seed % 4

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    layers = [(draw(d, d) / d**0.5, draw(d, d) / d**0.5, 0.3 / (M + N) * draw(d, d)) for _ in range(3)]
    Z, z = draw(d, M), draw(d, N)
    alone, expected = z, list(torch.cat([Z, z], 1).T)
    for W_Q, W_K, W_V in layers:
        expected = [t + sum((W_V @ s) * ((W_K @ s) @ (W_Q @ t)) for s in expected) for t in expected]
    for W_Q, W_K, W_V in layers:
        tokens = alone if zero_shot_base else z
        W = (W_V @ tokens @ (W_K @ tokens).T).requires_grad_()
        targets = W_V @ Z + W.detach() @ W_K @ Z
        (0.5 * (W @ W_K @ Z - targets).square().sum(0).mean()).backward()
        new = W.detach() - rate * M * W.grad
        alone = alone + W_V @ alone @ (W_K @ alone).T @ W_Q @ alone
        Z, z = Z + new @ W_Q @ Z if update else Z, z + new @ W_Q @ z
    return relative_error(z, torch.stack(expected[M:], 1))


@claim(
    "G-context",
    statement="Small transformers that are trained on linear regression learn new tasks from their demonstrations.",
    source="Garg et al. 2022; measured here",
    controls=[Control("the same networks without demonstrations", {"path": ("labels", "error", "no prompt")})],
    options={"path": ("labels", "error", "true")},
)
@claim(
    "G-labels",
    statement="That the format of demonstrations matters and their labels do not is false for these networks: permuted "
    "labels raise the error.",
    source="Min et al. 2022, as cited in [C]; measured here in regression",
    status="refuted here",
    controls=[Control("the true labels", {"path": ("labels", "error", "true")})],
    options={"path": ("labels", "error", "permuted")},
)
@claim(
    "G-passes",
    statement="One greedy pass over the layers is not enough: eight passes reach a lower error, each at its best rate.",
    source="[C] section 5; measured here",
    status="refuted here",
    controls=[Control("one pass", {"path": ("passes", "greedy", "1", "error")})],
    options={"path": ("passes", "greedy", "8", "error")},
)
@claim(
    "G-likeness-labels",
    statement="The in-context update resembles a joint gradient step on the demonstrations, and labels matter for it.",
    source="[B] section 3; measured here",
    controls=[Control("a step on shuffled labels", {"path": ("likeness, trained", "joint, shuffled", "plain")})],
    options={"path": ("likeness, trained", "joint, true", "plain")},
)
@claim(
    "G-likeness-trained",
    statement="That resemblance is a property of trained networks.",
    source="[B] section 3 with the control of Deutch et al. 2023; measured here",
    controls=[Control("untrained networks", {"path": ("likeness, untrained", "joint, true", "plain")})],
    options={"path": ("likeness, trained", "joint, true", "plain")},
)
@claim(
    "G-prompt-start",
    statement="A fixed prompt of true demonstrations lowers the error on a new task before finetuning begins.",
    source="[C] section 5.1; measured here",
    controls=[Control("no prompt", {"path": ("prompt", "no prompt", "curve", 0)})],
    options={"path": ("prompt", "true demonstrations", "curve", 0)},
)
@claim(
    "G-prompt-labels",
    statement="A fixed prompt with shuffled labels starts finetuning at a higher error than a true one.",
    source="[C] section 5.1; measured here",
    controls=[Control("a true prompt", {"path": ("prompt", "true demonstrations", "curve", 0)})],
    options={"path": ("prompt", "shuffled demonstrations", "curve", 0)},
)
@claim(
    "G-prompt-cost",
    statement="Up to the threshold, finetuning with the prompt in front of every question processes more tokens than "
    "finetuning without it.",
    source="[C] section 5.1; measured here",
    controls=[Control("no prompt", {"path": ("prompt", "no prompt", "tokens_not_shared")})],
    options={"path": ("prompt", "true demonstrations", "tokens_not_shared")},
)
def over_networks(seed: int, path: tuple[str | int, ...]) -> Interval:
    """What the record holds under `path` for each network, over pre-training seeds."""
    return mean_of([reduce(getitem, path, network) for network in record()["networks"].values()])


@claim(
    "G-beyond-one-step",
    statement="In context these networks do better than any single gradient step from zero, whose loss is at least "
    "(d + 1)/(M + d + 1).",
    source="[C] section 5, on Mahankali et al. 2023; measured here",
    controls=[Control("the loss of the best single step, in closed form", {"one_step": True})],
)
def beyond_one_step(seed: int, one_step: bool = False) -> Interval:
    found = over_networks(seed, ("labels", "error", "true"))
    d, M = record()["settings"]["SIZES"][0], record()["parameters"]["n_demonstrations"]
    best = (d + 1) / (M + d + 1)
    return Interval(best, best, found.n) if one_step else found
