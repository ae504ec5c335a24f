"""A token trace as a figure: the response in its colours over a strip of all weights (figures 8 and 9)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import groupby
from os import PathLike
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import (
    INK,
    LABEL,
    LEGEND_STYLE,
    MUTED,
    TEXT,
    legend_shape,
    matplotlib_module,
    new_figure,
    plain_axes,
    png_bytes,
)
from ultrafuser.display.palette import blend, colour, ink_on
from ultrafuser.inspect.trace import TokenTrace, mean_weights, printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 92  # characters in a line
_FONT = 9.0  # points
# All lengths below are inches.
_CHARACTER = 0.602 * _FONT / 72  # DejaVu Sans Mono, which matplotlib brings, advances by 0.602 em
_LINE = 1.7 * _FONT / 72
_HEADING, _STRIP, _FOOT = 0.26, 0.85, 0.52
_LEFT, _RIGHT = 0.55, 0.3
_GAP = 0.3  # below the response, and half of it above

Owned = list[tuple[str, int]]  # characters, each with the index of its token


def trace_figure(trace: TokenTrace) -> Figure:
    """The response on the leaders' colours, paler the less clearly they lead, over a strip of all weights."""
    matplotlib_module()
    from matplotlib.patches import Patch

    lines = wrap(trace.tokens, _COLUMNS)
    means = mean_weights([trace]) if trace.tokens else {}
    labels = [printable(name) + (f"  {means[name]:.2f}" if means else "") for name in trace.specialists]
    columns, legend_height = legend_shape(labels, _COLUMNS * _CHARACTER)
    num_headings = bool(trace.title) + bool(trace.prompt)
    text_width, text_height = _COLUMNS * _CHARACTER, max(1, len(lines)) * _LINE
    width = _LEFT + text_width + _RIGHT
    head = 0.1 + num_headings * _HEADING + legend_height + _GAP / 2
    height = head + text_height + _GAP + _STRIP + _FOOT
    figure = new_figure(width, height, fixed=True)
    _headings(figure, trace, height)

    def axes_at(bottom: float, tall: float) -> Axes:
        return figure.add_axes((_LEFT / width, bottom / height, text_width / width, tall / height))

    response = axes_at(_FOOT + _STRIP + _GAP, text_height)
    _response(response, trace, lines)
    patches = [Patch(color=colour(k), label=label) for k, label in enumerate(labels)]
    legend_bottom = 1 + _GAP / 2 / text_height
    anchor: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, legend_bottom)}
    response.legend(handles=patches, ncols=columns, borderpad=0, borderaxespad=0, **LEGEND_STYLE, **anchor)
    _weights_strip(axes_at(_FOOT, _STRIP), trace)
    return figure


def trace_png(trace: TokenTrace, path: str | PathLike[str]) -> Figure:
    """Write `trace_figure` to a PNG file and return the figure."""
    figure = trace_figure(trace)
    Path(path).write_bytes(png_bytes(figure))
    return figure


def wrap(tokens: Sequence[str], columns: int) -> list[list[tuple[int, int, str, int]]]:
    """Lines of (column, cells, piece, token index), broken at spaces where possible, as a terminal would."""
    owned = [(char, n) for n, token in enumerate(tokens) for char in printable(token).replace("\t", "    ")]
    lines: list[Owned] = [[]]
    for match in re.finditer(r"\n|[^\S\n]+|\S+", "".join(char for char, _ in owned)):
        if match.group() == "\n":
            lines.append([])
            continue
        word = owned[match.start() : match.end()]
        if lines[-1] and _cells(lines[-1]) + _cells(word) > columns:
            lines.append([])
            if match.group().isspace():
                continue
        for char in word:
            if _cells(lines[-1]) + _cells([char]) > columns:
                lines.append([])
            lines[-1].append(char)
    while lines and not lines[-1]:
        lines.pop()
    return [list(_runs(line)) for line in lines]


def _runs(line: Owned) -> Iterator[tuple[int, int, str, int]]:
    column = 0
    for token, group in groupby(line, key=lambda pair: pair[1]):
        run = list(group)
        yield column, _cells(run), "".join(char for char, _ in run), token
        column += _cells(run)


def _cells(run: Owned) -> int:
    """Width on a fixed grid: combining marks take no cell, wide East Asian characters two."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char, _ in run
    )


def _headings(figure: Figure, trace: TokenTrace, height: float) -> None:
    """Title and prompt, at the top."""
    x, y = _LEFT / figure.get_figwidth(), height - 0.1
    if trace.title:
        figure.text(x, y / height, printable(trace.title), size=11, weight="bold", color=INK, va="top")
        y -= _HEADING
    if trace.prompt:
        prompt = shorten(printable(trace.prompt), 105, placeholder=" …")
        figure.text(x, y / height, prompt, size=TEXT, style="italic", color=MUTED, va="top")


def _response(axes: Axes, trace: TokenTrace, lines: list[list[tuple[int, int, str, int]]]) -> None:
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, _COLUMNS), ylim=(max(1, len(lines)), 0))
    axes.set_axis_off()
    leaders = trace.leaders
    for row, line in enumerate(lines):
        for column, cells, piece, token in line:
            index, margin = leaders[token]
            shade = blend("#ffffff", colour(index), 0.06 + 0.94 * min(1.0, margin))
            axes.add_patch(Rectangle((column + 0.04, row + 0.06), cells - 0.08, 0.88, fc=shade, ec="none"))
            if piece.strip():
                axes.text(column, row + 0.68, piece, size=_FONT, family="monospace", color=ink_on(shade))


def _weights_strip(axes: Axes, trace: TokenTrace) -> None:
    count = len(trace.tokens)
    base = [0.0] * count
    for k in range(len(trace.specialists) if count else 0):
        top = [low + row[k] for low, row in zip(base, trace.weights, strict=True)]
        axes.stairs(top, range(count + 1), baseline=base, fill=True, color=colour(k), linewidth=0)
        base = top
    axes.set(xlim=(0, max(1, count)), ylim=(0, 1), yticks=[0, 0.5, 1])
    axes.set_xlabel("response token", **LABEL)
    axes.set_ylabel("gate weight", **LABEL)
    plain_axes(axes)
