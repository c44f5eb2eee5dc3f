"""The smallest example: one key and one value a token, so that the layer is a line and a demonstration is a point."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes

from iclgd_helpers.pages import figures
from iclgd_helpers.pages.drawings import KINDS, TEXT
from iclgd_helpers.theory.gradient_step import gradient_step, implied_training_set, mean_half_squared_error

BASE, KEYS, VALUES = 1.0, (1.0, 2.0), (3.0, -1.0)  # W_X; of two demonstrations
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
STILL = (1.0, 2.0)  # the two rates that are shown where no script runs
ALT = (
    "The layer is a line through zero and the two demonstrations are points: at a larger rate the points slide "
    "towards the line before the step, and the line after the step stays where it is"
)


@dataclass(frozen=True)
class Case:
    """At one rate: the labels of the two points, the slope that one step leads to, the loss before and after it."""

    labels: tuple[float, ...]
    slope: float
    before: float
    after: float


def case(rate: float, base: float = BASE) -> Case:
    """The step from slope BASE at `rate`, on labels that contain the outputs of `base` (another one is a mistake)."""
    start, keys, values = (torch.tensor([row], dtype=torch.float64) for row in ((BASE,), KEYS, VALUES))
    pairs = implied_training_set(values, keys, torch.full_like(start, base), rate)
    moved = gradient_step(start, lambda weight: mean_half_squared_error(weight, pairs), rate)
    losses = [float(mean_half_squared_error(weight, pairs)) for weight in (start, moved)]
    return Case(tuple(pairs.targets[0].tolist()), float(moved), *losses)


def _described(rate: float) -> str:
    found = case(rate)
    labels = " and ".join(f"{label:g}" for label in found.labels)
    fall = "falls" if found.after < found.before else "rises"
    return (
        f"Rate {rate:g}: labels {labels}; slope {BASE:g} before the step, {found.slope:g} after it; "
        f"the loss {fall} from {found.before:.4g} to {found.after:.4g}."
    )


def _draw(ax: Axes, rate: float) -> None:
    found, (_, orange, _, _), (_, blue, _, _) = case(rate), KINDS["demonstration"], KINDS["prompt"]
    ends = torch.tensor([0.0, 2.7])
    for slope, colour, dash, words in (
        (BASE, blue, "--", "before: y = k"),
        (found.slope, "#111111", "-", f"after: y = {found.slope:g}k"),
    ):
        ax.plot(ends, slope * ends, color=colour, linestyle=dash, linewidth=2)
        ax.text(2.76, slope * 2.7, words, color=colour, fontsize=TEXT, va="center")
    for key, value, label in zip(KEYS, VALUES, found.labels, strict=True):
        ax.plot([key, key], [BASE * key, label], color=orange, linestyle=":", linewidth=1.8)
        ax.plot(key, label, "s", color=orange, ms=8)
        away, align = (0.5, ("right", "bottom")) if value > 0 else (-0.5, ("left", "top"))  # not on the lines
        ax.text(key - away / 5, label + away, f"label {label:g}", fontsize=TEXT, ha=align[0], va=align[1])
    ax.text(2.76, 12.5, f"rate {rate:g}", fontsize=TEXT, weight="bold", va="center")
    ax.set(xlim=(0, 4), ylim=(-4.5, 15.5), xticks=(0, *KEYS), yticks=(0, 5, 10), xlabel="key k", ylabel="y")
    ax.grid(visible=False)


def show() -> None:
    """
    Display the line before the step, the two points, and the line after the step, with a slider for the rate.

    Two tokens demonstrate: keys 1 and 2, values 3 and -1. Where no script runs, two rates are drawn above one another.
    """
    drawn = []
    for rate in RATES:
        figure, ax = figures.axes(height=2.9)
        _draw(ax, rate)
        drawn.append(figure)
    still, panels = figures.axes(rows=len(STILL), height=2.6, sharex=True)
    for ax, rate in zip(panels, STILL, strict=True):
        _draw(ax, rate)
        ax.label_outer()
    described = [_described(rate) for rate in RATES]
    figures.frames(drawn, described, ALT, still=(still, " ".join(map(_described, STILL))))
