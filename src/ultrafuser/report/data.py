"""The results.json of a comparison as typed data, with the look-ups that a report needs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from ultrafuser.errors import DataError

Verdict = Literal["better", "level", "worse"]
Interval = tuple[float, float]

FIRST_KINDS = ["base", "specialist", "oracle"]
LAST_KIND = "fused"
BASELINES = {
    "best_specialist": "the best specialist at home",
    "oracle": "the per-domain oracle",
    "router": "the router",
    "main": "the main system",
    "versus": "the system that its entry in the recipe names",
}
MEAN = "mean"


class Loss(BaseModel):
    """Nats per response token on a domain. The mean over domains has neither tokens nor samples."""

    nll: float
    ci95: Interval
    tokens: int | None = None
    samples: int | None = None


class TaskScore(BaseModel):
    """Mean score of a benchmark, and the number of answers or verdicts that could not be used, by reason."""

    value: float
    ci95: Interval
    samples: int
    counts: dict[str, int] = {}


class Pair(BaseModel):
    """Mean difference to another system on the same samples: this system minus `versus`."""

    versus: str
    difference: float
    ci95: Interval


class Speed(BaseModel):
    """Generated tokens per second over several runs."""

    median: float
    runs: list[float] = []
    batch_size: int | None = None


class Parameters(BaseModel):
    """Numbers of parameters: all, used for one token, changed by training."""

    total: int
    active: int
    trained: int


class System(BaseModel):
    """One system of a comparison. A failed system has an error and no numbers.

    Attributes:
        label: the system's name in tables and figures.
        kind_label: the name of its kind there, by default the kind itself.
        description: what a system of this kind is, in one sentence, for the glossary.
        task_mean: plain mean of all benchmarks of the comparison. None: there are fewer than two, or it skips some.
    """

    label: str
    kind: str
    kind_label: str = ""
    description: str = ""
    status: Literal["done", "failed"]
    error: str | None = None
    loss: dict[str, Loss] | None = None
    tasks: dict[str, TaskScore] = {}
    task_mean: TaskScore | None = None
    paired: dict[str, dict[str, Pair]] = {}
    tokens_per_s: Speed | None = None
    peak_memory_mb: int | float | None = None
    parameters: Parameters | None = None
    chosen: dict[str, dict[str, int]] | None = None
    seconds: dict[str, float] = {}

    @model_validator(mode="after")
    def _name_the_kind(self) -> System:
        self.kind_label = self.kind_label or self.kind
        return self

    @property
    def failed(self) -> bool:
        return self.status == "failed"


class Task(BaseModel):
    """What a benchmark measures."""

    metric: str
    higher_is_better: bool
    description: str = ""


class Checkpoint(BaseModel):
    """Loss by domain at a step of the training."""

    step: int
    loss: dict[str, float] = Field(min_length=1)


@dataclass(frozen=True)
class Column:
    """A number that every system may have: the loss on a domain, the mean loss, or the score of a task."""

    name: str
    heading: str
    is_task: bool = False
    higher_is_better: bool = False
    metric: str = "nll"


@dataclass(frozen=True)
class Value:
    """A number with its 95% interval."""

    value: float
    low: float
    high: float
    samples: int | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, (self.value, self.low, self.high)))


class Comparison(BaseModel):
    """results.json. Systems are grouped by kind: base, specialists and oracle first, fused models last."""

    title: str
    created: str
    seed: int
    specialists: list[str]
    domains: list[str]
    tasks: dict[str, Task]
    systems: dict[str, System] = Field(min_length=1)
    gate_weights: dict[str, dict[str, dict[str, float]]] = {}
    sample_weights: dict[str, dict[str, list[dict[str, float]]]] = {}
    training: dict[str, list[dict[str, Any]]] = {}
    stability: dict[str, list[Checkpoint]] = {}
    table2: list[str] = []
    main: str | None  # None: it was not measured
    config: Any

    @model_validator(mode="after")
    def _names_agree(self) -> Comparison:
        _check_names("main", [self.main] if self.main is not None else [], self.systems)
        for key in ("table2", "gate_weights", "sample_weights", "training", "stability"):
            _check_names(key, getattr(self, key), self.systems)
        for name, system in self.systems.items():
            if system.failed and not system.error:
                raise ValueError(f"systems.{name}: status is 'failed', but 'error' is empty. Write the error's message")
            _check_names(f"systems.{name}.tasks", system.tasks, self.tasks)
            if system.loss is not None and set(system.loss) != {*self.domains, MEAN}:
                raise ValueError(f"systems.{name}.loss: has {sorted(system.loss)}, expected {[*self.domains, MEAN]}")
        kinds = {system.kind: None for system in self.systems.values()}
        order = [*FIRST_KINDS, *(kind for kind in kinds if kind not in (*FIRST_KINDS, LAST_KIND)), LAST_KIND]
        self.systems = dict(sorted(self.systems.items(), key=lambda item: order.index(item[1].kind)))
        return self

    @cached_property
    def specialist_systems(self) -> list[str]:
        """The systems of one specialist alone. A recipe may give them other names than the specialists."""
        return [name for name, system in self.done.items() if system.kind == "specialist"]

    @cached_property
    def losses(self) -> list[Column]:
        """The measured domains, and their mean."""
        measured = any(system.loss for system in self.done.values())
        names = self.domains if len(self.domains) == 1 else [*self.domains, MEAN]
        return [Column(name, name) for name in names] if measured else []

    @cached_property
    def scores(self) -> list[Column]:
        """The tasks for which any system has a score."""
        measured = {task for system in self.done.values() for task in system.tasks}
        return [
            Column(name, f"{name} (task)" if name in self.domains else name, True, task.higher_is_better, task.metric)
            for name, task in self.tasks.items()
            if name in measured
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of the results. Every PNG figure of a report carries it, so that a kept figure can be checked."""
        return hashlib.sha256(self.model_dump_json(exclude_defaults=True).encode()).hexdigest()

    @property
    def columns(self) -> list[Column]:
        return [*self.losses, *self.scores]

    @cached_property
    def done(self) -> dict[str, System]:
        return {name: system for name, system in self.systems.items() if not system.failed}

    @property
    def failed(self) -> dict[str, System]:
        return {name: system for name, system in self.systems.items() if system.failed}

    def label(self, name: str) -> str:
        """The label of a system, or the name itself where it is none."""
        return self.systems[name].label if name in self.systems else name

    def value(self, name: str, column: Column) -> Value | None:
        """A system's number, if it has one."""
        system = self.systems[name]
        if column.is_task:
            score = system.tasks.get(column.name)
            return Value(score.value, *score.ci95, score.samples, score.counts) if score else None
        loss = (system.loss or {}).get(column.name)
        return Value(loss.nll, *loss.ci95, loss.samples) if loss else None

    def values(self, column: Column, *, finite: bool = False) -> dict[str, Value]:
        """The numbers of all systems that have one, by name."""
        pairs = {name: self.value(name, column) for name in self.done}
        return {name: value for name, value in pairs.items() if value and (value.finite or not finite)}

    def best(self, column: Column) -> set[str]:
        """The systems with the best number. Equal systems are all included, the oracle never is."""
        candidates = {
            name: cell.value
            for name, cell in self.values(column).items()
            if self.systems[name].kind != "oracle" and not math.isnan(cell.value)
        }
        best = (max if column.higher_is_better else min)(candidates.values(), default=None)
        return {name for name, value in candidates.items() if value == best}

    def best_specialist(self, column: Column) -> str | None:
        """The specialist with the best number."""
        candidates = {n: v.value for n, v in self.values(column, finite=True).items() if n in self.specialist_systems}
        pick = max if column.higher_is_better else min
        return pick(candidates, key=lambda name: candidates[name]) if candidates else None

    def relative(self, name: str, column: Column) -> float | None:
        """A number relative to the best specialist, or to the best system if there is no specialist. Above 1 is better.

        A loss gives the ratio of the geometric mean probabilities of a token, `exp(reference - loss)`. A task gives the ratio
        of the scores, which needs both to be above zero.
        """
        reference = self.best_specialist(column) or min(self.best(column), default=None)
        values = self.values(column, finite=True)
        if name not in values or reference not in values:
            return None
        value, best = values[name].value, values[reference].value
        if not column.is_task:
            return math.exp(best - value)
        if min(value, best) <= 0 and not (value == 0 < best and column.higher_is_better):
            return None
        return value / best if column.higher_is_better else best / value

    def pair(self, name: str, rival: str, column: Column) -> Pair | None:
        """A system's paired difference to a rival.

        The key of a task is `task/NAME`, or NAME if no domain has that name too.
        """
        pairs = self.systems[name].paired.get(rival, {})
        if not column.is_task:
            return pairs.get(column.name)
        plain = None if column.name in (*self.domains, MEAN) else pairs.get(column.name)
        return pairs.get(f"task/{column.name}", plain)

    def verdict(self, pair: Pair, column: Column) -> Verdict:
        """Whether the interval of the difference lies on one side of zero, and on which."""
        low, high = pair.ci95
        if low <= 0 <= high or math.isnan(low + high):
            return "level"
        return "better" if (low > 0) == column.higher_is_better else "worse"


def check_comparison(results: Mapping[str, Any]) -> Comparison:
    """Read results.json.

    Raises:
        DataError: a key is missing or a value is invalid. The message names each.
    """
    try:
        return Comparison.model_validate(dict(results))
    except ValidationError as error:
        raise DataError(
            f"results of a comparison: {'. '.join(_messages(error))}. Run `ultrafuser compare` again"
        ) from None


def _messages(error: ValidationError) -> list[str]:
    """pydantic's findings in the style of our messages."""
    messages = []
    for finding in error.errors():
        location = ".".join(map(str, finding["loc"]))
        if finding["type"] == "missing":
            messages.append(f"key {location!r} is missing")
        elif finding["type"] == "value_error":
            messages.append(str(finding["ctx"]["error"]))
        else:
            reason = finding["msg"][0].lower() + finding["msg"][1:]
            messages.append(f"{location}: got {finding['input']!r:.60}, {reason}")
    return messages


def _check_names(location: str, names: Any, expected: Mapping[str, Any] | Sequence[str]) -> None:
    unknown = [name for name in names if name not in expected]
    if unknown:
        raise ValueError(f"{location}: unknown names {unknown}, expected some of {list(expected)}")
