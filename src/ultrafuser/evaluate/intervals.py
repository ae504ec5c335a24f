"""Means with 95% intervals, and differences paired row by row. All statistics of the package are computed here.

Intervals are bootstraps over rows drawn with replacement. Answers that are only right or wrong have Wilson's interval
instead. Their differences have that of Agresti and Min (2005). A bootstrap of 0 right of 32 would have no width at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

BOOTSTRAP_SAMPLES = 10_000
_Z = 1.959963984540054  # the normal distribution's 97.5th percentile
_CHUNK = 500  # resamples in memory together


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
        """The weighted mean: nats per token, or the mean score."""
        return sum(self.totals.values()) / sum(self.weights.values())

    @property
    def binary(self) -> bool:
        """Whether every row is one document that is right (1) or wrong (0)."""
        return set(self.totals.values()) <= {0.0, 1.0} and set(self.weights.values()) == {1.0}


class Estimate(TypedDict):
    """A mean and the lower and upper end of its 95% interval."""

    value: float
    ci95: list[float]


class Difference(TypedDict):
    """A mean paired difference and the lower and upper end of its 95% interval."""

    difference: float
    ci95: list[float]


def estimate(strata: Sequence[Stratum], seed: int = 0) -> Estimate:
    """The plain mean over strata of their weighted means.

    Raises:
        ValueError: no stratum, or one without rows.
    """
    if not strata or not all(stratum.totals for stratum in strata):
        raise ValueError("a mean of nothing")
    if len(strata) == 1 and strata[0].binary:
        return {"value": strata[0].value, "ci95": _wilson(strata[0])}
    return {"value": _mean(strata), "ci95": _bootstrap(strata, seed)}


def difference(minuend: Sequence[Stratum], subtrahend: Sequence[Stratum], seed: int = 0) -> Difference | None:
    """The difference on the rows of which both systems saw the same tokens, or None if a stratum has no such row."""
    paired = [_paired(a, b) for a, b in zip(minuend, subtrahend, strict=True)]
    if not all(stratum.totals for stratum in paired):
        return None
    if len(paired) == 1 and minuend[0].binary and subtrahend[0].binary:
        return {"difference": paired[0].value, "ci95": _agresti_min(paired[0])}
    return {"difference": _mean(paired), "ci95": _bootstrap(paired, seed)}


def _paired(minuend: Stratum, subtrahend: Stratum) -> Stratum:
    def same_tokens(row: str) -> bool:  # a longer template leaves fewer tokens of a row that fills the context
        return row in subtrahend.totals and minuend.weights[row] == subtrahend.weights[row]

    common = [row for row in minuend.totals if same_tokens(row)]
    differences = {row: minuend.totals[row] - subtrahend.totals[row] for row in common}
    return Stratum(differences, {row: minuend.weights[row] for row in common})


def _mean(strata: Sequence[Stratum]) -> float:
    return float(np.mean([stratum.value for stratum in strata]))


def _bootstrap(strata: Sequence[Stratum], seed: int) -> list[float]:
    """Percentiles of the mean over strata. Each stratum is resampled independently."""
    means = np.mean([_resampled_means(stratum, seed + i) for i, stratum in enumerate(strata)], axis=0)
    return [float(bound) for bound in np.percentile(means, [2.5, 97.5])]


def _resampled_means(stratum: Stratum, seed: int) -> np.ndarray:
    """Weighted means of rows drawn with replacement: (BOOTSTRAP_SAMPLES,)."""
    totals = np.array(list(stratum.totals.values()), dtype=float)
    weights = np.array([stratum.weights[row] for row in stratum.totals], dtype=float)
    rng, size, means = np.random.default_rng(seed), len(totals), []
    for _ in range(BOOTSTRAP_SAMPLES // _CHUNK):
        counts = rng.multinomial(size, np.full(size, 1 / size), size=_CHUNK)  # how often each row is drawn
        means.append((counts @ totals) / (counts @ weights))
    return np.concatenate(means)


def _wilson(stratum: Stratum) -> list[float]:
    """Wilson's score interval of a share."""
    size, share = len(stratum.totals), stratum.value
    centre = share + _Z**2 / (2 * size)
    half_width = _Z * math.sqrt(share * (1 - share) / size + (_Z / (2 * size)) ** 2)
    low, high = ((centre + sign * half_width) / (1 + _Z**2 / size) for sign in (-1, 1))
    return [max(low, 0.0), min(high, 1.0)]


def _agresti_min(paired: Stratum) -> list[float]:
    """Wald's interval of the difference of two paired shares after half a row more in each of the four cells."""
    size = len(paired.totals) + 2
    better, worse = (sum(total == sign for total in paired.totals.values()) + 0.5 for sign in (1, -1))
    centre = (better - worse) / size
    half_width = _Z * math.sqrt((better + worse) / size - centre**2) / math.sqrt(size)
    return [max(centre - half_width, -1.0), min(centre + half_width, 1.0)]
