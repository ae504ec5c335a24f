"""Read the rows of sources, skip or refuse bad rows, and report what was not used."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from ultrafuser.data.files import write_text
from ultrafuser.data.layouts import CONTEXT_COLUMNS, PAIR_LAYOUTS, SYSTEM_COLUMNS
from ultrafuser.data.records import Record, scan_file, scan_hub
from ultrafuser.data.row_files import find_files
from ultrafuser.data.schema import Row, parse_record
from ultrafuser.errors import DataError

OnBadRow = Literal["stop", "skip"]
_MAX_NAMES = 10  # files in a note
_TYPO_SIMILARITY = 0.75  # an unknown column this similar to a known one is taken for a typo
_KNOWN_COLUMNS = sorted(
    {"id", "domain", "messages", "conversations", "source", "licence", "topic", "subtopic", "tests", "check", "history"}
    | {column for layout in PAIR_LAYOUTS for column in layout if column}
    | {*CONTEXT_COLUMNS, *SYSTEM_COLUMNS}
)


class RowReader:
    """Reads rows, and counts everything that it does not use.

    Attributes:
        on_bad_row: `stop`: the first bad row is an error. `skip`: bad rows are left out and listed.
        num_rows: rows read so far.
        bad_rows: location and problem of each row that was skipped.
        unused_columns: number of rows that have a value in a column that is not read.
        unread_files: files beside the ones that were read.
    """

    def __init__(self, on_bad_row: OnBadRow = "stop") -> None:
        self.on_bad_row = on_bad_row
        self.num_rows = 0
        self.bad_rows: list[dict[str, str]] = []
        self.unused_columns: Counter[str] = Counter()
        self.unread_files: list[Path] = []

    def read(
        self,
        path: str,
        *,
        domain: str | None = None,
        split: str = "train",
        limit: int | None = None,
        revision: str | None = None,
        config: str | None = None,
    ) -> Iterator[Row]:
        """The rows of one source, as `load_rows`.

        Raises:
            DataError: as `load_rows`. A bad row only if `on_bad_row` is `stop`.
        """
        count, bad_rows_before = 0, len(self.bad_rows)
        for record in self._records(path, split, revision, config):
            problem = record.problem
            if problem is None:
                parsed = parse_record(record.value, domain)
                self.unused_columns.update(parsed.unused)
                if parsed.row is not None:
                    self.num_rows += 1
                    count += 1
                    yield parsed.row
                    if count == limit:
                        return
                    continue
                problem = parsed.problems[0]
            if self.on_bad_row == "stop":
                raise DataError(
                    f"{record.location}: {problem}. Fix the row, or skip bad rows with on_bad_row=skip (--on-bad-row skip)"
                )
            self.bad_rows.append({"where": record.location, "problem": problem})
        if not count:
            bad_rows = self.bad_rows[bad_rows_before:]
            first = f", all {len(bad_rows)} are bad, the first one {' '.join(bad_rows[0].values())}" if bad_rows else ""
            raise DataError(f"{path}: no rows{first}")

    def _records(self, path: str, split: str, revision: str | None, config: str | None) -> Iterator[Record]:
        files = find_files(path, split)
        self.unread_files += files.unread
        if not files.paths:
            yield from scan_hub(path, split, revision, config)
        for file in files.paths:
            try:
                yield from scan_file(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error

    def notes(self) -> list[str]:
        """One line for each kind of thing that was not used."""
        notes = []
        if self.unused_columns:
            columns = ", ".join(map(column_note, sorted(self.unused_columns.items())))
            notes.append(f"columns that are not used: {columns}")
        if self.unread_files:
            notes.append(unread_note(self.unread_files))
        if self.bad_rows:
            first = self.bad_rows[0]
            notes.append(
                f"skipped {len(self.bad_rows):,} bad rows of {self.num_rows + len(self.bad_rows):,}, the first one "
                f"{first['where']}: {first['problem']}"
            )
        return notes

    def write_bad_rows(self, file: Path) -> None:
        """List the skipped rows, one JSON object per line. Without any, the file is removed."""
        if not self.bad_rows:
            file.unlink(missing_ok=True)
            return
        write_text(file, "".join(json.dumps(row) + "\n" for row in self.bad_rows))


def column_note(count_of_column: tuple[str, int]) -> str:
    """An unused column with its number of rows, and the known column of a similar name."""
    column, count = count_of_column
    similar = difflib.get_close_matches(column, _KNOWN_COLUMNS, 1, _TYPO_SIMILARITY)
    hint = f", is it {similar[0]!r}?" if similar and similar[0] != column else ""
    return f"{column!r} ({count:,} rows{hint})"


def unread_note(files: Sequence[Path]) -> str:
    """The files that are not read, in one line."""
    names = ", ".join(str(file) for file in files[:_MAX_NAMES])
    more = f" and {len(files) - _MAX_NAMES} more" if len(files) > _MAX_NAMES else ""
    return f"files that are not read: {names}{more}"


def load_rows(
    path: str,
    *,
    domain: str | None = None,
    split: str = "train",
    limit: int | None = None,
    revision: str | None = None,
    config: str | None = None,
    reader: RowReader | None = None,
) -> list[Row]:
    """Read the rows of one source.

    Args:
        path: a file, a folder of files, a glob, `package:MODULE/FILE`, or a hub data set id (`owner/name`).
        domain: the stratum of all its rows. None: the domain that each row names.
        split: of a hub data set or a saved data set.
        revision, config: of a hub data set. `config` is its configuration, e.g. `main` of `openai/gsm8k`.
        limit: read at most this many rows. None: all.
        reader: counts what is not used, and may skip bad rows. None: the first bad row is an error.

    Raises:
        DataError: a missing or unreadable file, or a malformed row (with file and line number).
    """
    reader = reader or RowReader()
    return list(reader.read(path, domain=domain, split=split, limit=limit, revision=revision, config=config))


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as JSONL, one object per line."""
    path.write_text("".join(json.dumps(row.to_dict(), ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
