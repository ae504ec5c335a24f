"""Render rows in several processes into packed files, without holding all of them in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ultrafuser.data.packed import PackedChunk, PackedRows, pack, write_packed
from ultrafuser.data.schema import Row
from ultrafuser.data.templates import Renderer, RenderStats
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_ROWS_PER_CHUNK = 256
_ROWS_TO_SHOW = 2048  # fewer are rendered too quickly for a bar
_CHUNKS_ALONE = 8  # so many are rendered in this process, before others are started


class _Rendered(NamedTuple):
    """One chunk of rows, rendered."""

    packed: PackedChunk
    stats: RenderStats
    num_rows: int
    bad_rows: list[dict[str, str]]


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def render_packed(
    renderer: Renderer,
    rows: Iterable[Row],
    folder: Path,
    *,
    workers: int | None = None,
    bad_rows: list[dict[str, str]] | None = None,
    progress: Progress | None = None,
    label: str = "rendering rows",
) -> tuple[PackedRows, RenderStats]:
    """Render rows as they are read, and write them into the files of a folder.

    Args:
        workers: processes that render. None: one for each core. Platforms without `fork` use this process alone.
        bad_rows: collects the rows that a template refuses. None: such a row is an error.

    Raises:
        DataError: see `Renderer.render_all`.
        DiskError: the disk is full or not writable.
    """
    progress, stats, count = progress or Progress(), RenderStats(), 0
    refused: list[dict[str, str]] = []

    def packed_chunks() -> Iterator[PackedChunk]:
        nonlocal count
        for chunk in _render_chunks(
            renderer, rows, available_cores() if workers is None else workers, bad_rows is not None
        ):
            stats.add(chunk.stats)
            refused.extend(chunk.bad_rows)
            count += chunk.num_rows
            if count >= _ROWS_TO_SHOW:
                if count - chunk.num_rows < _ROWS_TO_SHOW:
                    progress.start(label, 0)
                    progress.advance(count - chunk.num_rows)
                progress.advance(chunk.num_rows)
            yield chunk.packed

    packed = write_packed(packed_chunks(), folder)
    if count >= _ROWS_TO_SHOW:
        progress.finish()
    if bad_rows is not None:
        bad_rows += refused
    renderer.check_count(count, len(packed), stats, refused)
    return packed, stats


def _render_chunks(renderer: Renderer, rows: Iterable[Row], workers: int, skip: bool) -> Iterator[_Rendered]:
    """The rows, rendered chunk by chunk, in their order."""
    source = iter(rows)
    chunks = iter(lambda: list(islice(source, _ROWS_PER_CHUNK)), [])
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    for chunk in chunks if workers < 2 or not can_fork else islice(chunks, _CHUNKS_ALONE):
        yield _render(renderer, chunk, skip)
    if (first := next(chunks, None)) is None:
        return
    context = multiprocessing.get_context("fork")  # the tokenizers are there already, and nothing is imported again
    pool = ProcessPoolExecutor(workers, context, _start_worker, (renderer, skip))
    pending: deque[Future[_Rendered]] = deque()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the workers use none of this process's threads
            pending.append(pool.submit(_work, first))
        for chunk in chunks:
            pending.append(pool.submit(_work, chunk))
            if len(pending) > 2 * workers:  # reading does not run ahead of rendering
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a process that renders rows was killed, perhaps because the memory is full. Set data.workers=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _render(renderer: Renderer, rows: list[Row], skip: bool) -> _Rendered:
    bad_rows: list[dict[str, str]] = []
    rendered, stats = renderer.render_some(rows, bad_rows if skip else None)
    return _Rendered(pack(rendered, len(renderer.formats)), stats, len(rows), bad_rows)


# ---------------------------------------------------------------- in the other processes

_worker: tuple[Renderer, bool]


def _start_worker(renderer: Renderer, skip: bool) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one, and says how to go on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler that saves a step belongs to the main process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = renderer, skip


def _work(rows: list[Row]) -> _Rendered:
    renderer, skip = _worker
    return _render(renderer, rows, skip)
