"""What pages 00 and 40 write out is right by independent means, and their verdicts notice when it is not."""

import types
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from notebook_cells import run


def quickstart(seed: int = 0, n: int = 16, changes: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    p = types.SimpleNamespace(seed=seed, n_demonstrations=n)
    cells = ("layer", "fast-weight", "step", "verdict", "verdict-controls")
    return run("00_quickstart", *cells, changes=changes, p=p, np=np, pd=pd, torch=torch)


@pytest.mark.parametrize("n", [1, 5, 64, 300])
@pytest.mark.parametrize("seed", range(5))
def test_quickstart_holds_for_any_draw_and_equals_loops(seed: int, n: int) -> None:
    page = quickstart(seed, n)
    W_K, W_Q, W_V, tokens = (page[name].numpy() for name in ("W_K", "W_Q", "W_V", "with_demonstrations"))

    def phi(u: np.ndarray) -> np.ndarray:
        return np.where(u > 0, u + 1, np.exp(np.minimum(u, 0)))

    query = phi(W_Q @ tokens[:, -1])
    expected = sum((phi(W_K @ token) @ query) * (W_V @ token) for token in tokens.T)
    found = page["attention"](page["with_demonstrations"], page["z"])[:, 0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("W_X - eta * gradient", "W_X + eta * gradient"),
        ("half=0.5", "half=1.0"),
        (".sum(dim=0).mean()", ".mean()"),
        (".sum(dim=0).mean()", ".sum()"),
        (" + W_X @ inputs  # y_i", ""),
        ("inputs = phi(W_K @ X_demo)  # x_i", "inputs = W_K @ X_demo  # x_i"),
        ("inputs = phi(W_K @ X_demo)  # x_i", "inputs = phi(W_Q @ X_demo)  # x_i"),
        ("return V @ Phi.T @ z", "return V @ (Phi.T @ z).softmax(dim=0)"),
        ('"wrong sign": gradient_step(inputs, base - (', '"wrong sign": gradient_step(inputs, base + ('),
    ],
)
def test_quickstart_notices(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        quickstart(changes=((old, new),))


PAGE_40 = {  # verdict -> the cells that it needs
    "verdict-layout": ("layout", "layout-rule"),
    "verdict-verbalizers": ("layout", "layout-rule", "example-tokens", "labels-tree", "labels-mask"),
    "verdict-chat": ("layout", "layout-rule", "example-tokens", "chat-layout"),
    "verdict-drawing": ("layout",),
    "verdict-rule": ("choice-table",),
    "verdict-fitting": ("layout", "layout-rule", "verdict-layout", "fitting"),
    "verdict-interval": (),
}


def page_40(verdict: str, changes: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    smoke = (('preset = "quick"', 'preset = "smoke"'), *changes)
    cells = ("parameters", "resolve", *PAGE_40[verdict], verdict)
    return run("40_tasks_and_prompts", *cells, changes=smoke, display=print)


@pytest.mark.parametrize("verdict", PAGE_40)
def test_page_40_holds(verdict: str, capsys: pytest.CaptureFixture[str]) -> None:
    page_40(verdict)
    assert "PASS 40" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("verdict", "old", "new"),
    [
        ("verdict-layout", "labels[example.label] + separator\n", "labels[example.label]\n"),
        ("verdict-layout", "tokens = [bos, *(", "tokens = [*("),
        ("verdict-layout", "encode(before + blank + word)", "encode(before + word)"),
        ("verdict-verbalizers", "seen[places[-1]]", "seen[places[0]]"),
        ("verdict-chat", "talker.decode([*chat.prefix([shown])", "talker.decode([*chat.prefix()"),
        ("verdict-drawing", "np.random.default_rng(p.seed)", "np.random.default_rng(p.seed + 1)"),
        ("verdict-rule", '(-round(t["mean"], 9), t["n_demonstrations"])', '-round(t["mean"], 9)'),
        ("verdict-rule", 'r["float32_float64"] <= bound', 'r["float32_float64"] >= bound'),
        ("verdict-fitting", "used + 1 + longest_question >= limit", "used + longest_question >= limit"),
        ("verdict-fitting", "used = len(context([]))  # BOS", "used = 30  # BOS"),
        ("verdict-interval", "[0.025, 0.975]", "[0.05, 0.95]"),
        ("verdict-interval", "(right_b[i] - right_a[i])", "(right_b[i] - right_a)"),
    ],
)
def test_page_40_notices(verdict: str, old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        page_40(verdict, ((old, new),))
