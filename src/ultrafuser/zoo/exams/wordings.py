"""Tables of wordings, and the lines of an answer that state its value."""

from __future__ import annotations

import re

_TABLE = re.compile(r"# (.*)\n((?:[^#\n].*\n)+)")
_ANSWER = re.compile(r"\banswer\b[*_ ]*:([^\n]*)", re.IGNORECASE)


def parse_wordings(text: str) -> dict[str, list[str]]:
    """The wordings under each heading `# name`. A bar or a line break parts them."""
    return {name: re.split(r" \| |\n", block.strip()) for name, block in _TABLE.findall(text)}


def answer_lines(response: str) -> list[str]:
    """What follows `Answer:` on each line that has it."""
    return _ANSWER.findall(response)
