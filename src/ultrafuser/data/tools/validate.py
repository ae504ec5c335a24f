"""List every problem of every row, with its file and line, not only the first."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.data.layouts import is_missing
from ultrafuser.data.records import Record, scan_file, scan_hub
from ultrafuser.data.row_files import find_files
from ultrafuser.data.schema import parse_record
from ultrafuser.data.sources import column_note, unread_note
from ultrafuser.data.tools.streaming import estimate_rows
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_REPORT_EVERY = 500  # rows between two reports of progress


@dataclass
class Findings:
    """The problems and notes of some sources.

    Attributes:
        rows: number of lines or records, unreadable ones included.
        problems: each with its file and line. A row with a problem cannot be used.
        notes: possible mistakes: columns that are not used, files that are not read, rows without a licence.
    """

    rows: int = 0
    bad_rows: int = 0
    domains: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def validate(sources: Sequence[str], *, domain: str | None = None, progress: Progress | None = None) -> Findings:
    """Check every row of every source. Only a missing source stops it.

    Args:
        sources: as in `load_rows`.
        domain: the stratum of all rows. None: the domain that each row names.

    Raises:
        DataError: a missing source.
    """
    progress = progress or Progress()
    progress.start("rows checked", estimate_rows(sources))
    findings = Findings()
    domains: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    locations_of_ids: dict[str, str] = {}
    for source in sources:
        rows_before = findings.rows
        unread = find_files(source).unread
        findings.notes += [unread_note(unread)] if unread else []
        for record in _records(source):
            findings.rows += 1
            problems = [record.problem] if record.problem else []
            if not problems:
                parsed = parse_record(record.value, domain)
                problems = [*parsed.problems, *_code_problems(record.value)]
                unused.update(parsed.unused)
            if not record.problem and isinstance(record.value, Mapping):
                row_id = record.value.get("id")  # without one, `parse_row` makes it from the content
                first = (
                    record.location if is_missing(row_id) else locations_of_ids.setdefault(str(row_id), record.location)
                )
                if first != record.location:
                    problems.append(f"id {str(row_id)!r} is also the id of {first}, expected unique ids")
                empty.update(key for key in ("source", "licence") if not record.value.get(key))
                domains[str(domain or record.value.get("domain") or "")] += 1
            findings.bad_rows += bool(problems)
            findings.problems += [{"where": record.location, "problem": text} for text in problems]
            if findings.rows % _REPORT_EVERY == 0:
                progress.advance(_REPORT_EVERY)
        if findings.rows == rows_before:
            findings.problems.append({"where": source, "problem": "no rows"})
    progress.finish()
    findings.domains = dict(sorted((name, count) for name, count in domains.items() if name))
    findings.notes += [f"column not used: {column_note(item)}" for item in sorted(unused.items())]
    findings.notes += [f"{count} rows without a {key}" for key, count in sorted(empty.items())]
    return findings


def problems_of(raw: Any, domain: str | None = None) -> list[str]:
    """Every problem of one raw record. Empty for a record that `parse_row` reads and whose code is Python."""
    return [*parse_record(raw, domain).problems, *_code_problems(raw)]


def _code_problems(raw: Any) -> Iterator[str]:
    for key in ("tests", "check"):
        value = raw.get(key) if isinstance(raw, Mapping) else None
        text = "\n".join(map(str, value)) if isinstance(value, list) else value
        if isinstance(text, str):
            try:
                ast.parse(text)
            except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # ValueError: null bytes
                yield f"{key!r}: not Python: {error}"


def _records(source: str) -> Iterator[Record]:
    """The records of a source. An unreadable file is one record with a problem."""
    files = find_files(source).paths
    if not files:
        yield from scan_hub(source)  # a hub data set, or the error
    for file in files:
        try:
            yield from scan_file(file)
        except DataError as error:
            index, _, problem = str(error).removeprefix(str(file)).partition(": ")
            yield Record(None, f"{file}{index}", problem)
        except OSError as error:
            yield Record(None, str(file), f"cannot be read: {error.strerror or error}")
