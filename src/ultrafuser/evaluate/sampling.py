"""Which rows or documents a limit selects: the same for every model, every run and every task of one seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from ultrafuser.errors import DataError

T = TypeVar("T")


def draw_rows(rows: Sequence[T], limit: int | None, seed: int, source: str) -> list[T]:
    """`limit` of the rows drawn by the seed, in their original order. A larger limit keeps the rows of a smaller one.

    Args:
        rows: all rows, documents or indices.
        limit: None selects all.
        source: the task or file that the rows belong to, for the error.

    Raises:
        DataError: no rows, or a limit below 1.
    """
    if not rows or (limit is not None and limit < 1):
        raise DataError(
            f"{source}: zero samples (limit {limit}, {len(rows)} rows), expected at least one. Raise --limit"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in sorted(order[:limit])]
