"""Where the gate puts its weight, by domain (table 6 of the paper) and by sample (figure 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ultrafuser.display.drawing import (
    INK,
    MUTED,
    SMALL,
    TEXT,
    WIDTH,
    draw_legend,
    finished,
    inset,
    legend_shape,
    name_rows,
    name_width,
    new_figure,
    plain_axes,
)
from ultrafuser.display.palette import colours, ink_on
from ultrafuser.errors import DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
