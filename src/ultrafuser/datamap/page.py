"""The map of a data set as a page to explore, and as a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ultrafuser.datamap.layout import NAMES, Point
from ultrafuser.display.drawing import TEXT, draw_legend, legend_shape, new_figure
from ultrafuser.display.page import Cell, Html, Note, Row, Table, page, render, text_file
from ultrafuser.display.palette import domain_colours
from ultrafuser.inspect.trace import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_TEXT = 400  # characters of a row under the pointer
_GRID = 10_000  # coordinates of the page are whole numbers up to this


def map_figure(points: Sequence[Point]) -> Figure:
    """The map as a scatter plot, coloured by domain.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    domains = sorted({point.domain for point in points})
    shades = domain_colours(domains, [])
    columns, legend_height = legend_shape(domains, 7.0)
    figure = new_figure(7.5, 6.6 + legend_height)
    axes = figure.subplots()
    from matplotlib.lines import Line2D

    size = float(np.clip(9000 / max(len(points), 1), 3, 30))  # square points
    # In the order of the ids, not domain by domain: the last domain would cover the others.
    ordered = sorted(points, key=lambda point: (point.id, point.domain))
    axes.scatter(
        [point.x for point in ordered],
        [point.y for point in ordered],
        s=size,
        c=[shades[point.domain] for point in ordered],
        alpha=0.65,
        linewidths=0,
    )
    axes.set_aspect("equal", adjustable="datalim")
    axes.set_axis_off()
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=TEXT * 0.7, color=shade, label=domain)
        for domain, shade in shades.items()
    ]
    draw_legend(figure, handles, columns=columns)
    return figure


def map_page(
    points: Sequence[Point], *, model: str, method: str, content: str, agreement: dict[str, float], title: str = ""
) -> str:
    """The map as one HTML page that loads nothing: zoom, move, point at a row to read it, hide domains, search."""
    domains = sorted({point.domain for point in points})
    shades = domain_colours(domains, [])
    drawing = render(
        "datamap/templates/map.html.jinja",
        domains=[(printable(domain), shades[domain]) for domain in domains],
        num_points=len(points),
        data=_page_data(points, domains, shades),
    )
    counts = {domain: sum(point.domain == domain for point in points) for domain in domains}
    rows = [Row(Cell(printable(d)), [Cell(f"{counts[d]:,}"), Cell(f"{agreement[d]:.3f}")]) for d in domains]
    table = Table([Cell("domain"), Cell("rows"), Cell("neighbours of the same domain")], rows)
    note = (
        "The last column: of the five rows that are nearest in the model's own space, the share that is of the same domain. "
        f"{NAMES[method]} shows which rows are near each other. Distances and sizes of clusters mean little."
    )
    return page(
        title or "Map of a data set",
        [("", [Html(drawing)]), ("In numbers", [table, Note(note)])],
        lead=f"Each point is one row's {content}, placed by {NAMES[method]} of the mean last hidden state of {model}.",
        styles=[text_file("datamap/templates/map.css")],
        script=text_file("datamap/templates/map.js"),
    )


def _page_data(points: Sequence[Point], domains: Sequence[str], shades: dict[str, str]) -> str:
    """The points as JSON that cannot end the script element it stands in."""
    positions = np.array([[point.x, point.y] for point in points])
    low, high = positions.min(0), positions.max(0)
    scale = _GRID / max(float((high - low).max()), 1e-9)  # one scale for both axes
    grid = np.rint((positions - low) * scale).astype(int).tolist()
    index_of = {domain: index for index, domain in enumerate(domains)}
    data = {
        "domains": [printable(domain) for domain in domains],
        "colours": [shades[domain] for domain in domains],
        "points": [
            [x, y, index_of[point.domain], printable(point.id), _shortened(point.text)]
            for point, (x, y) in zip(points, grid, strict=True)
        ],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _shortened(text: str) -> str:
    text = printable(text.strip())
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 1].rstrip() + "…"
