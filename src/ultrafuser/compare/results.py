"""Put the measurements of systems side by side: intervals, paired differences, gate weights.

A comparison of losses alone needs row losses and nothing else:

    losses = {"base": group_losses(...), "text": ..., "fused": fused_losses(...)[0]}     # lists of RowLoss
    systems = [SystemResult(name, KINDS[name], Measurement(losses=by_stratum(rows, row_losses)))
               for name, row_losses in losses.items()]
    systems[-1].measurement.sample_weights = by_domain(rows, weights)                    # of fused_losses
    systems[-1].measurement.training = read_metrics(output / "metrics.jsonl")
    comparison = compare_systems(systems, title="Demo", specialists=names, main="fused", seed=seed)
    write_json(output / "results.json", comparison.model_dump(mode="json"))
    write_report(comparison, output, traces=traces)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.evaluate.losses import mean_weights
from ultrafuser.evaluate.scoring import TaskScores
from ultrafuser.evaluate.tasks import TASKS
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.data import (
    MEAN,
    Checkpoint,
    Comparison,
    Loss,
    Pair,
    Parameters,
    Speed,
    System,
    Task,
    TaskScore,
)

TASK = "task/"  # before a benchmark's name in a column, since a domain may have the same name
ORACLE = "oracle"
Strata = dict[str, Stratum]  # by domain or benchmark: its test rows or documents


@dataclass
class Measurement:
    """The measurements of one system. A field keeps its default where nothing was measured.

    Attributes:
        losses: by domain, nats and response tokens of each test row (`evaluate.losses.by_stratum` makes them).
        tasks: scores of each benchmark, by document.
        sample_weights: by domain, the mean weight of each specialist on each test row, in the order of `losses`.
        parameters: `total` and `active`.
        training: the rows of metrics.jsonl.
        traces: answers with the gate weights of each token.
        chosen: number of answers chosen `of` each specialist and `by` each rule (best-of-K).
        seconds: duration of the measurement.
    """

    losses: Strata = field(default_factory=dict)
    tasks: dict[str, TaskScores] = field(default_factory=dict)
    sample_weights: dict[str, list[Sequence[float]]] = field(default_factory=dict)
    tokens_per_s: Speed | None = None
    peak_memory_mb: float | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    chosen: dict[str, dict[str, int]] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "loss": {domain: asdict(stratum) for domain, stratum in self.losses.items()} or None,
            "tasks": {task: scores.to_dict() for task, scores in self.tasks.items()},
            "sample_weights": self.sample_weights or None,
            "tokens_per_s": self.tokens_per_s.model_dump() if self.tokens_per_s else None,
            "peak_memory_mb": self.peak_memory_mb,
            "parameters": self.parameters,
            "training": self.training,
            "traces": [trace.to_dict() for trace in self.traces],
            "chosen": self.chosen,
            "seconds": self.seconds,
        }

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Measurement:
        """Read the result of `to_dict`."""
        speed = tree.get("tokens_per_s")
        return cls(
            losses={domain: Stratum(**stratum) for domain, stratum in (tree.get("loss") or {}).items()},
            tasks={task: TaskScores(**scores) for task, scores in tree["tasks"].items()},
            sample_weights=tree.get("sample_weights") or {},
            tokens_per_s=Speed(**speed) if speed else None,
            peak_memory_mb=tree.get("peak_memory_mb"),
            parameters=tree["parameters"],
            training=tree["training"],
            traces=[TokenTrace.from_dict(trace) for trace in tree.get("traces", [])],
            chosen=tree.get("chosen"),
            seconds=tree["seconds"],
        )


@dataclass
class SystemResult:
    """One system of a comparison, measured or failed.

    Attributes:
        kind: `specialist`, `oracle`, `router` and `fused` have a meaning for the paired differences and the report.
            An `oracle` needs no measurement: it takes the numbers of the best specialist of each column.
        measurement: None where the system failed.
        error: why there is no measurement.
        label: its name in tables and figures. Default: `name`.
        kind_label, description: name of its kind in the report, and a sentence about it.
        versus: a further system that it is compared with.
    """

    name: str
    kind: str
    measurement: Measurement | None = None
    error: str = "not measured yet"
    label: str = ""
    kind_label: str = ""
    description: str = ""
    versus: str | None = None
    trained_parameters: int = 0
    build_seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return self.measurement is None and self.kind != ORACLE


def compare_systems(
    systems: Sequence[SystemResult],
    *,
    title: str,
    specialists: Sequence[str],
    main: str | None,
    seed: int = 0,
    config: Any = None,
) -> Comparison:
    """Put measured systems side by side.

    Args:
        systems: in the order of the report.
        specialists: names of the specialists, in the order of the gate's weights.
        main: the system that the report is about. It is ignored when it was not measured.
        seed: of the bootstrap.
        config: settings to show at the end of the report, as JSON.

    Returns:
        Means with 95% intervals, and each system's paired differences to the best specialist of each column, to the
        oracle, to the router, to the main system and to its `versus`.
    """
    measured = {system.name: system.measurement for system in systems if system.measurement is not None}
    numbers = _Numbers.of(measured, seed)
    best = numbers.best_columns([system.name for system in systems if system.kind == "specialist"])
    for system in systems:
        if system.kind == ORACLE:
            numbers.copy_best(system.name, best)
    main = main if main in measured else None
    rivals = {"best_specialist": best, **_rivals(systems, numbers, main)}
    return Comparison(
        title=title,
        created=time.strftime("%Y-%m-%d"),
        seed=seed,
        specialists=list(specialists),
        domains=numbers.domains,
        tasks=numbers.tasks,
        systems={system.name: _system(system, numbers, rivals) for system in systems},
        gate_weights={
            name: mean_weights(measurement.sample_weights, _tokens(measurement), specialists)
            for name, measurement in measured.items()
            if measurement.sample_weights and measurement.losses
        },
        sample_weights={
            name: _named_weights(measurement.sample_weights, specialists)
            for name, measurement in measured.items()
            if measurement.sample_weights
        },
        training={name: measurement.training for name, measurement in measured.items() if measurement.training},
        stability={
            name: checkpoints
            for name, measurement in measured.items()
            if (checkpoints := _stability(measurement.training))
        },
        table2=[system.name for system in systems if system.kind == "fused" and system.name in measured],
        main=main,
        config=config,
    )


def _rivals(systems: Sequence[SystemResult], numbers: _Numbers, main: str | None) -> dict[str, dict[str, str]]:
    """The measured router, oracle and main system, with which every system is compared in every column."""
    first = {kind: next((s.name for s in systems if s.kind == kind), None) for kind in ("router", ORACLE)}
    rivals = {kind: name for kind, name in {**first, "main": main}.items() if name is not None}
    return {kind: dict.fromkeys(numbers.columns, name) for kind, name in rivals.items() if name in numbers.scores}


@dataclass
class _Numbers:
    """The test rows and documents of every system.

    A column is a domain, the `mean` of the domains, or `task/NAME`.
    """

    losses: dict[str, Strata]
    scores: dict[str, Strata]
    domains: list[str]
    tasks: dict[str, Task]
    seed: int

    @classmethod
    def of(cls, measured: Mapping[str, Measurement], seed: int) -> _Numbers:
        losses = {name: measurement.losses for name, measurement in measured.items() if measurement.losses}
        scores = {
            name: {task: scores.stratum() for task, scores in measurement.tasks.items() if scores.scores}
            for name, measurement in measured.items()
        }
        domains = list(dict.fromkeys(domain for strata in losses.values() for domain in strata))
        return cls(losses, scores, domains, _tasks(measured), seed)

    @property
    def columns(self) -> list[str]:
        return [*self.domains, MEAN, *(TASK + task for task in self.tasks)]

    def strata(self, name: str, column: str) -> list[Stratum] | None:
        """The rows or documents behind a system's number in a column. None: it has no such number."""
        if column.startswith(TASK):
            tree, keys = self.scores.get(name, {}), [column.removeprefix(TASK)]
        else:
            tree, keys = self.losses.get(name, {}), self.domains if column == MEAN else [column]
        return [tree[key] for key in keys] if keys and all(key in tree for key in keys) else None

    def best_columns(self, specialists: Sequence[str]) -> dict[str, str]:
        """The specialist with the best number of each column, on this very test."""
        best = {}
        for column in self.columns:
            strata_of = {name: strata for name in specialists if (strata := self.strata(name, column)) is not None}
            means = {name: statistics.mean(stratum.value for stratum in strata) for name, strata in strata_of.items()}
            if means:
                best[column] = (max if column.startswith(TASK) else min)(means, key=lambda name: means[name])
        return best

    def copy_best(self, name: str, best: Mapping[str, str]) -> None:
        """Give an oracle the rows of the best specialist of each domain and task."""
        if best:
            self.losses[name] = {d: self.losses[best[d]][d] for d in self.domains if d in best}
            self.scores[name] = {t: self.scores[best[TASK + t]][t] for t in self.tasks if TASK + t in best}

    def loss(self, name: str) -> dict[str, Loss] | None:
        """A system's losses by domain, and their mean."""
        strata = self.losses.get(name)
        if not strata:
            return None
        cells = {domain: _loss([strata[domain]], self.seed) for domain in self.domains}
        mean = _loss([strata[domain] for domain in self.domains], self.seed)
        return cells | {MEAN: Loss(nll=mean.nll, ci95=mean.ci95)}

    def paired(self, name: str, rivals: Mapping[str, str]) -> dict[str, Pair]:
        """A system minus another one on the same rows, by column."""
        pairs = {}
        for column, rival in rivals.items():
            strata, rival_strata = self.strata(name, column), self.strata(rival, column)
            if rival != name and strata is not None and rival_strata is not None:
                pair = difference(strata, rival_strata, self.seed)
                if pair is not None:
                    pairs[column] = Pair.model_validate({"versus": rival, **pair})
        return pairs


def _system(system: SystemResult, numbers: _Numbers, rivals: Mapping[str, Mapping[str, str]]) -> System:
    """What the report shows of one system."""
    measurement = system.measurement or Measurement()
    trained = system.trained_parameters
    if system.versus is not None:
        rivals = {**rivals, "versus": dict.fromkeys(numbers.columns, system.versus)}
    return System(
        label=system.label or system.name,
        kind=system.kind,
        kind_label=system.kind_label or system.kind,
        description=system.description,
        status="failed" if system.failed else "done",
        error=system.error if system.failed else None,
        loss=numbers.loss(system.name),
        tasks={
            task: _score(stratum, measurement.tasks.get(task), numbers.seed)
            for task, stratum in numbers.scores.get(system.name, {}).items()
        },
        paired={rival: numbers.paired(system.name, columns) for rival, columns in rivals.items()},
        tokens_per_s=measurement.tokens_per_s,
        peak_memory_mb=measurement.peak_memory_mb,
        parameters=Parameters(**measurement.parameters, trained=trained) if measurement.parameters else None,
        chosen=measurement.chosen,
        seconds={
            phase: seconds
            for phase, seconds in (("build", system.build_seconds), ("measure", measurement.seconds))
            if seconds
        },
    )


def _loss(strata: Sequence[Stratum], seed: int) -> Loss:
    mean = estimate(strata, seed)
    tokens = sum(int(sum(stratum.weights.values())) for stratum in strata)
    samples = sum(len(stratum.totals) for stratum in strata)
    return Loss.model_validate({"nll": mean["value"], "ci95": mean["ci95"], "tokens": tokens, "samples": samples})


def _score(stratum: Stratum, scores: TaskScores | None, seed: int) -> TaskScore:
    counts = {label: count for label, count in (scores.counts if scores else {}).items() if count and label != "ok"}
    return TaskScore.model_validate(estimate([stratum], seed) | {"samples": len(stratum.totals), "counts": counts})


def _tasks(measured: Mapping[str, Measurement]) -> dict[str, Task]:
    """What each benchmark measures, in the order in which the systems ran them."""
    tasks: dict[str, Task] = {}
    for measurement in measured.values():
        for name, scores in measurement.tasks.items():
            description = TASKS[name].description if name in TASKS else name
            tasks.setdefault(name, Task(metric=scores.metric, higher_is_better=True, description=description))
    return tasks


def _tokens(measurement: Measurement) -> dict[str, list[float]]:
    """Response tokens of each row, by domain."""
    return {domain: list(stratum.weights.values()) for domain, stratum in measurement.losses.items()}


def _named_weights(
    weights: Mapping[str, Sequence[Sequence[float]]], specialists: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    return {domain: [dict(zip(specialists, row, strict=True)) for row in rows] for domain, rows in weights.items()}


def _stability(training: Sequence[Mapping[str, Any]]) -> list[Checkpoint]:
    """Validation losses by domain at each checkpoint of the last stage (table 4 of the paper)."""
    checkpoints = []
    for row in training:
        loss = {key.removeprefix("eval_loss/"): value for key, value in row.items() if key.startswith("eval_loss/")}
        if loss and row["stage"] == training[-1]["stage"]:
            checkpoints.append(Checkpoint(step=row["step"], loss=loss))
    return checkpoints
