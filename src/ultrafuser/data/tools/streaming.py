"""Rows of several sources one at a time, with progress: a data set need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ultrafuser.data.schema import Row, parse_row
from ultrafuser.data.sources import local_files, read_records
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_STEP = 500  # rows between two reports of progress


def stream_rows(
    sources: Sequence[str], *, domain: str | None = None, progress: Progress | None = None, what: str = "rows"
) -> Iterator[Row]:
    """Every row of every source, in order.

    Args:
        sources: as in `load_rows`.
        domain: the stratum of all rows; by default each row's own.

    Raises:
        DataError: as `load_rows`.
    """
    progress = progress or Progress()
    progress.start(what, estimate_rows(sources))
    number = 0
    try:
        for source in sources:
            before = number
            for raw, where in read_records(source):
                yield parse_row(raw, where, domain)
                number += 1
                if number % _STEP == 0:
                    progress.advance(_STEP)
            if number == before:
                raise DataError(f"{source}: no rows")
        progress.advance(number % _STEP)
    finally:
        progress.finish()


def estimate_rows(sources: Sequence[str]) -> int:
    """About how many rows some sources have, for a bar; of hub data sets nothing is known."""
    return sum(_estimate(file) for source in sources for file in local_files(source))


def _estimate(file: Path) -> int:
    """Lines, or what Parquet says."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_metadata(file).num_rows
        except (pa.ArrowInvalid, OSError):
            return 0  # reading it will say what is wrong
    if file.suffix == ".json":
        return file.stat().st_size // 1500  # a guess at the size of a conversation, bytes
    with file.open("rb") as stream:
        return sum(block.count(b"\n") for block in iter(lambda: stream.read(1 << 20), b""))
