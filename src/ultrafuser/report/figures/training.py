"""How systems learned: training losses (figure 5), one run in detail, stability over checkpoints (table 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import (
    INK,
    LABEL,
    LEGEND_STYLE,
    RULE,
    TEXT,
    WIDTH,
    draw_legend,
    legend_shape,
    new_figure,
    plain_axes,
)
from ultrafuser.display.palette import colours, domain_colours
from ultrafuser.errors import DataError
from ultrafuser.report.data import MEAN, Checkpoint, Comparison
from ultrafuser.report.figures.quality import short, system_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, Any]]


def training_losses(comparison: Comparison) -> Figure | None:
    """Training loss over the steps of each stage: one panel per stage, one curve per system."""
    runs = {name: steps for name, rows in comparison.training.items() if (steps := steps_by_stage(rows))}
    if not runs:
        return None
    stages = list(dict.fromkeys(stage for steps in runs.values() for stage in steps))
    panels = _panels(comparison, list(runs), len(stages))
    shades = system_colours(comparison, list(runs))
    for stage, axes in zip(stages, panels, strict=True):
        for name, steps in runs.items():
            if stage in steps:
                curve(axes, steps[stage], "loss", shades[name], short(comparison.label(name)))
        axes.set_xlabel(f"step of the {stage} stage", **LABEL)
    panels[0].set_ylabel("training loss, nats per token", **LABEL)
    return _with_legend(panels)


def stability_curves(comparison: Comparison) -> Figure | None:
    """Mean loss over the domains at each checkpoint, one curve per system with two checkpoints or more."""
    runs = {name: points for name, points in comparison.stability.items() if len(points) > 1}
    if not runs:
        return None
    [axes] = _panels(comparison, list(runs))
    for name, shade in system_colours(comparison, list(runs)).items():
        points = sorted((point.step, fmean(point.loss.values())) for point in runs[name])
        label = short(comparison.label(name))
        axes.plot(*zip(*points, strict=True), color=shade, linewidth=1.4, marker="o", markersize=4.5, label=label)
    axes.set_xlabel("step of the checkpoint", **LABEL)
    axes.set_ylabel("mean loss, nats per token", **LABEL)
    return _with_legend([axes])


def training_curves(metrics: Rows) -> Figure:
    """Loss per domain and mean gate weight per specialist over the steps, a column for each stage.

    metrics: rows of metrics.jsonl. `loss/D` is drawn thin and its running mean thick, `eval_loss/D` as
    diamonds; `gate_weight/S` and `gate_entropy` (nats) follow below. What a row lacks is skipped; of a step
    logged twice (a resumed run) the later row counts.

    Raises:
        DataError: no row has a stage and a step.
    """
    steps_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in metrics:
        if "stage" in row and "step" in row:
            steps_of.setdefault(row["stage"], []).append(row)
    if not steps_of:
        raise DataError("training_curves: no row has both 'stage' and 'step'. Pass the rows of metrics.jsonl")
    specialists = _suffixes(metrics, "gate_weight/")
    domains = _suffixes(metrics, "loss/") or _suffixes(metrics, "eval_loss/")
    heights = {"loss": 2.2}  # inches of each panel
    if specialists:
        heights["weight"] = 1.5
    if any("gate_entropy" in row for row in metrics):
        heights["entropy"] = 0.85

    grid = _stage_grid(steps_of, heights)
    for axes, rows in zip(grid[0], steps_of.values(), strict=True):
        for domain, shade in (domain_colours(domains, specialists) or {"": INK}).items():
            suffix = f"/{domain}" if domain else ""
            curve(axes, rows, f"loss{suffix}", shade, domain or "all domains")
            steps, values = _series(rows, f"eval_loss{suffix}")
            axes.plot(steps, values, linestyle="", marker="D", markersize=5, color=shade, mec=INK, mew=0.8)
    _name_curves(grid[0], "loss, nats per token")
    if "weight" in heights:
        for axes, rows in zip(grid[1], steps_of.values(), strict=True):
            for name, shade in colours(specialists).items():
                curve(axes, rows, f"gate_weight/{name}", shade, name)
            axes.set_ylim(0, 1)
        _name_curves(grid[1], "mean gate weight")
    if "entropy" in heights:
        for axes, rows in zip(grid[-1], steps_of.values(), strict=True):
            curve(axes, rows, "gate_entropy", INK, "gate entropy")
            axes.set_ylim(bottom=0)
        _name_curves(grid[-1], "entropy, nats")
    grid[0, 0].figure.align_ylabels(grid[:, 0])
    return grid[0, 0].figure


def steps_by_stage(rows: Rows) -> dict[str, list[dict[str, float]]]:
    """Steps and losses of each stage. The rows of Branch-Train-MiX belong to the joint stage.

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
    return {
        name: (fmean(losses), stdev(losses) if len(losses) > 1 else None) for name, losses in series.items() if losses
    }


def _loss(row: Mapping[str, Any]) -> float | None:
    if isinstance(row.get("loss"), (int, float)):
        return float(row["loss"]) if math.isfinite(row["loss"]) else None
    losses = [value for key, value in row.items() if key.startswith("loss/") and isinstance(value, (int, float))]
    return fmean(losses) if losses and all(map(math.isfinite, losses)) else None


def _panels(comparison: Comparison, names: Sequence[str], count: int = 1) -> list[Axes]:
    """Axes side by side, with room above for a legend of the systems."""
    _, legend_height = legend_shape([short(comparison.label(name)) for name in names])
    figure = new_figure(WIDTH, 3.3 + legend_height)
    panels = list(figure.subplots(1, count, squeeze=False, sharey=True)[0])
    for axes in panels:
        plain_axes(axes, spines=("bottom", "left"))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.locator_params(axis="x", integer=True)
    return panels


def _with_legend(panels: Sequence[Axes]) -> Figure:
    """The panels' figure with one legend of all curves."""
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure: Figure = panels[0].figure  # type: ignore[assignment]
    draw_legend(figure, list(handles.values()), columns=legend_shape(list(handles))[0])
    return figure


def _stage_grid(steps_of: Mapping[str, Rows], heights: Mapping[str, float]) -> Any:
    """Axes, a row per panel and a column per stage, wide as the stage is long, within reason."""
    lengths = [len({row["step"] for row in rows}) for rows in steps_of.values()]
    figure = new_figure(WIDTH, sum(heights.values()) + 0.28 * (len(heights) - 1) + 0.8)
    grid = figure.subplots(
        len(heights),
        len(steps_of),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=list(heights.values()),
        width_ratios=[max(length, 0.45 * max(lengths)) for length in lengths],
    )
    for index, (stage, axes) in enumerate(zip(steps_of, grid[0], strict=True)):
        axes.set_title(f"stage {index + 1}: {stage}", size=TEXT, weight="bold", color=INK, pad=6)
    for axes in grid[-1]:
        axes.set_xlabel("step", **LABEL)
        axes.locator_params(axis="x", integer=True)
    return grid


def _name_curves(line: Sequence[Axes], label: str) -> None:
    """Name a row of panels at its left, its curves at its right."""
    line[0].set_ylabel(label, **LABEL)
    for axes in line:
        plain_axes(axes, spines=("bottom", "left"))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
    if len(line[-1].get_legend_handles_labels()[1]) > 1:
        line[-1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), **LEGEND_STYLE)


def _suffixes(metrics: Rows, prefix: str) -> list[str]:
    return list(dict.fromkeys(key[len(prefix) :] for row in metrics for key in row if key.startswith(prefix)))


def _series(rows: Rows, key: str) -> tuple[list[float], list[float]]:
    """Steps and values of a key, in order of the steps."""
    value_at = {row["step"]: row[key] for row in rows if row.get(key) is not None and math.isfinite(row[key])}
    steps = sorted(value_at)
    return steps, [value_at[step] for step in steps]


def curve(axes: Axes, rows: Rows, key: str, shade: str, label: str) -> None:
    """The values as a thin line, their running mean over about a twentieth of the steps as a thick one."""
    steps, values = _series(rows, key)
    keep = max(0.0, 1 - 20 / len(values)) if values else 0.0
    smooth, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight)
    if keep:
        axes.plot(steps, values, color=shade, linewidth=0.7, alpha=0.35)
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, smooth, color=shade, linewidth=1.9, marker=marker, markersize=3.5, label=label)
