"""Thinning of long series."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.store.metrics import Series, thin


def series_of(values: list[float]) -> Series:
    return Series([10 * index for index in range(len(values))], values)


@given(values=st.lists(st.floats(-1e6, 1e6), max_size=300), max_points=st.integers(4, 60))
def test_ends_and_extremes_survive_and_no_point_is_invented(values: list[float], max_points: int) -> None:
    whole = series_of(values)
    thinned = thin(whole, max_points)
    points = list(zip(thinned.steps, thinned.values, strict=True))
    assert len(points) <= max_points
    assert set(points) <= set(zip(whole.steps, whole.values, strict=True))
    assert thinned.steps == sorted(set(thinned.steps))
    if values:
        assert (points[0], points[-1]) == ((0, values[0]), (whole.steps[-1], values[-1]))
        assert (min(thinned.values), max(thinned.values)) == (min(values), max(values))
    if len(values) <= max_points:
        assert thinned == whole
    assert thin(whole, max_points) == thinned


def test_each_bucket_keeps_its_lowest_and_highest() -> None:
    # 2 ends and 2 buckets of 4: [5 1 9 5] and [5 5 2 7].
    thinned = thin(series_of([0, 5, 1, 9, 5, 5, 5, 2, 7, 0]), 6)
    assert thinned == Series([0, 20, 30, 70, 80, 90], [0, 1, 9, 2, 7, 0])


def test_of_equals_the_earliest_stays() -> None:
    assert thin(series_of([1.0] * 100), 4) == Series([0, 10, 990], [1.0, 1.0, 1.0])


def test_fewer_than_four_points_can_not_be_asked_for() -> None:
    with pytest.raises(ValueError, match="fewer than 4"):
        thin(series_of([1.0]), 3)
