"""A row: one conversation. The common layouts of data sets are parsed into rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ultrafuser.errors import DataError

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# (question, context, answer) columns of the layouts on the hub, tried in this order.
PAIR_LAYOUTS = (
    ("instruction", "input", "output"),
    ("instruction", "input", "response"),
    ("instruction", "context", "response"),
    ("instruction", None, "output"),
    ("instruction", None, "response"),
    ("prompt", None, "completion"),
    ("prompt", None, "response"),
    ("query", None, "response"),
    ("question", None, "answer"),
    ("problem", None, "solution"),
)


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

    def chat(self) -> list[dict[str, str]]:
        """The messages in the form that chat templates take."""
        return [{"role": role, "content": content} for role, content in self.messages]

    def to_dict(self) -> dict[str, Any]:
        """The row as one JSON object, without optional keys that are None."""
        fields = asdict(self) | {"messages": self.chat()}
        return {key: value for key, value in fields.items() if value is not None}


def parse_row(raw: Mapping[str, Any], location: str, domain: str | None = None) -> Row:
    """Read one raw record in any of the known layouts.

    Args:
        raw: the record: `messages`, ShareGPT `conversations`, or instruction/answer columns.
        location: file and line, for error messages.
        domain: the stratum to use instead of the domain in the record.

    Raises:
        DataError: not an object, no known layout, empty content, a wrong role or role order, no domain.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{location}: expected a JSON object, got {type(raw).__name__}")
    messages = _messages(raw, location)
    _check_messages(messages, location)
    domain = domain or raw.get("domain")
    if not domain or not isinstance(domain, str):
        raise DataError(f"{location}: no domain. Add a 'domain' column or give the source one in the recipe")
    text = "\x1f".join(content for _, content in messages)
    row_id = raw.get("id")
    return Row(
        id=hashlib.sha256(text.encode()).hexdigest()[:12] if row_id in (None, "") else str(row_id),
        domain=domain,
        messages=messages,
        **{key: str(raw.get(key) or "") for key in ("source", "licence", "topic", "subtopic")},
        tests=raw.get("tests") or None,
        check=raw.get("check") or None,
    )


def _messages(raw: Mapping[str, Any], location: str) -> tuple[tuple[str, str], ...]:
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if raw.get(key) is not None:
            return _turns(raw[key], key, role_key, content_key, location)
    question_column, context_column, answer_column = pair_layout(raw, location)
    question, answer = raw[question_column], raw[answer_column]
    for column, value in ((question_column, question), (answer_column, answer)):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{location}: column {column!r} is empty")
    context = raw.get(context_column) if context_column else None
    if isinstance(context, str) and context.strip():
        question = f"{question.strip()}\n\n{context.strip()}"
    return (("user", question.strip()), ("assistant", answer.strip()))


def pair_layout(raw: Mapping[str, Any], location: str) -> tuple[str, str | None, str]:
    """The columns of the question, its context and the answer in one raw record.

    Raises:
        DataError: no known layout.
    """
    for layout in PAIR_LAYOUTS:
        if all(column in raw for column in layout if column):
            return layout
    layouts = "; ".join("/".join(column for column in layout if column) for layout in PAIR_LAYOUTS)
    raise DataError(
        f"{location}: no known layout in the columns {sorted(map(str, raw))}, expected 'messages', 'conversations', or "
        f"one of {layouts}"
    )


def _turns(turns: Any, key: str, role_key: str, content_key: str, location: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
        raise DataError(f"{location}: {key!r} must be a list of objects with {role_key!r} and {content_key!r}")
    messages = []
    for index, turn in enumerate(turns):
        role = turn.get(role_key, turn.get("role"))
        content = turn.get(content_key, turn.get("content"))
        role = SHAREGPT_ROLES.get(str(role), role)
        if role not in ROLES:
            raise DataError(f"{location}: {key}[{index}]: role {role!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(content, str) or not content.strip():
            raise DataError(f"{location}: {key}[{index}]: empty content of the {role}")
        messages.append((str(role), content.strip()))
    return tuple(messages)


def _check_messages(messages: tuple[tuple[str, str], ...], location: str) -> None:
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise DataError(f"{location}: a conversation without messages")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        got = ", ".join(roles)
        raise DataError(f"{location}: roles must alternate user, assistant and end with assistant, got {got}")
