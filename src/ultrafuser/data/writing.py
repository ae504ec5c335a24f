"""Write rows in any known layout to JSONL, JSON, CSV and Parquet files."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from ultrafuser.data.files import atomic_file, atomic_files, check_target, json_text, naming
from ultrafuser.data.layouts import CHAT_LAYOUTS, MESSAGE_KEYS, PAIR_LAYOUTS
from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
# The name of a pair layout is its columns, as in the errors of `parse_row`.
PAIRS = {"/".join(filter(None, layout)): layout for layout in PAIR_LAYOUTS}
LAYOUTS = (*CHAT_LAYOUTS, *PAIRS)
_CSV_LAYOUT = "instruction/input/output"
_SHAREGPT_NAMES = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
_ROWS_PER_GROUP = 2000  # rows of a Parquet row group

Write = Callable[[Mapping[str, Any]], None]


def check_targets(rows: Path | None, report: Path | None, *, force: bool) -> None:
    """Check the two files that a command may write: its rows and its report.

    Raises:
        DataError: as `check_layout` and `check_target`.
    """
    if rows is not None:
        check_layout(rows, None)
    for target in filter(None, (rows, report)):
        check_target(target, force=force)


@contextmanager
def row_writer(target: Path, layout: str | None = None, *, force: bool = False) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row to `target`. The file appears when the block succeeds.

    Args:
        target: the file to write. Its suffix sets the file type.
        layout: one of LAYOUTS. None: `messages`, or `instruction/input/output` for CSV.

    Raises:
        DataError: an unknown suffix or layout, a layout that does not fit the file type or a row, or a file that exists
            while `force` is false.
    """
    layout = check_layout(target, layout)
    with atomic_file(target, force=force) as draft, draft_writer(target, draft, layout) as write:
        yield write


@contextmanager
def row_writers(
    targets: Sequence[Path], report: Path | None, *, force: bool = False
) -> Iterator[tuple[list[Callable[[Row], None]], Callable[[Any], None]]]:
    """A function for each target that writes a row to it, and one that writes the report as JSON at the end.

    All files appear when the block succeeds, or none does.

    Raises:
        DataError: as `row_writer`.
    """
    files = [*targets, *filter(None, [report])]
    texts: list[str] = []
    with atomic_files(files, force=force) as drafts:
        with ExitStack() as stack:
            pairs = zip(targets, drafts[: len(targets)], strict=True)
            writers = [draft_writer(target, draft, check_layout(target, None)) for target, draft in pairs]
            yield [stack.enter_context(writer) for writer in writers], lambda value: texts.append(json_text(value))
        if report is not None:
            with naming(report, drafts[-1]):
                drafts[-1].write_text("".join(texts), encoding="utf-8", errors="backslashreplace")


@contextmanager
def draft_writer(target: Path, draft: Path, layout: str) -> Iterator[Callable[[Row], None]]:
    """A function that writes a row to the draft of a target. Errors of the disk name the target."""
    with naming(target, draft), _OPENERS[target.suffix](draft, layout) as write:

        def write_row(row: Row) -> None:
            try:
                with naming(target, draft):
                    write(record_of(row, layout))
            except UnicodeEncodeError as error:
                raise DataError(
                    f"row {row.id!r}: holds a lone surrogate, which UTF-8 cannot encode ({error.reason}). Fix or drop the row"
                ) from error

        yield write_row


def check_layout(target: Path, layout: str | None) -> str:
    """The layout to write a file in.

    Raises:
        DataError: an unknown suffix or layout, or conversations in CSV.
    """
    if target.suffix not in SUFFIXES:
        raise DataError(f"{target}: unknown file type {target.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    layout = layout or (_CSV_LAYOUT if target.suffix == ".csv" else "messages")
    if layout not in LAYOUTS:
        raise DataError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if target.suffix == ".csv" and layout not in PAIRS:
        raise DataError(f"{target}: the layout {layout!r} has lists, which CSV cannot hold. Use {_CSV_LAYOUT} or JSONL")
    return layout


def record_of(row: Row, layout: str) -> dict[str, Any]:
    """A row as one record of a layout, which `parse_row` reads back exactly.

    Raises:
        DataError: a conversation with several turns, a system message or further keys of messages, in a layout of one
            question and answer.
    """
    record = row.to_dict()
    if layout == "messages":
        return record
    messages = record.pop("messages")
    if layout == "conversations":
        turns = [
            {"from": _SHAREGPT_NAMES[message.pop("role")], "value": message.pop("content"), **message}
            for message in messages
        ]
        return record | {"conversations": turns}
    question_column, context_column, answer_column = PAIRS[layout]
    if [role for role, _ in row.messages] != ["user", "assistant"]:
        roles = ", ".join(role for role, _ in row.messages)
        raise DataError(
            f"row {row.id!r}: messages of {roles} do not fit the layout {layout!r}, one question and one answer. Use "
            "messages or conversations"
        )
    if row.extras:
        keys = ", ".join(sorted({key for extras in row.extras.values() for key in extras}))
        raise DataError(
            f"row {row.id!r}: messages with {keys} do not fit the layout {layout!r}, which has texts only. Use messages or "
            "conversations"
        )
    (_, question), (_, answer) = row.messages
    context = {context_column: ""} if context_column else {}
    return record | {question_column: question} | context | {answer_column: answer}


def _columns(layout: str) -> list[str]:
    """All columns that a record of the layout may have, in order."""
    layout_columns = [name for name in PAIRS[layout] if name] if layout in PAIRS else [layout]
    return ["id", "domain", *layout_columns, "source", "licence", "topic", "subtopic", "tests", "check"]


# ---------------------------------------------------------------- file types


@contextmanager
def _jsonl(draft: Path, layout: str) -> Iterator[Write]:
    columns: Counter[str] = Counter()
    with draft.open("w", encoding="utf-8") as stream:

        def write(record: Mapping[str, Any]) -> None:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")
            columns.update(record.keys())

        yield write
    if len(set(columns.values())) > 1:
        _fill_columns(draft, columns)


def _fill_columns(draft: Path, columns: Iterable[str]) -> None:
    """Give every row all columns. `datasets` reads the columns from the first 10 MB, and refuses others later on."""
    uneven = draft.rename(draft.with_suffix(".uneven"))
    try:
        with uneven.open(encoding="utf-8") as lines, draft.open("w", encoding="utf-8") as stream:
            for line in lines:
                record = dict.fromkeys(columns, "") | json.loads(line)
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
    finally:
        uneven.unlink()


@contextmanager
def _json(draft: Path, layout: str) -> Iterator[Write]:
    with draft.open("w", encoding="utf-8") as stream:
        separator = "[\n"

        def write(record: Mapping[str, Any]) -> None:
            nonlocal separator
            stream.write(separator + json.dumps(record, ensure_ascii=False))
            separator = ",\n"

        yield write
        stream.write("[]\n" if separator == "[\n" else "\n]\n")


@contextmanager
def _csv(draft: Path, layout: str) -> Iterator[Write]:
    with draft.open("w", encoding="utf-8", newline="") as stream:
        table = csv.DictWriter(stream, _columns(layout), restval="")
        table.writeheader()
        yield table.writerow


@contextmanager
def _parquet(draft: Path, layout: str) -> Iterator[Write]:
    """The rows are first written as JSONL, since the keys of the messages are only known at the end."""
    rows_file = draft.with_suffix(".uneven")
    message_keys: set[str] = set()
    try:
        with rows_file.open("w", encoding="utf-8") as stream:

            def write(record: Mapping[str, Any]) -> None:
                record = dict(record)
                if layout in CHAT_LAYOUTS:
                    record[layout] = [_flat(message) for message in record[layout]]
                    message_keys.update(key for message in record[layout] for key in message)
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")

            yield write
        _write_parquet(rows_file, draft, layout, message_keys)
    finally:
        rows_file.unlink(missing_ok=True)


def _flat(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose values fit into a column: lists as JSON text, which `parse_row` reads."""
    return {
        key: value if isinstance(value, str | int) else json.dumps(value, ensure_ascii=False, default=str)
        for key, value in message.items()
    }


def _write_parquet(rows_file: Path, draft: Path, layout: str, message_keys: set[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def column_type(column: str) -> Any:
        if column not in CHAT_LAYOUTS:
            return pa.string()
        keys = [*CHAT_LAYOUTS[layout], *(key for key in MESSAGE_KEYS if key in message_keys)]
        return pa.list_(pa.struct([(key, pa.int64() if key == "weight" else pa.string()) for key in keys]))

    schema = pa.schema([(column, column_type(column)) for column in _columns(layout)])
    with rows_file.open(encoding="utf-8") as lines, pq.ParquetWriter(draft, schema) as file:
        while batch := [json.loads(line) for line in islice(lines, _ROWS_PER_GROUP)]:
            file.write_table(pa.Table.from_pylist(batch, schema=schema))


_OPENERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
