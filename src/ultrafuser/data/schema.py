"""One conversation as ultrafuser keeps it, and how the common layouts become one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ultrafuser.errors import DataError

ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# (instruction, input, answer) columns of the layouts found on the hub, tried in this order.
_PAIR_LAYOUTS = (
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
    """A conversation and where it comes from.

    Attributes:
        id: unique within its data set; made from the content where the source has none.
        domain: the stratum that the balanced sampler counts, e.g. `text`, `code`, `math`, `mixed`. A stratum
            needs no specialist of its own, and a specialist needs no stratum.
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
        """The messages as chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]

    def to_dict(self) -> dict[str, Any]:
        """The row as one JSON object; empty optional keys are left out."""
        out = asdict(self) | {"messages": self.chat()}
        return {key: value for key, value in out.items() if value is not None}


def parse_row(raw: Mapping[str, Any], where: str, domain: str | None = None) -> Row:
    """Read one raw record in any of the known layouts.

    Args:
        raw: the record: `messages`, ShareGPT `conversations`, or instruction/answer columns.
        where: file and line, for the errors.
        domain: the stratum to use instead of the record's own.

    Raises:
        DataError: not an object, no known layout, empty content, a wrong role or role order, no domain.
    """
    if not isinstance(raw, Mapping):
        raise DataError(f"{where}: expected a JSON object, got {type(raw).__name__}")
    messages = _messages(raw, where)
    _check_messages(messages, where)
    domain = domain or raw.get("domain")
    if not domain or not isinstance(domain, str):
        raise DataError(f"{where}: no domain; add a 'domain' column or give the source one in the recipe")
    text = "\x1f".join(content for _, content in messages)
    given = raw.get("id")
    return Row(
        id=hashlib.sha256(text.encode()).hexdigest()[:12] if given in (None, "") else str(given),
        domain=domain,
        messages=messages,
        **{key: str(raw.get(key) or "") for key in ("source", "licence", "topic", "subtopic")},
        tests=raw.get("tests") or None,
        check=raw.get("check") or None,
    )


def _messages(raw: Mapping[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    for key, role_key, content_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        turns = raw.get(key)
        if turns is None:
            continue
        if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in turns):
            raise DataError(f"{where}: {key!r} must be a list of objects with {role_key!r} and {content_key!r}")
        found = []
        for number, turn in enumerate(turns):
            role = turn.get(role_key, turn.get("role"))
            content = turn.get(content_key, turn.get("content"))
            role = _SHAREGPT_ROLES.get(str(role), role)
            if role not in ROLES:
                raise DataError(f"{where}: {key}[{number}]: role {role!r}, expected one of {', '.join(ROLES)}")
            if not isinstance(content, str) or not content.strip():
                raise DataError(f"{where}: {key}[{number}]: empty content of the {role}")
            found.append((str(role), content.strip()))
        return tuple(found)
    for asked, extra, answered in _PAIR_LAYOUTS:
        if asked in raw and answered in raw and (extra is None or extra in raw):
            question, answer = raw[asked], raw[answered]
            for column, value in ((asked, question), (answered, answer)):
                if not isinstance(value, str) or not value.strip():
                    raise DataError(f"{where}: column {column!r} is empty")
            context = raw.get(extra) if extra else None
            if isinstance(context, str) and context.strip():
                question = f"{question.strip()}\n\n{context.strip()}"
            return (("user", question.strip()), ("assistant", answer.strip()))
    layouts = "; ".join("/".join(c for c in layout if c) for layout in _PAIR_LAYOUTS)
    raise DataError(
        f"{where}: no known layout in the columns {sorted(map(str, raw))}; expected 'messages', 'conversations', or "
        f"one of {layouts}"
    )


def _check_messages(messages: tuple[tuple[str, str], ...], where: str) -> None:
    roles = [role for role, _ in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns:
        raise DataError(f"{where}: a conversation without messages")
    if turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(f"{where}: roles must alternate user, assistant and end with assistant; got {', '.join(roles)}")
