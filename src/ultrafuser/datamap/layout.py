"""A map of a data set: one point per row, near each other if a model sees them as similar (the paper's figure 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from ultrafuser.data.schema import Row
from ultrafuser.data.tools.near_duplicates import COMPARED_ROLES
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.progress import Progress

METHODS = ("tsne", "umap")
NAMES = {"tsne": "t-SNE", "umap": "UMAP"}
_FEWEST = 5  # points of a map
_NEIGHBOURS = 5
_PRINCIPAL = 50  # dimensions that t-SNE and UMAP start from


@dataclass(frozen=True)
class Point:
    """A row on the map. x and y have no unit."""

    id: str
    domain: str
    text: str
    x: float
    y: float


def text_of(row: Row, content: str) -> str:
    """The text of a row for the model: its `instructions`, its `answers` or the whole `conversation`."""
    return "\n\n".join(text for role, text in row.messages if role in COMPARED_ROLES[content])


def sample(rows: Iterable[Row], per_domain: int, seed: int = 0) -> list[Row]:
    """At most `per_domain` rows of each domain, drawn by a hash of seed and id. The order of the rows does not matter."""
    by_domain: dict[str, list[tuple[bytes, int, Row]]] = {}
    for index, row in enumerate(rows):
        draw = blake2b(f"{seed}\x1f{row.id}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        by_domain.setdefault(row.domain, []).append((draw, index, row))
    return [
        row
        for domain in sorted(by_domain)
        for _, _, row in sorted(by_domain[domain], key=lambda entry: entry[:2])[:per_domain]
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
    """A position for each vector, (N, D) -> (N, 2). Start from `principal`.

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


def as_points(rows: Sequence[Row], positions: np.ndarray, content: str = "instructions") -> list[Point]:
    """Rows with their positions."""
    return [
        Point(row.id, row.domain, text_of(row, content), float(x), float(y))
        for row, (x, y) in zip(rows, positions, strict=True)
    ]
