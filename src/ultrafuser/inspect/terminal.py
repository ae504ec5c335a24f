"""A token trace as coloured text in the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text

from ultrafuser.display.palette import NEUTRAL, blend, colour, ink_on
from ultrafuser.inspect.trace import TokenTrace, mean_weights, on_one_line, printable


def render_terminal(trace: TokenTrace, *, weights: bool = False) -> Group:
    """The response, each token on the colour of the specialist that leads, greyer the less clearly it leads.

    Text is black or white on a painted background, so it reads on dark and on light terminals alike.
    Below it stands a legend with mean weights, and with `weights` a table of every token's weights.
    """
    lines: list[RenderableType] = []
    if trace.title:
        lines.append(Text(printable(trace.title), style="bold"))
    if trace.prompt:
        lines.append(Text(printable(trace.prompt), style="dim italic"))
    gap = "" if trace.text.endswith("\n") else "\n"
    lines += [_response(trace), Text(gap, end="") + legend(trace)]
    if weights and trace.tokens:
        lines += ["", _weights_table(trace)]
    return Group(*lines)


def token_style(index: int, margin: float) -> Style:
    """Style of a token led by specialist `index` by `margin` in [0, 1]."""
    background = blend(NEUTRAL, colour(index), min(1.0, margin))
    return Style(color=ink_on(background), bgcolor=background)


def _response(trace: TokenTrace) -> Text:
    text = Text()
    for token, (index, margin) in zip(trace.tokens, trace.leaders, strict=True):
        text.append(printable(token), style=token_style(index, margin))
    return text if trace.tokens else Text("(the response has no tokens)", style="dim")


def legend(trace: TokenTrace) -> Text:
    """The specialists on their colours, with their mean weights."""
    means = mean_weights([trace]) if trace.tokens else {}
    text = Text()
    for index, name in enumerate(trace.specialists):
        text.append("   " if index else "")
        text.append(f" {printable(name)} ", style=token_style(index, 1.0))
        text.append(f" {means[name]:.2f}" if means else "")
    if len(trace.specialists) > 1:
        text.append("   ")
        text.append(" no clear lead ", style=token_style(0, 0.0))
    return text


def _weights_table(trace: TokenTrace) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(Text("token"), no_wrap=True)
    for name in trace.specialists:
        table.add_column(Text(printable(name)), justify="right", no_wrap=True)
    for token, row, (index, margin) in zip(trace.tokens, trace.weights, trace.leaders, strict=True):
        cells = [Text(f"{w:.3f}", style=token_style(index, margin) if k == index else "") for k, w in enumerate(row)]
        table.add_row(Text(on_one_line(token)), *cells)
    return table
