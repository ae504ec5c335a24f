"""The tables of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ultrafuser.display.page import Cell, Row, Table
from ultrafuser.report.data import Column, Comparison, System
from ultrafuser.report.figures.training import over_checkpoints

DAGGER = "†"  # marks the oracle
_MAX_COLUMNS = 7  # columns of numbers that fit beside each other in the width of the page
_EMPTY = Cell("–")
CellOf = Callable[[str], Cell]  # of a system, by its name


@dataclass(frozen=True)
class Cost:
    """A number of what a system takes. `least` says whether the least or the most is best."""

    heading: str
    read: Callable[[System], float | None]
    write: Callable[[float], str]
    least: bool | None = None


def main_tables(comparison: Comparison) -> list[Table]:
    """Every system by loss, tasks and cost, in as few tables as fit the page.

    Losses come first. A table leaves out the systems that have no number in it.
    """
    columns = [(_heading(column, comparison), _quality_cell(comparison, column)) for column in comparison.columns]
    num_losses = len(comparison.losses)
    groups = [columns[:num_losses], columns[num_losses:]]
    if any(cost.read(system) is not None for cost in COSTS for system in comparison.done.values()):
        groups.append([(Cell(cost.heading), _cost_cell(comparison, cost)) for cost in COSTS])
    packed: list[list[tuple[Cell, CellOf]]] = [[]]
    for group in groups:
        if packed[-1] and len(packed[-1]) + len(group) > _MAX_COLUMNS:
            packed.append([])
        packed[-1] += group
    tables = []
    for columns in filter(None, packed):
        cells = [cell for _, cell in columns]
        names = [n for n, s in comparison.systems.items() if s.failed or any(cell(n) != _EMPTY for cell in cells)]
        tables.append(_system_table(comparison, columns, names))
    return tables


def ablation_table(comparison: Comparison, names: Sequence[str]) -> Table:
    """Loss and tasks of some systems, in their order, best in bold among all systems."""
    columns = [(_heading(column, comparison), _quality_cell(comparison, column)) for column in comparison.columns]
    return _system_table(comparison, columns, names, ruled=False)


def paired_tables(comparison: Comparison, rival: str) -> list[Table]:
    """Every system's paired difference to a rival, if any system has one."""
    columns = [c for c in comparison.columns if any(comparison.pair(n, rival, c) for n in comparison.done)]
    names = [n for n in comparison.done if any(comparison.pair(n, rival, c) for c in columns)]
    cells: dict[Column, tuple[Cell, CellOf]] = {}
    for column in columns:
        rivals = {pair.versus for name in names if (pair := comparison.pair(name, rival, column))}
        shared = rivals.pop() if len(rivals) == 1 else None
        heading = _heading(column, comparison)
        if shared:
            heading = replace(heading, notes=[*heading.notes, f"vs {comparison.label(shared)}"])
        cells[column] = heading, _paired_cell(comparison, rival, column, shared)
    groups = [[cells[column] for column in columns if column.is_task is tasks] for tasks in (False, True)]
    if len(cells) < _MAX_COLUMNS:  # signed intervals need more width than plain ones
        groups = [list(cells.values())]
    return [_system_table(comparison, group, names) for group in groups if group]


def gate_table(comparison: Comparison) -> Table:
    """Mean gate weights of every system by domain (table 6)."""
    specialists = list(dict.fromkeys(s for d in comparison.gate_weights.values() for w in d.values() for s in w))
    rows = []
    for name, domains in comparison.gate_weights.items():
        for domain, weights in domains.items():
            cells = [Cell(f"{weights[s]:.3f}") if s in weights else _EMPTY for s in specialists]
            rows.append(Row(Cell(comparison.label(name), [domain]), cells))
    return Table([Cell("system, data of"), *map(Cell, specialists)], rows, dense=True)


def stability_table(comparison: Comparison) -> Table:
    """Mean ± deviation of the losses over the checkpoints of every system (table 4)."""
    columns = [column.name for column in comparison.losses] or [*comparison.domains]
    rows = []
    for name, checkpoints in comparison.stability.items():
        statistics = over_checkpoints(checkpoints, comparison.domains)
        cells = [_mean_and_deviation(*statistics[c]) if c in statistics else _EMPTY for c in columns]
        count = f"{len(checkpoints)} checkpoint{'s' * (len(checkpoints) != 1)}"
        rows.append(Row(Cell(comparison.label(name), [count]), cells))
    return Table([Cell("system"), *map(Cell, columns)], rows, dense=True)


def in_one_line(error: str, limit: int = 160) -> str:
    """The most telling line of an error, truncated: the first, or the last of a traceback."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or [""]
    line = lines[-1 if lines[0].startswith("Traceback") else 0]
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def decimals(column: Column, comparison: Comparison) -> int:
    """Digits after the point of a column's numbers: four for losses below 0.1 as in table 3, else three."""
    values = [value.value for value in comparison.values(column, finite=True).values()]
    return 4 if values and not column.is_task and min(values) < 0.1 else 3


def metric_name(column: Column) -> str:
    return column.metric if column.is_task else "nats"


def _count(parameters: float) -> str:
    """A number of parameters: 134,515,008 as 134.5 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.4g} {unit}"
    return f"{parameters:g}"


COSTS = (
    Cost("tokens/s", lambda s: s.tokens_per_s.median if s.tokens_per_s else None, lambda n: f"{n:,.1f}", least=False),
    Cost("peak memory, MB", lambda s: s.peak_memory_mb, lambda n: f"{n:,.0f}", least=True),
    Cost("parameters, total", lambda s: s.parameters.total if s.parameters else None, _count),
    Cost("active", lambda s: s.parameters.active if s.parameters else None, _count),
    Cost("trained", lambda s: s.parameters.trained if s.parameters else None, _count),
    Cost("build, s", lambda s: s.seconds.get("build"), lambda n: f"{n:,.1f}"),
    Cost("measure, s", lambda s: s.seconds.get("measure"), lambda n: f"{n:,.1f}"),
)


def _system_table(
    comparison: Comparison, columns: Sequence[tuple[Cell, CellOf]], names: Sequence[str], *, ruled: bool = True
) -> Table:
    """A row per system, with rules between the kinds. A failed system has its error across all columns."""
    rows: list[Row] = []
    previous_kind = None
    for name in names:
        system = comparison.systems[name]
        rule = "rule" if ruled and previous_kind not in (None, system.kind) else ""
        previous_kind = system.kind
        if system.failed:
            rows.append(Row(_system_heading(system), classes=rule, failure=in_one_line(system.error or "")))
        else:
            strong = "strong" if name == comparison.main else ""
            cells = [cell(name) for _, cell in columns]
            rows.append(Row(_system_heading(system), cells, classes=f"{strong} {rule}".strip()))
    return Table([Cell("system"), *(heading for heading, _ in columns)], rows, dense=True)


def _system_heading(system: System) -> Cell:
    mark = f"\N{NO-BREAK SPACE}{DAGGER}" if system.kind == "oracle" else ""
    same = system.kind_label.lower() == system.label.lower()
    return Cell(f"{system.label}{mark}", [] if same else [system.kind_label])


def _heading(column: Column, comparison: Comparison) -> Cell:
    """A column's name, metric and, where all systems agree, number of samples."""
    counts = {value.samples for value in comparison.values(column).values() if value.samples is not None}
    arrow = "↑" if column.higher_is_better else "↓"
    notes = [f"{metric_name(column)} {arrow}"]
    if len(counts) == 1:
        notes.append(f"{counts.pop():,} samples")
    return Cell(column.heading, notes)


def _quality_cell(comparison: Comparison, column: Column) -> CellOf:
    best, digits = comparison.best(column), decimals(column, comparison)

    def cell(name: str) -> Cell:
        value = comparison.value(name, column)
        if value is None:
            return _EMPTY
        counts = ", ".join(f"{count:,} {label}" for label, count in value.counts.items())
        interval = f"{value.low:.{digits}f}–{value.high:.{digits}f}"
        return Cell(f"{value.value:.{digits}f}", [interval, counts] if counts else [interval], bold=name in best)

    return cell


def _cost_cell(comparison: Comparison, cost: Cost) -> CellOf:
    costs = {
        name: value
        for name, system in comparison.done.items()
        if system.kind != "oracle" and (value := cost.read(system)) is not None and not math.isnan(value)
    }
    best = None if cost.least is None else (min if cost.least else max)(costs.values(), default=None)

    def cell(name: str) -> Cell:
        system = comparison.systems[name]
        value = cost.read(system)
        if value is None:
            return _EMPTY
        speed = system.tokens_per_s
        batch_size = speed.batch_size if speed and cost is COSTS[0] else None
        bold = best is not None and costs.get(name) == best
        return Cell(cost.write(value), [] if batch_size is None else [f"batch of {batch_size}"], bold=bold)

    return cell


def _paired_cell(comparison: Comparison, rival: str, column: Column, shared: str | None) -> CellOf:
    digits = decimals(column, comparison) + (0 if column.is_task else 1)

    def cell(name: str) -> Cell:
        pair = comparison.pair(name, rival, column)
        if pair is None or pair.versus == name:
            return _EMPTY
        low, high = pair.ci95
        notes = [f"{_signed(low, digits)} to {_signed(high, digits)}"]
        if not shared:
            notes.append(f"vs {comparison.label(pair.versus)}")
        return Cell(_signed(pair.difference, digits), notes, verdict=comparison.verdict(pair, column))

    return cell


def _signed(difference: float, digits: int) -> str:
    """A difference with its sign, the minus as wide as the plus."""
    return f"{difference:+.{digits}f}".replace("-", "−")


def _mean_and_deviation(mean: float, deviation: float | None) -> Cell:
    return Cell(f"{mean:.3f}", [] if deviation is None else [f"± {deviation:.3f}"])
