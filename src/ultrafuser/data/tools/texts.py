"""Read every text of a file: the strings of records, or the paragraphs of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.data.records import read_file, read_text
from ultrafuser.data.row_files import EXPECTED, SUFFIXES, file_type, find_files
from ultrafuser.errors import DataError

TEXT_SUFFIXES = (*SUFFIXES, ".txt")  # of the files of a folder


@dataclass(frozen=True)
class Text:
    """A text and its location.

    Attributes:
        location: the item: file and line, or file and index in its list.
        field: the path of the text within the item, such as `choices[2].text`. Empty for plain text.
    """

    location: str
    field: str
    text: str


def read_texts(path: str, fields: Sequence[str] = ()) -> Iterator[Text]:
    """Every string in the items of a file, of a folder of files, or of a glob.

    Mappings and lists are read at every depth. A key that holds a space is text too (TruthfulQA stores its answers as
    keys). A file of another type is plain text: each paragraph is an item, or each line if the
    file has no empty lines.

    Args:
        fields: top-level fields of the items to read. Empty: all.

    Raises:
        DataError: a missing or unreadable file, or a field that no item of a file has.
    """
    files = find_files(path, suffixes=TEXT_SUFFIXES).paths
    if not files:
        raise DataError(f"{path}: no such test file, expected {EXPECTED} or plain text, a folder of them, or a glob")
    for file in files:
        names: set[str] = set()
        for record, location in _read_items(file):
            if fields and isinstance(record, Mapping):
                names |= {str(key) for key in record}
                record = {key: value for key, value in record.items() if key in fields}
            yield from (Text(location, field, text) for field, text in _strings(record, ""))
        missing = [field for field in fields if field not in names]
        if names and missing:
            raise DataError(f"{file}: no item has the field {missing[0]!r}. Its fields are {', '.join(sorted(names))}")


def _read_items(file: Path) -> Iterator[tuple[Any, str]]:
    if file.is_dir() or file_type(file) is not None:
        yield from read_file(file)
        return
    lines = read_text(file).splitlines()
    if all(line.strip() for line in lines):
        yield from ((line, f"{file}:{line_number}") for line_number, line in enumerate(lines, 1))
        return
    block: list[str] = []
    for line_number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block), f"{file}:{line_number - len(block)}"
            block = []


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if " " in str(key).strip():
                yield f"{field}.<key>".lstrip("."), str(key)
            yield from _strings(inner, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _strings(inner, f"{field}[{index}]")
