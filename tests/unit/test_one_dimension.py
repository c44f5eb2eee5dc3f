"""The smallest example by hand: what its figure draws and says, at every rate of the slider."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from iclgd_helpers.pages import figures, one_dimension


@pytest.mark.parametrize("rate", one_dimension.RATES)
def test_the_numbers_are_those_made_by_hand(rate):
    found = one_dimension.case(rate)
    labels = [2 / rate * value + key for value, key in ((3, 1), (-1, 2))]  # M/rate v + W_X k
    losses = [sum((w * k - y) ** 2 for k, y in zip((1, 2), labels, strict=True)) / 4 for w in (1, 2)]
    assert found.labels == pytest.approx(labels)
    assert found.slope == pytest.approx(1 + 3 * 1 + (-1) * 2)  # not a word of the rate
    assert (found.before, found.after) == pytest.approx(losses)


def test_the_two_rates_of_the_text():
    assert [one_dimension.case(rate).labels for rate in one_dimension.STILL] == [(7, 0), (4, 1)]


def test_labels_with_another_base_move_the_line_and_the_rate_then_matters():
    slopes = [one_dimension.case(rate, base=0.5).slope for rate in one_dimension.RATES]
    assert min(abs(slope - 2) for slope in slopes) > 0.1 and len({round(slope, 6) for slope in slopes}) == 5


def test_the_figure_draws_what_it_says(monkeypatch):
    shown = {}
    monkeypatch.setattr(figures, "frames", lambda drawn, labels, alt, still: shown.update(locals()))
    one_dimension.show()
    assert len(shown["drawn"]) == len(shown["labels"]) == 5 and shown["alt"]
    panels = [figure.axes[0] for figure in shown["drawn"]] + shown["still"][0].axes
    for ax, rate in zip(panels, (*one_dimension.RATES, *one_dimension.STILL), strict=True):
        before, after, *points = ax.lines
        slopes = [np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0] for line in (before, after)]
        assert slopes == pytest.approx([1, 2])
        marked = [point.get_ydata()[0] for point in points if point.get_marker() == "s"]
        assert marked == pytest.approx(one_dimension.case(rate).labels)
    assert "labels 4 and 1" in shown["labels"][2] and "rises from 2.5 to 3.25" in shown["labels"][2]
    assert "falls from 40 to 39.25" in shown["labels"][0]
    plt.close("all")


def test_where_no_script_runs_the_still_picture_stands(monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "display", lambda *bundles, **options: shown.append(bundles[0]))
    one_dimension.show()
    page = shown[0]["text/html"]
    image = page[: page.index("<script>")]
    assert page.count("data:image/webp;base64,") == 5 and image.count("data:image/png;base64,") == 1
    assert "Rate 1: labels 7 and 0" in image and "Rate 2: labels 4 and 1" in image and 'value="0"' in image
    assert "[image.src]" not in page and page.index("slider.oninput();") > page.index("slider.oninput =")
