"""How the systems of a comparison learned: training losses (figure 5) and stability over checkpoints (table 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import (
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
from ultrafuser.report.data import MEAN, Checkpoint, Comparison
from ultrafuser.report.figures.demo import curve
from ultrafuser.report.figures.quality import short, system_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def training_losses(comparison: Comparison) -> Figure | None:
    """Training loss over the steps of each stage, a panel a stage, a curve a system."""
    runs = {name: found for name, rows in comparison.training.items() if (found := steps_by_stage(rows))}
    if not runs:
        return None
    stages = list(dict.fromkeys(stage for found in runs.values() for stage in found))
    panels = _axes_for(comparison, list(runs), len(stages))
    shades = system_colours(comparison, list(runs))
    for stage, axes in zip(stages, panels, strict=True):
        for name, found in runs.items():
            if stage in found:
                curve(axes, found[stage], "loss", shades[name], short(comparison.label(name)))
        axes.set_xlabel(f"step of the {stage} stage", size=SMALL, color=MUTED)
    panels[0].set_ylabel("training loss, nats per token", size=SMALL, color=MUTED)
    return _with_legend(panels)


def stability_curves(comparison: Comparison) -> Figure | None:
    """Mean loss over the domains at each checkpoint, a curve a system; None where no system has two."""
    runs = {name: points for name, points in comparison.stability.items() if len(points) > 1}
    if not runs:
        return None
    [axes] = _axes_for(comparison, list(runs))
    for name, shade in system_colours(comparison, list(runs)).items():
        points = sorted((point.step, fmean(point.loss.values())) for point in runs[name])
        label = short(comparison.label(name))
        axes.plot(*zip(*points, strict=True), color=shade, linewidth=1.4, marker="o", markersize=4.5, label=label)
    axes.set_xlabel("step of the checkpoint", size=SMALL, color=MUTED)
    axes.set_ylabel("mean loss, nats per token", size=SMALL, color=MUTED)
    return _with_legend([axes])


def steps_by_stage(rows: Rows) -> dict[str, list[dict[str, float]]]:
    """Steps and losses of each stage; Branch-Train-MiX is trained by the joint one.

    rows: of metrics.jsonl; where `loss` is missing the mean of `loss/D` counts, a row with neither is no step
    of the training.
    """
    out: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        if "step" in row and (loss := _loss(row)):
            stage = str(row.get("stage", "training"))
            out.setdefault("joint" if stage == "btx" else stage, []).append({"step": row["step"], "loss": loss})
    return out


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


def _axes_for(comparison: Comparison, names: Sequence[str], panels: int = 1) -> list[Axes]:
    """Axes side by side under room for a legend of the systems."""
    _, height = legend_shape([short(comparison.label(name)) for name in names], WIDTH - 1)
    figure = new_figure(WIDTH, 3.3 + height)
    left, bottom, width, tall = inset(figure, left=0.75, right=0.15, bottom=0.5, top=0.25 + height)
    gap = 0.04 if panels > 1 else 0.0
    each = (width - gap * (panels - 1)) / panels
    out: list[Axes] = []
    for number in range(panels):
        axes = figure.add_axes((left + number * (each + gap), bottom, each, tall), sharey=out[0] if out else None)
        plain_axes(axes, spines=("bottom", "left"))
        axes.tick_params(labelleft=not out)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
        out.append(axes)
    return out


def _with_legend(panels: Sequence[Axes]) -> Figure:
    found = dict(pair for axes in panels for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns, _ = legend_shape(list(found), WIDTH - 1)
    figure: Figure = panels[0].figure  # type: ignore[assignment]
    handles = [found[label] for label in found]
    draw_legend(figure, handles, columns, 0.75, figure.get_figheight() - 0.08)
    return finished(figure)
