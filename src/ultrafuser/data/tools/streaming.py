"""Stream the rows of several sources with progress, and copy them. A data set need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ultrafuser.data.files import check_target
from ultrafuser.data.schema import Row, parse_row
from ultrafuser.data.sources import local_files, read_records
from ultrafuser.data.writing import check_layout, row_writer
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_REPORT_EVERY = 500  # rows between two reports of progress


def stream_rows(
    sources: Sequence[str], *, domain: str | None = None, progress: Progress | None = None, label: str = "rows"
) -> Iterator[Row]:
    """Every row of every source, in order.

    Args:
        sources: as in `load_rows`.
        domain: the stratum of all rows. None: the domain that each row names.
        label: what the progress counts.

    Raises:
        DataError: as `load_rows`.
    """
    progress = progress or Progress()
    progress.start(label, estimate_rows(sources))
    count = 0
    try:
        for source in sources:
            count_before = count
            for raw, location in read_records(source):
                yield parse_row(raw, location, domain)
                count += 1
                if count % _REPORT_EVERY == 0:
                    progress.advance(_REPORT_EVERY)
            if count == count_before:
                raise DataError(f"{source}: no rows")
        progress.advance(count % _REPORT_EVERY)
    finally:
        progress.finish()


def estimate_rows(sources: Sequence[str]) -> int:
    """Approximate number of rows of some sources, for a progress bar. Hub data sets count as 0."""
    return sum(_estimate(file) for source in sources for file in local_files(source))


def _estimate(file: Path) -> int:
    """Number of lines, or the row count that Parquet stores."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(file).num_rows
        except (pa.ArrowInvalid, OSError):
            return 0  # reading it will raise the error
    if file.suffix == ".json":
        return file.stat().st_size // 1500  # a guess: bytes per conversation
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))


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
