"""The sources of a recipe as rows and as token sequences."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from accelerate import PartialState

from ultrafuser.data.packed import PackedRows, domains_of, is_whole
from ultrafuser.data.rendering import render_packed
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
    *,
    folder: Path | None = None,
    workers: int | None = None,
) -> Sequence[Rendered]:
    """Rows of all sources as token sequences. What was not used of them is logged.

    Args:
        purpose: what the rows are for, in messages.
        reader: collects bad rows, if it skips them. None: the first bad row is an error.
        folder: for files that hold the rows. None: a list in memory.
        workers: processes that render into the files. None: one for each core.

    Raises:
        DataError: no sources, or a domain of which no row fits.
    """
    if not sources:
        raise DataError(f"the recipe names no {purpose} data. Add sources under data.train")
    reader = reader or RowReader()
    read = RowReader(reader.on_bad_row)  # the notes are about these sources
    domains: set[str] = set()
    rows = _stream(sources, read, domains)
    bad_rows = read.bad_rows if read.on_bad_row == "skip" else None
    rendered: Sequence[Rendered]
    if folder is None:
        rendered, stats = renderer.render_all(list(rows), bad_rows)
    else:
        label = f"rendering {purpose} rows"
        rendered, stats = render_packed(
            renderer, rows, folder, workers=workers, bad_rows=bad_rows, progress=progress, label=label
        )
    reader.bad_rows += read.bad_rows
    counts = Counter({domain: 0 for domain in sorted(domains)})
    counts.update(domains_of(rendered))
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


def _stream(sources: Sequence[SourceRecipe], reader: RowReader, domains: set[str]) -> Iterator[Row]:
    """The rows of all sources as they are read. Their domains are added to `domains`."""
    for source in sources:
        for row in reader.read(**source.model_dump()):
            domains.add(row.domain)
            yield row


def share_rows(read: Callable[[], Sequence[Rendered]], folder: Path) -> Sequence[Rendered]:
    """Let one process read rows into the files of a folder, and map them in all. A machine that does not see them reads too."""
    state = PartialState()
    if state.is_local_main_process:
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
    state.wait_for_everyone()
    if state.is_main_process:
        read()
    state.wait_for_everyone()
    if state.is_local_main_process and not is_whole(folder):
        read()
    state.wait_for_everyone()
    return PackedRows(folder)
