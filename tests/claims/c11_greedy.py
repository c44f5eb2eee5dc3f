"""Page 11: what the record of small trained transformers separates, over its six pre-trained networks."""

import json
from functools import cache, reduce
from operator import getitem
from typing import Any

import torch

from claims.registry import Control, Interval, chapter, mean_of
from iclgd_helpers.paths import resolve_path

claim = chapter("11_greedy_layers_and_fixed_prompts", drawn="", status="empirical")
RECORD = "results/theory/greedy_layers.json"
OVER = "mean over six networks, pre-trained from seeds 0 to 5"


@cache
def record() -> dict[str, Any]:
    return json.loads(resolve_path(RECORD).read_text(encoding="utf-8"))


@claim(
    "G-context",
    side="below",
    statement=f"Small transformers that are trained on linear regression learn new tasks from their demonstrations "
    f"({OVER}).",
    source="Garg et al. 2022; measured here",
    controls=[Control("the same networks without demonstrations", {"path": ("labels", "error", "no prompt")})],
    options={"path": ("labels", "error", "true")},
)
@claim(
    "G-labels",
    side="above",
    statement=f"Permuted labels raise the error of networks that were trained on regression ({OVER}).",
    source="measured here; for classification by language models Min et al. 2022, cited in [C], find little harm",
    controls=[Control("the true labels", {"path": ("labels", "error", "true")})],
    options={"path": ("labels", "error", "permuted")},
)
@claim(
    "G-passes",
    side="below",
    statement=f"Finetuning without context, eight greedy passes over the layers reach a lower error than one, each at "
    f"its best rate ({OVER}).",
    source="measured here, on finetuning and not on Algorithm 1; beside [C] section 5",
    controls=[Control("one pass", {"path": ("passes", "greedy", "1", "error")})],
    options={"path": ("passes", "greedy", "8", "error")},
)
@claim(
    "G-likeness",
    side="above",
    statement=f"The in-context update of trained networks resembles a joint gradient step on the demonstrations, more "
    f"than the controls do ({OVER}).",
    source="[B] section 3, untrained networks after Deutch et al. 2023; measured here",
    controls=[
        Control("a step on shuffled labels", {"path": ("likeness, trained", "joint, shuffled", "plain")}),
        Control("untrained networks", {"path": ("likeness, untrained", "joint, true", "plain")}),
    ],
    options={"path": ("likeness, trained", "joint, true", "plain")},
)
@claim(
    "G-prompt-start",
    side="below",
    statement=f"A fixed prompt of true demonstrations lowers the error on a new task before finetuning begins "
    f"({OVER}).",
    source="[C] section 5.1; measured here",
    controls=[
        Control("no prompt", {"path": ("prompt", "no prompt", "curve", 0)}),
        Control("a prompt with shuffled labels", {"path": ("prompt", "shuffled demonstrations", "curve", 0)}),
    ],
    options={"path": ("prompt", "true demonstrations", "curve", 0)},
)
@claim(
    "G-prompt-cost",
    side="above",
    statement=f"Up to the threshold, finetuning with the prompt in front of every question processes more tokens than "
    f"finetuning without it (each question is counted with its twelve demonstrations; counted once for a batch the "
    f"difference is open; {OVER}).",
    source="[C] section 5.1; measured here",
    controls=[Control("no prompt", {"path": ("prompt", "no prompt", "tokens_not_shared")})],
    options={"path": ("prompt", "true demonstrations", "tokens_not_shared")},
)
def over_networks(seed: int, path: tuple[str | int, ...]) -> Interval:
    """What the record holds under `path` for each network, over pre-training seeds."""
    return mean_of([reduce(getitem, path, network) for network in record()["networks"].values()])


@claim(
    "G-beyond-one-step",
    side="below",
    statement=f"In context these networks do better than one gradient step from zero on the demonstrations, whichever "
    f"way its rate is chosen ({OVER}).",
    source="[C] section 5, on Mahankali et al. 2023; measured here",
    drawn="20000 prompts for the single step; nothing for the networks",
    controls=[
        Control("one step at the best rate fixed beforehand", {"rate": "fixed"}),
        Control("one step at the best rate chosen from the inputs", {"rate": "inputs"}),
        Control("one step with a line search on the demonstrations", {"rate": "line search"}),
        Control("one step at the rate that is best for the prompt's task, as if it were known", {"rate": "task known"}),
    ],
)
def beyond_one_step(seed: int, rate: str = "") -> Interval:
    if not rate:
        return over_networks(seed, ("labels", "error", "true"))
    d, n = record()["settings"]["SIZES"][0], record()["parameters"]["n_demonstrations"]
    g, eye = torch.Generator().manual_seed(seed), torch.eye(d)
    X, w = torch.randn(20_000, d, n, generator=g), torch.randn(20_000, d, generator=g) / d**0.5
    S = torch.einsum("pin,pjn->pij", X, X) / n  # the Hessian; the gradient at zero is -S w
    descent = torch.einsum("pij,pj->pi", S, w)
    curvature = torch.einsum("pi,pij,pj->p", descent, S, descent)
    eta = {
        "fixed": torch.full((len(S),), n / (n + d + 1)),
        "inputs": torch.einsum("pij,ij->p", S, eye) / S.square().sum((1, 2)),
        "line search": descent.square().sum(1) / curvature,
        "task known": (w * descent).sum(1) / descent.square().sum(1),
    }[rate]
    return mean_of((w - eta[:, None] * descent).square().sum(1))
