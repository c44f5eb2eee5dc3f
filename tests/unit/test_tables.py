"""Words and cells that tables of several pages share."""

import math

import pytest

from iclgd_helpers.pages import tables


@pytest.mark.parametrize(
    ("interval", "word"),
    [
        ((0.1, 0.3), "higher"),
        ((-0.3, -0.1), "lower"),
        ((-0.1, 0.3), "undecided"),
        ((0.0, 0.3), "undecided"),
        ((-0.3, 0.0), "undecided"),
        ((0.2, 0.2), "undecided"),  # no width: every resample is the same
        ((-0.2, -0.2), "undecided"),
        ((math.nan, math.nan), "undecided"),
    ],
)
def test_a_difference_has_a_direction_only_where_its_interval_excludes_zero(interval, word):
    assert tables.direction(interval) == word
