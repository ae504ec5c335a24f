"""Stream the rows of several sources with progress, and copy them. A data set need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ultrafuser.data.files import check_target
from ultrafuser.data.row_files import file_type, find_files, open_binary
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader
from ultrafuser.data.writing import check_layout, row_writer
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_REPORT_EVERY = 500  # rows between two reports of progress


def stream_rows(
    sources: Sequence[str],
    *,
    domain: str | None = None,
    reader: RowReader | None = None,
    progress: Progress | None = None,
    label: str = "rows",
) -> Iterator[Row]:
    """Every row of every source, in order.

    Args:
        sources: as in `load_rows`.
        domain: the stratum of all rows. None: the domain that each row names.
        reader: counts what is not used, and may skip bad rows. None: the first bad row is an error.
        label: what the progress counts.

    Raises:
        DataError: as `load_rows`.
    """
    reader, progress = reader or RowReader(), progress or Progress()
    progress.start(label, estimate_rows(sources))
    count = 0
    try:
        for source in sources:
            for row in reader.read(source, domain=domain):
                yield row
                count += 1
                if count % _REPORT_EVERY == 0:
                    progress.advance(_REPORT_EVERY)
        progress.advance(count % _REPORT_EVERY)
    finally:
        progress.finish()


def estimate_rows(sources: Sequence[str]) -> int:
    """Approximate number of rows of some sources, for a progress bar. Hub data sets count as 0."""
    return sum(_estimate(file) for source in sources for file in find_files(source).paths)


def _estimate(file: Path) -> int:
    """Number of lines, or the row count that Parquet stores. 0 if it is not known in advance."""
    kind = file_type(file)
    try:
        if kind == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                return pq.read_metadata(file).num_rows
            except pa.ArrowException:
                return 0  # reading it will raise the error
        if kind == ".json":
            return file.stat().st_size // 1500  # a guess: bytes per conversation
        if file.is_dir() or kind in (None, ".arrow"):
            return 0
        with open_binary(file) as stream:
            return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
    except (OSError, DataError):
        return 0  # reading it will raise the error


def convert(
    sources: Sequence[str],
    output: Path,
    layout: str | None = None,
    *,
    domain: str | None = None,
    limit: int | None = None,
    force: bool = False,
    reader: RowReader | None = None,
    progress: Progress | None = None,
) -> int:
    """Copy rows into one file.

    Args:
        sources: rows, as in `load_rows`.
        output: the file to write. Its suffix sets the file type.
        layout: one of `LAYOUTS`. None: `messages`, or `instruction/input/output` for CSV.
        domain: the stratum of all rows. None: the domain that each row names.
        reader: as in `stream_rows`.

    Returns:
        the number of rows written.

    Raises:
        DataError: rows that are unreadable or do not fit the layout, or an output that exists or cannot be written.
    """
    check_layout(output, layout)
    check_target(output, force=force)
    rows = stream_rows(sources, domain=domain, reader=reader, progress=progress, label="rows converted")
    count = 0
    with row_writer(output, layout, force=force) as write:
        for row in islice(rows, limit):
            write(row)
            count += 1
    return count
