"""The losses of a comparison as a table for the terminal."""

from __future__ import annotations

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from ultrafuser.report.data import MEAN, Column, Comparison, Loss

_STYLES = {"better": "green", "worse": "red", "level": ""}


def loss_table(comparison: Comparison) -> Table:
    """Every system's loss over its 95% interval, then the main system's difference to the best specialist.

    The best loss of each column is bold. Four domains fit into 80 columns.
    """
    columns = comparison.losses
    systems = [name for name, system in comparison.done.items() if system.loss]
    title = "nats per response token over its 95% interval, lower is better"
    table = Table(title=title, title_justify="left", header_style="bold", box=HORIZONTALS)
    table.add_column(Text("system"), no_wrap=True)
    for column in columns:
        table.add_column(Text(column.heading), justify="right", no_wrap=True)
    for name in systems:
        losses = comparison.systems[name].loss or {}
        cells = [_loss_cell(losses[c.name], bold=name in comparison.best(c), interval=c.name != MEAN) for c in columns]
        table.add_row(Text(comparison.label(name)), *cells, end_section=name == systems[-1])
    if comparison.main is not None and comparison.specialist_systems:
        cells = [_difference_cell(comparison, comparison.main, column) for column in columns]
        table.add_row(Text(f"{comparison.label(comparison.main)} − best\nspecialist,\npaired"), *cells)
    return table


def _loss_cell(loss: Loss, *, bold: bool, interval: bool) -> Text:
    text = Text(f"{loss.nll:.4f}", "bold" if bold else "")
    low, high = loss.ci95
    return text + Text(f"\n{low:.2f}–{high:.2f}", "dim") if interval else text


def _difference_cell(comparison: Comparison, main: str, column: Column) -> Text:
    pair = comparison.pair(main, "best_specialist", column)
    if pair is None or column.name == MEAN:
        return Text("")
    low, high = pair.ci95
    text = Text(f"{pair.difference:+.4f}", _STYLES[comparison.verdict(pair, column)])
    return text + Text(f"\n{low:+.4f} to\n{high:+.4f}\nvs {comparison.label(pair.versus)}", "dim")
