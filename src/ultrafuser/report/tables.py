"""The tables of a comparison, as HTML, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from ultrafuser.report.blocks import row, table
from ultrafuser.report.data import Column, Comparison, System, Value
from ultrafuser.report.figures.training import over_checkpoints

_WIDEST = 7  # columns of numbers that fit beside each other in the width of the page
_NONE = "–"  # no such number
_DAGGER = "†"  # marks the oracle


@dataclass(frozen=True)
class Cost:
    """A number of what a system takes, with the note that stands under it; `least` says which one is best."""

    heading: str
    read: Callable[[System], float | None]
    write: Callable[[float], str]
    note: Callable[[System], str] = lambda system: ""
    least: bool | None = None


def main_tables(comparison: Comparison) -> list[str]:
    """Every system by loss, tasks and cost: as few HTML tables as fit the page, losses first; in each the systems that have
    a number there."""
    columns = [(_head(column, comparison), _quality_cell(comparison, column)) for column in comparison.columns]
    losses = len(comparison.losses)
    groups = [columns[:losses], columns[losses:], [(cost.heading, _cost_cell(comparison, cost)) for cost in COSTS]]
    costs_measured = any(cost.read(system) is not None for cost in COSTS for system in comparison.done.values())
    packed: list[list[tuple[str, Callable[[str], str]]]] = [[]]
    for group in groups if costs_measured else groups[:2]:
        if packed[-1] and len(packed[-1]) + len(group) > _WIDEST:
            packed.append([])
        packed[-1] += group
    out = []
    for part in filter(None, packed):
        names = [n for n, own in comparison.systems.items() if own.failed or any(cell(n) != _NONE for _, cell in part)]
        out.append(_system_table(comparison, part, names))
    return out


def chosen_table(comparison: Comparison, names: Sequence[str]) -> str:
    """Loss and tasks of some systems, in their order, best in bold among all systems."""
    columns = [(_head(column, comparison), _quality_cell(comparison, column)) for column in comparison.columns]
    return _system_table(comparison, columns, names, kinds=False)


def paired_tables(comparison: Comparison, rival: str) -> str:
    """Every system's paired difference to a rival; empty where no system has one."""
    columns = [c for c in comparison.columns if any(comparison.pair(n, rival, c) for n in comparison.done)]
    names = [n for n in comparison.done if any(comparison.pair(n, rival, c) for c in columns)]
    if not columns:
        return ""
    shared = {column: _shared_rival(comparison, rival, column, names) for column in columns}
    cells = [(_paired_head(comparison, c, shared[c]), _paired_cell(comparison, rival, c, shared[c])) for c in columns]
    parts = [
        [cell for cell, column in zip(cells, columns, strict=True) if column.is_task is tasks]
        for tasks in (False, True)
    ]
    if len(cells) < _WIDEST:  # signed intervals take more room
        parts = [cells]
    return "".join(_system_table(comparison, part, names) for part in parts if part)


def gate_table(comparison: Comparison) -> str:
    """Mean gate weights of every system by domain (table 6)."""
    specialists = list(dict.fromkeys(s for d in comparison.gate_weights.values() for w in d.values() for s in w))
    rows = [
        row(f"{escape(comparison.label(name))}<small>{escape(domain)}</small>", cells)
        for name, domains in comparison.gate_weights.items()
        for domain, weights in domains.items()
        for cells in [[f"{weights[s]:.3f}" if s in weights else _NONE for s in specialists]]
    ]
    return table(["system, data of", *map(escape, specialists)], rows, kind="dense")


def stability_table(comparison: Comparison) -> str:
    """Mean ± deviation of the losses over the checkpoints of every system (table 4)."""
    columns = [column.name for column in comparison.losses] or [*comparison.domains]
    rows = []
    for name, points in comparison.stability.items():
        found = over_checkpoints(points, comparison.domains)
        cells = [_mean_and_deviation(*found[column]) if column in found else _NONE for column in columns]
        steps = f"{len(points)} checkpoint{'s' * (len(points) != 1)}"
        rows.append(row(f"{escape(comparison.label(name))}<small>{steps}</small>", cells))
    return table(["system", *map(escape, columns)], rows, kind="dense")


def markdown_table(comparison: Comparison) -> str:
    """One Markdown table with a line for every system, failed ones included."""
    heads = [
        "system",
        "kind",
        *(_plain(f"{c.heading} ({_metric(c)})") for c in comparison.columns),
        *(c.heading for c in COSTS),
    ]
    lines = [heads, ["---", "---", *["---:"] * (len(heads) - 2)]]
    for name, system in comparison.systems.items():
        label = f"**{_plain(system.label)}**" if name == comparison.main else _plain(system.label)
        mark = f" {_DAGGER}" if system.kind == "oracle" else ""
        cells = [f"{label}{mark}", _plain(system.kind_label)]
        if system.failed:
            cells += [f"failed: {_plain(in_one_line(system.error or ''))}", *[""] * (len(heads) - 3)]
        else:
            cells += [_markdown_value(comparison, name, column) for column in comparison.columns]
            cells += ["" if (n := cost.read(system)) is None else cost.write(n) for cost in COSTS]
        lines.append(cells)
    notes = ["Best of each column in bold; 95% intervals in brackets."]
    if any(system.kind == "oracle" for system in comparison.systems.values()):
        notes.append(f"{_DAGGER} not a system: the best specialist of each domain, chosen afterwards.")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{' '.join(notes)}\n"


def csv_text(comparison: Comparison) -> str:
    """Every number of the systems, gate weights, sample weights and stability, a line each."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["system", "column", "metric", "value", "low", "high", "samples"])
    for line in _csv_rows(comparison):
        writer.writerow(["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in line])
    return buffer.getvalue()


def in_one_line(error: str, most: int = 160) -> str:
    """The line of an error that says most, cut to some length: the first, or the last of a traceback."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or [""]
    line = lines[-1 if lines[0].startswith("Traceback") else 0]
    return line if len(line) <= most else f"{line[: most - 1]}…"


CsvRow = tuple[str, str, str, float | int | None, float | None, float | None, int | None]


def _csv_rows(comparison: Comparison) -> Iterator[CsvRow]:
    for name, system in comparison.done.items():
        for column in comparison.columns:
            cell = comparison.value(name, column)
            if cell:
                yield name, column.name, column.metric, cell.value, cell.low, cell.high, cell.samples
            for what, number in cell.counts.items() if cell else ():
                yield name, column.name, f"{column.metric}/{what}", number, None, None, None
            for rival in system.paired:
                if pair := comparison.pair(name, rival, column):
                    metric = f"{column.metric}/minus/{rival}/{pair.versus}"
                    yield name, column.name, metric, pair.difference, *pair.ci95, cell.samples if cell else None
        for domain, loss in (system.loss or {}).items():
            if loss.tokens is not None:
                yield name, domain, "tokens", loss.tokens, None, None, loss.samples
        yield from ((name, "", metric, value, None, None, None) for metric, value in _cost_numbers(system))
    for name, domains in comparison.gate_weights.items():
        for domain, weights in domains.items():
            for s, weight in weights.items():
                yield name, domain, f"gate_weight/{s}", weight, None, None, None
    for name, by_domain in comparison.sample_weights.items():
        for domain, samples in by_domain.items():
            for n, weights in enumerate(samples):
                yield from ((name, domain, f"sample_weight/{n}/{s}", w, None, None, None) for s, w in weights.items())
    for name, points in comparison.stability.items():
        for point in points:
            for domain, nll in point.loss.items():
                yield name, domain, f"nll/step/{point.step}", nll, None, None, None


def _cost_numbers(system: System) -> Iterator[tuple[str, float | int]]:
    if speed := system.tokens_per_s:
        yield "tokens_per_s", speed.median
        yield from ((f"tokens_per_s/run/{n}", run) for n, run in enumerate(speed.runs))
        if speed.batch_size is not None:
            yield "tokens_per_s/batch_size", speed.batch_size
    if system.peak_memory_mb is not None:
        yield "peak_memory_mb", system.peak_memory_mb
    if system.parameters:
        yield from ((f"parameters/{part}", value) for part, value in system.parameters.model_dump().items())
    yield from ((f"seconds/{phase}", value) for phase, value in system.seconds.items())


def _count(number: float) -> str:
    """A number of parameters: 134,515,008 as 134.5 M."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:g}"


def _batch(system: System) -> str:
    speed = system.tokens_per_s
    return f"batch of {speed.batch_size}" if speed and speed.batch_size is not None else ""


COSTS = (
    Cost(
        "tokens/s",
        lambda s: s.tokens_per_s.median if s.tokens_per_s else None,
        lambda n: f"{n:,.1f}",
        _batch,
        least=False,
    ),
    Cost("peak memory, MB", lambda s: s.peak_memory_mb, lambda n: f"{n:,.0f}", least=True),
    Cost("parameters, total", lambda s: s.parameters.total if s.parameters else None, _count),
    Cost("active", lambda s: s.parameters.active if s.parameters else None, _count),
    Cost("trained", lambda s: s.parameters.trained if s.parameters else None, _count),
    Cost("build, s", lambda s: s.seconds.get("build"), lambda n: f"{n:,.1f}"),
    Cost("measure, s", lambda s: s.seconds.get("measure"), lambda n: f"{n:,.1f}"),
)


def _system_table(
    comparison: Comparison,
    columns: Sequence[tuple[str, Callable[[str], str]]],
    names: Sequence[str],
    *,
    kinds: bool = True,
) -> str:
    """A row a system; a failed one says so across all columns; rules between the kinds."""
    rows, before = [], None
    for name in names:
        system = comparison.systems[name]
        rule = "rule" if kinds and before not in (None, system.kind) else ""
        strong = "strong" if name == comparison.main else ""
        before = system.kind
        if system.failed:
            reason = f"<b>failed:</b> {escape(in_one_line(system.error or ''))}"
            cells = f'<td class="failed" colspan="{len(columns)}">{reason}</td>'
            rows.append(f'<tr class="{rule}"><th scope="row">{_system_head(system)}</th>{cells}</tr>')
        else:
            kind = f"{strong} {rule}".strip()
            rows.append(row(_system_head(system), [cell(name) for _, cell in columns], kind))
    return table(["system", *(head for head, _ in columns)], rows, kind="dense")


def _system_head(system: System) -> str:
    mark = f"&nbsp;{_DAGGER}" if system.kind == "oracle" else ""
    same = system.kind_label.lower() == system.label.lower()
    note = "" if same else f"<small>{escape(system.kind_label)}</small>"
    return f"{escape(system.label)}{mark}{note}"


def _metric(column: Column) -> str:
    return column.metric if column.is_task else "nats"


def _head(column: Column, comparison: Comparison) -> str:
    """A column's name, metric and, where all systems agree, number of samples."""
    counts = {cell.samples for cell in comparison.values(column).values() if cell.samples is not None}
    size = f"{counts.pop():,} samples" if len(counts) == 1 else ""
    arrow = "↑" if column.higher_is_better else "↓"
    notes = [f"{_metric(column)} {arrow}", size]
    return escape(column.heading) + "".join(f"<small>{escape(note)}</small>" for note in notes if note)


def decimals(column: Column, comparison: Comparison) -> int:
    """Places of a column's numbers: four for losses below 0.1 as in table 3, else three."""
    values = [cell.value for cell in comparison.values(column, finite=True).values()]
    return 4 if values and not column.is_task and min(values) < 0.1 else 3


def _quality_cell(comparison: Comparison, column: Column) -> Callable[[str], str]:
    best, places = comparison.best(column), decimals(column, comparison)

    def cell(name: str) -> str:
        value = comparison.value(name, column)
        if value is None:
            return _NONE
        number = f"<b>{value.value:.{places}f}</b>" if name in best else f"{value.value:.{places}f}"
        counts = ", ".join(f"{number:,} {escape(what)}" for what, number in value.counts.items())
        return f"{number}<small>{_range(value, places)}</small>" + (f"<small>{counts}</small>" if counts else "")

    return cell


def _cost_cell(comparison: Comparison, cost: Cost) -> Callable[[str], str]:
    numbers = {
        name: number
        for name, system in comparison.done.items()
        if system.kind != "oracle" and (number := cost.read(system)) is not None and not math.isnan(number)
    }
    best = None if cost.least is None else (min if cost.least else max)(numbers.values(), default=None)

    def cell(name: str) -> str:
        system = comparison.systems[name]
        number = cost.read(system)
        if number is None:
            return _NONE
        bold = best is not None and numbers.get(name) == best
        text = f"<b>{cost.write(number)}</b>" if bold else cost.write(number)
        return text + (f"<small>{note}</small>" if (note := cost.note(system)) else "")

    return cell


def _range(value: Value, places: int) -> str:
    return f"{value.low:.{places}f}–{value.high:.{places}f}"


def _shared_rival(comparison: Comparison, rival: str, column: Column, names: Sequence[str]) -> str | None:
    """The one system that all differences of a column are taken to, if it is one."""
    found = {pair.versus for name in names if (pair := comparison.pair(name, rival, column))}
    return found.pop() if len(found) == 1 else None


def _paired_head(comparison: Comparison, column: Column, shared: str | None) -> str:
    return _head(column, comparison) + (f"<small>vs {escape(comparison.label(shared))}</small>" if shared else "")


def _paired_cell(comparison: Comparison, rival: str, column: Column, shared: str | None) -> Callable[[str], str]:
    places = decimals(column, comparison) + (0 if column.is_task else 1)

    def cell(name: str) -> str:
        pair = comparison.pair(name, rival, column)
        if pair is None or pair.versus == name:
            return _NONE
        low, high = pair.ci95
        number = f'<span class="{comparison.verdict(pair, column)}">{_signed(pair.difference, places)}</span>'
        versus = "" if shared else f"<small>vs {escape(comparison.label(pair.versus))}</small>"
        return f"{number}<small>{_signed(low, places)} to {_signed(high, places)}</small>{versus}"

    return cell


def _signed(number: float, places: int) -> str:
    """A difference with its sign, the minus as wide as the plus."""
    return f"{number:+.{places}f}".replace("-", "−")


def _mean_and_deviation(mean: float, deviation: float | None) -> str:
    return f"{mean:.3f}<small>± {deviation:.3f}</small>" if deviation is not None else f"{mean:.3f}"


def _markdown_value(comparison: Comparison, name: str, column: Column) -> str:
    value = comparison.value(name, column)
    if value is None:
        return ""
    places = decimals(column, comparison)
    number = f"{value.value:.{places}f}"
    bold = f"**{number}**" if name in comparison.best(column) else number
    return f"{bold} [{value.low:.{places}f}, {value.high:.{places}f}]"


def _plain(text: str) -> str:
    """Text as a Markdown cell that shows it as it is."""
    escaped = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{mark}" if mark in r"\|*_`[]~" else mark for mark in escaped)
