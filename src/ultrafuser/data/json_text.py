"""Parse JSON text, with one error for everything that cannot be read."""

from __future__ import annotations

import json
import re
from typing import Any

from ultrafuser.errors import DataError

_MAX_DEPTH = 100  # of lists and objects. Rows of real data sets have less than ten levels
_DECODER = json.JSONDecoder()
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")
LONE_SURROGATE = "holds a lone surrogate, half of a character"


class JsonProblem(DataError):
    """A text that is not JSON, or is JSON that cannot be used. The message has no location."""


def decode_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        JsonProblem: not JSON, nested too deep, or with an integer that Python refuses to read.
    """
    value = parse_json(text)
    check_depth(value)
    return value


def parse_json(text: str) -> Any:
    """As `decode_json`, without a limit of the nesting besides Python's.

    Raises:
        JsonProblem: as `decode_json`.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, message = f"line {error.lineno}, " if "\n" in text.strip() else "", error.msg.removesuffix(" at")
        raise JsonProblem(f"not JSON: {message} at {line}column {error.colno}") from error
    except RecursionError as error:
        raise JsonProblem(_too_deep()) from error
    except ValueError as error:  # more digits than sys.get_int_max_str_digits
        raise JsonProblem("an integer has more than 4300 digits. Write it as text") from error


def check_depth(value: Any) -> None:
    """
    Raises:
        JsonProblem: lists and objects are nested too deep.
    """
    if _is_deep(value):
        raise JsonProblem(_too_deep())


def has_lone_surrogate(value: Any) -> bool:
    """Whether a text in a JSON value has half of a character, which no file of ours and no tokenizer can hold.

    Python also makes lone surrogates of bytes on the command line that are not UTF-8.
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return not text.isascii() and _LONE_SURROGATE.search(text) is not None


def first_bad_element(text: str) -> int | None:
    """The index of the first element of a JSON list that cannot be parsed. None: the text is no list."""
    index, position = 0, _skip_blanks(text, 0)
    if text[position : position + 1] != "[":
        return None
    position = _skip_blanks(text, position + 1)
    while True:
        try:
            _, position = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError):
            return index
        position = _skip_blanks(text, position)
        if text[position : position + 1] != ",":
            return index
        index, position = index + 1, _skip_blanks(text, position + 1)


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\n", "\r"):
        position += 1
    return position


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _too_deep() -> str:
    return f"lists and objects are nested deeper than {_MAX_DEPTH} levels"
