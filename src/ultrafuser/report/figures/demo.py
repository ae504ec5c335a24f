"""Figures of what a fused model does, in the manner of the paper, as matplotlib figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import (
    INK,
    MUTED,
    RULE,
    SMALL,
    TEXT,
    WIDTH,
    draw_legend,
    finished,
    inset,
    interval_point,
    legend_shape,
    name_rows,
    name_width,
    new_figure,
    plain_axes,
    png_bytes,
    svg,
)
from ultrafuser.display.palette import colours, domain_colours, ink_on
from ultrafuser.errors import DataError
from ultrafuser.inspect.figure import trace_figure, trace_png
from ultrafuser.report.demo_results import specialists_of, system_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "loss_bars",
    "png_bytes",
    "svg",
    "trace_figure",
    "trace_png",
    "training_curves",
    "weights_by_domain",
    "weights_heatmap",
]

Rows = Sequence[Mapping[str, Any]]


def weights_by_domain(gate_weights: Mapping[str, Mapping[str, float]]) -> Figure:
    """Mean gate weight of each specialist on each domain's data, as stacked bars (table 6).

    gate_weights: domain -> specialist -> mean weight; each domain's weights sum to 1.

    Raises:
        DataError: no domains, or domains that name different specialists.
    """
    domains, specialists = _domains_and_specialists(gate_weights, "weights_by_domain")
    margin = _left_margin(domains)
    columns, legend_height = legend_shape(specialists, WIDTH - margin)
    figure = new_figure(WIDTH, 0.6 + legend_height + 0.42 * len(domains))
    axes = figure.add_axes(inset(figure, left=margin, right=0.15, bottom=0.42, top=0.18 + legend_height))
    left = [0.0] * len(domains)
    for name, shade in colours(specialists).items():
        widths = [gate_weights[domain][name] for domain in domains]
        axes.barh(range(len(domains)), widths, left=left, height=0.72, color=shade, label=name)
        for row, (start, size) in enumerate(zip(left, widths, strict=True)):
            if size >= 0.045:  # narrower than its number
                middle = start + size / 2
                axes.text(middle, row, f"{size:.2f}", ha="center", va="center", size=TEXT, color=ink_on(shade))
        left = [start + size for start, size in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 1), ylim=(len(domains) - 0.5, -0.5))
    axes.set_xlabel("mean gate weight on the data of each domain", size=SMALL, color=MUTED)
    plain_axes(axes)
    name_rows(axes, domains)
    handles, _ = axes.get_legend_handles_labels()
    draw_legend(figure, handles, columns, margin, figure.get_figheight() - 0.08)
    return finished(figure)


def weights_heatmap(sample_weights: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Heat map: a column per sample, a row per specialist, samples grouped by domain (figure 6).

    sample_weights: domain -> for each sample, specialist -> mean weight over its response tokens.

    Raises:
        DataError: no domains, a domain without samples, or samples that name different specialists.
    """
    for domain, samples in sample_weights.items():
        if not samples:
            raise DataError(f"weights_heatmap: domain {domain!r} has no samples; leave it out")
    every = {f"{d} {n}": sample for d, samples in sample_weights.items() for n, sample in enumerate(samples)}
    _, specialists = _domains_and_specialists(every, "weights_heatmap")

    figure = new_figure(WIDTH, 0.85 + 0.36 * len(specialists))
    left, bottom, width, height = inset(figure, left=_left_margin(specialists), right=0.95, bottom=0.32, top=0.3)
    # A domain of few samples is widened until its name fits above it.
    sizes = [max(len(samples), 0.12 * len(every)) for samples in sample_weights.values()]
    gap = 0.01 * width
    unit = (width - gap * (len(sizes) - 1)) / sum(sizes)
    for (domain, samples), size in zip(sample_weights.items(), sizes, strict=True):
        axes = figure.add_axes((left, bottom, unit * size, height))
        image = axes.imshow(
            [[sample[name] for sample in samples] for name in specialists],
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=1,
            interpolation="none",
        )
        axes.set_title(domain, size=TEXT, color=INK, pad=4)
        axes.set_xlabel(f"{len(samples)} sample{'s' * (len(samples) > 1)}", size=SMALL, color=MUTED)
        axes.set_xticks([])
        plain_axes(axes)
        name_rows(axes, specialists if axes is figure.axes[0] else [""] * len(specialists))
        left += unit * size + gap
    bar_axes = figure.add_axes((1 - 0.78 / WIDTH, bottom, 0.14 / WIDTH, height))
    bar = figure.colorbar(image, cax=bar_axes, ticks=[0, 0.5, 1])
    bar.set_label("gate weight", size=SMALL, color=MUTED)
    plain_axes(bar_axes)
    return finished(figure)


def loss_bars(results: Mapping[str, Any]) -> Figure:
    """Loss of every system on every domain with its 95% interval; the dotted line marks the fused model.

    results: the demo's results.json; nats per response token. The axes need not start at zero, so points are
    drawn and not bars.
    """
    domains, systems = list(results["domains"]), list(results["systems"])
    shades = colours(specialists_of(results))
    across = min(4, len(domains))
    down = -(-len(domains) // across)
    figure = new_figure(WIDTH, down * (0.72 + 0.27 * len(systems)))
    high = figure.get_figheight()
    grid = figure.subplots(down, across, squeeze=False, sharey=True)
    labels = [system_label(system) for system in systems]
    left = _left_margin(labels) / WIDTH
    figure.subplots_adjust(left, 0.44 / high, 1 - 0.1 / WIDTH, 1 - 0.28 / high, wspace=0.12, hspace=0.4)
    for axes in grid.flat[len(domains) :]:
        axes.set_visible(False)
    for axes, domain in zip(grid.flat, domains, strict=False):
        cells = {system: results["systems"][system][domain] for system in systems}
        _intervals(axes, cells, shades)
        axes.set_title(domain, size=TEXT + 0.5, color=INK, weight="bold", pad=5)
        axes.locator_params(axis="x", nbins=4)
        axes.grid(axis="x", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        plain_axes(axes, spines=("bottom",))
        name_rows(axes, labels)
    note = "nats per response token (95% interval); lower is better"
    figure.supxlabel(note, size=SMALL, color=MUTED, y=0.06 / high, va="bottom")
    return finished(figure)


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
        raise DataError("training_curves: no row has both 'stage' and 'step'; pass the rows of metrics.jsonl")
    specialists = _suffixes(metrics, "gate_weight/")
    domains = _suffixes(metrics, "loss/") or _suffixes(metrics, "eval_loss/")
    tall = {"loss": 2.2}  # inches of each panel
    if specialists:
        tall["weight"] = 1.5
    if any("gate_entropy" in row for row in metrics):
        tall["entropy"] = 0.85

    grid = _stage_grid(steps_of, tall, right=0.6 + name_width([*domains, *specialists, "mixed"]))
    for axes, rows in zip(grid[0], steps_of.values(), strict=True):
        for domain, shade in (domain_colours(domains, specialists) or {"": INK}).items():
            suffix = f"/{domain}" if domain else ""
            curve(axes, rows, f"loss{suffix}", shade, domain or "all domains")
            _diamonds(axes, rows, f"eval_loss{suffix}", shade)
    _name_curves(grid[0], "loss, nats per token")
    if "weight" in tall:
        for axes, rows in zip(grid[1], steps_of.values(), strict=True):
            for name, shade in colours(specialists).items():
                curve(axes, rows, f"gate_weight/{name}", shade, name)
            axes.set_ylim(0, 1)
        _name_curves(grid[1], "mean gate weight")
    if "entropy" in tall:
        for axes, rows in zip(grid[-1], steps_of.values(), strict=True):
            curve(axes, rows, "gate_entropy", INK, "gate entropy")
            axes.set_ylim(bottom=0)
        _name_curves(grid[-1], "entropy, nats")
    figure = grid[0, 0].figure
    figure.align_ylabels(grid[:, 0])
    return finished(figure)


def _domains_and_specialists(table: Mapping[str, Mapping[str, float]], what: str) -> tuple[list[str], list[str]]:
    if not table:
        raise DataError(f"{what}: no domains; expected at least one")
    first, *rest = table
    for name in rest:
        if set(table[name]) != set(table[first]):
            raise DataError(
                f"{what}: {name!r} has weights of {sorted(table[name])}, expected {sorted(table[first])} "
                f"as in {first!r}"
            )
    return list(table), list(table[first])


def _left_margin(names: Sequence[str]) -> float:
    """Inches left of a y axis that names its rows."""
    return max(1.15, 0.15 + name_width(names))


def _intervals(axes: Axes, cells: Mapping[str, Mapping[str, Any]], shades: Mapping[str, str]) -> None:
    """One row per system: its loss as a point, its interval as a line, the number at the right."""
    for row, (system, cell) in enumerate(cells.items()):
        shade = shades.get(system, INK if system.startswith("fused") else MUTED)
        interval_point(axes, row, cell["nll"], cell["ci95"], shade, hollow=system == "fused_stage1")
        axes.annotate(
            f"{cell['nll']:.3f}",
            (1, row),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            size=SMALL,
            color=INK,
            weight="bold" if system == "fused" else "normal",
        )
    if "fused" in cells:
        axes.axvline(cells["fused"]["nll"], color=INK, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    low, high = axes.get_xlim()
    axes.set(xlim=(low, high + 0.38 * (high - low)), ylim=(len(cells) - 0.5, -0.5))  # room for the numbers


def _stage_grid(steps_of: Mapping[str, Rows], tall: Mapping[str, float], *, right: float) -> Any:
    """Axes, a row per panel and a column per stage, wide as the stage is long, within reason."""
    lengths = [len({row["step"] for row in rows}) for rows in steps_of.values()]
    figure = new_figure(WIDTH, sum(tall.values()) + 0.28 * (len(tall) - 1) + 0.8)
    high = figure.get_figheight()
    grid = figure.subplots(
        len(tall),
        len(steps_of),
        squeeze=False,
        sharex="col",
        sharey="row",
        height_ratios=list(tall.values()),
        width_ratios=[max(length, 0.45 * max(lengths)) for length in lengths],
    )
    figure.subplots_adjust(0.75 / WIDTH, 0.45 / high, 1 - right / WIDTH, 1 - 0.32 / high, wspace=0.05)
    for number, (stage, axes) in enumerate(zip(steps_of, grid[0], strict=True), start=1):
        axes.set_title(f"stage {number}: {stage}", size=TEXT, weight="bold", color=INK, pad=6)
    for axes in grid[-1]:
        axes.set_xlabel("step", size=SMALL, color=MUTED)
        axes.locator_params(axis="x", integer=True)
    return grid


def _name_curves(line: Sequence[Axes], label: str) -> None:
    """Name a row of panels at its left, its curves at its right."""
    line[0].set_ylabel(label, size=SMALL, color=MUTED)
    for axes in line:
        plain_axes(axes, spines=("bottom", "left"))
        axes.grid(axis="y", color=RULE, linewidth=0.6)
    if len(line[-1].get_legend_handles_labels()[1]) > 1:
        line[-1].legend(
            loc="center left",
            bbox_to_anchor=(1.02, 0.5),
            frameon=False,
            fontsize=TEXT,
            handlelength=1.2,
            labelcolor=INK,
        )


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


def _diamonds(axes: Axes, rows: Rows, key: str, shade: str) -> None:
    steps, values = _series(rows, key)
    axes.plot(steps, values, linestyle="", marker="D", markersize=5, color=shade, mec=INK, mew=0.8)
