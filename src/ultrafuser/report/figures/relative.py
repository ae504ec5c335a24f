"""Quality relative to the best specialist of each domain or task: as a radar (figure 1) and as bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import (
    INK,
    LABEL,
    MUTED,
    PAPER,
    RULE,
    SMALL,
    WIDTH,
    draw_legend,
    legend_shape,
    new_figure,
)
from ultrafuser.display.palette import domain_colours
from ultrafuser.report.data import MEAN, Column, Comparison
from ultrafuser.report.figures.quality import (
    ROW,
    name_systems,
    panel,
    short,
    system_colours,
    system_rows,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.projections.polar import PolarAxes

_LEAST, _MOST = 0.5, 2.0  # relative scores beyond these are marked at the edge
_RADAR_SYSTEMS = 6


def radar(comparison: Comparison) -> Figure | None:
    """Relative scores on a spoke for each column (figure 1 of the paper), for three columns or more.

    It shows at most six systems, which have every number (see `_radar_systems`).
    """
    columns = _relative_columns(comparison)
    names = _radar_systems(comparison, columns)
    if len(columns) < 3 or not names:
        return None
    scores = {name: [_relative(comparison, name, column) for column in columns] for name in names}
    low = max(0.0, math.floor(min(map(min, scores.values())) * 10 - 0.5) / 10)
    figure = new_figure(WIDTH, 4.7)
    axes: Any = figure.subplots(subplot_kw={"projection": "polar"})
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    angles = [2 * math.pi * k / len(columns) for k in range(len(columns))]
    shades = system_colours(comparison, names)
    for name in reversed(names):
        main = name == comparison.main
        closed = [*scores[name], scores[name][0]]
        style: dict[str, Any] = {"linewidth": 2.4 if main else 1.5, "zorder": 4 if main else 3}
        axes.plot([*angles, 0], closed, color=shades[name], label=short(comparison.label(name)), **style)
        axes.fill([*angles, 0], closed, color=shades[name], alpha=0.07 if main else 0.0, linewidth=0)
    axes.set_ylim(low, max(1.02, max(map(max, scores.values())) * 1.02))
    _spokes(axes, comparison, columns, angles)
    handles, _ = axes.get_legend_handles_labels()
    draw_legend(figure, handles[::-1], columns=1, loc="outside right center")
    return figure


def relative_bars(comparison: Comparison) -> Figure | None:
    """One bar per system from 1, the best specialist, to its mean relative score. Each column has a mark."""
    columns = _relative_columns(comparison)
    rows = system_rows(comparison, columns)
    scores = {
        name: {column: score for column in columns if (score := comparison.relative(name, column)) is not None}
        for name in rows
    }
    if not columns or not any(scores.values()):
        return None
    legend_columns, legend_height = legend_shape([column.heading for column in columns])
    figure = new_figure(WIDTH, 0.75 + legend_height + ROW * (max(rows.values()) + 1.2))
    axes = figure.subplots()
    from matplotlib.lines import Line2D

    shades = _column_colours(comparison, columns)
    named = [name for name in rows if name in (*comparison.specialist_systems, comparison.main)]
    bars = system_colours(comparison, named)
    for name, row in rows.items():
        if len(scores[name]) == len(columns):
            mean = fmean(scores[name].values())
            width = min(max(mean, _LEAST), _MOST) - 1
            axes.barh(row, width, left=1, height=0.74, color=bars.get(name, MUTED), alpha=0.55, linewidth=0)
            if not _LEAST <= mean <= _MOST:
                text, side = (f"◂ {mean:.0%}", "left") if mean < _LEAST else (f"{mean:.0%} ▸", "right")
                axes.text(1 + width, row, f" {text} ", ha=side, va="center", size=SMALL, color=INK)
        for column, score in scores[name].items():
            if _LEAST <= score <= _MOST:
                marker = "s" if column.is_task else "o"
                axes.plot(score, row, marker, color=shades[column], markersize=4.8, mec=PAPER, mew=0.6, zorder=4)
    axes.axvline(1, color=INK, linewidth=0.9)
    panel(axes, rows, comparison.main)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    kind = "specialist" if any(comparison.best_specialist(column) for column in comparison.columns) else "system"
    axes.set_xlabel(f"relative to the best {kind} of each column (100%), further right is better", **LABEL)
    name_systems(axes, comparison, rows)
    handles = [
        Line2D([], [], linestyle="", marker="s" if c.is_task else "o", color=shades[c], markersize=5.5, label=c.heading)
        for c in columns
    ]
    draw_legend(figure, handles, columns=legend_columns)
    return figure


def _relative_columns(comparison: Comparison) -> list[Column]:
    """Every column but the mean for which relative scores exist."""
    columns = [column for column in comparison.columns if column.is_task or column.name != MEAN]
    return [c for c in columns if sum(comparison.relative(name, c) is not None for name in comparison.done) > 1]


def _relative(comparison: Comparison, name: str, column: Column) -> float:
    score = comparison.relative(name, column)
    return math.nan if score is None else score


def _radar_systems(comparison: Comparison, columns: Sequence[Column]) -> list[str]:
    """The main system, the best three specialists, the best of the two best other kinds, then the next best of both."""
    means = {name: fmean(_relative(comparison, name, c) for c in columns) for name in comparison.done if columns}
    complete = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    best_of_kind: dict[str, str] = {}
    for name in sorted(complete, key=lambda name: -complete[name]):
        if name not in comparison.specialist_systems and name != comparison.main:
            best_of_kind.setdefault(comparison.systems[name].kind, name)
    best_of_kind.pop("oracle", None)  # the circle at 100%
    rivals = sorted(best_of_kind.values(), key=lambda name: -complete[name])
    specialists = sorted(
        (name for name in comparison.specialist_systems if name in complete), key=lambda name: -complete[name]
    )
    candidates = [*specialists[:3], *rivals[:2], *specialists[3:], *rivals[2:]]
    return [name for name in [comparison.main or "", *candidates] if name in complete][:_RADAR_SYSTEMS]


def _spokes(axes: PolarAxes, comparison: Comparison, columns: Sequence[Column], angles: Sequence[float]) -> None:
    """Name the spokes, each with the number that 100% stands for, and draw the rings."""
    top = axes.get_ylim()[1]
    for column, angle in zip(columns, angles, strict=True):
        reference = comparison.best_specialist(column) or min(comparison.best(column))
        cell = comparison.value(reference, column)
        side = math.sin(angle)
        horizontal = "center" if abs(side) < 0.2 else "left" if side > 0 else "right"
        vertical = "bottom" if math.cos(angle) > 0.2 else "top" if math.cos(angle) < -0.2 else "center"
        name = shorten(column.heading, 18, placeholder="…")
        text = f"{name}\n100% = {cell.value:.3f}" if cell else name
        axes.annotate(
            text,
            (angle, top),
            xytext=(5 * side, 5 * math.cos(angle)),
            textcoords="offset points",
            size=SMALL,
            color=INK,
            annotation_clip=False,
            ha=horizontal,
            va=vertical,
        )
    axes.set_xticks(angles, [""] * len(angles))
    rings = _rings(*axes.get_ylim())
    axes.set_yticks(rings, [""] * len(rings))
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for ring in rings:  # above the curves, which tick labels would lie below
        middle = math.pi / len(columns)
        label = axes.text(middle, ring, f"{ring:.0%}", ha="center", va="center", size=SMALL - 1, color=MUTED, zorder=6)
        label.set_bbox(box)
    axes.plot([2 * math.pi * k / 180 for k in range(181)], [1] * 181, color=INK, linewidth=0.9, zorder=1)
    axes.grid(color=RULE, linewidth=0.6)
    axes.spines["polar"].set_color(RULE)
    axes.set_facecolor("none")


def _column_colours(comparison: Comparison, columns: Sequence[Column]) -> dict[Column, str]:
    domains = [column.name for column in columns if not column.is_task]
    tasks = [f"{column.name} " for column in columns if column.is_task]  # a task may be named as a domain is
    shades = domain_colours([*domains, *tasks], comparison.specialists)
    return {column: shades[f"{column.name} " if column.is_task else column.name] for column in columns}


def _rings(low: float, high: float) -> list[float]:
    """Three to five round relative scores inside a range, 1 among them."""
    step = next((step for step in (0.05, 0.1, 0.2, 0.25, 0.5, 1.0, 2.0, 5.0) if (high - low) / step <= 5), high - low)
    first = math.ceil((low - 1) / step + 0.01)
    return [1 + k * step for k in range(first, first + 6) if low < 1 + k * step < high]
