"""Means with 95% bootstrap intervals, over rows drawn with replacement; differences are paired row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

BOOTSTRAP_SAMPLES = 10_000


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


def estimate(strata: Sequence[Stratum], seed: int = 0) -> dict[str, object]:
    """The mean over strata (each counts the same) of their weighted means: `value` and `ci95`.

    Raises:
        ValueError: no stratum, or one without rows.
    """
    if not strata or not all(stratum.totals for stratum in strata):
        raise ValueError("a mean of nothing")
    drawn = np.mean([_resampled(stratum, seed + i) for i, stratum in enumerate(strata)], axis=0)
    value = float(np.mean([stratum.value for stratum in strata]))
    return {"value": value, "ci95": [float(x) for x in np.percentile(drawn, [2.5, 97.5])]}


def difference(mine: Sequence[Stratum], other: Sequence[Stratum], seed: int = 0) -> dict[str, object]:
    """`mine` minus `other` on the rows that both have: `difference` and its paired `ci95`.

    Raises:
        ValueError: a stratum without common rows.
    """
    paired = [_paired(a, b) for a, b in zip(mine, other, strict=True)]
    found = estimate(paired, seed)
    return {"difference": found["value"], "ci95": found["ci95"]}


def _paired(mine: Stratum, other: Stratum) -> Stratum:
    common = [row for row in mine.totals if row in other.totals]
    return Stratum({row: mine.totals[row] - other.totals[row] for row in common}, {r: mine.weights[r] for r in common})


def _resampled(stratum: Stratum, seed: int) -> np.ndarray:
    """Weighted means of rows drawn with replacement: (BOOTSTRAP_SAMPLES,)."""
    totals = np.array(list(stratum.totals.values()), dtype=float)
    weights = np.array([stratum.weights[row] for row in stratum.totals], dtype=float)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=BOOTSTRAP_SAMPLES)
    return (drawn @ totals) / (drawn @ weights)
