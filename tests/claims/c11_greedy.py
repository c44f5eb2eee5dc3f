"""Page 11: what the record of small trained transformers separates, and the forward pass as a greedy sweep."""

import json
import statistics
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from claims.registry import Exact, Measured, claim
from iclgd_helpers.paths import resolve_path

HERE = {"notebook": "11_greedy_layers_and_fixed_prompts"}
FOUND = HERE | {"tolerance": None}
RECORD = "results/theory/greedy_layers.json"
T_975 = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
Network = dict[str, Any]


@cache
def networks() -> list[Network]:
    return list(json.loads(resolve_path(RECORD).read_text(encoding="utf-8"))["networks"].values())


def interval(of: Callable[[Network], float]) -> tuple[float, float]:
    """Student's t interval over pre-training seeds."""
    values = [of(network) for network in networks()]
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def compared(found: Callable[[Network], float], control: Callable[[Network], float]) -> Measured:
    return Measured(interval(found), interval(control), 0.95, len(networks()))


def error(labels: str) -> Callable[[Network], float]:
    return lambda network: network["labels"]["error"][labels]


def likeness(which: str, labels: str) -> Callable[[Network], float]:
    return lambda network: network[f"likeness, {which}"][f"joint, {labels}"]["plain"]


def greedy(passes: str) -> Callable[[Network], float]:
    return lambda network: network["passes"]["greedy"][passes]["error"]


def prompt(arm: str, quantity: str) -> Callable[[Network], float]:
    def of(network: Network) -> float:
        value = network["prompt"][arm][quantity]
        return value[0] if quantity == "curve" else value

    return of


@claim(
    "G-forward",
    statement="The forward pass of linear attention layers is one greedy sweep from bottom to top, with one gradient "
    "step for each layer, whether trained or not.",
    source="[C] section 5 and Theorem 4.1, corrected",
    status="identity",
    control="the base of the zero-shot pass, demonstrations that are not updated, or twice the rate",
    **HERE,
)
def forward(seed: int) -> Exact:
    g = torch.Generator().manual_seed(seed)
    d, M, N = 4 + seed % 5, 2 + seed % 11, 1 + seed % 4

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    layers = [(draw(d, d) / d**0.5, draw(d, d) / d**0.5, 0.3 / (M + N) * draw(d, d)) for _ in range(3)]
    demos, query = draw(d, M), draw(d, N)

    expected = list(torch.cat([demos, query], 1).T)
    for W_Q, W_K, W_V in layers:
        expected = [t + sum((W_V @ s) * ((W_K @ s) @ (W_Q @ t)) for s in expected) for t in expected]
    expected = torch.stack(expected[M:], 1)

    def sweep(rate: float = M, zero_shot_base: bool = False, update: bool = True) -> float:
        Z, z, alone = demos, query, query
        for W_Q, W_K, W_V in layers:
            tokens = alone if zero_shot_base else z
            W = (W_V @ tokens @ (W_K @ tokens).T).requires_grad_()
            targets = W_V @ Z + W.detach() @ W_K @ Z
            (0.5 * (W @ W_K @ Z - targets).square().sum(0).mean()).backward()
            new = W.detach() - rate * W.grad
            alone = alone + W_V @ alone @ (W_K @ alone).T @ W_Q @ alone
            Z, z = Z + new @ W_Q @ Z if update else Z, z + new @ W_Q @ z
        return float((z - expected).norm() / expected.norm())

    return Exact(sweep(), min(sweep(zero_shot_base=True), sweep(update=False), sweep(rate=2 * M)))


@claim(
    "G-context",
    statement="Small transformers that are trained on linear regression learn new tasks from their demonstrations.",
    source="Garg et al. 2022; measured here",
    status="empirical",
    control="the same networks without demonstrations",
    **FOUND,
)
def in_context(seed: int) -> Measured:
    return compared(error("true"), error("no prompt"))


@claim(
    "G-labels",
    statement="That the format of demonstrations matters and their labels do not is false for these networks: permuted "
    "labels raise the error.",
    source="Min et al. 2022, as cited in [C]; measured here in regression",
    status="refuted here",
    control="the true labels",
    **FOUND,
)
def permuted_labels(seed: int) -> Measured:
    return compared(error("permuted"), error("true"))


@claim(
    "G-passes",
    statement="One greedy pass over the layers is not enough: eight passes reach a lower error, each at its best rate.",
    source="[C] section 5; measured here",
    status="refuted here",
    control="one pass",
    **FOUND,
)
def eight_passes(seed: int) -> Measured:
    return compared(greedy("8"), greedy("1"))


@claim(
    "G-likeness-labels",
    statement="The in-context update resembles a joint gradient step on the demonstrations, and labels matter for it.",
    source="[B] section 3; measured here",
    status="empirical",
    control="a step on shuffled labels",
    **FOUND,
)
def likeness_of_labels(seed: int) -> Measured:
    return compared(likeness("trained", "true"), likeness("trained", "shuffled"))


@claim(
    "G-likeness-trained",
    statement="That resemblance is a property of trained networks.",
    source="[B] section 3 with the control of Deutch et al. 2023; measured here",
    status="empirical",
    control="untrained networks",
    **FOUND,
)
def likeness_of_trained(seed: int) -> Measured:
    return compared(likeness("trained", "true"), likeness("untrained", "true"))


@claim(
    "G-prompt-start",
    statement="A fixed prompt of true demonstrations lowers the error on a new task before finetuning begins.",
    source="[C] section 5.1; measured here",
    status="empirical",
    control="no prompt",
    **FOUND,
)
def start_with_prompt(seed: int) -> Measured:
    return compared(prompt("true demonstrations", "curve"), prompt("no prompt", "curve"))


@claim(
    "G-prompt-labels",
    statement="A fixed prompt with shuffled labels starts finetuning at a higher error than a true one.",
    source="[C] section 5.1; measured here",
    status="empirical",
    control="a true prompt",
    **FOUND,
)
def start_with_shuffled_labels(seed: int) -> Measured:
    return compared(prompt("shuffled demonstrations", "curve"), prompt("true demonstrations", "curve"))


@claim(
    "G-prompt-cost",
    statement="Up to the threshold, finetuning with the prompt in front of every question processes more tokens than "
    "finetuning without it.",
    source="[C] section 5.1; measured here",
    status="empirical",
    control="no prompt",
    **FOUND,
)
def cost_of_prompt(seed: int) -> Measured:
    return compared(prompt("true demonstrations", "tokens_not_shared"), prompt("no prompt", "tokens_not_shared"))


@claim(
    "G-beyond-one-step",
    statement="In context these networks do better than any single gradient step from zero, whose loss is at least "
    "(d + 1)/(M + d + 1).",
    source="[C] section 5, on Mahankali et al. 2023; measured here",
    status="empirical",
    control="the loss of the best single step, in closed form",
    **FOUND,
)
def beyond_one_step(seed: int) -> Measured:
    content = json.loads(resolve_path(RECORD).read_text(encoding="utf-8"))
    d, M = content["settings"]["SIZES"][0], content["parameters"]["n_demonstrations"]
    best = (d + 1) / (M + d + 1)
    return Measured(interval(error("true")), (best, best), 0.95, len(networks()))
