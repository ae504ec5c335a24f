"""Every problem of every row, with its file and line, instead of the first one alone."""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.data.schema import _PAIR_LAYOUTS, _SHAREGPT_ROLES, ROLES, parse_row
from ultrafuser.data.sources import local_files, read_file, read_records
from ultrafuser.data.tools.streaming import estimate_rows
from ultrafuser.errors import DataError
from ultrafuser.progress import Progress

_TEXT_FIELDS = ("source", "licence", "topic", "subtopic", "tests", "check")
_KNOWN = {"id", "domain", "messages", "conversations", *_TEXT_FIELDS}
_STEP = 500
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
_NEAREST = 0.75  # how alike an unknown column must be to a known one to be taken for a slip


@dataclass
class Findings:
    """What was found in some sources.

    Attributes:
        rows: lines or records, unreadable ones too.
        problems: each with the file and line it is about; rows that have one cannot be used.
        notes: what may be meant so: columns that are not read, rows without a licence.
    """

    rows: int = 0
    bad_rows: int = 0
    domains: dict[str, int] = field(default_factory=dict)
    problems: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The findings as JSON."""
        return asdict(self)


def validate(sources: Sequence[str], *, domain: str | None = None, progress: Progress | None = None) -> Findings:
    """Look at every row of every source; nothing but a source that is not there stops it.

    Args:
        sources: as in `load_rows`.
        domain: the stratum of all rows; by default each row's own.

    Raises:
        DataError: a source that is not there.
    """
    progress = progress or Progress()
    progress.start("rows looked at", estimate_rows(sources))
    found = Findings()
    domains: Counter[str] = Counter()
    columns: Counter[str] = Counter()
    without: Counter[str] = Counter()
    places: dict[str, str] = {}
    for source in sources:
        rows_before = found.rows
        for raw, where, problem in _records(source):
            problems = [problem] if problem else list(problems_of(raw, domain))
            found.rows += 1
            if isinstance(raw, Mapping) and not problem:
                problems += _repeated(raw, where, places)
                columns.update(str(key) for key in raw)
                without.update(key for key in ("source", "licence") if not raw.get(key))
                domains[str(domain or raw.get("domain") or "")] += 1
            found.bad_rows += bool(problems)
            found.problems += [{"where": where, "problem": text} for text in problems]
            if found.rows % _STEP == 0:
                progress.advance(_STEP)
        if found.rows == rows_before:
            found.problems.append({"where": source, "problem": "no rows"})
    progress.finish()
    found.domains = dict(sorted((name, count) for name, count in domains.items() if name))
    found.notes = [*_unread(columns), *(f"{count} rows without a {key}" for key, count in sorted(without.items()))]
    return found


def problems_of(raw: Any, domain: str | None = None) -> Iterator[str]:
    """Everything that is wrong with one raw record; nothing for one that `parse_row` reads."""
    if not isinstance(raw, Mapping):
        yield f"expected a JSON object, got {type(raw).__name__}"
        return
    turns_of = next((key for key in ("messages", "conversations") if raw.get(key) is not None), None)
    if turns_of is not None:
        yield from _turn_problems(raw[turns_of], turns_of)
    else:
        yield from _pair_problems(raw)
    own = domain or raw.get("domain")
    if not own:
        yield "no domain; add a 'domain' column or give one for all rows with --domain"
    elif not isinstance(own, str):
        yield f"domain {own!r}: expected text, got {type(own).__name__}"
    for key in _TEXT_FIELDS:
        if raw.get(key) is not None and not isinstance(raw[key], str):
            yield f"{key!r}: expected text, got {type(raw[key]).__name__}"
    for key, value in raw.items():
        if _LONE_SURROGATE.search(
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        ):
            yield f"{key!r}: holds half a character (a lone surrogate)"
    for key in ("tests", "check"):
        if isinstance(raw.get(key), str):
            yield from _code_problems(key, raw[key])


def _turn_problems(turns: Any, key: str) -> Iterator[str]:
    role_key, content_key = ("role", "content") if key == "messages" else ("from", "value")
    if not isinstance(turns, list | tuple):
        yield f"{key!r}: expected a list of objects with {role_key!r} and {content_key!r}, got {type(turns).__name__}"
        return
    roles = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            yield f"{key}[{number}]: expected an object with {role_key!r} and {content_key!r}, got {type(turn).__name__}"
            continue
        given = turn.get(role_key, turn.get("role"))
        content = turn.get(content_key, turn.get("content"))
        role = _SHAREGPT_ROLES.get(str(given), given)
        roles.append(role)
        if role not in ROLES:
            yield f"{key}[{number}]: role {given!r}, expected one of {', '.join(ROLES)}"
        if not isinstance(content, str):
            yield f"{key}[{number}]: the content is {type(content).__name__}, expected text"
        elif not content.strip():
            yield f"{key}[{number}]: empty content"
    if len(roles) < len(turns) or any(role not in ROLES for role in roles):
        return  # their order says nothing
    rest = roles[1:] if roles[:1] == ["system"] else roles
    if not rest:
        yield f"{key!r}: a conversation without messages"
    elif rest != ["user", "assistant"] * (len(rest) // 2):
        yield f"roles must alternate user, assistant and end with assistant; got {', '.join(map(str, roles))}"


def _pair_problems(raw: Mapping[str, Any]) -> Iterator[str]:
    for asked, extra, answered in _PAIR_LAYOUTS:
        if asked in raw and answered in raw and (extra is None or extra in raw):
            for column in (asked, answered):
                value = raw[column]
                if not isinstance(value, str):
                    yield f"column {column!r}: expected text, got {type(value).__name__}"
                elif not value.strip():
                    yield f"column {column!r} is empty"
            return
    try:
        parse_row(raw, "", "any")
    except DataError as error:
        yield str(error).removeprefix(": ")


def _code_problems(key: str, code: str) -> Iterator[str]:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError) as error:  # ValueError: null bytes
        yield f"{key!r}: not Python: {error}"


def _repeated(raw: Mapping[str, Any], where: str, places: dict[str, str]) -> list[str]:
    """A problem where an id stands in an earlier row too; `places` remembers them."""
    given = raw.get("id")
    if given in (None, ""):
        return []  # one is made from the content
    first = places.setdefault(str(given), where)
    return [] if first == where else [f"id {str(given)!r} is that of {first} too; ids must differ"]


def _unread(columns: Counter[str]) -> Iterator[str]:
    """Columns that nothing reads, with what may be meant."""
    known = _KNOWN | {column for layout in _PAIR_LAYOUTS for column in layout if column}
    for column, count in sorted(columns.items()):
        if column not in known:
            near = difflib.get_close_matches(column, sorted(known), 1, _NEAREST)
            hint = f"; is it {near[0]!r}?" if near else ""
            yield f"column {column!r} of {count} rows is not read{hint}"


# ---------------------------------------------------------------- records, and those that are none


def _records(source: str) -> Iterator[tuple[Any, str, str | None]]:
    """Raw records with their place; None and a problem for what cannot be read."""
    files = local_files(source)
    if not files:
        yield from ((raw, where, None) for raw, where in read_records(source))  # a hub data set, or the error
    for file in files:
        if file.suffix == ".jsonl":
            yield from _lines(file)
            continue
        try:
            for raw, where in read_file(file):
                yield raw, where, None
        except DataError as error:
            yield None, str(file), str(error).removeprefix(f"{file}: ")


def _lines(file: Path) -> Iterator[tuple[Any, str, str | None]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            where = f"{file}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                yield None, where, f"not UTF-8 at byte {error.start} of the line"
                continue
            if not text.strip():
                yield None, where, "empty line; expected one JSON object"
                continue
            try:
                yield json.loads(text), where, None
            except json.JSONDecodeError as error:
                yield None, where, f"not JSON: {error.msg} at column {error.colno}"
