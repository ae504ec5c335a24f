"""Put the measurements of systems side by side: intervals, paired differences, gate weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter

from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.evaluate.losses import mean_weights
from ultrafuser.evaluate.scoring import TaskScores
from ultrafuser.evaluate.tasks import TASKS
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.data import MEAN, Checkpoint, Comparison, Loss, Pair, Parameters, Speed, System, Task, TaskScore

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

    losses: Annotated[Strata, Field(alias="loss")] = field(default_factory=dict)  # the key in measured.json
    tasks: dict[str, TaskScores] = field(default_factory=dict)
    sample_weights: dict[str, list[Sequence[float]]] = field(default_factory=dict)
    tokens_per_s: Speed | None = None
    peak_memory_mb: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    traces: list[TokenTrace] = field(default_factory=list)
    chosen: dict[str, dict[str, int]] | None = None
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return _FORMAT.dump_python(self, by_alias=True)

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any]) -> Measurement:
        """Read the result of `to_dict`."""
        return _FORMAT.validate_python({key: value for key, value in tree.items() if value is not None})


_FORMAT = TypeAdapter(Measurement)


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
    numbers = _Numbers(measured, seed)
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
            name: {
                domain: [dict(zip(specialists, row, strict=True)) for row in rows]
                for domain, rows in measurement.sample_weights.items()
            }
            for name, measurement in measured.items()
            if measurement.sample_weights
        },
        training={name: measurement.training for name, measurement in measured.items() if measurement.training},
        stability={name: losses for name, m in measured.items() if (losses := _stability(m.training))},
        table2=[system.name for system in systems if system.kind == "fused" and system.name in measured],
        main=main,
        config=config,
    )


class _Numbers:
    """The test rows and documents of every system.

    A column is a domain, the `mean` of the domains, `task/NAME`, or `task/mean`, the mean of several benchmarks.
    """

    def __init__(self, measured: Mapping[str, Measurement], seed: int) -> None:
        self.seed = seed
        self.losses = {name: measurement.losses for name, measurement in measured.items() if measurement.losses}
        self.scores: dict[str, Strata] = {}
        self.tasks: dict[str, Task] = {}  # in the order in which the systems ran them
        for name, measurement in measured.items():
            self.scores[name] = {t: scores.stratum() for t, scores in measurement.tasks.items() if scores.scores}
            for task, scores in measurement.tasks.items():
                description = TASKS[task].description if task in TASKS else task
                self.tasks.setdefault(task, Task(metric=scores.metric, higher_is_better=True, description=description))
        self.domains = list(dict.fromkeys(domain for strata in self.losses.values() for domain in strata))
        shares = all(
            0 <= score <= 1 for tree in self.scores.values() for s in tree.values() for score in s.totals.values()
        )
        means = [MEAN] if len(self.tasks) > 1 and shares else []  # ratings and shares have no mean
        self.columns = [*self.domains, MEAN, *(TASK + task for task in [*self.tasks, *means])]

    def strata(self, name: str, column: str) -> list[Stratum] | None:
        """The rows or documents behind a system's number in a column. None: it has no such number."""
        if column.startswith(TASK):
            task = column.removeprefix(TASK)
            tree, keys = self.scores.get(name, {}), list(self.tasks) if task == MEAN else [task]
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
                best[column] = (max if column.startswith(TASK) else min)(means, key=means.__getitem__)
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
        cells = {}
        for column in (*self.domains, MEAN):
            rows = [strata[domain] for domain in (self.domains if column == MEAN else [column])]
            mean = estimate(rows, self.seed)
            cells[column] = Loss(nll=mean["value"], ci95=(mean["ci95"][0], mean["ci95"][1]))
            if column != MEAN:
                cells[column].tokens, cells[column].samples = int(sum(rows[0].weights.values())), len(rows[0].totals)
        return cells

    def task_mean(self, name: str) -> TaskScore | None:
        """A system's plain mean over the benchmarks. None: it has no such number."""
        strata = self.strata(name, TASK + MEAN) if TASK + MEAN in self.columns else None
        if strata is None:
            return None
        samples = sum(len(stratum.totals) for stratum in strata)
        return TaskScore.model_validate({**estimate(strata, self.seed), "samples": samples})

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


def _rivals(systems: Sequence[SystemResult], numbers: _Numbers, main: str | None) -> dict[str, dict[str, str]]:
    """The measured router, oracle and main system, with which every system is compared in every column."""
    first = {kind: next((s.name for s in systems if s.kind == kind), None) for kind in ("router", ORACLE)}
    rivals = {**first, "main": main}
    return {kind: dict.fromkeys(numbers.columns, name) for kind, name in rivals.items() if name in numbers.scores}


def _system(system: SystemResult, numbers: _Numbers, rivals: Mapping[str, Mapping[str, str]]) -> System:
    """What the report shows of one system."""
    measurement = system.measurement or Measurement()
    if system.versus is not None:
        rivals = {**rivals, "versus": dict.fromkeys(numbers.columns, system.versus)}
    tasks = {}
    for task, stratum in numbers.scores.get(system.name, {}).items():
        counts = measurement.tasks[task].counts if task in measurement.tasks else {}  # an oracle has none
        unusable = {label: count for label, count in counts.items() if count and label != "ok"}
        fields = {**estimate([stratum], numbers.seed), "samples": len(stratum.totals), "counts": unusable}
        tasks[task] = TaskScore.model_validate(fields)
    seconds = {"build": system.build_seconds, "measure": measurement.seconds}
    parameters = measurement.parameters | {"trained": system.trained_parameters}
    return System(
        label=system.label or system.name,
        kind=system.kind,
        kind_label=system.kind_label,
        description=system.description,
        status="failed" if system.failed else "done",
        error=system.error if system.failed else None,
        loss=numbers.loss(system.name),
        tasks=tasks,
        task_mean=numbers.task_mean(system.name),
        paired={rival: numbers.paired(system.name, columns) for rival, columns in rivals.items()},
        tokens_per_s=measurement.tokens_per_s,
        peak_memory_mb=measurement.peak_memory_mb,
        parameters=Parameters(**parameters) if measurement.parameters else None,
        chosen=measurement.chosen,
        seconds={phase: duration for phase, duration in seconds.items() if duration},
    )


def _tokens(measurement: Measurement) -> dict[str, list[float]]:
    """Response tokens of each row, by domain."""
    return {domain: list(stratum.weights.values()) for domain, stratum in measurement.losses.items()}


def _stability(training: Sequence[Mapping[str, Any]]) -> list[Checkpoint]:
    """Validation losses by domain at each checkpoint of the last stage (table 4 of the paper)."""
    checkpoints = []
    for row in training:
        loss = {key.removeprefix("eval_loss/"): value for key, value in row.items() if key.startswith("eval_loss/")}
        if loss and row["stage"] == training[-1]["stage"]:
            checkpoints.append(Checkpoint(step=row["step"], loss=loss))
    return checkpoints
