"""The form of results.json of an evaluation, and its table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict, cast

from ultrafuser.data.files import atomic_file
from ultrafuser.errors import DataError
from ultrafuser.evaluate.intervals import Stratum, estimate
from ultrafuser.evaluate.scoring import TaskScores


class LossCell(TypedDict):
    """The loss of one domain, in nats per response token."""

    nll: float
    ci95: list[float]
    tokens: int
    samples: int


class TaskCell(TypedDict, total=False):
    """One benchmark. A second metric, such as `pass@10`, is a further key that holds an `Estimate`."""

    metric: str
    version: str
    samples: int
    value: float | None
    ci95: list[float] | None
    counts: dict[str, int]
    details: dict[str, Any]


class ModelResults(TypedDict, total=False):
    """Everything about one model."""

    source: str
    fingerprint: str
    parameters: dict[str, int] | None
    seed: int
    limit: int | None
    seconds: float
    loss: dict[str, LossCell]  # by domain
    gate_weights: dict[str, dict[str, float]]  # by domain and specialist
    tasks: dict[str, TaskCell]


class EvalResults(TypedDict):
    """All models of an output folder."""

    created: str
    models: dict[str, ModelResults]


def read_models(file: Path) -> dict[str, ModelResults]:
    """What earlier runs measured into the same results.json, or nothing if there is none.

    Raises:
        DataError: the file holds something else, such as a comparison.
    """
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["models"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the results of an evaluation. Choose another --output") from error


def merge_results(previous: ModelResults, current: ModelResults) -> ModelResults:
    """New numbers of a model, and those of earlier runs that were not measured again."""
    if previous.get("fingerprint") != current["fingerprint"]:
        return current
    merged: ModelResults = {**previous, **current}
    if "loss" in merged:
        merged["loss"] = {**previous.get("loss", {}), **current.get("loss", {})}
    if "tasks" in merged:
        merged["tasks"] = {**previous.get("tasks", {}), **current.get("tasks", {})}
    return merged


def loss_cell(stratum: Stratum, seed: int) -> LossCell:
    """The loss of one domain with its interval, its tokens and its rows."""
    mean = estimate([stratum], seed)
    tokens = int(sum(stratum.weights.values()))
    return {"nll": mean["value"], "ci95": mean["ci95"], "tokens": tokens, "samples": len(stratum.totals)}


def task_cell(scores: TaskScores, seed: int) -> TaskCell:
    """A benchmark's mean with its interval, its second metrics, and its counts."""
    cell: dict[str, Any] = {"metric": scores.metric, "version": scores.version, "samples": len(scores.scores)}
    if scores.scores:
        cell |= estimate([scores.stratum()], seed)
    else:  # no verdict of the judge was readable
        cell |= {"value": None, "ci95": None}
    for metric, by_document in scores.extra.items():
        if metric != "unparsed":  # which is counted
            cell[metric] = estimate([Stratum(by_document, dict.fromkeys(by_document, 1.0))], seed)
    if scores.counts:
        cell["counts"] = scores.counts
    if scores.details:
        cell["details"] = scores.details
    return cast(TaskCell, cell)


def write_documents(file: Path, scores: TaskScores) -> None:
    """One JSON line for each document: its scores and the answer."""
    with atomic_file(file, force=True) as draft, draft.open("w", encoding="utf-8") as lines:
        for document in dict.fromkeys([*scores.scores, *scores.answers]):
            record = {"id": document, scores.metric: scores.scores.get(document)}
            record |= {metric: values[document] for metric, values in scores.extra.items() if document in values}
            if document in scores.answers:
                record["answer"] = scores.answers[document]
            lines.write(json.dumps(record) + "\n")


# ---------------------------------------------------------------- the table


def columns_of(results: EvalResults) -> list[tuple[str, str]]:
    """(`loss` or `tasks`, name) of each column that some model has."""
    models = results["models"].values()
    columns = [("loss", domain) for model in models for domain in model.get("loss", {})]
    columns += [("tasks", task) for model in models for task in model.get("tasks", {})]
    return list(dict.fromkeys(columns))


def cell_texts(model: ModelResults, kind: str, column: str) -> tuple[str, str]:
    """A table's number of one model, and the interval and counts that belong to it."""
    if kind == "loss":
        if column not in model.get("loss", {}):
            return "–", ""
        loss = model["loss"][column]
        low, high = loss["ci95"]
        return f"{loss['nll']:.4f}", f"{low:.4f} to {high:.4f}"
    if column not in model.get("tasks", {}):
        return "–", ""
    cell = model["tasks"][column]
    counts = [f"{count} {status}" for status, count in cell.get("counts", {}).items() if count and status != "ok"]
    value, interval = cell["value"], cell["ci95"]
    if value is None or interval is None:
        return "–", "; ".join(counts)
    scale, unit = (1, "") if cell["metric"] == "rating" else (100, " %")
    low, high = interval
    return f"{scale * value:.2f}{unit}", "; ".join([f"{scale * low:.2f} to {scale * high:.2f}", *counts])


def markdown(results: EvalResults) -> str:
    """The results as a Markdown table."""
    columns = columns_of(results)
    heads = [f"{name}, nats/token" if kind == "loss" else name for kind, name in columns]
    lines = [f"| model | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    counts = set()
    for name, model in results["models"].items():
        texts = [cell_texts(model, kind, column) for kind, column in columns]
        cells = [f"{value} ({note})" if note else value for value, note in texts]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        counts |= {f"{task}: {cell['samples']}" for task, cell in model.get("tasks", {}).items()}
        counts |= {f"{domain}: {cell['samples']} rows" for domain, cell in model.get("loss", {}).items()}
    return "\n".join(lines) + f"\n\n95% intervals in brackets. Samples: {'; '.join(sorted(counts))}.\n"
