"""Parse a model's answer: the end of its reasoning, its code blocks, and refusals."""

from __future__ import annotations

import ast
import itertools
import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

PYTHON_NAMES = ("python", "python3", "py", "py3")  # languages of a code block that holds Python

MAX_CLOSING_FENCES = 20  # that are tried as the end of one block
# A fence may stand in a list item, behind its marker, or in a quotation. Groups: prefix, fence, language, rest of the line.
_OPENING = re.compile(r"((?:[ \t]*(?:>|[-*+•]|\d{1,3}[.)])(?=[ \t]|>))*[ \t]*)(`{3,}|~{3,})[ \t]*[{.]*([\w+.#-]*)(.*)")
_QUOTATION = re.compile(r"[ \t]*>[ \t]?")

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

    @property
    def may_be_python(self) -> bool:
        """Whether its fence names Python or nothing."""
        return self.language.lower() in ("", *PYTHON_NAMES)


class FencedBlock(NamedTuple):
    """A fenced block and its place in the text. A block that is cut off is not closed."""

    language: str
    body: str
    start: int  # of its first line
    end: int  # of its last line, without the line break
    closed: bool


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
    return (CodeBlock(block.language, block.body) for block in fenced_blocks(text))


def parse_python(code: str) -> ast.Module | None:
    """The syntax tree of a program, or None if it does not parse."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the parser raises all of these
        return None


def without_code(text: str) -> str:
    """The text with a newline in place of each fenced block."""
    end, texts = 0, []
    for block in fenced_blocks(text):
        texts += [text[end : block.start], "\n"]
        end = block.end
    return "".join([*texts, text[end:]])


def fenced_blocks(text: str) -> list[FencedBlock]:
    """The blocks between fences of three or more backticks or tildes, as in CommonMark.

    A fence may have any indentation, which the body then loses. A fence inside a Python docstring does not end the block.
    """
    lines = text.split("\n")
    starts = [0, *itertools.accumulate(len(line) + 1 for line in lines)]  # of each line, and after the last one
    blocks, index = [], 0
    while index < len(lines):
        opening = _OPENING.fullmatch(lines[index])
        if opening is None or (opening[2][0] == "`" and "`" in opening[4]):  # the latter is code within a line
            index += 1
            continue
        end = _closing_line(lines, index, opening)
        body = _body(lines[index + 1 : end], opening[1])
        closed = end < len(lines)
        last = min(end, len(lines) - 1)
        blocks.append(
            FencedBlock(
                opening[3], body + "\n" * (closed and end > index + 1), starts[index], starts[last + 1] - 1, closed
            )
        )
        index = end + 1
    return blocks


def _closing_line(lines: list[str], opening_line: int, opening: re.Match[str]) -> int:
    """The number of the line that closes a block. The number of lines if none does."""
    quoted, fence = ">" in opening[1], opening[2]
    closing = re.compile(rf"[ \t]*{fence[0]}{{{len(fence)},}}[ \t]*")
    candidates = (
        index
        for index in range(opening_line + 1, len(lines))
        if closing.fullmatch(_QUOTATION.sub("", lines[index], count=1) if quoted else lines[index])
    )
    first = next(candidates, len(lines))
    if opening[3].lower() not in ("", *PYTHON_NAMES) or not _ends_in_docstring(lines[opening_line + 1 : first]):
        return first
    # The fence stands in a docstring, if the block is Python with a later end.
    for end in itertools.islice(itertools.chain(candidates, [len(lines)]), MAX_CLOSING_FENCES):
        body = lines[opening_line + 1 : end]
        if not _ends_in_docstring(body) and _is_python(_body(body, opening[1])):
            return end
    return first


def _body(lines: list[str], prefix: str) -> str:
    """The lines of a block without the indentation of its fence, or the marks of its quotation."""
    if ">" in prefix:
        lines = [_QUOTATION.sub("", line, count=1) for line in lines]
        prefix = prefix.rpartition(">")[2][1:]
    indentation = min([len(prefix), *(len(line) - len(line.lstrip()) for line in lines if line.strip())])
    return "\n".join(line[indentation:] if line.strip() else line.lstrip(" \t") for line in lines)


def _ends_in_docstring(lines: list[str]) -> bool:
    code = "\n".join(lines)
    return any(code.count(quotes) % 2 for quotes in ('"""', "'''"))


def _is_python(code: str) -> bool:
    return parse_python(textwrap.dedent(code)) is not None
