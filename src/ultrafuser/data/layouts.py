"""From a raw record in any known layout to the turns of one conversation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from ultrafuser.data.json_text import JsonProblem, decode_json

ROLES = ("system", "user", "assistant", "tool")
ROLE_ALIASES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "developer": "system",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
CHAT_LAYOUTS = {"messages": ("role", "content"), "conversations": ("from", "value")}
# (question, context, answer) columns of the layouts on the hub, tried in this order. Context is also read where a layout
# does not name it.
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
    ("question", None, "response"),
    ("problem", None, "solution"),
)
CONTEXT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
# Keys of a message besides its role and content.
MESSAGE_KEYS = ("weight", "reasoning_content", "tool_calls", "tool_call_id", "name")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_ORDER = re.compile(r"(?:ua(?:t+a)*)+")  # user, assistant, and tools only between two assistants
_LEADING_BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)+")


@dataclass
class Turn:
    """One message. `extras` holds its further keys, out of MESSAGE_KEYS."""

    role: str
    content: str
    extras: dict[str, Any] = field(default_factory=dict)


@dataclass
class Conversation:
    """The turns of a record.

    Attributes:
        columns: the columns that were read.
        unused_keys: keys of messages that were not read.
        problems: what is wrong with the record. Empty: it can be used.
    """

    turns: list[Turn] = field(default_factory=list)
    columns: set[str] = field(default_factory=set)
    unused_keys: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


def read_conversation(raw: Mapping[str, Any]) -> Conversation:
    """The turns of one raw record, and everything that is wrong with them."""
    talk = Conversation()
    chats = sorted((is_missing(raw[key]), key) for key in CHAT_LAYOUTS if raw.get(key) is not None)
    pair = _pair_columns(raw)
    if chats and (pair is None or not is_missing(raw[chats[0][1]])):
        key = chats[0][1]
        talk.columns.add(key)
        _add_chat(talk, raw[key], key, *CHAT_LAYOUTS[key])
    elif pair is not None:
        _add_pair(talk, raw, *pair)
    else:
        layouts = "; ".join("/".join(filter(None, layout)) for layout in PAIR_LAYOUTS)
        talk.problems.append(
            f"no known layout in the columns {sorted(map(str, raw))}, expected 'messages', 'conversations', or one of "
            f"{layouts}"
        )
        return talk
    _add_system(talk, raw)
    if not talk.problems:
        _check_turns(talk)
    return talk


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, an empty text or list, or the NaN that pandas writes for a missing text."""
    return value is None or (isinstance(value, float) and math.isnan(value)) or value in ("", [], ())


def as_text(value: Any) -> str | None:
    """Text, or a number as text. Empty for a missing value. None for anything else."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    return str(value) if isinstance(value, int) or math.isfinite(value) else None


def clean(text: str) -> str:
    """A text without blank lines before it and white space after it.

    The indentation of its first line is kept, since code needs it. A single leading space is removed: completions of some
    data sets begin with one.
    """
    text = _LEADING_BLANK_LINES.sub("", text).rstrip()
    unindented = text.lstrip()
    indentation = text[: len(text) - len(unindented)]
    return unindented if indentation != "\t" and len(indentation) < 2 else text


# ---------------------------------------------------------------- chats


def _add_chat(talk: Conversation, value: Any, key: str, role_key: str, content_key: str) -> None:
    turns = _parse_list(value)
    if not isinstance(turns, list | tuple):
        talk.problems.append(
            f"{key!r} must be a list of objects with {role_key!r} and {content_key!r}, got {_type_name(value)}"
        )
        return
    for index, turn in enumerate(turns):
        location = f"{key}[{index}]"
        if not isinstance(turn, Mapping):
            talk.problems.append(
                f"{location}: must be an object with {role_key!r} and {content_key!r}, got {_type_name(turn)}"
            )
            continue
        raw_role = turn.get(role_key, turn.get("role"))
        role = str(raw_role).strip().lower()
        role = ROLE_ALIASES.get(role, role)
        if role not in ROLES:
            talk.problems.append(f"{location}: role {raw_role!r}, expected one of {', '.join(ROLES)}")
        extras = _extras(talk, turn, location)
        content = _content(talk, turn.get(content_key, turn.get("content")), location)
        if content == "" and role == "system":  # no system message
            continue
        if content == "" and not extras.get("tool_calls"):
            talk.problems.append(f"{location}: empty content of the {role}")
        talk.turns.append(Turn(role, content or "", extras))
        read_keys = {role_key, content_key, "role", "content", *MESSAGE_KEYS}
        talk.unused_keys |= {
            f"{key}[].{name}" for name, cell in turn.items() if name not in read_keys and not is_missing(cell)
        }


def _extras(talk: Conversation, turn: Mapping[str, Any], location: str) -> dict[str, Any]:
    extras = {key: turn[key] for key in MESSAGE_KEYS if not is_missing(turn.get(key))}
    if "weight" in extras:
        if extras["weight"] not in (0, 1):
            talk.problems.append(f"{location}: weight {extras['weight']!r}, expected 0 or 1")
        else:
            extras["weight"] = int(extras["weight"])
    if "tool_calls" in extras:
        extras["tool_calls"] = _parse_list(extras["tool_calls"])
        calls = extras["tool_calls"]
        if not isinstance(calls, list | tuple) or not all(isinstance(call, Mapping) for call in calls):
            talk.problems.append(f"{location}: 'tool_calls' must be a list of objects, got {_type_name(calls)}")
    for key in ("reasoning_content", "tool_call_id", "name"):
        if key in extras and not isinstance(extras[key], str):
            talk.problems.append(f"{location}: {key!r} must be text, got {_type_name(extras[key])}")
    return extras


def _content(talk: Conversation, value: Any, location: str) -> str | None:
    """The text of a message. Text parts are joined. None, with a problem, if it is not text."""
    if isinstance(value, list | tuple) and value:
        texts = []
        for part in value:
            if not isinstance(part, Mapping):
                talk.problems.append(f"{location}: a list of {_type_name(part)}, expected text or a list of text parts")
                return None
            if part.get("type") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
                talk.problems.append(f"{location}: a part of type {part.get('type')!r}, expected text only")
                return None
            texts.append(part["text"])
        return clean("".join(texts))
    text = as_text(value)
    if text is None:
        talk.problems.append(f"{location}: expected text, got {_type_name(value)}")
        return None
    return clean(text)


def _parse_list(value: Any) -> Any:
    """A list that stands as JSON text in a cell, as in CSV. Anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return decode_json(value)
        except JsonProblem:
            return value
    return value


def _type_name(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


# ---------------------------------------------------------------- pairs


def _pair_columns(raw: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of the question and the answer. Columns with values come before empty ones."""
    pairs = [(question, answer) for question, _, answer in PAIR_LAYOUTS if question in raw and answer in raw]
    full = [pair for pair in pairs if not any(is_missing(raw[column]) for column in pair)]
    return next(iter(full or pairs), None)


def _add_pair(talk: Conversation, raw: Mapping[str, Any], question: str, answer: str) -> None:
    talk.columns |= {question, answer, "history"}
    _add_history(talk, raw.get("history"))
    _add_side(talk, raw[question], question, "user")
    contexts = []
    for column in CONTEXT_COLUMNS:
        talk.columns.add(column)
        context = _content(talk, raw.get(column), f"column {column!r}")
        contexts += [context] if context else []
    if contexts and talk.turns and talk.turns[-1].role == "user":
        talk.turns[-1].content = "\n\n".join([talk.turns[-1].content, *contexts])
    elif contexts and not talk.problems:
        talk.problems.append(f"column {question!r} does not end with a user's message that the context could follow")
    if _as_chat(raw[question]) is not None:  # only the completion is learned, as in TRL
        for turn in talk.turns:
            if turn.role == "assistant":
                turn.extras.setdefault("weight", 0)
    _add_side(talk, raw[answer], answer, "assistant")


def _add_side(talk: Conversation, value: Any, column: str, role: str) -> None:
    """The question or the answer of a pair: a text, or a list of messages."""
    if (turns := _as_chat(value)) is not None:
        _add_chat(talk, turns, column, "role", "content")
        return
    content = _content(talk, value, f"column {column!r}")
    if content == "":
        talk.problems.append(f"column {column!r} is empty")
    talk.turns.append(Turn(role, content or ""))


def _as_chat(value: Any) -> list[Any] | None:
    """The messages in a cell. None if it holds anything else."""
    turns = _parse_list(value)
    if not isinstance(turns, list | tuple) or not turns:
        return None
    return list(turns) if all(isinstance(turn, Mapping) and "role" in turn for turn in turns) else None


def _add_history(talk: Conversation, value: Any) -> None:
    """Earlier turns of the Alpaca layout: a list of (question, answer)."""
    pairs = _parse_list(value)
    if is_missing(pairs):
        return
    if not isinstance(pairs, list | tuple):
        talk.problems.append(f"'history' must be a list of [question, answer], got {_type_name(value)}")
        return
    for index, pair in enumerate(pairs):
        location = f"history[{index}]"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            talk.problems.append(f"{location}: expected [question, answer], got {_type_name(pair)}")
            continue
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = _content(talk, text, location)
            if content == "":
                talk.problems.append(f"{location}: empty content of the {role}")
            talk.turns.append(Turn(role, content or ""))


# ---------------------------------------------------------------- the whole conversation


def _add_system(talk: Conversation, raw: Mapping[str, Any]) -> None:
    """The system message of a column, before all turns."""
    for column in SYSTEM_COLUMNS:
        talk.columns.add(column)
        content = _content(talk, raw.get(column), f"column {column!r}")
        if not content:
            continue
        if not talk.turns or talk.turns[0].role != "system":
            talk.turns.insert(0, Turn("system", content))
        elif talk.turns[0].content != content:
            talk.problems.append(f"column {column!r} and the system message differ. Remove one of them")


def _check_turns(talk: Conversation) -> None:
    roles = [turn.role for turn in talk.turns]
    turn_roles = roles[1:] if roles[:1] == ["system"] else roles
    answers = [turn for turn in talk.turns if turn.role == "assistant"]
    if not turn_roles:
        talk.problems.append("a conversation without messages")
    elif not _ORDER.fullmatch("".join(role[0] for role in turn_roles)):
        got = ", ".join(roles)
        talk.problems.append(f"roles must alternate user, assistant and end with assistant, got {got}")
    elif all(turn.extras.get("weight") == 0 for turn in answers):
        talk.problems.append("every answer has weight 0, so there is nothing to learn")
