"""Where the gate puts its weight, by domain (table 6 of the paper) and by sample (figure 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ultrafuser.display.drawing import (
    INK,
    LABEL,
    TEXT,
    WIDTH,
    draw_legend,
    legend_shape,
    name_rows,
    new_figure,
    plain_axes,
)
from ultrafuser.display.palette import colours, ink_on
from ultrafuser.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def weights_by_domain(gate_weights: Mapping[str, Mapping[str, float]]) -> Figure:
    """Mean gate weight of each specialist on each domain's data, as stacked bars (table 6).

    gate_weights: domain -> specialist -> mean weight. The weights of a domain sum to 1.

    Raises:
        DataError: no domains, or domains that name different specialists.
    """
    domains, specialists = _domains_and_specialists(gate_weights, "weights_by_domain")
    columns, legend_height = legend_shape(specialists)
    figure = new_figure(WIDTH, 0.6 + legend_height + 0.42 * len(domains))
    axes = figure.subplots()
    starts = [0.0] * len(domains)
    for name, shade in colours(specialists).items():
        widths = [gate_weights[domain][name] for domain in domains]
        bars = axes.barh(range(len(domains)), widths, left=starts, height=0.72, color=shade, label=name)
        # Below 0.045 the bar is narrower than its number.
        numbers = [f"{width:.2f}" if width >= 0.045 else "" for width in widths]
        axes.bar_label(bars, numbers, label_type="center", size=TEXT, color=ink_on(shade))
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set(xlim=(0, 1), ylim=(len(domains) - 0.5, -0.5))
    axes.set_xlabel("mean gate weight on the data of each domain", **LABEL)
    plain_axes(axes)
    name_rows(axes, domains)
    draw_legend(figure, axes.get_legend_handles_labels()[0], columns=columns)
    return figure


def weights_heatmap(sample_weights: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Heat map: a column per sample, a row per specialist, samples grouped by domain (figure 6).

    sample_weights: domain -> for each sample, specialist -> mean weight over its response tokens.

    Raises:
        DataError: no domains, a domain without samples, or samples that name different specialists.
    """
    for domain, samples in sample_weights.items():
        if not samples:
            raise DataError(f"weights_heatmap: domain {domain!r} has no samples. Leave it out")
    every = {f"{d} {n}": sample for d, samples in sample_weights.items() for n, sample in enumerate(samples)}
    _, specialists = _domains_and_specialists(every, "weights_heatmap")

    # A domain of few samples is widened until its name fits above it.
    widths = [max(len(samples), 0.12 * len(every)) for samples in sample_weights.values()]
    figure = new_figure(WIDTH, 0.85 + 0.36 * len(specialists))
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for axes, (domain, samples) in zip(panels, sample_weights.items(), strict=True):
        image = axes.imshow(
            [[sample[name] for sample in samples] for name in specialists],
            aspect="auto",
            cmap="viridis",
            vmin=0,
            vmax=1,
            interpolation="none",
        )
        axes.set_title(domain, size=TEXT, color=INK, pad=4)
        axes.set_xlabel(f"{len(samples)} sample{'s' * (len(samples) > 1)}", **LABEL)
        axes.set_xticks([])
        plain_axes(axes)
        name_rows(axes, specialists if axes is panels[0] else [""] * len(specialists))
    bar = figure.colorbar(image, ax=panels, ticks=[0, 0.5, 1], pad=0.01, aspect=12)
    bar.set_label("gate weight", **LABEL)
    plain_axes(bar.ax)
    return figure


def _domains_and_specialists(table: Mapping[str, Mapping[str, float]], caller: str) -> tuple[list[str], list[str]]:
    if not table:
        raise DataError(f"{caller}: no domains, expected at least one")
    first, *rest = table
    for name in rest:
        if set(table[name]) != set(table[first]):
            raise DataError(
                f"{caller}: {name!r} has weights of {sorted(table[name])}, expected {sorted(table[first])} "
                f"as in {first!r}"
            )
    return list(table), list(table[first])
