"""Read raw records from JSONL, JSON, CSV, Parquet and Arrow files, saved data sets and hub data sets."""

from __future__ import annotations

import codecs
import csv
import io
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ultrafuser.data.json_text import JsonProblem, check_depth, decode_json, first_bad_element, parse_json
from ultrafuser.data.row_files import EXPECTED, file_type, find_files, is_saved_dataset, open_binary
from ultrafuser.errors import DataError

_MAX_CELL_BYTES = 1 << 26  # of a CSV file


class Record(NamedTuple):
    """A raw record, or the reason why it cannot be read.

    Attributes:
        value: None if there is a problem.
        location: file and line, or file and index.
    """

    value: Any
    location: str
    problem: str | None = None


def read_records(
    path: str, split: str = "train", revision: str | None = None, config: str | None = None
) -> Iterator[tuple[Any, str]]:
    """Raw records of any layout, each with its location.

    Args:
        path: a file, a folder of files, a glob, `package:MODULE/FILE`, or a hub data set id (`owner/name`).
        split: of a hub data set or a saved data set.
        revision, config: of a hub data set. `config` is its configuration, e.g. `main` of `openai/gsm8k`.

    Raises:
        DataError: a missing or unreadable file, or an unreadable record (with file and line number).
    """
    files = find_files(path, split).paths
    if not files:
        yield from ((record.value, record.location) for record in scan_hub(path, split, revision, config))
    for file in files:
        yield from read_file(file)


def read_file(file: Path) -> Iterator[tuple[Any, str]]:
    """Raw records of one file, each with its location.

    Raises:
        DataError: an unknown or unreadable type of file, or an unreadable record.
    """
    for record in scan_file(file):
        if record.problem is not None:
            raise DataError(f"{record.location}: {record.problem}")
        yield record.value, record.location


def scan_hub(
    path: str, split: str = "train", revision: str | None = None, config: str | None = None
) -> Iterator[Record]:
    """The records of a hub data set.

    Raises:
        DataError: neither a hub data set nor a file.
    """
    if Path(path).expanduser().exists():
        raise DataError(f"{path}: no file of a known type in this folder, expected {EXPECTED}")
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or file_type(Path(path)) is not None:
        raise DataError(f"{path}: no such file, expected {EXPECTED}, a folder of them, a glob, or a hub id")
    import datasets

    try:
        rows = datasets.load_dataset(path, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # a missing data set or split, or no network
        raise DataError(
            f"{path}: no such local file, and the hub data set could not be loaded (split {split!r}): {error}"
        ) from error
    yield from (Record(record, f"{path}[{split}][{index}]") for index, record in enumerate(rows))


def scan_file(file: Path) -> Iterator[Record]:
    """The records of one file. An unreadable record has a problem, and reading goes on.

    Raises:
        DataError: an unknown or unreadable type of file.
    """
    if file.is_dir() and is_saved_dataset(file):
        yield from _saved_dataset(file)
        return
    kind = file_type(file)
    if kind is None:
        raise DataError(f"{file}: unknown file type {file.suffix!r}, expected one of {EXPECTED}")
    if kind == ".parquet":
        yield from _parquet(file)
    elif kind == ".arrow":
        yield from _arrow(file)
    elif kind == ".json":
        yield from _json(file)
    else:
        with open_binary(file) as stream:
            yield from _json_lines(file, stream) if kind in (".jsonl", ".ndjson") else _csv(file, stream)


def read_text(file: Path) -> str:
    """The text of a file that may be compressed.

    Raises:
        DataError: not UTF-8.
    """
    with open_binary(file) as stream:
        return _decoded(file, stream.read())


def _decoded(file: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}. Convert the file") from error


# ---------------------------------------------------------------- JSON


def _json_lines(file: Path, lines: Iterable[bytes]) -> Iterator[Record]:
    for line_number, line in enumerate(lines, 1):
        location = f"{file}:{line_number}"
        try:
            text = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
            if text.strip():
                yield Record(decode_json(text), location)
        except UnicodeDecodeError as error:
            yield Record(None, location, f"not UTF-8 at byte {error.start} of the line. Convert the file")
        except JsonProblem as error:
            yield Record(None, location, str(error))


def _json(file: Path) -> Iterator[Record]:
    """A JSON list of records, one record, or JSON Lines under another name."""
    with open_binary(file) as stream:
        content = stream.read().removeprefix(codecs.BOM_UTF8)
    first_line, _, other_lines = content.strip().partition(b"\n")
    if first_line.startswith(b"{") and other_lines and _is_json(first_line):
        yield from _json_lines(file, content.split(b"\n"))
        return
    text = _decoded(file, content)
    try:
        value = parse_json(text) if first_line else []
    except JsonProblem as error:
        index = first_bad_element(text)
        raise DataError(f"{file}{'' if index is None else f'[{index}]'}: {error}") from error
    if not isinstance(value, list | dict):
        raise DataError(f"{file}: expected a JSON list of rows, got {type(value).__name__}")
    records = [value] if isinstance(value, dict) else value
    for index, record in enumerate(records):
        location = str(file) if records is not value else f"{file}[{index}]"
        try:
            check_depth(record)
            yield Record(record, location)
        except JsonProblem as error:
            yield Record(None, location, str(error))


def _is_json(line: bytes) -> bool:
    try:
        parse_json(line.decode())
    except (UnicodeDecodeError, JsonProblem):
        return False
    return True


# ---------------------------------------------------------------- CSV


class _Lines:
    """The lines of a CSV file, one for each call of the reader. Lines of a broken record can be read again."""

    def __init__(self, stream: IO[bytes]) -> None:
        # bytes that are not UTF-8 become lone surrogates, so that only their row is bad
        self._lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        self._waiting: deque[str] = deque()
        self.read: list[str] = []  # the lines of the current record
        self.line_number = 0  # of the last line that was read

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._waiting.popleft() if self._waiting else next(self._lines)
        self.line_number += 1
        self.read.append(line)
        return line

    def go_back(self) -> None:
        """Go back to the line after the first line of the current record."""
        self._waiting.extendleft(reversed(self.read[1:]))
        self.line_number -= len(self.read) - 1


def _csv(file: Path, stream: IO[bytes]) -> Iterator[Record]:
    csv.field_size_limit(_MAX_CELL_BYTES)  # the default, 128 KiB, is too short for a long conversation
    lines = _Lines(stream)
    reader = csv.reader(lines, strict=True)
    columns: list[str] = []
    while True:
        lines.read.clear()
        first_line = lines.line_number + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if not columns:
                raise DataError(f"{file}:{first_line}: not readable CSV: {_csv_problem(error)}") from error
            yield Record(None, f"{file}:{first_line}", f"not readable CSV: {_csv_problem(error)}")
            lines.go_back()
            reader = csv.reader(lines, strict=True)
            continue
        if cells is None:
            return
        if not any(cells) and len(cells) < 2:  # a blank line
            continue
        if not columns:
            columns = _header(file, cells)
            continue
        yield _csv_record(cells, columns, f"{file}:{first_line}")


def _header(file: Path, cells: list[str]) -> list[str]:
    repeated = sorted({name for name in cells if cells.count(name) > 1})
    if repeated:
        raise DataError(f"{file}:1: two columns are named {repeated[0]!r}, expected unique names")
    return cells


def _csv_record(cells: list[str], columns: list[str], location: str) -> Record:
    if len(cells) != len(columns):
        problem = f"{len(cells)} cells, expected {len(columns)} as in the header"
        if len(cells) > len(columns):
            problem += f". The first surplus cell is {cells[len(columns)][:40]!r}. Quote cells that hold commas"
        return Record(None, location, problem)
    if any("\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell):
        return Record(None, location, "not UTF-8. Convert the file")
    return Record(dict(zip(columns, cells, strict=True)), location)


def _csv_problem(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quote that opens in this row never closes"
    if "expected after" in str(error):
        return "text follows a closing quote. Either a quote does not close, or a quote within a cell is not doubled"
    return str(error)


# ---------------------------------------------------------------- Arrow


def _parquet(file: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            yield from _batches(file, table.iter_batches())
    except (pa.ArrowException, UnicodeDecodeError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error


def _arrow(file: Path) -> Iterator[Record]:
    """An Arrow file in the format of files (Feather) or of streams (the cache of `datasets`)."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            if is_file:
                table = pa.ipc.open_file(source)
                batches = (table.get_batch(index) for index in range(table.num_record_batches))
            else:
                batches = pa.ipc.open_stream(source)
            yield from _batches(file, batches)
    except (pa.ArrowException, UnicodeDecodeError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file}: not a readable Arrow file: {error}") from error


def _batches(file: Path, batches: Iterable[Any]) -> Iterator[Record]:
    index = 0
    for batch in batches:
        for value in batch.to_pylist():
            yield Record(value, f"{file}[{index}]")
            index += 1


def _saved_dataset(folder: Path) -> Iterator[Record]:
    import datasets
    import pyarrow as pa

    try:
        rows = datasets.load_from_disk(str(folder))
        yield from (Record(row, f"{folder}[{index}]") for index, row in enumerate(rows))
    except (pa.ArrowException, OSError, ValueError, KeyError, ImportError) as error:  # cut off, or images without PIL
        raise DataError(f"{folder}: not a readable saved data set: {error}") from error
