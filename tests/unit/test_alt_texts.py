"""A figure's numbers in words: read off the marks, so that they cannot differ from the picture."""

import numpy as np
import pytest

from iclgd_helpers.pages import alt_texts, figures


@pytest.fixture
def panel():
    figure, ax = figures.axes()
    yield ax
    figures.png(figure)  # closes it


def told(ax):
    return alt_texts.in_numbers(ax.figure)


def test_a_line_tells_its_ends_and_what_goes_beyond_them(panel):
    panel.plot([0, 1, 2, 3], [0.5, 0.25, 0.75, 0.6], label="joint")
    panel.plot([0, 1], [1, 2], label="straight")
    panel.plot([0, 1], [7, 8])  # without a label: a guide
    panel.set_xlabel("layer")
    panel.set_ylabel("SimAOU")
    assert told(panel) == "SimAOU: joint from 0.5 to 0.6, lowest 0.25, highest 0.75; straight from 1 to 2."


def test_rows_are_told_by_name(panel):
    figures.interval_points(panel, ["zero-shot", "in-context"], [0.4, 0.6], [[0.3, 0.5], [0.5, 0.7]])
    panel.set_xlabel("accuracy")
    assert told(panel) == "accuracy: 0.4 (zero-shot), 0.6 (in-context)."


def test_of_many_rows_the_extremes_are_told(panel):
    names = ["CB", "SST-2", "SST-5", "Subj"]
    figures.interval_points(panel, names, [0.4, None, 0.1, 0.9], [[None, None]] * 4)
    panel.plot(0.2, 3, "o", label="chosen")
    assert told(panel) == "chosen 0.2."  # what has a label is what the legend names
    panel.lines[-1].set_label("_")
    panel.plot(0.3, 1, "o")
    assert told(panel) == "0.1 (SST-5) to 0.9 (Subj)."


def test_bars_and_dots(panel):
    panel.barh([0, 1], [0.2, 0.3], label="both")
    panel.set_yticks([0, 1], ["CB", "MR"])
    panel.scatter([0.5], [1], label="null")
    panel.set_title("Changes")
    assert told(panel) == "Changes: null 0.5; both 0.2 (CB), 0.3 (MR)."


def test_bars_of_error(panel):
    panel.errorbar([1, 2], [0.2, 0.4], [0.1, 0.1], fmt="o", label="mean")
    assert told(panel) == "mean from 0.2 to 0.4."


@pytest.mark.parametrize("draw", ["imshow", "pcolormesh"])
def test_a_map_tells_its_range(panel, draw):
    getattr(panel, draw)(np.array([[1.0, np.nan], [-2.0, 3.5]]))
    assert told(panel) == "entries from -2 to 3.5."


def test_nothing_drawn_is_nothing_said(panel):
    assert told(panel) == ""
    panel.plot([0, 1], [2, 3])
    assert told(panel) == "from 2 to 3."  # the only line needs no name
    panel.plot([0, 1], [np.nan, np.nan], label="diverged")
    assert told(panel) == "diverged undefined."


def test_what_would_be_too_long_is_counted():
    figure, panels = figures.axes(10, 0.5)
    for ax in panels:
        ax.plot([0, 1], [0, 1], label="an arm " * 12)
    text = alt_texts.in_numbers(figure)
    figures.png(figure)
    assert len(text) < alt_texts.LONGEST + 30 and text.endswith(" more panels.")


def test_another_value_is_another_text(panel):
    panel.plot([0, 1], [0, 1], label="an arm")
    before = told(panel)
    panel.lines[0].set_ydata([0, 2])
    assert told(panel) != before
