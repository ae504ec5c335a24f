"""Means and paired differences against numbers worked out by hand, and the laws of their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from ultrafuser.evaluate.intervals import Stratum, difference, estimate


def stratum(totals: dict[str, float], weights: dict[str, float] | None = None) -> Stratum:
    return Stratum(totals, weights or dict.fromkeys(totals, 1.0))


def test_the_mean_is_weighted_within_a_stratum_and_plain_over_strata():
    one = stratum({"a": 10.0, "b": 2.0}, {"a": 4.0, "b": 2.0})  # 12 / 6
    two = stratum({"c": 5.0})
    assert estimate([one])["value"] == 2.0
    assert estimate([one, two])["value"] == pytest.approx(3.5)


def test_equal_rows_have_no_interval():
    assert estimate([stratum({str(i): 3.0 for i in range(5)})])["ci95"] == pytest.approx([3.0, 3.0])


def test_the_interval_is_that_of_the_normal_law_for_many_rows():
    values = np.random.default_rng(0).normal(1.0, 2.0, size=1000)
    low, high = estimate([stratum({str(i): v for i, v in enumerate(values)})])["ci95"]
    error = 1.96 * values.std() / 1000**0.5
    assert low == pytest.approx(values.mean() - error, abs=0.02)
    assert high == pytest.approx(values.mean() + error, abs=0.02)


def test_differences_are_paired_by_row():
    rng = np.random.default_rng(1)
    hard = {str(i): v for i, v in enumerate(rng.normal(0, 100.0, size=50))}  # rows differ far more than systems do
    better = stratum({row: v - 1 for row, v in hard.items()})
    found = difference([better], [stratum(dict(reversed(hard.items())))])
    assert found["difference"] == pytest.approx(-1.0)
    assert found["ci95"] == pytest.approx([-1.0, -1.0])


def test_only_common_rows_are_paired():
    assert difference([stratum({"a": 1.0, "b": 9.0})], [stratum({"a": 3.0, "c": 0.0})])["difference"] == -2.0


def test_the_same_seed_gives_the_same_interval():
    rows = [stratum({str(i): float(i**2) for i in range(20)})]
    assert estimate(rows, 1) == estimate(rows, 1) != estimate(rows, 2)


@pytest.mark.parametrize("strata", [[], [stratum({})]])
def test_a_mean_of_nothing_is_refused(strata):
    with pytest.raises(ValueError, match="a mean of nothing"):
        estimate(strata)


def test_rows_cut_differently_are_no_pair():
    mine, other = stratum({"a": 1.0, "b": 6.0}, {"a": 10, "b": 2}), stratum({"a": 1.0, "b": 2.0}, {"a": 12, "b": 2})
    assert difference([mine], [other])["difference"] == pytest.approx(2.0)


def test_nothing_in_common_is_no_difference():
    assert difference([stratum({"a": 1.0})], [stratum({"b": 1.0})]) is None
