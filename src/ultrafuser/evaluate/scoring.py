"""Tasks and losses of one loaded model by document and row: what tables, intervals and comparisons are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError
from ultrafuser.evaluate.intervals import Stratum
from ultrafuser.evaluate.losses import by_domain, by_stratum, fused_losses
from ultrafuser.evaluate.sampling import draw_rows
from ultrafuser.evaluate.tasks import TASKS, TaskOptions, load_tasks
from ultrafuser.progress import Progress
from ultrafuser.train.features import FeatureStore

if TYPE_CHECKING:  # lm-eval, which losses do not need
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task

    from ultrafuser.evaluate.lm.load import LoadedModel


@dataclass
class TaskScores:
    """One benchmark of one model.

    Attributes:
        scores: by document, the task's metric, from 0 to 1 (ratings: 1 to 10).
        extra: by name of a second metric, by document (e.g. `unparsed`, `pass@10`).
        counts: sums over all documents (e.g. a judge's refusals and errors).
        answers: by document, what the model wrote. Empty if options are scored.
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


def score_tasks(
    lm: LM, names: Sequence[str], options: TaskOptions, *, limit: int | None = None, seed: int = 0
) -> dict[str, TaskScores]:
    """Run tasks of lm-eval.

    Args:
        names: of `tasks.load_tasks`.
        limit: documents of each task, drawn by `seed`: the same ones for every model. None: all.

    Raises:
        DataError: an unknown task, a missing or malformed data file, a limit below 1.
    """
    if not names:
        return {}
    from lm_eval.evaluator import evaluate

    tasks = load_tasks(names, options)
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not options.unsafe_code:
        raise DataError(f"task {unsafe[0]!r} runs generated code without the sandbox. Allow it with --unsafe-code")
    documents = {
        task.config.task: draw_rows(range(len(task.eval_docs)), limit, seed, name) for name, task in tasks.items()
    }
    results = evaluate(
        lm=lm,
        task_dict={task.config.task: task for task in tasks.values()},
        samples=documents,
        bootstrap_iters=0,
        apply_chat_template=True,
        confirm_run_unsafe_code=options.unsafe_code,
    )
    assert results is not None  # as on further ranks only
    return {name: _scores(name, task, results["samples"][task.config.task]) for name, task in tasks.items()}


def _scores(name: str, task: Task, samples: Sequence[Mapping[str, Any]]) -> TaskScores:
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]  # a task may have several
    by_metric: dict[str, dict[str, float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], (int, float)):  # others are pairs, which only their aggregation can read
                by_metric.setdefault(metric, {})[str(sample["doc_id"])] = float(sample[metric])
    metric = TASKS[name].metric if name in TASKS else next(iter(by_metric), "")
    if metric not in by_metric:
        raise DataError(
            f"task {name!r}: none of its metrics is a number for each document. Give it one such as exact_match"
        )
    generated = task.get_config("output_type") == "generate_until"
    return TaskScores(
        metric=metric,
        version=str(task.VERSION),
        scores=by_metric.pop(metric),
        extra=by_metric,
        counts={"unparsed": round(sum(by_metric.get("unparsed", {}).values()))},
        answers={str(sample["doc_id"]): sample["resps"][0] for sample in samples} if generated else {},
    )


def score_losses(
    loaded: LoadedModel, rows: Sequence[Row], folder: Path, progress: Progress | None = None
) -> tuple[dict[str, Stratum], dict[str, list[Sequence[float]]]]:
    """By domain, the nats of each row under a model, and each row's mean weight of every specialist.

    Args:
        folder: of the rows' cached features, where an interrupted computation resumes.

    Raises:
        DataError: no row fits into the model's context.
    """
    assert loaded.model is not None and loaded.renderer is not None  # no endpoint
    rendered, stats = loaded.renderer.render_all(rows)
    if stats.truncated_rows or stats.dropped_rows:
        (progress or Progress()).log(f"rows longer than the context of {loaded.renderer.max_length} tokens: {stats}")
    store = FeatureStore.build(loaded.model, rendered, folder, progress=progress)
    losses, weights = fused_losses(loaded.model, store)
    return by_stratum(rendered, losses), by_domain(rendered, weights)
