"""List every problem of every row, with its file and line, not only the first."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.data.schema import PAIR_LAYOUTS, ROLES, SHAREGPT_ROLES, pair_layout
from ultrafuser.data.sources import local_files, read_file, read_records
from ultrafuser.data.tools.streaming import estimate_rows
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_TEXT_FIELDS = ("source", "licence", "topic", "subtopic", "tests", "check")
_KNOWN_COLUMNS = {"id", "domain", "messages", "conversations", *_TEXT_FIELDS}
_REPORT_EVERY = 500  # rows between two reports of progress
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_TYPO_SIMILARITY = 0.75  # an unknown column this similar to a known one is taken for a typo


@dataclass
class Findings:
    """The problems and notes of some sources.

    Attributes:
        rows: number of lines or records, unreadable ones included.
        problems: each with its file and line. A row with a problem cannot be used.
        notes: possible mistakes: columns that are not read, rows without a licence.
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
    columns: Counter[str] = Counter()
    empty: Counter[str] = Counter()
    locations_of_ids: dict[str, str] = {}
    for source in sources:
        rows_before = findings.rows
        for raw, location, problem in _records(source):
            problems = [problem] if problem else list(problems_of(raw, domain))
            findings.rows += 1
            if isinstance(raw, Mapping) and not problem:
                row_id = raw.get("id")  # without one, `parse_row` makes it from the content
                if (
                    row_id not in (None, "")
                    and (first := locations_of_ids.setdefault(str(row_id), location)) != location
                ):
                    problems.append(f"id {str(row_id)!r} is also the id of {first}, expected unique ids")
                columns.update(str(key) for key in raw)
                empty.update(key for key in ("source", "licence") if not raw.get(key))
                domains[str(domain or raw.get("domain") or "")] += 1
            findings.bad_rows += bool(problems)
            findings.problems += [{"where": location, "problem": text} for text in problems]
            if findings.rows % _REPORT_EVERY == 0:
                progress.advance(_REPORT_EVERY)
        if findings.rows == rows_before:
            findings.problems.append({"where": source, "problem": "no rows"})
    progress.finish()
    findings.domains = dict(sorted((name, count) for name, count in domains.items() if name))
    known = _KNOWN_COLUMNS | {column for layout in PAIR_LAYOUTS for column in layout if column}
    for column, count in sorted(columns.items()):
        if column not in known:
            similar = difflib.get_close_matches(column, sorted(known), 1, _TYPO_SIMILARITY)
            hint = f". Is it {similar[0]!r}?" if similar else ""
            findings.notes.append(f"column {column!r} of {count} rows is not read{hint}")
    findings.notes += [f"{count} rows without a {key}" for key, count in sorted(empty.items())]
    return findings


def problems_of(raw: Any, domain: str | None = None) -> Iterator[str]:
    """Every problem of one raw record. None for a record that `parse_row` reads."""
    if not isinstance(raw, Mapping):
        yield f"expected a JSON object, got {type(raw).__name__}"
        return
    turns_key = next((key for key in ("messages", "conversations") if raw.get(key) is not None), None)
    if turns_key is not None:
        yield from _turn_problems(raw[turns_key], turns_key)
    else:
        yield from _pair_problems(raw)
    row_domain = domain or raw.get("domain")
    if not row_domain:
        yield "no domain. Add a 'domain' column or give one for all rows with --domain"
    elif not isinstance(row_domain, str):
        yield f"domain {row_domain!r}: expected text, got {type(row_domain).__name__}"
    for key in _TEXT_FIELDS:
        if raw.get(key) is not None and not isinstance(raw[key], str):
            yield f"{key!r}: expected text, got {type(raw[key]).__name__}"
    for key, value in raw.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        if _LONE_SURROGATE.search(text):
            yield f"{key!r}: holds a lone surrogate, half of a character"
    for key in ("tests", "check"):
        if isinstance(raw.get(key), str):
            try:
                ast.parse(raw[key])
            except (SyntaxError, ValueError) as error:  # ValueError: null bytes
                yield f"{key!r}: not Python: {error}"


def _turn_problems(turns: Any, key: str) -> Iterator[str]:
    role_key, content_key = ("role", "content") if key == "messages" else ("from", "value")
    if not isinstance(turns, list | tuple):
        yield f"{key!r}: expected a list of objects with {role_key!r} and {content_key!r}, got {type(turns).__name__}"
        return
    roles = []
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            yield f"{key}[{index}]: expected an object with {role_key!r} and {content_key!r}, got {type(turn).__name__}"
            continue
        raw_role = turn.get(role_key, turn.get("role"))
        content = turn.get(content_key, turn.get("content"))
        role = SHAREGPT_ROLES.get(str(raw_role), raw_role)
        roles.append(role)
        if role not in ROLES:
            yield f"{key}[{index}]: role {raw_role!r}, expected one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            yield f"{key}[{index}]: the content is {type(content).__name__}, expected text"
        elif not content.strip():
            yield f"{key}[{index}]: empty content"
    if len(roles) < len(turns) or any(role not in ROLES for role in roles):
        return  # the order is meaningless with wrong roles
    turn_roles = roles[1:] if roles[:1] == ["system"] else roles
    if not turn_roles:
        yield f"{key!r}: a conversation without messages"
    elif turn_roles != ["user", "assistant"] * (len(turn_roles) // 2):
        yield f"roles must alternate user, assistant and end with assistant, got {', '.join(map(str, roles))}"


def _pair_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    try:
        question, _, answer = pair_layout(raw, "")
    except DataError as error:
        yield str(error).removeprefix(": ")
        return
    for column in (question, answer):
        value = raw[column]
        if not isinstance(value, str):
            yield f"column {column!r}: expected text, got {type(value).__name__}"
        elif not value.strip():
            yield f"column {column!r} is empty"


# ---------------------------------------------------------------- reading records


def _records(source: str) -> Iterator[tuple[Any, str, str | None]]:
    """Raw records with their location. An unreadable record is None, with its problem."""
    files = local_files(source)
    if not files:
        yield from ((raw, location, None) for raw, location in read_records(source))  # a hub data set, or the error
    for file in files:
        if file.suffix == ".jsonl":
            yield from _lines(file)
            continue
        try:
            for raw, location in read_file(file):
                yield raw, location, None
        except DataError as error:
            yield None, str(file), str(error).removeprefix(f"{file}: ")


def _lines(file: Path) -> Iterator[tuple[Any, str, str | None]]:
    with file.open("rb") as stream:
        for line_number, line in enumerate(stream, 1):
            location = f"{file}:{line_number}"
            try:
                text = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield None, location, f"not UTF-8 at byte {error.start} of the line"
                continue
            if not text.strip():
                yield None, location, "empty line, expected one JSON object"
                continue
            try:
                yield json.loads(text), location, None
            except json.JSONDecodeError as error:
                yield None, location, f"not JSON: {error.msg} at column {error.colno}"
