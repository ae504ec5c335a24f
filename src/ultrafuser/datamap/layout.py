"""A map of a data set: one point for each row, near each other where a model reads them alike (the paper's figure 3)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.near_duplicates import COMPARED_ROLES
from ultrafuser.datamap.page import SCRIPT, STYLE
from ultrafuser.display.drawing import TEXT, draw_legend, finished, inset, legend_shape, new_figure
from ultrafuser.display.palette import domain_colours
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.inspect.html import page
from ultrafuser.inspect.trace import printable
from ultrafuser.progress import Progress
from ultrafuser.report.blocks import row as table_row
from ultrafuser.report.blocks import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("tsne", "umap")
NAMES = {"tsne": "t-SNE", "umap": "UMAP"}
_FEWEST = 5  # points of a map
_NEIGHBOURS = 5
_PRINCIPAL = 50  # dimensions that t-SNE and UMAP start from
_TEXT_SHOWN = 400  # characters of a row under the pointer
_GRID = 10_000  # coordinates of the page are whole numbers up to this


@dataclass(frozen=True)
class Point:
    """A row on the map; x and y have no unit."""

    id: str
    domain: str
    text: str
    x: float
    y: float


def text_of(row: Row, part: str) -> str:
    """What the model reads of a row: its `instructions`, its `answers` or the whole `conversation`."""
    return "\n\n".join(content for role, content in row.messages if role in COMPARED_ROLES[part])


def sample(rows: Iterable[Row], per_domain: int, seed: int = 0) -> list[Row]:
    """At most so many rows of each domain, drawn by a hash of seed and id: the same whatever the order of the rows."""
    by_domain: dict[str, list[tuple[bytes, int, Row]]] = {}
    for number, row in enumerate(rows):
        draw = blake2b(f"{seed}\x1f{row.id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        by_domain.setdefault(row.domain, []).append((draw, number, row))
    return [
        row
        for domain in sorted(by_domain)
        for _, _, row in sorted(by_domain[domain], key=lambda one: one[:2])[:per_domain]
    ]


def principal(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """The vectors in their 50 directions of most variance, (N, D) -> (N, at most 50).

    Raises:
        DataError: too few rows for a map.
        MissingExtraError: scikit-learn is not installed.
    """
    if len(vectors) < _FEWEST:
        raise DataError(f"a map of {len(vectors)} rows: expected at least {_FEWEST}")
    try:
        from sklearn.decomposition import PCA
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "data", "drawing a map of a data set") from error
    return PCA(min(_PRINCIPAL, *vectors.shape), random_state=seed).fit_transform(vectors)


def lay_out(
    vectors: np.ndarray, method: str = "tsne", *, seed: int = 0, progress: Progress | None = None
) -> np.ndarray:
    """A place for each vector, (N, D) -> (N, 2); start from `principal`.

    Raises:
        DataError: an unknown method.
        MissingExtraError: umap-learn is not installed.
    """
    progress = progress or Progress()
    if method not in METHODS:
        raise DataError(f"method {method!r}: expected one of {', '.join(METHODS)}")
    progress.log(f"{NAMES[method]} of {len(vectors)} points")
    if method == "umap":
        try:
            from umap import UMAP
        except ImportError as error:
            raise MissingExtraError("umap-learn", "umap", "drawing a map by UMAP") from error
        neighbours = min(15, len(vectors) - 1)
        return np.asarray(UMAP(n_neighbors=neighbours, random_state=seed, n_jobs=1).fit_transform(vectors))
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(vectors) - 1) / 3)
    return np.asarray(TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors))


def neighbour_agreement(vectors: np.ndarray, domains: Sequence[str]) -> dict[str, float]:
    """For each domain, the share of its rows' five nearest neighbours that are of the domain too (1: well apart).

    It is counted among the vectors, not on the map, which bends distances.
    """
    from sklearn.neighbors import NearestNeighbors

    size = min(_NEIGHBOURS, len(vectors) - 1)
    nearest = NearestNeighbors(n_neighbors=size).fit(vectors).kneighbors(return_distance=False)  # without itself
    names = np.array(domains)
    same = (names[nearest] == names[:, None]).mean(axis=1)
    return {domain: float(same[names == domain].mean()) for domain in sorted(set(domains))}


def as_points(rows: Sequence[Row], places: np.ndarray, part: str = "instructions") -> list[Point]:
    """Rows with their places."""
    return [
        Point(row.id, row.domain, text_of(row, part), float(x), float(y))
        for row, (x, y) in zip(rows, places, strict=True)
    ]


# ---------------------------------------------------------------- drawing


def map_figure(points: Sequence[Point]) -> Figure:
    """The map as a scatter plot, coloured by domain.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    domains = sorted({point.domain for point in points})
    shades = domain_colours(domains, [])
    columns, legend_height = legend_shape(domains, 7.0)
    figure = new_figure(7.5, 6.6 + legend_height)
    axes = figure.add_axes(inset(figure, left=0.15, right=0.15, bottom=0.15, top=0.3 + legend_height))
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
    draw_legend(figure, handles, columns, 0.2, figure.get_figheight() - 0.1)
    return finished(figure)


def map_page(
    points: Sequence[Point], *, model: str, method: str, part: str, agreement: dict[str, float], title: str = ""
) -> str:
    """The map as one HTML page that loads nothing: zoom, move, point at a row to read it, hide domains, search."""
    domains = sorted({point.domain for point in points})
    shades = domain_colours(domains, [])
    data = _page_data(points, domains, shades)
    keys = "".join(
        f'<button type="button" data-domain="{number}" aria-pressed="true"><i style="background:{shades[domain]}"></i>'
        f"{escape(printable(domain))}</button>"
        for number, domain in enumerate(domains)
    )
    drawing = (
        f'<div class="uf-map-bar">{keys}<input type="search" placeholder="find in texts" aria-label="find in texts">'
        '<button type="button" data-reset>whole map</button></div>\n'
        f'<div class="uf-map"><canvas role="img" aria-label="{len(points)} rows as points, coloured by domain"></canvas>'
        '<div class="uf-map-tip" hidden></div></div>\n'
        "<noscript><p>The map is drawn by a script of this page; switch JavaScript on, or look at the PNG.</p></noscript>"
        '\n<p class="note">Drag to move, scroll or pinch to zoom, point at a row to read it.</p>'
        f'\n<script type="application/json" id="uf-map-data">{data}</script>'
    )
    counts = {domain: sum(point.domain == domain for point in points) for domain in domains}
    rows = [
        table_row(escape(printable(domain)), [f"{counts[domain]:,}", f"{agreement[domain]:.3f}"]) for domain in domains
    ]
    numbers = table(["domain", "rows", "neighbours of the same domain"], rows) + (
        f'<p class="note">The last column: of the five rows that are nearest in the model\'s own space, the share that '
        f"is of the same domain. {NAMES[method]} shows who is near whom; distances and sizes of clusters mean little.</p>"
    )
    lead = f"Each point is one row's {part}, placed by {NAMES[method]} of the mean last hidden state of {model}."
    sections = [("", drawing), ("In numbers", numbers)]
    return page(title or "Map of a data set", sections, lead=lead, style=STYLE, script=SCRIPT)


def _page_data(points: Sequence[Point], domains: Sequence[str], shades: dict[str, str]) -> str:
    """The points as JSON that cannot end the script element it stands in."""
    places = np.array([[point.x, point.y] for point in points])
    low, high = places.min(0), places.max(0)
    scale = _GRID / max(float((high - low).max()), 1e-9)  # one scale for both axes
    grid = np.rint((places - low) * scale).astype(int).tolist()
    number = {domain: index for index, domain in enumerate(domains)}
    data: dict[str, Any] = {
        "domains": [printable(domain) for domain in domains],
        "colours": [shades[domain] for domain in domains],
        "points": [
            [x, y, number[point.domain], printable(point.id), _shortened(point.text)]
            for point, (x, y) in zip(points, grid, strict=True)
        ],
    }
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _shortened(text: str) -> str:
    text = printable(text.strip())
    return text if len(text) <= _TEXT_SHOWN else text[: _TEXT_SHOWN - 1].rstrip() + "…"
