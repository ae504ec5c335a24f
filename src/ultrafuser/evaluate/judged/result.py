"""The result of a judged benchmark: scores of samples, and counts of what could not be scored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from ultrafuser.evaluate.judged.judge import STATUSES, Judgement


class Sample(TypedDict):
    """One judged sample. The benchmarks add their own fields.

    `id` is unique in the benchmark, `score` is None without a readable verdict.
    """

    id: str
    score: float | None


@dataclass(frozen=True)
class JudgedResult:
    """The result of a judged benchmark.

    Attributes:
        value: mean of `scores`. None when no sample could be scored.
        scores: score by the sample's id. Samples without a readable verdict are not in it.
        counts: judgements by status (`ok`, `unparsed`, `refused`, `error`), and samples without a score.
        details: the benchmark's own numbers.
        samples: one JSON-able record per sample: question, answers, verdicts, the judge's words.
    """

    task: str
    metric: str
    value: float | None
    scores: dict[str, float]
    counts: dict[str, int]
    details: dict[str, Any]
    samples: list[dict[str, Any]]


def judged_result(
    task: str, metric: str, samples: Sequence[Sample], judgements: Iterable[Judgement], details: dict[str, Any]
) -> JudgedResult:
    """The mean score over the samples that have one, with the others counted."""
    scores = {sample["id"]: sample["score"] for sample in samples if sample["score"] is not None}
    statuses = Counter[str](judgement.status for judgement in judgements)
    counts = {status: statuses[status] for status in STATUSES} | {"unscored": len(samples) - len(scores)}
    return JudgedResult(
        task, metric, mean(scores.values()), scores, counts, details, [dict(sample) for sample in samples]
    )


def mean(values: Iterable[float]) -> float | None:
    """The mean. None where there are no values."""
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None
