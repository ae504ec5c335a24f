"""Read rows from JSONL, JSON, CSV and Parquet files, folders, globs, package data, and hub data sets."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ultrafuser.data.schema import Row, parse_row
from ultrafuser.errors import CheckpointError, DataError
from ultrafuser.model.references import package_path

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_MAX_CELL_BYTES = 1 << 26  # of a CSV file


def load_rows(
    path: str,
    *,
    domain: str | None = None,
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    config: str | None = None,
) -> list[Row]:
    """Read the rows of one source.

    Args:
        path: a file, a folder of files, a glob, `package:MODULE/FILE`, or a hub data set id (`owner/name`).
        domain: the stratum of all its rows. None: the domain that each row names.
        split, revision, config: of a hub data set. `config` is its configuration, e.g. `main` of `openai/gsm8k`.
        limit: read at most this many rows. None: all.

    Raises:
        DataError: a missing or unreadable file, or a malformed row (with file and line number).
    """
    rows = []
    for raw, location in read_records(path, split, revision, config):
        rows.append(parse_row(raw, location, domain))
        if limit is not None and len(rows) >= limit:
            break
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSONL, one object per line."""
    path.write_text("".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_records(
    path: str, split: str = "train", revision: str | None = None, config: str | None = None
) -> Iterator[tuple[Any, str]]:
    """Raw records of any layout, each with its location. Arguments and errors are those of `load_rows`."""
    files = local_files(path)
    if files:
        for file in files:
            yield from read_file(file)
    elif path.count("/") == 1 and not path.startswith((".", "/", "~")) and not path.endswith(SUFFIXES):
        import datasets

        try:
            rows = datasets.load_dataset(path, config, split=split, revision=revision)
        except (OSError, ValueError) as error:  # a missing data set or split, or no network
            raise DataError(
                f"{path}: no such local file, and the hub data set could not be loaded (split {split!r}): {error}"
            ) from error
        yield from ((record, f"{path}[{split}][{index}]") for index, record in enumerate(rows))
    else:
        raise DataError(f"{path}: no such file, expected {', '.join(SUFFIXES)}, a folder of them, a glob, or a hub id")


def local_files(path: str, suffixes: Sequence[str] = SUFFIXES) -> list[Path]:
    """The files behind a path: one file, those of a folder with these suffixes, a glob, or `package:MODULE/FILE`.

    Raises:
        DataError: a package that is not installed or has no such file.
    """
    if path.startswith("package:"):
        try:
            path = str(package_path(path))
        except CheckpointError as error:
            raise DataError(str(error)) from error
    local = Path(path).expanduser()
    if local.is_dir():
        return sorted(file for file in local.iterdir() if file.suffix in suffixes)
    if local.is_file():
        return [local]
    return [Path(match) for match in sorted(glob.glob(str(local), recursive=True))] if glob.has_magic(path) else []


def read_file(file: Path) -> Iterator[tuple[Any, str]]:
    """Raw records of one file, each with its location.

    Raises:
        DataError: an unknown or unreadable type of file.
    """
    if file.suffix not in SUFFIXES:
        raise DataError(f"{file}: unknown file type {file.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    try:
        if file.suffix == ".jsonl":
            with file.open(encoding="utf-8-sig") as lines:
                for line_number, line in enumerate(lines, 1):
                    location = f"{file}:{line_number}"
                    if not line.strip():
                        raise DataError(f"{location}: empty line, expected one JSON object")
                    yield parse_json(line, location), location
        elif file.suffix == ".json":
            records = parse_json(read_text(file), str(file))
            if not isinstance(records, list):
                raise DataError(f"{file}: expected a JSON list of rows, got {type(records).__name__}")
            yield from ((record, f"{file}[{index}]") for index, record in enumerate(records))
        elif file.suffix == ".csv":
            csv.field_size_limit(_MAX_CELL_BYTES)  # the default, 128 KiB, is too short for a long conversation
            with file.open(encoding="utf-8-sig", newline="") as lines:
                reader = csv.DictReader(lines)
                for record in reader:
                    yield record, f"{file}:{reader.line_num}"
        else:
            yield from _read_parquet(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}. Convert the file") from error
    except csv.Error as error:
        raise DataError(f"{file}: not readable CSV: {error}") from error


def read_text(file: Path) -> str:
    """The text of a file.

    Raises:
        DataError: not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}. Convert the file") from error


def parse_json(text: str, location: str) -> Any:
    """Parse JSON text.

    Raises:
        DataError: the text is not JSON. The message holds the location.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{location}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error


def _read_parquet(file: Path) -> Iterator[tuple[Any, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise DataError(f"{file}: not a readable Parquet file: {error}") from error
    index = 0
    for batch in table.iter_batches():
        for record in batch.to_pylist():
            yield record, f"{file}[{index}]"
            index += 1
