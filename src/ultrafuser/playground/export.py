"""A conversation of the playground as the page that `ultrafuser inspect` writes."""

from __future__ import annotations

import json
from typing import TypedDict, cast

from ultrafuser.display.page import Block, Html, Preformatted, Subheading, page, text_file
from ultrafuser.errors import DataError
from ultrafuser.inspect.html import trace_css, trace_html
from ultrafuser.inspect.trace import TokenTrace

MAX_EXPORT_BYTES = 32 * 2**20  # about 300,000 tokens with the weights of three specialists


class ExportedAnswer(TypedDict):
    """One answer. `tokens` joined are its text. Without `weights` (T, K) it has no colours."""

    label: str
    specialists: list[str]
    tokens: list[str]
    weights: list[list[float]]


class ExportedTurn(TypedDict):
    """A question and its answers: one, or two side by side."""

    question: str
    answers: list[ExportedAnswer]


class Export(TypedDict):
    """A conversation as the page in the browser posts it."""

    title: str
    turns: list[ExportedTurn]


def read_export(body: bytes) -> Export:
    """
    Raises:
        DataError: the body is not a conversation. The message names the field.
    """
    try:
        value = json.loads(body)
    except ValueError as error:
        raise DataError(f"export: not JSON ({error})") from None
    except RecursionError:
        raise DataError("export: JSON that is nested too deeply") from None
    _check("export", value, {"title": str, "turns": list})
    for i, turn in enumerate(value["turns"]):
        _check(f"export: turns[{i}]", turn, {"question": str, "answers": list})
        for j, answer in enumerate(turn["answers"]):
            location = f"export: turns[{i}].answers[{j}]"
            _check(location, answer, {"label": str, "specialists": list, "tokens": list, "weights": list})
            _check_items(location, answer)
    return cast(Export, value)


def conversation_page(conversation: Export) -> str:
    """A page with a section per turn and the coloured tokens of every answer.

    Raises:
        DataError: weights that do not fit their tokens, see `TokenTrace`.
    """
    sections = [(turn["question"][:80], _blocks(turn)) for turn in conversation["turns"]]
    return page(conversation["title"], sections, styles=[trace_css(), text_file("playground/export.css")])


def _blocks(turn: ExportedTurn) -> list[Block]:
    blocks: list[Block] = []
    for answer in turn["answers"]:
        if answer["weights"]:
            trace = TokenTrace(
                answer["tokens"], answer["weights"], answer["specialists"], turn["question"], title=answer["label"]
            )
            blocks.append(Html(trace_html(trace, style=False)))
        else:
            blocks += [Subheading(answer["label"]), Preformatted("".join(answer["tokens"]))]
    return blocks


def _check(location: str, value: object, fields: dict[str, type]) -> None:
    if not isinstance(value, dict) or set(value) != set(fields):
        raise DataError(f"{location}: expected an object with the fields {', '.join(fields)}")
    for name, kind in fields.items():
        if not isinstance(value[name], kind):
            expected = "a text" if kind is str else "a list"
            raise DataError(f"{location}.{name}: got {type(value[name]).__name__}, expected {expected}")


def _check_items(location: str, answer: dict[str, list[object]]) -> None:
    for name in ("specialists", "tokens"):
        if not all(isinstance(item, str) for item in answer[name]):
            raise DataError(f"{location}.{name}: expected a list of texts")
    for row in answer["weights"]:
        if not isinstance(row, list) or not all(type(weight) in (int, float) for weight in row):
            raise DataError(f"{location}.weights: expected a list of numbers per token")
