"""Replies -> items: tolerant of how a model writes lists, strict about what comes out."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass
from typing import Any

from ultrafuser.data.answer_text import CLOSED_BLOCK, after_thinking, code_blocks

GIANT_CHARS = 200_000  # of a reply: nothing that was asked for is that long
MAX_NAME_CHARS = 100
MAX_NAME_WORDS = 14

_BULLET = re.compile(r"\s{0,8}(?:\(?\d{1,3}[.):]|\(?[a-z]\)|[-*•–·])\s+(\S.*)")
_NUMBERED = re.compile(r"\s{0,8}\(?\d{1,3}[.):]\s")
_WRAPPED = re.compile(r"^[\"'“”‘’«»`*_]+|[\"'“”‘’«»`*_]+$")
_NAME_AND_MORE = re.compile(r"\s*(?::|\s[-–—]\s|\|)\s*")
_TRAILING_COMMA = re.compile(r",(\s*[\]}])")
_LABEL = re.compile(
    r"^\W*(?:rewritten|new|more complex|improved)?\s*(?:instruction|version|prompt|task)\W{0,3}:[*_\s]*", re.I
)
_RATING = re.compile(r"\[\[\s*(10|[1-9])\s*\]\]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TEST_HEAD = re.compile(r"(?:^|\n)[#*_ \t]*(?:unit |assert(?:ion)? )?tests?[^\n]{0,40}:?[*_ \t]*\n*\Z", re.I)
_NAME_KEYS = ("name", "sub_topic", "subtopic", "topic", "title")
_TEXT_KEYS = ("instruction", "text", "prompt", "question", "task", "request", "content", *_NAME_KEYS)


@dataclass(frozen=True)
class Unreadable:
    """A reply from which nothing could be read, and why."""

    reason: str


@dataclass(frozen=True)
class NamedConcepts:
    """A sub-topic as a reply lists it."""

    name: str
    concepts: tuple[str, ...] = ()


# ---------------------------------------------------------------- lists


def read_list(reply: str) -> list[Any] | Unreadable:
    """The items of a reply: strings, or JSON objects.

    Tried in this order: JSON in a fence, JSON anywhere, numbered lines, bulleted lines; lines first where one of them
    comes before any bracket or fence. JSON may have trailing commas, be cut off in its last item, hold the list under any
    key, or be one object a line.
    """
    text = after_thinking(reply).strip()
    if not text:
        return Unreadable("empty reply")
    if len(text) > GIANT_CHARS:
        return Unreadable("giant reply")
    for read in (_listed_lines, _any_json) if _starts_with_a_line(text) else (_any_json, _listed_lines):
        if items := read(text):
            return items
    return Unreadable("wrong JSON" if re.search(r"[\[{]\s*[\"{\[]", text) else "no list")


def _starts_with_a_line(text: str) -> bool:
    """Whether a listed line comes first, so that brackets and code further on are part of an item."""
    line = re.search(rf"^{_BULLET.pattern}", text, re.M)
    code = re.search(r"[\[{]|^[ \t]*(?:```|~~~)", text, re.M)
    return line is not None and line[1][0] not in "[{" and (code is None or line.start() < code.start())


def _any_json(text: str) -> list[Any] | None:
    """The items of JSON in a fence, else anywhere; a list of numbers is something else."""
    for part in [*(block.body for block in code_blocks(text)), text]:
        items = _json_items(part)
        if items and any(isinstance(item, (str, dict)) for item in items):
            return items
    return None


def _json_items(text: str) -> list[Any] | None:
    start = re.search(r"[\[{]", text)
    if start is None:
        return None
    text = text[start.start() :]
    for written in (text, mended := _TRAILING_COMMA.sub(r"\1", text)):
        try:
            value, end = json.JSONDecoder(strict=False).raw_decode(written)
        except (ValueError, RecursionError):
            continue
        text = written
        break
    else:
        return _salvaged(mended)
    if isinstance(value, dict):
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1 and not any(key in value for key in _NAME_KEYS):
            return lists[0]
        rest = text[end:].lstrip(", \t\r\n")
        more = _json_items(rest) if rest.startswith("{") else None
        return [value, *(more or [])]
    return value if isinstance(value, list) else None


def _salvaged(text: str) -> list[Any] | None:
    """The whole items at the start of a list that is cut off or broken somewhere."""
    inner = text[1:] if text.startswith("[") else re.sub(r"^\{[^\[{]*\[", "", text, count=1)
    if inner == text:
        return None
    decoder, at = json.JSONDecoder(strict=False), 0
    items: list[Any] = []
    while match := re.compile(r"[\s,]*(?=[\"{\[])").match(inner, at):
        try:
            item, at = decoder.raw_decode(inner, match.end())
        except (ValueError, RecursionError):
            break
        items.append(item)
    return items or None


def _listed_lines(text: str) -> list[Any] | None:
    """Numbered lines where there are any, else bulleted ones; an indented or plain line goes on with the item before it."""
    lines = text.splitlines()
    numbered = any(_NUMBERED.match(line) for line in lines)
    items: list[str] = []
    for line in lines:
        match = _BULLET.match(line)
        if match and (not numbered or _NUMBERED.match(line)):
            items.append(match[1])
        elif items and line.strip():
            if not numbered and not line[:1].isspace():
                break  # words after the list
            items[-1] += "\n" + line.rstrip()
        elif items and not line.strip():
            items[-1] += "\n"
    out: list[Any] = []
    for item in items:
        paragraphs = item.strip().split("\n\n")
        out.append(paragraphs[0] if len(paragraphs) > 1 and item is items[-1] else item.strip())
    return out or None


# ---------------------------------------------------------------- strict checks


def as_name(item: Any) -> str | Unreadable:
    """A topic: one short line."""
    whole = isinstance(item, dict)  # in a line of a list, a name may be followed by an explanation
    if isinstance(item, dict):
        item = next((item[key] for key in _NAME_KEYS if isinstance(item.get(key), str)), None)
    if not isinstance(item, str):
        return Unreadable("not text")
    name = _bare(item.strip().splitlines()[0] if item.strip() else "")
    name = _bare(name if whole else _NAME_AND_MORE.split(name, maxsplit=1)[0]).rstrip(".;,")
    if not any(character.isalpha() for character in name):
        return Unreadable("empty item")
    if len(name) > MAX_NAME_CHARS or len(name.split()) > MAX_NAME_WORDS:
        return Unreadable("not a name")
    return name


def as_named_concepts(item: Any, at_most: int) -> NamedConcepts | Unreadable:
    """A sub-topic with concepts; `name: concept, concept` will do as well."""
    name = as_name(item)
    if isinstance(name, Unreadable):
        return name
    found: list[Any] = []
    if isinstance(item, dict):
        found = next((value for value in item.values() if isinstance(value, list)), [])
    elif isinstance(item, str):
        more = _NAME_AND_MORE.split(" ".join(item.split()), maxsplit=1)
        found = re.split(r"[,;]", more[1]) if len(more) > 1 else []
    concepts = []
    for concept in found:
        bare = _bare(concept).rstrip(".") if isinstance(concept, str) else ""
        if bare and len(bare) <= MAX_NAME_CHARS and "\n" not in bare and bare not in concepts:
            concepts.append(bare)
    return NamedConcepts(name, tuple(concepts[:at_most]))


def as_instruction(item: Any) -> str | Unreadable:
    """An instruction out of a list: a string, or an object that holds one under a usual name."""
    if isinstance(item, dict):
        given = next((item[key] for key in _TEXT_KEYS if isinstance(item.get(key), str)), None)
        extra = item.get("input")
        item = f"{given}\n\n{extra}" if given and isinstance(extra, str) and extra.strip() else given
    if not isinstance(item, str):
        return Unreadable("not text")
    text = _unquoted(_printable(item).strip())
    return text if any(character.isalnum() for character in text) else Unreadable("empty item")


def read_text(reply: str) -> str | Unreadable:
    """A reply that is one text: without thoughts, and without the lines that prompts put around what they quote."""
    text = after_thinking(_printable(reply)).strip()
    text = re.sub(r"^=== .{0,60} [0-9a-f]{8}\s*\n|\n=== end of .{0,60} [0-9a-f]{8}\s*$", "", text).strip()
    if not text:
        return Unreadable("empty reply")
    return Unreadable("giant reply") if len(text) > GIANT_CHARS else text


def read_instruction(reply: str) -> str | Unreadable:
    """A reply that is one instruction, without a label or quotes around it."""
    text = read_text(reply)
    if isinstance(text, Unreadable):
        return text
    text = _unquoted(_LABEL.sub("", text, count=1).strip())
    return text if any(character.isalnum() for character in text) else Unreadable("empty reply")


def read_rating(reply: str) -> int | Unreadable:
    """The rating, if the last line holds one and the reply no other."""
    text = after_thinking(reply).strip()
    if not text:
        return Unreadable("empty reply")
    found = _RATING.findall(text[-GIANT_CHARS:])
    last = _RATING.search(text.splitlines()[-1])
    if last is None or set(found) != {last[1]}:
        return Unreadable("no rating")
    return int(last[1])


def split_tests(answer: str) -> tuple[str, str | None]:
    """An answer and the tests that end it: a last Python block of nothing but asserts, after a block of code."""
    blocks = list(CLOSED_BLOCK.finditer(answer))
    if len(blocks) < 2 or answer[blocks[-1].end() :].strip():
        return answer, None
    tests = blocks[-1][2].strip()
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return answer, None
    kinds = (ast.Assert, ast.Import, ast.ImportFrom)
    if not tree.body or not all(isinstance(node, kinds) for node in tree.body):
        return answer, None
    if not any(isinstance(node, ast.Assert) for node in tree.body):
        return answer, None
    head = answer[: blocks[-1].start()].rstrip()
    return _TEST_HEAD.sub("", head).rstrip(), tests


def _bare(text: str) -> str:
    return _WRAPPED.sub("", _printable(text).strip()).strip()


def _printable(text: str) -> str:
    """Without halves of characters, which no file can hold, and without control characters."""
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode())


def _unquoted(text: str) -> str:
    """Without quotes around the whole text."""
    for left, right in (('"', '"'), ("“", "”"), ("'", "'")):
        if len(text) > 2 and text.startswith(left) and text.endswith(right) and not {left, right} & set(text[1:-1]):
            return text[1:-1].strip()
    return re.sub(r"^\*\*(.+?)\*\*$", r"\1", text)
