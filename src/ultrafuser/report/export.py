"""The numbers of a comparison as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from html import escape

from ultrafuser.report.data import Column, Comparison, System
from ultrafuser.report.tables import COSTS, DAGGER, decimals, in_one_line, metric_name

# system, column, metric, value, low, high, samples
CsvRow = tuple[str, str, str, float | int | None, float | None, float | None, int | None]


def markdown_table(comparison: Comparison) -> str:
    """One Markdown table with a line for every system, failed ones included. Costs that no system has are left out."""
    costs = [cost for cost in COSTS if any(cost.read(system) is not None for system in comparison.done.values())]
    headings = [
        "system",
        "kind",
        *(_plain(f"{c.heading} ({metric_name(c)})") for c in comparison.columns),
        *(cost.heading for cost in costs),
    ]
    lines = [headings, ["---", "---", *["---:"] * (len(headings) - 2)]]
    for name, system in comparison.systems.items():
        label = f"**{_plain(system.label)}**" if name == comparison.main else _plain(system.label)
        mark = f" {DAGGER}" if system.kind == "oracle" else ""
        cells = [f"{label}{mark}", _plain(system.kind_label)]
        if system.failed:
            cells += [f"failed: {_plain(in_one_line(system.error or ''))}", *[""] * (len(headings) - 3)]
        else:
            cells += [_markdown_value(comparison, name, column) for column in comparison.columns]
            cells += ["" if (value := cost.read(system)) is None else cost.write(value) for cost in costs]
        lines.append(cells)
    notes = ["Best of each column in bold, 95% intervals in brackets."]
    if any(system.kind == "oracle" for system in comparison.systems.values()):
        notes.append(f"{DAGGER} not a system: the best specialist of each domain, chosen afterwards.")
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{' '.join(notes)}\n"


def csv_text(comparison: Comparison) -> str:
    """Every number of the systems, gate weights, sample weights and stability, one per line."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["system", "column", "metric", "value", "low", "high", "samples"])
    for line in _csv_rows(comparison):
        writer.writerow(["" if cell is None else repr(cell) if isinstance(cell, float) else cell for cell in line])
    return buffer.getvalue()


def _csv_rows(comparison: Comparison) -> Iterator[CsvRow]:
    for name, system in comparison.done.items():
        yield from _quality_rows(comparison, name, system)
        yield from ((name, "", metric, value, None, None, None) for metric, value in _cost_numbers(system))
    for name, domains in comparison.gate_weights.items():
        for domain, weights in domains.items():
            for specialist, weight in weights.items():
                yield name, domain, f"gate_weight/{specialist}", weight, None, None, None
    for name, by_domain in comparison.sample_weights.items():
        for domain, samples in by_domain.items():
            for index, weights in enumerate(samples):
                for specialist, weight in weights.items():
                    yield name, domain, f"sample_weight/{index}/{specialist}", weight, None, None, None
    for name, checkpoints in comparison.stability.items():
        for checkpoint in checkpoints:
            for domain, nll in checkpoint.loss.items():
                yield name, domain, f"nll/step/{checkpoint.step}", nll, None, None, None


def _quality_rows(comparison: Comparison, name: str, system: System) -> Iterator[CsvRow]:
    for column in comparison.columns:
        value = comparison.value(name, column)
        if value:
            yield name, column.name, column.metric, value.value, value.low, value.high, value.samples
        for label, count in value.counts.items() if value else ():
            yield name, column.name, f"{column.metric}/{label}", count, None, None, None
        for rival in system.paired:
            if pair := comparison.pair(name, rival, column):
                metric = f"{column.metric}/minus/{rival}/{pair.versus}"
                yield name, column.name, metric, pair.difference, *pair.ci95, value.samples if value else None
    for domain, loss in (system.loss or {}).items():
        if loss.tokens is not None:
            yield name, domain, "tokens", loss.tokens, None, None, loss.samples


def _cost_numbers(system: System) -> Iterator[tuple[str, float | int]]:
    if speed := system.tokens_per_s:
        yield "tokens_per_s", speed.median
        yield from ((f"tokens_per_s/run/{index}", run) for index, run in enumerate(speed.runs))
        if speed.batch_size is not None:
            yield "tokens_per_s/batch_size", speed.batch_size
    if system.peak_memory_mb is not None:
        yield "peak_memory_mb", system.peak_memory_mb
    if system.parameters:
        yield from ((f"parameters/{name}", count) for name, count in system.parameters.model_dump().items())
    yield from ((f"seconds/{phase}", seconds) for phase, seconds in system.seconds.items())


def _markdown_value(comparison: Comparison, name: str, column: Column) -> str:
    value = comparison.value(name, column)
    if value is None:
        return ""
    digits = decimals(column, comparison)
    text = f"{value.value:.{digits}f}"
    bold = f"**{text}**" if name in comparison.best(column) else text
    return f"{bold} [{value.low:.{digits}f}, {value.high:.{digits}f}]"


def _plain(text: str) -> str:
    """Text as a Markdown cell that shows it unchanged."""
    escaped = escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{mark}" if mark in r"\|*_`[]~" else mark for mark in escaped)
