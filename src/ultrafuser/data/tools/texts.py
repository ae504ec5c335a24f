"""Every text in a file of whatever form: the strings of JSON, CSV and Parquet records, or the paragraphs of plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.data.sources import SUFFIXES, local_files, parse_json, read_file
from ultrafuser.errors import DataError

PLAIN_SUFFIX = ".txt"


@dataclass(frozen=True)
class Text:
    """A piece of text and where it stands.

    Attributes:
        where: the item: file and line, or file and number in its list.
        field: the way to the text within the item, such as `choices[2].text`; empty for plain text.
    """

    where: str
    field: str
    text: str


def read_texts(path: str, fields: Sequence[str] = ()) -> Iterator[Text]:
    """Every string in the items of a file, of a folder's files, or of a glob's.

    Mappings and lists are gone through to the bottom. A key that holds a space is text too (TruthfulQA keeps its answers
    as keys). A file that is not JSONL, JSON, CSV or Parquet is plain text: an item is a paragraph, or a line where no
    empty line stands between paragraphs.

    Args:
        fields: top-level fields of the items to read; empty: all.

    Raises:
        DataError: nothing there, an unreadable file, or a field that no item of a file has.
    """
    files = local_files(path, (*SUFFIXES, PLAIN_SUFFIX))
    if not files:
        raise DataError(
            f"{path}: no such test file; expected {', '.join(SUFFIXES)} or plain text, a folder of them, or a glob"
        )
    for file in files:
        seen: set[str] = set()
        for record, where in _items(file):
            if fields and isinstance(record, Mapping):
                seen |= {str(key) for key in record}
                record = {key: value for key, value in record.items() if key in fields}
            yield from (Text(where, field, text) for field, text in _strings(record, ""))
        missing = [field for field in fields if field not in seen]
        if seen and missing:
            raise DataError(f"{file}: no item has the field {missing[0]!r}; its fields are {', '.join(sorted(seen))}")


def _items(file: Path) -> Iterator[tuple[Any, str]]:
    if file.suffix == ".json":  # unlike rows, test items need not be a list
        value = parse_json(_decoded(file), str(file))
        if isinstance(value, list):
            yield from ((item, f"{file}[{number}]") for number, item in enumerate(value))
        else:
            yield value, str(file)
    elif file.suffix in SUFFIXES:
        yield from read_file(file)
    else:
        yield from _paragraphs(file)


def _paragraphs(file: Path) -> Iterator[tuple[str, str]]:
    lines = _decoded(file).splitlines()
    if all(line.strip() for line in lines):
        yield from ((line, f"{file}:{number}") for number, line in enumerate(lines, 1))
        return
    block: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if line.strip():
            block.append(line)
        elif block:
            yield "\n".join(block), f"{file}:{number - len(block)}"
            block = []


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 at byte {error.start}; convert the file") from error


def _strings(value: Any, field: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield field, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if " " in str(key).strip():
                yield f"{field}.<key>".lstrip("."), str(key)
            yield from _strings(inner, f"{field}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _strings(inner, f"{field}[{number}]")
