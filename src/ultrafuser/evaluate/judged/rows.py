"""The raw rows of the judged benchmarks: from a local file or from the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ultrafuser.data.json_text import LONE_SURROGATE, has_lone_surrogate
from ultrafuser.data.records import read_file
from ultrafuser.errors import DataError


def local_records(data_dir: str | Path, name: str) -> Iterator[tuple[Any, str]]:
    """The records of one JSON or JSONL file of the data folder, each with its location.

    Raises:
        DataError: no such file, or not what its name says.
    """
    path = Path(data_dir) / name
    try:
        for record, location in read_file(path):
            if has_lone_surrogate(record):
                raise DataError(f"{location}: {LONE_SURROGATE}. Fix the row")
            yield record, location
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); expected {name} in the folder given by --data-dir, {data_dir}. "
            "Leave --data-dir out to load it from the hub"
        ) from error


def hub_records(path: str, split: str, **options: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a data set on the hub, each with its location.

    Raises:
        DataError: it could not be loaded.
    """
    import datasets

    source = options.get("data_files", f"{path}[{split}]")
    try:
        dataset = datasets.load_dataset(path, split=split, **options)
        yield from ((dict(record), f"{source}[{i}]") for i, record in enumerate(dataset))
    except (OSError, ValueError, RuntimeError) as error:  # not found, no such split, no network, a script
        raise DataError(
            f"{source}: could not be loaded from the hub ({error}). Give a folder with the file by --data-dir"
        ) from error


def text_of(record: Any, key: str, location: str) -> str:
    """A field that must be text.

    Raises:
        DataError: the field is missing, or is not text.
    """
    value = record.get(key) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        raise DataError(f"{location}: {key!r} is {type(value).__name__}, expected text")
    return value
