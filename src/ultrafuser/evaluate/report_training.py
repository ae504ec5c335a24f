"""How the systems of a comparison learned: training losses (figure 5) and stability over checkpoints (table 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ultrafuser.evaluate.report_data import MEAN, Checkpoint, Comparison
from ultrafuser.evaluate.report_figures import short, system_colours
from ultrafuser.inspect.drawing import (
    MUTED,
    RULE,
    SMALL,
    WIDTH,
    draw_legend,
    finished,
    inset,
    legend_shape,
    new_figure,
    plain_axes,
)
from ultrafuser.inspect.figures import curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def training_losses(comparison: Comparison) -> Figure | None:
    """Training loss over the steps, a curve a system, stages joined; dotted lines where the main system's meet."""
    runs = {name: joined_steps(rows) for name, rows in comparison.training.items()}
    runs = {name: run for name, run in runs.items() if run[0]}
    if not runs:
        return None
    axes = _axes_for(comparison, list(runs))
    for name, shade in system_colours(comparison, list(runs)).items():
        curve(axes, runs[name][0], "loss", shade, short(comparison.label(name)))
    for step in runs.get(comparison.main or "", ([], []))[1]:
        axes.axvline(step + 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)), zorder=0)
    axes.set_xlabel("step, over all stages", size=SMALL, color=MUTED)
    axes.set_ylabel("training loss, nats per token", size=SMALL, color=MUTED)
    return _with_legend(axes)


def stability_curves(comparison: Comparison) -> Figure | None:
    """Mean loss over the domains at each checkpoint, a curve a system; None where no system has two."""
    runs = {name: points for name, points in comparison.stability.items() if len(points) > 1}
    if not runs:
        return None
    axes = _axes_for(comparison, list(runs))
    for name, shade in system_colours(comparison, list(runs)).items():
        points = sorted((point.step, fmean(point.loss.values())) for point in runs[name])
        label = short(comparison.label(name))
        axes.plot(*zip(*points, strict=True), color=shade, linewidth=1.4, marker="o", markersize=4.5, label=label)
    axes.set_xlabel("step of the checkpoint", size=SMALL, color=MUTED)
    axes.set_ylabel("mean loss, nats per token", size=SMALL, color=MUTED)
    return _with_legend(axes)


def joined_steps(rows: Rows) -> tuple[list[dict[str, float]], list[int]]:
    """Steps and losses of all stages one after the other, and the steps that end a stage but the last.

    rows: of metrics.jsonl; where `loss` is missing the mean of `loss/D` counts, a row with neither is no step
    of the training.
    """
    joined, ends, before = [], [], 0
    training = [(row.get("stage"), row["step"], loss) for row in rows if "step" in row and (loss := _loss(row))]
    for _, stage in groupby(training, key=lambda item: item[0]):
        steps = list(stage)
        joined += [{"step": before + step, "loss": loss} for _, step, loss in steps]
        before += max(step for _, step, _ in steps)
        ends.append(before)
    return joined, ends[:-1]


def over_checkpoints(points: Sequence[Checkpoint], domains: Sequence[str]) -> dict[str, tuple[float, float | None]]:
    """Mean and sample standard deviation of each domain's loss, and of their mean, over the checkpoints."""
    series = {domain: [point.loss[domain] for point in points if domain in point.loss] for domain in domains}
    series[MEAN] = [fmean(point.loss.values()) for point in points]
    return {name: (fmean(found), stdev(found) if len(found) > 1 else None) for name, found in series.items() if found}


def _loss(row: Mapping[str, Any]) -> float | None:
    if isinstance(row.get("loss"), (int, float)):
        return float(row["loss"]) if math.isfinite(row["loss"]) else None
    losses = [value for key, value in row.items() if key.startswith("loss/") and isinstance(value, (int, float))]
    return fmean(losses) if losses and all(map(math.isfinite, losses)) else None


def _axes_for(comparison: Comparison, names: Sequence[str]) -> Axes:
    """Axes under room for a legend of the systems."""
    _, height = legend_shape([short(comparison.label(name)) for name in names], WIDTH - 1)
    figure = new_figure(WIDTH, 3.3 + height)
    axes = figure.add_axes(inset(figure, left=0.75, right=0.15, bottom=0.5, top=0.25 + height))
    plain_axes(axes, spines=("bottom", "left"))
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.locator_params(axis="x", integer=True)
    return axes


def _with_legend(axes: Axes) -> Figure:
    handles, labels = axes.get_legend_handles_labels()
    columns, _ = legend_shape(labels, WIDTH - 1)
    figure: Figure = axes.figure  # type: ignore[assignment]
    draw_legend(figure, handles, columns, 0.75, figure.get_figheight() - 0.08)
    return finished(figure)
