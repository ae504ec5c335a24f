"""Means with 95% intervals; differences are paired row by row.

Intervals are bootstraps over rows drawn with replacement. Answers that are only right or wrong have Wilson's interval
instead (their differences that of Agresti and Min, 2005): a bootstrap of 0 right of 32 would have no width at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 10_000
_Z = 1.959963984540054  # the normal law's 97.5th percentile
_AT_ONCE = 500  # resamples in memory together


@dataclass(frozen=True)
class Stratum:
    """What was measured on the rows of one domain or task.

    Attributes:
        totals: by row id: nats summed over the row's tokens, or the score of a document.
        weights: by row id: the row's tokens, or 1 for a document.
    """

    totals: Mapping[str, float]
    weights: Mapping[str, float]

    @property
    def value(self) -> float:
        """The weighted mean: nats a token, or the mean score."""
        return sum(self.totals.values()) / sum(self.weights.values())

    @property
    def binary(self) -> bool:
        """Whether every row is one document that is right (1) or wrong (0)."""
        return set(self.totals.values()) <= {0.0, 1.0} and set(self.weights.values()) == {1.0}


def estimate(strata: Sequence[Stratum], seed: int = 0) -> dict[str, object]:
    """The mean over strata (each counts the same) of their weighted means: `value` and `ci95`.

    Raises:
        ValueError: no stratum, or one without rows.
    """
    if not strata or not all(stratum.totals for stratum in strata):
        raise ValueError("a mean of nothing")
    if len(strata) == 1 and strata[0].binary:
        return {"value": strata[0].value, "ci95": _wilson(strata[0])}
    return {"value": _mean(strata), "ci95": _bootstrap(strata, seed)}


def difference(mine: Sequence[Stratum], other: Sequence[Stratum], seed: int = 0) -> dict[str, object] | None:
    """`mine` minus `other` on the rows of which both saw the same tokens: `difference` and its paired `ci95`.

    None where a stratum has no such row.
    """
    paired = [_paired(a, b) for a, b in zip(mine, other, strict=True)]
    if not all(stratum.totals for stratum in paired):
        return None
    if len(paired) == 1 and mine[0].binary and other[0].binary:
        return {"difference": paired[0].value, "ci95": _agresti_min(paired[0])}
    return {"difference": _mean(paired), "ci95": _bootstrap(paired, seed)}


def _paired(mine: Stratum, other: Stratum) -> Stratum:
    def same(row: str) -> bool:  # a longer template leaves fewer tokens of a row that fills the context
        return row in other.totals and mine.weights[row] == other.weights[row]

    common = [row for row in mine.totals if same(row)]
    return Stratum({row: mine.totals[row] - other.totals[row] for row in common}, {r: mine.weights[r] for r in common})


def _mean(strata: Sequence[Stratum]) -> float:
    return float(np.mean([stratum.value for stratum in strata]))


def _bootstrap(strata: Sequence[Stratum], seed: int) -> list[float]:
    """Percentiles of the mean over strata, each resampled by itself."""
    drawn = np.mean([_resampled(stratum, seed + i) for i, stratum in enumerate(strata)], axis=0)
    return [float(x) for x in np.percentile(drawn, [2.5, 97.5])]


def _wilson(stratum: Stratum) -> list[float]:
    """Wilson's score interval of a share."""
    size, share = len(stratum.totals), stratum.value
    centre = share + _Z**2 / (2 * size)
    reach = _Z * math.sqrt(share * (1 - share) / size + (_Z / (2 * size)) ** 2)
    low, high = ((centre + sign * reach) / (1 + _Z**2 / size) for sign in (-1, 1))
    return [max(low, 0.0), min(high, 1.0)]


def _agresti_min(paired: Stratum) -> list[float]:
    """Wald's interval of the difference of two paired shares after half a row more in each of the four cells."""
    size = len(paired.totals) + 2
    better, worse = (sum(total == sign for total in paired.totals.values()) + 0.5 for sign in (1, -1))
    centre = (better - worse) / size
    reach = _Z * math.sqrt((better + worse) / size - centre**2) / math.sqrt(size)
    return [max(centre - reach, -1.0), min(centre + reach, 1.0)]


def _resampled(stratum: Stratum, seed: int) -> np.ndarray:
    """Weighted means of rows drawn with replacement: (BOOTSTRAP_SAMPLES,)."""
    totals = np.array(list(stratum.totals.values()), dtype=float)
    weights = np.array([stratum.weights[row] for row in stratum.totals], dtype=float)
    rng, size, out = np.random.default_rng(seed), len(totals), []
    for _ in range(BOOTSTRAP_SAMPLES // _AT_ONCE):
        drawn = rng.multinomial(size, np.full(size, 1 / size), size=_AT_ONCE)
        out.append((drawn @ totals) / (drawn @ weights))
    return np.concatenate(out)
