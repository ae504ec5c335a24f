"""The figures of a comparison: quality by system, quality against cost, losses of the specialists by domain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import median
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import (
    INK,
    LABEL,
    MUTED,
    PAPER,
    RULE,
    SMALL,
    TEXT,
    WIDTH,
    interval_point,
    name_rows,
    name_width,
    new_figure,
    plain_axes,
)
from ultrafuser.display.palette import blend, colours, extend_colours, ink_on
from ultrafuser.report.data import MEAN, Column, Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAME = 32  # characters of a system's name in a figure. Tables have the whole name
_KIND_WIDTH = 0.8  # inches of the column that names the kinds
ROW = 0.235  # inches of a system's row
_OFF_SCALE = 2.0  # losses above so many medians are marked at the edge, so that the others keep their room


def short(label: str) -> str:
    """A name cut in its middle to what a figure has room for: long names often differ at the end."""
    return label if len(label) <= _NAME else f"{label[: _NAME - 13].rstrip()}…{label[-12:].lstrip()}"


def system_colours(comparison: Comparison, names: Sequence[str]) -> dict[str, str]:
    """Colours of systems: the specialists' own, ink for the main system, further colours of the palette for the rest."""
    first = len({*comparison.specialists, *comparison.specialist_systems})
    return extend_colours(_fixed_colours(comparison), names, first)


def _fixed_colours(comparison: Comparison) -> dict[str, str]:
    """Ink for the main system. A specialist has the colour that the gate's figures give it."""
    shades = colours(list(dict.fromkeys([*comparison.specialists, *comparison.specialist_systems])))
    return shades | ({comparison.main: INK} if comparison.main is not None else {})


def off_scale(comparison: Comparison, column: Column) -> float:
    """The loss above which a system stands at the edge of a figure. Tasks have no such bound."""
    losses = [cell.value for cell in comparison.values(column, finite=True).values()]
    return math.inf if column.is_task or not losses else _OFF_SCALE * median(losses)


def quality(comparison: Comparison, columns: Sequence[Column]) -> Figure:
    """One panel per column, one row per system, grouped by kind: points with 95% intervals."""
    rows = system_rows(comparison, columns)
    across = max(1, min(len(columns), 6, int((WIDTH - _margin(comparison, rows)) / 1.15)))
    down = -(-len(columns) // across)
    across = -(-len(columns) // down)
    figure = new_figure(WIDTH, down * (ROW * (max(rows.values()) + 1.2) + 0.55) + 0.3)
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    for axes in grid.flat[len(columns) :]:
        axes.set_visible(False)
    for axes, column in zip(grid.flat, columns, strict=False):
        _points(axes, comparison, column, rows)
    for axes in grid[:, 0]:
        name_systems(axes, comparison, rows)
    figure.supxlabel(_direction(columns), **LABEL)
    return figure


def quality_and_cost(comparison: Comparison) -> Figure | None:
    """Mean loss against tokens/s and peak memory. The dashed line joins the systems that no other beats in both."""
    column = comparison.losses[-1] if comparison.losses else None
    values = comparison.values(column, finite=True) if column else {}
    loss = {name: cell.value for name, cell in values.items() if comparison.systems[name].kind != "oracle"}
    panels = {
        "tokens per second (more is better)": {
            name: system.tokens_per_s.median for name, system in comparison.done.items() if system.tokens_per_s
        },
        "peak memory, MB (less is better)": {
            name: system.peak_memory_mb for name, system in comparison.done.items() if system.peak_memory_mb
        },
    }
    points = {
        label: {name: (cost, loss[name]) for name, cost in costs.items() if name in loss and 0 < cost < math.inf}
        for label, costs in panels.items()
    }
    points = {label: systems for label, systems in points.items() if len(systems) > 1}
    if not points:
        return None
    names = sorted({name for systems in points.values() for name in systems}, key=lambda name: (loss[name], name))
    limit = off_scale(comparison, column) if column else math.inf
    inside = [loss[name] for name in names if loss[name] <= limit]
    edge = max(inside) + 0.12 * (max(inside) - min(inside))
    labels = {n: short(comparison.label(n)) + (f" ({loss[n]:.3g})" if loss[n] > limit else "") for n in names}
    height = max(3.6, 0.8 + 0.2 * len(names))
    figure = new_figure(WIDTH, height)
    grid = figure.subplots(1, len(points), squeeze=False, sharey=True)[0]
    shades = system_colours(comparison, names)
    for axes, (label, systems) in zip(grid, points.items(), strict=True):
        _front(axes, [point for point in systems.values() if point[1] <= limit], more_is_better="more" in label)
        for name, (cost, value) in systems.items():
            marker = "^" if value > limit else "o"
            axes.plot(cost, min(value, edge), marker=marker, markersize=7, color=shades[name], mec=PAPER, zorder=3)
        costs = [cost for cost, _ in systems.values()]
        if max(costs) > 8 * min(costs):
            axes.set_xscale("log")
        axes.set_xlabel(label, **LABEL)
        axes.margins(0.09)
        plain_axes(axes, spines=("bottom", "left"))
        axes.grid(color=RULE, linewidth=0.5)
        axes.set_axisbelow(True)
    grid[0].set_ylabel("mean loss, nats per token (less is better)", **LABEL)
    _name_points(grid[-1], [(labels[n], shades[n], min(loss[n], edge)) for n in names], height - 0.7)
    return figure


def loss_matrix(comparison: Comparison) -> Figure | None:
    """Heat map of every specialist's loss on every domain (table 3), for two specialists or more."""
    domains = [column for column in comparison.losses if column.name != MEAN]
    names = [name for name in comparison.specialist_systems if comparison.done[name].loss]
    if len(names) < 2 or not domains:
        return None
    cells = [[comparison.value(name, column) for column in domains] for name in names]
    table = [[cell.value if cell else math.nan for cell in line] for line in cells]
    least = [min((line[k] for line in table if math.isfinite(line[k])), default=math.nan) for k in range(len(domains))]
    excess = [[value - low for value, low in zip(line, least, strict=True)] for line in table]
    labels = [short(comparison.label(name)) for name in names]
    figure = new_figure(WIDTH, 0.7 + 0.4 * len(names))
    axes = figure.subplots()
    from matplotlib.ticker import MaxNLocator

    image = axes.imshow(excess, aspect="auto", cmap="viridis_r", vmin=0, interpolation="none")
    for row, line in enumerate(table):
        for k, value in enumerate(line):
            weight = "bold" if value == least[k] else "normal"
            shade = _hex_of(image, excess[row][k])
            axes.text(k, row, f"{value:.3f}", ha="center", va="center", size=TEXT, color=ink_on(shade), weight=weight)
    axes.xaxis.tick_top()
    plain_axes(axes)
    axes.set_xticks(range(len(domains)), [short(column.heading) for column in domains])
    axes.tick_params(axis="x", labelsize=TEXT, labelcolor=INK)
    axes.set_title("loss on the data of", **LABEL, pad=5)
    name_rows(axes, labels)
    bar = figure.colorbar(image, ax=axes, ticks=MaxNLocator(4), pad=0.015, aspect=10)
    bar.set_label("above the best", **LABEL)
    plain_axes(bar.ax)
    return figure


def system_rows(comparison: Comparison, columns: Sequence[Column]) -> dict[str, float]:
    """The systems that have any of the numbers, each with its height. Kinds stand a little apart."""
    names = [name for name in comparison.done if any(name in comparison.values(c, finite=True) for c in columns)]
    rows, height = {}, 0.0
    for _, group in groupby(names, key=lambda name: comparison.systems[name].kind):
        for name in group:
            rows[name] = height
            height += 1
        height += 0.35
    return rows


def _points(axes: Axes, comparison: Comparison, column: Column, rows: Mapping[str, float]) -> None:
    """One panel: a point and an interval for each row that has the number."""
    values = comparison.values(column, finite=True)
    shades = _fixed_colours(comparison)
    limit = off_scale(comparison, column)
    for name, cell in values.items():
        shade = shades.get(name, MUTED)
        if cell.value <= limit:
            hollow = comparison.systems[name].kind == "oracle"
            interval_point(axes, rows[name], cell.value, (cell.low, min(cell.high, limit)), shade, hollow=hollow)
    for name, cell in comparison.values(column).items():
        if name in rows and not (cell.finite and cell.value <= limit):
            style: dict[str, Any] = {
                "xycoords": ("axes fraction", "data"),
                "ha": "right",
                "va": "center",
                "size": SMALL,
            }
            axes.annotate(f"{cell.value:.3g} ▸", (1, rows[name]), color=shades.get(name, MUTED), **style)
    main = values.get(comparison.main or "")
    if main and main.value <= limit:
        axes.axvline(main.value, color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    axes.set_title(shorten(column.heading, 20, placeholder="…"), size=TEXT + 0.5, color=INK, weight="bold", pad=5)
    panel(axes, rows, comparison.main)


def panel(axes: Axes, rows: Mapping[str, float], main: str | None) -> None:
    axes.set_ylim(max(rows.values()) + 0.7, -0.7)
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="x", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    if main is not None and main in rows:
        axes.axhspan(rows[main] - 0.5, rows[main] + 0.5, color=RULE, alpha=0.35, linewidth=0, zorder=0)
    plain_axes(axes, spines=("bottom",))


def name_systems(axes: Axes, comparison: Comparison, rows: Mapping[str, float]) -> None:
    """Name the rows, and each kind left of the names at its first row."""
    names = [short(comparison.label(name)) for name in rows]
    kinds = groupby(rows, key=lambda name: comparison.systems[name].kind_label)
    first_rows = {rows[next(group)]: shorten(kind_label, 12, placeholder="…") for kind_label, group in kinds}
    axes.yaxis.remove_overlapping_locs = False  # a kind and a system share a row
    axes.set_yticks(list(rows.values()), names)
    axes.set_yticks(list(first_rows), list(first_rows.values()), minor=True)
    axes.tick_params(axis="y", labelsize=SMALL, labelcolor=INK)
    axes.tick_params(
        axis="y", which="minor", length=0, pad=72 * _margin(comparison, rows), labelsize=SMALL, labelcolor=MUTED
    )
    for label in axes.get_yticklabels(minor=True):
        label.set_horizontalalignment("left")


def _margin(comparison: Comparison, rows: Mapping[str, float]) -> float:
    """Inches for the names of kinds and systems."""
    return _KIND_WIDTH + 0.9 * SMALL / TEXT * name_width([short(comparison.label(name)) for name in rows])


def _direction(columns: Sequence[Column]) -> str:
    if not columns[0].is_task:
        return "nats per response token (95% interval); lower is better"
    up = [column.heading for column in columns if column.higher_is_better]
    down = [column.heading for column in columns if not column.higher_is_better]
    if not down:
        return "score (95% interval); higher is better"
    return "score (95% interval); lower is better" + (f" on {', '.join(down)}" if up else "")


def _front(axes: Axes, points: Any, *, more_is_better: bool) -> None:
    """A dashed staircase through the points that no other beats in both loss and cost."""
    best, front = math.inf, []
    for cost, loss in sorted(points, key=lambda point: (-point[0] if more_is_better else point[0], point[1])):
        if loss < best:
            front.append((cost, loss))
            best = loss
    if len(front) > 1:
        style: dict[str, Any] = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (3, 2)), "zorder": 1}
        axes.step(*zip(*front, strict=True), where="post", **style)


def _name_points(axes: Axes, points: Sequence[tuple[str, str, float]], height: float) -> None:
    """Names right of the axes, moved apart where they would overlap.

    points: name, colour and loss, in the order of the losses.
    """
    low, high = axes.get_ylim()
    heights = [(loss - low) / (high - low) for _, _, loss in points]
    for (name, shade, _), position, point_height in zip(points, spread(heights, 0.19 / height), heights, strict=True):
        line: dict[str, Any] = {"arrowstyle": "-", "color": shade, "linewidth": 0.8, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            (1.0, point_height),
            xytext=(1.1, position),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            size=SMALL,
            color=INK,
            arrowprops={**line, "shrinkA": 2, "shrinkB": 0},
            annotation_clip=False,
        )


def spread(positions: Sequence[float], gap: float) -> list[float]:
    """Rising positions in [0, 1], moved so that neighbours are at least `gap` apart and stay inside, if they fit."""
    out: list[float] = []
    for position in positions:
        out.append(max(position, out[-1] + gap) if out else position)
    limit = 1.0
    for k in reversed(range(len(out))):
        out[k] = min(out[k], limit)
        limit = out[k] - gap
    return out


def _hex_of(image: Any, value: float) -> str:
    """#rrggbb of a value in a heat map. A missing value is white."""
    red, green, blue, opacity = image.cmap(image.norm(value))
    return blend("#ffffff", "#" + "".join(f"{round(255 * component):02x}" for component in (red, green, blue)), opacity)
