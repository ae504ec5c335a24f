"""Parse a model's answer: the end of its reasoning, its code blocks, and refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

PYTHON_NAMES = ("python", "python3", "py", "py3")  # languages of a code block that holds Python

_FENCE = r"^[ \t]*(?:```|~~~)"
_END_OF_BLOCK = rf"(?:{_FENCE}[ \t]*$|\Z)"  # a block that is cut off ends with the text
_BLOCK = re.compile(rf"{_FENCE}[ \t]*([\w+.-]*)[^\n]*\n(.*?){_END_OF_BLOCK}", re.M | re.S)
_FENCED = re.compile(rf"{_FENCE}.*?{_END_OF_BLOCK}", re.M | re.S)  # also a fence in the last line, without a body
# Complete blocks between backticks at the margin; groups: language, body.
CLOSED_BLOCK = re.compile(r"^```[ \t]*([\w+.-]*)[^\n]*\n(.*?)^```[ \t]*$", re.M | re.S)

_REFUSAL = re.compile(
    # "I'm sorry", "My apologies, but", "Sorry, but I"
    r"\W*(?:(?:i['’]m|i am) (?:very |so |really |truly )?sorry\b|(?:my )?apologies,? but|sorry,? (?:but )?i\b|"
    # "Unfortunately, I can't", "As a teacher, I will not", "I am unable"
    r"(?:unfortunately,? |as [^.\n]{3,60}, )?i "
    r"(?:can['’]t|can ?not|won['’]t|will not|must decline|am (?:unable|not able)|do not feel)"
    # "I'm not able", "As an AI"
    r"|i['’]m (?:unable|not able)|as an? (?:ai|artificial|large language|language)\b)",
    re.I,
)


class CodeBlock(NamedTuple):
    """A fenced block of an answer."""

    language: str  # as the fence names it; "" if it names none
    body: str


def after_thinking(answer: str) -> str:
    """The answer without the reasoning that some models put between <think> tags.

    Some templates open the tag in the prompt, so everything before the last closing tag is reasoning. An answer that is
    cut off in its reasoning is what comes before the opening tag.
    """
    return answer.rsplit("</think>", 1)[-1] if "</think>" in answer else answer.split("<think>", 1)[0]


def is_refusal(text: str) -> bool:
    """Whether a text opens with a refusal to answer."""
    return _REFUSAL.match(text) is not None


def code_blocks(text: str) -> Iterator[CodeBlock]:
    """Every fenced block, in order. A block that is cut off extends to the end of the text."""
    return (CodeBlock(*match.groups()) for match in _BLOCK.finditer(text))


def without_code(text: str) -> str:
    """The text with a newline in place of each fenced block."""
    return _FENCED.sub("\n", text)
