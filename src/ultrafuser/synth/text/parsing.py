"""Reads the items of a reply. It accepts many ways to write a list, and checks each item strictly."""

from __future__ import annotations

import ast
import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from ultrafuser.data.answer_text import after_thinking, code_blocks, fenced_blocks

GIANT_CHARS = 200_000  # a longer reply is rejected
MAX_NAME_CHARS = 100
MAX_NAME_WORDS = 14

_ITEM_LINE = re.compile(r"\s{0,8}(?:\(?\d{1,3}[.):]|\(?[a-z]\)|[-*•–·])\s+(\S.*)")
_NUMBERED_LINE = re.compile(r"\s{0,8}\(?\d{1,3}[.):]\s")
_SURROUNDING_MARKS = "\"'“”‘’«»`*_"
_NAME_END = re.compile(r"(?::|\s[-–—]\s|\|)\s*")
_BETWEEN_OBJECTS = re.compile(r"[, \t\r\n]*")
_TRAILING_COMMA = re.compile(r",(\s*[\]}])")
_LABEL = re.compile(
    r"^\W*(?:rewritten|new|more complex|improved)?\s*(?:instruction|version|prompt|task)\W{0,3}:[*_\s]*", re.I
)
_RATING = re.compile(r"\[\[\s*(10|[1-9])\s*\]\]")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_TEST_HEAD = re.compile(
    r"(?:^|\n)[#*_ \t]*(?:\d{1,2}[.)] *)?[*_]*(?:unit |assert(?:ion)? )?tests?[^\n]{0,40}:?[*_ \t]*\n*\Z", re.I
)
_NAME_KEYS = ("name", "sub_topic", "subtopic", "topic", "title")
_TEXT_KEYS = ("instruction", "text", "prompt", "question", "task", "request", "content", *_NAME_KEYS)


class Unreadable(Exception):
    """Nothing can be read from a reply. Its text is the reason, and every function below may raise it."""


@dataclass(frozen=True)
class NamedConcepts:
    """A sub-topic in a reply."""

    name: str
    concepts: tuple[str, ...] = ()


# ---------------------------------------------------------------- lists


def read_list(reply: str) -> list[Any]:
    """The items of a reply: strings, or JSON objects.

    The order is: JSON in a code block, JSON anywhere, numbered lines, bulleted lines. Lines are first if one of them comes
    before any bracket or code block. JSON may have trailing commas, be cut off in its last item, have the list under any
    key, or be one object per line.
    """
    text = _not_empty_or_giant(after_thinking(reply).strip())
    # If a line of a list comes first, later brackets and code are part of an item.
    line = re.search(rf"^{_ITEM_LINE.pattern}", text, re.M)
    code = re.search(r"[\[{]|^[ \t]*(?:```|~~~)", text, re.M)
    lines_first = line is not None and line[1][0] not in "[{" and (code is None or line.start() < code.start())
    for read in (_listed_lines, _any_json) if lines_first else (_any_json, _listed_lines):
        if items := read(text):
            return items
    raise Unreadable("wrong JSON" if re.search(r"[\[{]\s*[\"{\[]", text) else "no list")


def _any_json(text: str) -> list[Any]:
    """The items of JSON in a code block, or else anywhere. A list of numbers alone is not a list of items."""
    for candidate in [*(block.body for block in code_blocks(text)), text]:
        items = _json_items(candidate)
        if any(isinstance(item, (str, dict)) for item in items):
            return items
    return []


def _json_items(text: str) -> list[Any]:
    # 1. Start at the first bracket.
    start = re.search(r"[\[{]", text)
    if start is None:
        return []
    text, position, is_repaired = text[start.start() :], 0, False
    decoder = json.JSONDecoder(strict=False)
    items: list[Any] = []
    while True:
        # 2. Decode the text, or the text without trailing commas. If neither is valid, take its complete items.
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError):
            text, position = text[position:], 0
            if is_repaired:
                return items + _complete_items(text)
            text, is_repaired = _TRAILING_COMMA.sub(r"\1", text), True
            continue
        if not isinstance(value, dict):
            return items + value
        # 3. An object either contains the list, or is one of several, one after another.
        lists = [item for item in value.values() if isinstance(item, list)]
        if len(lists) == 1 and not any(key in value for key in _NAME_KEYS):
            return items + lists[0]
        items.append(value)
        position = _BETWEEN_OBJECTS.match(text, end).end()  # type: ignore[union-attr]  # it matches everywhere
        if not text.startswith("{", position):
            return items


def _complete_items(text: str) -> list[Any]:
    """The complete items at the start of a list that is cut off or broken."""
    inner = text[1:] if text.startswith("[") else re.sub(r"^\{[^\[{]*\[", "", text, count=1)
    if inner == text:
        return []
    decoder, position = json.JSONDecoder(strict=False), 0
    items: list[Any] = []
    while match := re.compile(r"[\s,]*(?=[\"{\[])").match(inner, position):
        try:
            item, position = decoder.raw_decode(inner, match.end())
        except (ValueError, RecursionError):
            break
        items.append(item)
    return items


def _listed_lines(text: str) -> list[Any]:
    """Numbered lines if there are any, otherwise bulleted ones. Indented, plain and fenced lines continue the item above."""
    # 1. Collect the lines of each item.
    lines = text.split("\n")
    code = _code_lines(text)
    numbered = any(_NUMBERED_LINE.match(line) for index, line in enumerate(lines) if index not in code)
    items: list[str] = []
    for index, line in enumerate(lines):
        match = _ITEM_LINE.match(line) if index not in code else None
        if match and (not numbered or _NUMBERED_LINE.match(line)):
            items.append(match[1])
        elif items and line.strip():
            if not numbered and not line[:1].isspace() and index not in code:
                break  # text after the list
            items[-1] += "\n" + line.rstrip()
        elif items and not line.strip():
            items[-1] += "\n"
    # 2. Further paragraphs after the last item are text after the list.
    items[-1:] = [_until_paragraph(item) for item in items[-1:]]
    return [_at_margin(item.strip()) for item in items]


def _code_lines(text: str) -> set[int]:
    """The lines of fenced blocks inside items. A block around the list, or before it, is not in an item."""
    first = re.search(rf"^{_ITEM_LINE.pattern}", text, re.M)
    lines: set[int] = set()
    if first is None:
        return lines
    for block in [block for block in fenced_blocks(text) if block.closed]:
        start, end = (text.count("\n", 0, position) for position in (block.start, block.end))
        if block.start > first.start():
            lines.update(range(start, end + 1))
        elif block.start == first.start():  # the fence stands behind the marker of the item
            lines.update(range(start + 1, end + 1))
    return lines


def _until_paragraph(item: str) -> str:
    """An item up to its first empty line that neither code nor an indented line follows."""
    blocks = fenced_blocks(item)
    for gap in re.finditer(r"\n\n(?![ \t\n]|```|~~~)", item):
        if not any(block.start < gap.start() < block.end for block in blocks):
            return item[: gap.start()]
    return item


def _at_margin(item: str) -> str:
    """An item with code, whose further lines lose their common indentation."""
    first, _, rest = item.partition("\n")
    return f"{first}\n{textwrap.dedent(rest)}" if fenced_blocks(rest) else item


# ---------------------------------------------------------------- strict checks


def as_name(item: Any) -> str:
    """A topic: one short line."""
    is_object = isinstance(item, dict)
    if isinstance(item, dict):
        item = next((item[key] for key in _NAME_KEYS if isinstance(item.get(key), str)), None)
    if not isinstance(item, str):
        raise Unreadable("not text")
    name = _bare(item.strip().splitlines()[0] if item.strip() else "")
    # In a line of text a name may be followed by an explanation.
    name = _bare(name if is_object else _NAME_END.split(name, maxsplit=1)[0]).rstrip(".;,")
    if not any(character.isalpha() for character in name):
        raise Unreadable("empty item")
    if len(name) > MAX_NAME_CHARS or len(name.split()) > MAX_NAME_WORDS:
        raise Unreadable("not a name")
    return name


def as_named_concepts(item: Any, at_most: int) -> NamedConcepts:
    """A sub-topic with concepts: an object, or text such as `name: concept, concept`."""
    name = as_name(item)
    candidates: list[Any] = []
    if isinstance(item, dict):
        candidates = next((value for value in item.values() if isinstance(value, list)), [])
    elif isinstance(item, str):
        texts = _NAME_END.split(" ".join(item.split()), maxsplit=1)
        candidates = re.split(r"[,;]", texts[1]) if len(texts) > 1 else []
    concepts = []
    for concept in candidates:
        bare = _bare(concept).rstrip(".") if isinstance(concept, str) else ""
        if bare and len(bare) <= MAX_NAME_CHARS and "\n" not in bare and bare not in concepts:
            concepts.append(bare)
    return NamedConcepts(name, tuple(concepts[:at_most]))


def as_instruction(item: Any) -> str:
    """An instruction of a list: a string, or an object with one under a usual key."""
    if isinstance(item, dict):
        instruction = next((item[key] for key in _TEXT_KEYS if isinstance(item.get(key), str)), None)
        extra = item.get("input")
        item = f"{instruction}\n\n{extra}" if instruction and isinstance(extra, str) and extra.strip() else instruction
    if not isinstance(item, str):
        raise Unreadable("not text")
    text = _unquoted(_printable(item).strip())
    if not any(character.isalnum() for character in text):
        raise Unreadable("empty item")
    return text


def read_text(reply: str) -> str:
    """A reply that is one text, without reasoning and without the lines that our prompts put around quotations."""
    text = after_thinking(_printable(reply)).strip()
    text = re.sub(r"^=== .{0,60} [0-9a-f]{8}\s*\n|\n=== end of .{0,60} [0-9a-f]{8}\s*$", "", text).strip()
    return _not_empty_or_giant(text)


def read_instruction(reply: str) -> str:
    """A reply that is one instruction, without a label or quotes around it."""
    text = _unquoted(_LABEL.sub("", read_text(reply), count=1).strip())
    if not any(character.isalnum() for character in text):
        raise Unreadable("empty reply")
    return text


def read_rating(reply: str) -> int:
    """The rating in the last line. A reply with different ratings has none."""
    text = after_thinking(reply).strip()
    if not text:
        raise Unreadable("empty reply")
    ratings = _RATING.findall(text[-GIANT_CHARS:])
    last = _RATING.search(text.splitlines()[-1])
    if last is None or set(ratings) != {last[1]}:
        raise Unreadable("no rating")
    return int(last[1])


def split_tests(answer: str) -> tuple[str, str | None]:
    """An answer, and the tests in its last code block. Tests are assert statements and imports, after a block of code."""
    blocks = [block for block in fenced_blocks(answer) if block.closed]
    if len(blocks) < 2 or answer[blocks[-1].end :].strip():
        return answer, None
    tests = blocks[-1].body.strip()
    try:
        tree = ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return answer, None
    kinds = {type(node) for node in tree.body}
    if ast.Assert not in kinds or not kinds <= {ast.Assert, ast.Import, ast.ImportFrom}:
        return answer, None
    head = answer[: blocks[-1].start].rstrip()
    return _TEST_HEAD.sub("", head).rstrip(), tests


def _not_empty_or_giant(text: str) -> str:
    if not text:
        raise Unreadable("empty reply")
    if len(text) > GIANT_CHARS:
        raise Unreadable("giant reply")
    return text


def _bare(text: str) -> str:
    return _printable(text).strip().strip(_SURROUNDING_MARKS).strip()


def _printable(text: str) -> str:
    """The text without lone surrogates, which no file can hold, and without control characters."""
    return _CONTROL.sub("", text.encode("utf-8", "replace").decode())


def _unquoted(text: str) -> str:
    """The text without quotes around all of it."""
    for left, right in (('"', '"'), ("“", "”"), ("'", "'")):
        if len(text) > 2 and text.startswith(left) and text.endswith(right) and not {left, right} & set(text[1:-1]):
            return text[1:-1].strip()
    return re.sub(r"^\*\*(.+?)\*\*$", r"\1", text)
