"""Rows from any known layout and kind of file into any other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from ultrafuser.data.tools.streaming import stream_rows
from ultrafuser.data.writing import check_layout, check_target, row_writer
from ultrafuser.progress import Progress


def convert(
    sources: Sequence[str],
    output: Path,
    layout: str | None = None,
    *,
    domain: str | None = None,
    limit: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> int:
    """Copy rows into one file, and say how many.

    Args:
        sources: rows, as in `load_rows`.
        output: its suffix says the kind of file.
        layout: one of `LAYOUTS`; None: `messages`, in CSV `instruction/input/output`.
        domain: the stratum of all rows; by default each row's own.

    Raises:
        DataError: rows that cannot be read or do not fit the layout, an output that cannot be written or is there already.
    """
    check_layout(output, layout)
    check_target(output, force=force)
    rows = stream_rows(sources, domain=domain, progress=progress, what="rows converted")
    written = 0
    with row_writer(output, layout, force=force) as write:
        for row in islice(rows, limit):
            write(row)
            written += 1
    return written
