"""A row: one conversation. The common layouts of data sets are parsed into rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ultrafuser.data.json_text import LONE_SURROGATE, has_lone_surrogate
from ultrafuser.data.layouts import Conversation, as_text, is_missing, read_conversation
from ultrafuser.errors import DataError

_TEXT_COLUMNS = ("source", "licence", "topic", "subtopic")
_CODE_COLUMNS = ("tests", "check")


@dataclass(frozen=True)
class Row:
    """A conversation and its origin.

    Attributes:
        id: unique within its data set. Made from the content if the source has none.
        domain: the stratum that the balanced sampler counts, e.g. `text`, `code`, `math`, `mixed`. Strata and
            specialists need not correspond.
        messages: (role, content) pairs, the last one an assistant's.
        tests: Python statements to run after the code of the last answer (code rows), if any.
        check: Python statements that verify the last answer, held in `answer` (math rows), if any.
        extras: further keys of messages, by the index of the message: `weight` (0: the answer is not learned),
            `reasoning_content`, `tool_calls`, `tool_call_id`, `name`.
    """

    id: str
    domain: str
    messages: tuple[tuple[str, str], ...]
    source: str = ""
    licence: str = ""
    topic: str = ""
    subtopic: str = ""
    tests: str | None = None
    check: str | None = None
    extras: Mapping[int, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def chat(self) -> list[dict[str, Any]]:
        """The messages in the form that chat templates take."""
        return [
            {"role": role, "content": content, **self.extras.get(index, {})}
            for index, (role, content) in enumerate(self.messages)
        ]

    def to_dict(self) -> dict[str, Any]:
        """The row as one JSON object, without optional keys that are None."""
        values = {column.name: getattr(self, column.name) for column in fields(self)} | {"messages": self.chat()}
        return {key: value for key, value in values.items() if value is not None and key != "extras"}


@dataclass
class ParsedRecord:
    """What one raw record holds.

    Attributes:
        row: None if there are problems.
        problems: everything that is wrong with the record.
        unused: columns with values that are not read, and keys of messages as `messages[].KEY`.
    """

    row: Row | None
    problems: list[str]
    unused: set[str] = field(default_factory=set)


def parse_row(raw: Mapping[str, Any], location: str, domain: str | None = None) -> Row:
    """Read one raw record in any of the known layouts.

    Args:
        raw: the record: `messages`, ShareGPT `conversations`, or instruction/answer columns.
        location: file and line, for error messages.
        domain: the stratum to use instead of the domain in the record.

    Raises:
        DataError: not an object, no known layout, empty content, a wrong role or role order, no domain.
    """
    parsed = parse_record(raw, domain)
    if parsed.row is None:
        raise DataError(f"{location}: {parsed.problems[0]}")
    return parsed.row


def parse_record(raw: Any, domain: str | None = None) -> ParsedRecord:
    """Read one raw record in any of the known layouts, and list all its problems."""
    if not isinstance(raw, Mapping):
        return ParsedRecord(None, [f"expected a JSON object, got {type(raw).__name__}"])
    talk = read_conversation(raw)
    problems = talk.problems
    row_domain = _domain(raw, domain, problems)
    texts = {column: _text(raw, column, problems) for column in ("id", *_TEXT_COLUMNS)}
    code = {column: _code(raw, column, problems) for column in _CODE_COLUMNS}
    _check_characters(talk, {"domain": row_domain, **texts, **code}, problems)
    known = {"id", "domain", *_TEXT_COLUMNS, *_CODE_COLUMNS} | talk.columns
    unused = {str(key) for key, value in raw.items() if key not in known and not is_missing(value)} | talk.unused_keys
    if problems:
        return ParsedRecord(None, problems, unused)
    messages = tuple((turn.role, turn.content) for turn in talk.turns)
    content = "\x1f".join(content for _, content in messages)
    row = Row(
        id=texts.pop("id") or hashlib.sha256(content.encode()).hexdigest()[:12],
        domain=row_domain,
        messages=messages,
        extras={index: turn.extras for index, turn in enumerate(talk.turns) if turn.extras},
        tests=code["tests"] or None,
        check=code["check"] or None,
        **texts,
    )
    return ParsedRecord(row, [], unused)


def _domain(raw: Mapping[str, Any], domain: str | None, problems: list[str]) -> str:
    value = domain or raw.get("domain")
    if isinstance(value, str) and value:
        return value
    if is_missing(value):
        problems.append(
            "no domain. Add a 'domain' column, or give the source one (--domain, or 'domain' in the recipe)"
        )
    else:
        problems.append(f"domain {value!r}: expected text, got {type(value).__name__}")
    return ""


def _text(raw: Mapping[str, Any], column: str, problems: list[str]) -> str:
    text = as_text(raw.get(column))
    if text is None:
        problems.append(f"{column!r}: expected text, got {type(raw[column]).__name__}")
    return text or ""


def _code(raw: Mapping[str, Any], column: str, problems: list[str]) -> str:
    """Python statements: a text, or a list with one text for each statement."""
    value = raw.get(column)
    if isinstance(value, list | tuple) and all(isinstance(statement, str) for statement in value):
        return "\n".join(value)
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    problems.append(f"{column!r}: expected text or a list of texts, got {type(value).__name__}")
    return ""


def _check_characters(talk: Conversation, columns: Mapping[str, str], problems: list[str]) -> None:
    """Find lone surrogates, which no file of ours and no tokenizer can hold."""
    texts: dict[str, Any] = dict(columns)
    for index, turn in enumerate(talk.turns):
        texts[f"message {index}"] = turn.content
        texts |= {f"message {index}, {key}": value for key, value in turn.extras.items()}
    problems += [f"{name}: {LONE_SURROGATE}" for name, text in texts.items() if has_lone_surrogate(text)]
