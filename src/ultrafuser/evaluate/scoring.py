"""Benchmarks and losses of one loaded model, row by row: what tables, intervals and comparisons are made of."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError
from ultrafuser.evaluate.domain_loss import fused_losses
from ultrafuser.evaluate.intervals import Stratum
from ultrafuser.evaluate.models import Served
from ultrafuser.evaluate.tasks import TASKS
from ultrafuser.progress import Progress
from ultrafuser.train.features import FeatureStore


@dataclass
class TaskScores:
    """One benchmark of one model.

    Attributes:
        scores: by document: the task's metric, from 0 to 1 (ratings: 1 to 10).
        extra: by name of a second metric, by document (e.g. `unparsed`, `pass@10`).
        counts: what is counted over all documents (refusals and errors of a judge, say).
        answers: by document, what the model wrote; empty where options are weighed.
        details: further numbers of a judged benchmark.
    """

    metric: str
    version: str
    scores: dict[str, float]
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    answers: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def stratum(self) -> Stratum:
        """The documents, each with the same weight."""
        return Stratum(self.scores, dict.fromkeys(self.scores, 1.0))

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def benchmark(
    lm: LM,
    names: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> dict[str, TaskScores]:
    """Run our lm-eval tasks.

    Args:
        limit: so many documents of each task, drawn by `seed`: the same ones for every model.
        options: of `tasks.load_tasks`: `data_dir`, `unsafe_code`, `samples`, `temperature`, `max_new_tokens`.

    Raises:
        DataError: an unknown task, a missing or malformed data file, a limit of nothing.
    """
    from lm_eval.evaluator import evaluate

    from ultrafuser.evaluate.tasks import load_tasks

    if not names:
        return {}
    tasks = load_tasks(names, **options)
    chosen = {task.config.task: _chosen(len(task.eval_docs), limit, seed) for task in tasks.values()}
    found = evaluate(
        lm=lm,
        task_dict={task.config.task: task for task in tasks.values()},
        samples=chosen,
        bootstrap_iters=0,
        apply_chat_template=True,
        confirm_run_unsafe_code=bool(options.get("unsafe_code")),
    )
    if found is None:
        raise DataError("lm-eval gave no results on this process")
    return {name: _scores(name, task, found["samples"][task.config.task]) for name, task in tasks.items()}


def _chosen(total: int, limit: int | None, seed: int) -> list[int]:
    if limit is not None and limit < 1:
        raise DataError(f"a limit of {limit} leaves no documents; give at least 1")
    order = list(range(total))
    random.Random(seed).shuffle(order)  # a larger limit keeps the documents of a smaller one
    return sorted(order[:limit])


def _scores(name: str, task: Any, samples: Sequence[dict[str, Any]]) -> TaskScores:
    metric = TASKS[name].metric if name in TASKS else samples[0]["metrics"][0]
    by_name: dict[str, dict[str, float]] = {}
    for sample in samples:
        for own in sample["metrics"]:
            by_name.setdefault(own, {})[str(sample["doc_id"])] = float(sample[own])
    weighed = task.get_config("output_type") != "generate_until"
    answers = {} if weighed else {str(sample["doc_id"]): sample["resps"][0] for sample in samples}
    return TaskScores(
        metric=metric,
        version=str(task.VERSION),
        scores=by_name.pop(metric),
        extra=by_name,
        counts={"unparsed": round(sum(by_name.get("unparsed", {}).values()))},
        answers=answers,
    )


def losses(
    served: Served, rows: Sequence[Row], folder: Path, progress: Progress | None = None
) -> tuple[dict[str, Stratum], dict[str, list[list[float]]]]:
    """Nats of each row under a model, by domain, and each row's mean weight of every specialist.

    Args:
        folder: where the features of the rows are kept; an interrupted computation goes on there.

    Raises:
        DataError: an endpoint, or no row that fits.
    """
    if served.model is None or served.renderer is None:
        raise DataError(
            f"{served.name}: an endpoint shows no probabilities of given text, so it has no loss; leave out `loss` and "
            "`mixed`, or give the model itself"
        )
    rendered, _ = served.renderer.render_all(rows)
    store = FeatureStore.build(served.model, rendered, folder, progress=progress)
    found, weights = fused_losses(served.model, store)
    strata: dict[str, Stratum] = {}
    by_domain: dict[str, list[list[float]]] = {}
    for row, loss, own in zip(rendered, found, weights, strict=True):
        stratum = strata.setdefault(row.domain, Stratum({}, {}))
        stratum.totals[row.row_id], stratum.weights[row.row_id] = loss.nats, loss.tokens  # type: ignore[index]
        by_domain.setdefault(row.domain, []).append(own)
    return strata, by_domain
