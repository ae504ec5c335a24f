"""Convert rows from any known layout and file type to any other."""

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
    """Copy rows into one file.

    Args:
        sources: rows, as in `load_rows`.
        output: the file to write. Its suffix sets the file type.
        layout: one of `LAYOUTS`. None: `messages`, or `instruction/input/output` for CSV.
        domain: the stratum of all rows. None: the domain that each row names.

    Returns:
        the number of rows written.

    Raises:
        DataError: rows that are unreadable or do not fit the layout, or an output that exists or cannot be written.
    """
    check_layout(output, layout)
    check_target(output, force=force)
    rows = stream_rows(sources, domain=domain, progress=progress, label="rows converted")
    count = 0
    with row_writer(output, layout, force=force) as write:
        for row in islice(rows, limit):
            write(row)
            count += 1
    return count
