"""Means and paired differences against numbers worked out by hand, and the laws of their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from ultrafuser.evaluate.intervals import Stratum, difference, estimate


def stratum(totals: dict[str, float], weights: dict[str, float] | None = None) -> Stratum:
    return Stratum(totals, weights or dict.fromkeys(totals, 1.0))


def test_the_mean_is_weighted_within_a_stratum_and_plain_over_strata():
    first = stratum({"a": 10.0, "b": 2.0}, {"a": 4.0, "b": 2.0})  # 12 / 6
    second = stratum({"c": 5.0})
    assert estimate([first])["value"] == 2.0
    assert estimate([first, second])["value"] == pytest.approx(3.5)


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
    result = difference([better], [stratum(dict(reversed(hard.items())))])
    assert result["difference"] == pytest.approx(-1.0)
    assert result["ci95"] == pytest.approx([-1.0, -1.0])


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
    minuend, subtrahend = (
        stratum({"a": 1.0, "b": 6.0}, {"a": 10, "b": 2}),
        stratum({"a": 1.0, "b": 2.0}, {"a": 12, "b": 2}),
    )
    assert difference([minuend], [subtrahend])["difference"] == pytest.approx(2.0)


def test_nothing_in_common_is_no_difference():
    assert difference([stratum({"a": 1.0})], [stratum({"b": 1.0})]) is None


def share(right: int, size: int) -> Stratum:
    return stratum({str(i): float(i < right) for i in range(size)})


@pytest.mark.parametrize(
    ("right", "size", "low", "high"),  # Newcombe (1998), table I, method 3: 0 of 20, 81 of 263, 15 of 148, 1 of 29
    [(0, 20, 0.0, 0.1611), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (1, 29, 0.0061, 0.1718)],
)
def test_right_or_wrong_answers_have_wilsons_interval(right, size, low, high):
    result = estimate([share(right, size)])
    assert result["value"] == pytest.approx(right / size)
    assert result["ci95"] == pytest.approx([low, high], abs=5e-5)


def test_a_share_of_one_has_an_interval_too():
    low, high = estimate([share(32, 32)])["ci95"]
    assert low == pytest.approx(1 - estimate([share(0, 32)])["ci95"][1]) and high == 1.0


def test_partly_right_answers_are_bootstrapped():
    halves = stratum({str(i): 0.5 for i in range(8)})
    assert estimate([halves])["ci95"] == [0.5, 0.5]
    assert estimate([share(4, 8), halves])["ci95"] != estimate([share(4, 8)])["ci95"]


def test_the_difference_of_right_and_wrong_answers_is_agrestis_and_mins():
    """Worked out by hand: 20 rows, 6 better and 2 worse; half a row more in each of four cells."""
    minuend = stratum({str(i): float(i < 10) for i in range(20)})
    subtrahend = stratum({str(i): float(4 <= i < 8 or i in (18, 19)) for i in range(20)})
    reach = 1.959964 * ((6.5 + 2.5) / 22 - (4 / 22) ** 2) ** 0.5 / 22**0.5
    result = difference([minuend], [subtrahend])
    assert result["difference"] == pytest.approx(4 / 20)
    assert result["ci95"] == pytest.approx([4 / 22 - reach, 4 / 22 + reach])


def test_equal_answers_do_not_prove_equal_systems():
    low, high = difference([share(0, 32)], [share(0, 32)])["ci95"]
    assert low == pytest.approx(-high) and 0.02 < high < 0.1
    assert difference([share(3, 3)], [share(0, 3)])["ci95"][1] == 1.0


def test_differences_of_other_scores_are_no_shares():
    """Ratings one point apart, or scores of one half that are equal, differ by 0 or 1 without being right or wrong."""
    ratings = Stratum({str(i): 7.0 for i in range(8)}, dict.fromkeys(map(str, range(8)), 1.0))
    higher = Stratum(ratings.totals | {"3": 8.0}, ratings.weights)
    low, high = difference([higher], [ratings])["ci95"]
    assert low == 0 < high
    assert difference([ratings], [higher])["ci95"] == [-high, 0]
    assert difference([ratings], [ratings])["ci95"] == [0, 0]


@pytest.mark.parametrize(("right", "size"), [(0, 12), (1, 29), (15, 148), (263, 263)])
def test_wilsons_interval_is_that_of_scipy(right: int, size: int):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    expected = binomtest(right, size).proportion_ci(method="wilson")
    assert estimate([share(right, size)])["ci95"] == pytest.approx([expected.low, expected.high], abs=1e-12)


def test_the_bootstrap_is_that_of_scipy():
    """Percentiles of the weighted mean; the two draw their resamples differently, so only a little less than equal."""
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    rng = np.random.default_rng(2)
    tokens = rng.integers(5, 200, size=80)
    nats = tokens * rng.gamma(4.0, 0.5, size=80)
    expected = bootstrap(
        (nats, tokens),
        lambda totals, weights, axis: totals.sum(axis) / weights.sum(axis),
        n_resamples=10_000,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(3),
    ).confidence_interval
    rows = [str(i) for i in range(80)]
    interval = estimate([Stratum(dict(zip(rows, nats, strict=True)), dict(zip(rows, tokens, strict=True)))])["ci95"]
    width = expected.high - expected.low
    assert interval == pytest.approx([expected.low, expected.high], abs=0.03 * width)
