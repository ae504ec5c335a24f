"""The sources of a recipe as rows and as token sequences."""

from __future__ import annotations

from collections.abc import Sequence

from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader, load_rows
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress
from ultrafuser.recipe import SourceRecipe

BAD_ROWS_FILE = "bad_rows.jsonl"  # in the folder of a run


def load_source(source: SourceRecipe, reader: RowReader | None = None) -> list[Row]:
    """The rows of one source of a recipe.

    Raises:
        DataError: see `load_rows`.
    """
    return load_rows(**source.model_dump(), reader=reader)


def read_sources(
    sources: Sequence[SourceRecipe],
    renderer: Renderer,
    progress: Progress,
    purpose: str,
    reader: RowReader | None = None,
) -> list[Rendered]:
    """Rows of all sources as token sequences. What was not used of them is logged.

    Args:
        purpose: what the rows are for, in messages.
        reader: collects bad rows, if it skips them. None: the first bad row is an error.

    Raises:
        DataError: no sources, or a domain of which no row fits.
    """
    if not sources:
        raise DataError(f"the recipe names no {purpose} data. Add sources under data.train")
    reader = reader or RowReader()
    read = RowReader(reader.on_bad_row)  # the notes are about these sources
    rows = [row for source in sources for row in load_source(source, read)]
    rendered, stats = renderer.render_all(rows, read.bad_rows if read.on_bad_row == "skip" else None)
    reader.bad_rows += read.bad_rows
    counts = {domain: sum(row.domain == domain for row in rendered) for domain in sorted({r.domain for r in rows})}
    for domain, count in counts.items():
        if count == 0:
            advice = f". Raise data.max_length, now max_length={renderer.max_length}" if stats.dropped_rows else ""
            raise DataError(f"domain {domain!r} has no {purpose} row left: {stats}{advice}")
    progress.log(
        f"{purpose} rows: " + ", ".join(f"{count} {domain}" for domain, count in counts.items()) + f" ({stats})"
    )
    for note in read.notes():
        progress.log(f"{purpose} rows: {note}")
    return rendered
