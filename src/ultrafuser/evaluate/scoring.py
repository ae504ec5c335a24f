"""Benchmarks and losses of one loaded model, row by row: what tables, intervals and comparisons are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError
from ultrafuser.evaluate.intervals import Stratum
from ultrafuser.evaluate.lm.load import LoadedModel
from ultrafuser.evaluate.losses import by_domain, by_stratum, fused_losses
from ultrafuser.evaluate.sampling import draw_rows
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
    chosen = {
        task.config.task: draw_rows(range(len(task.eval_docs)), limit, seed, name) for name, task in tasks.items()
    }
    if unsafe := [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]:
        if not options.get("unsafe_code"):
            raise DataError(f"task {unsafe[0]!r} runs generated code by itself; allow it with --unsafe-code")
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


def _scores(name: str, task: Any, samples: Sequence[dict[str, Any]]) -> TaskScores:
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]  # a task may have several
    by_name: dict[str, dict[str, float]] = {}
    for sample in first:
        for own in sample["metrics"]:
            if isinstance(sample[own], (int, float)):  # some metrics are pairs, for an aggregation of their own
                by_name.setdefault(own, {})[str(sample["doc_id"])] = float(sample[own])
    metric = TASKS[name].metric if name in TASKS else next(iter(by_name), "")
    if metric not in by_name:
        raise DataError(
            f"task {name!r}: its metrics are no plain numbers of a document; give it one such as exact_match"
        )
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
    served: LoadedModel, rows: Sequence[Row], folder: Path, progress: Progress | None = None
) -> tuple[dict[str, Stratum], dict[str, list[Sequence[float]]]]:
    """Nats of each row under a model, by domain, and each row's mean weight of every specialist.

    Args:
        folder: where the features of the rows are kept; an interrupted computation goes on there.

    Raises:
        DataError: no row fits.
    """
    assert served.model is not None and served.renderer is not None  # no endpoint
    rendered, stats = served.renderer.render_all(rows)
    if stats.truncated_rows or stats.dropped_rows:
        (progress or Progress()).log(f"rows longer than the context of {served.renderer.max_length} tokens: {stats}")
    store = FeatureStore.build(served.model, rendered, folder, progress=progress)
    found, weights = fused_losses(served.model, store)
    return by_stratum(rendered, found), by_domain(rendered, weights)
