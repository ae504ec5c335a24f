"""What an answer in prose settles on: its box, what follows "the answer is", its last formula, its last number."""

from __future__ import annotations

import re

from ultrafuser.data.answer_text import after_thinking

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-z])\s*")
_MATH = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|(?<!\\)\$(.+?)(?<!\\)\$", re.DOTALL)
_SPACES = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ])(?=\d{3})")  # 10{,}000 and 10\,000
# 1,319 or 18.5 or 3/4; a minus after a digit, a letter or a bracket is an operator.
_NUMBER = re.compile(r"(?:(?<![\w.)\]}])[-−])?(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:/\d+)?")


def number(answer: str) -> str | None:
    """The number that an answer settles on, e.g. "1319"; None if there is none.

    In this order: the last box, whole, if it holds a digit; the first number after "####"; the first number after the
    last "answer is", "answer:" or the like that one follows, behind the last "=" of that line if it has one; the last
    number of all.
    """
    text = _plain(after_thinking(answer))
    if (box := boxed(text)) and re.search(r"\d", box):
        return box
    marked = [text.rsplit("####", 1)[1]] if "####" in text else []
    for place in [*marked, *(cue.rsplit("=", 1)[-1] for cue in after_cues(text, "answer"))]:
        if found := _numbers(place):
            return found[0]
    return _last(_numbers(text))


def expression(answer: str) -> str | None:
    """The formula, value or word that an answer settles on; None if there is none.

    In this order: the last box; what follows the last "answer is", "answer:" or the like that a formula or a digit
    follows, or the last of all if there is none; the last formula; the last number.
    """
    text = after_thinking(answer)
    if box := boxed(text):
        return box
    cues = after_cues(text, "answer")
    if cues:
        cue = next((cue for cue in cues if formulas(cue) or re.search(r"\d", cue)), cues[0])
        plain = re.split(r"[.!;]\s", cue + " ", maxsplit=1)[0]
        return ", ".join(formulas(cue)) or plain.strip().strip("*_`").rstrip(".").strip() or None
    return _last(formulas(text)) or number(text)


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed and not empty."""
    for start in [match.end() for match in _BOX.finditer(text)][::-1]:
        content = _braced(text, start) if text[start : start + 1] == "{" else text[start : start + 1]
        if content and content.strip():
            return content.strip()
    return None


def after_cues(text: str, words: str) -> list[str]:
    """What follows each "answer is", "answer:" or "answer =" on its line, or on the next if that is empty; last first.

    Args:
        words: what may stand for "answer": a regular expression.
    """
    found = []
    for cue in re.finditer(rf"(?i:{words})\b[^.\n]{{0,60}}?(?:\b(?:is|are)\b|[:=])", text):
        lines = (re.sub(r"^[\s:*_]+", "", line).strip() for line in text[cue.end() :].split("\n"))
        found.append(next((line for line in lines if line), ""))
    return [line for line in reversed(found) if line]


def formulas(text: str) -> list[str]:
    """What stands between dollars, \\( \\) or \\[ \\]."""
    return [next(group for group in match.groups() if group).strip() for match in _MATH.finditer(text)]


def _braced(text: str, start: int) -> str | None:
    depth = 0
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
        if depth == 0:
            return text[start + 1 : end]
    return None


def _plain(text: str) -> str:
    r"""Without currency signs, and without the separators of thousands of LaTeX."""
    return _SPACES.sub("", re.sub(r"\\?[$€£]", "", text))


def _numbers(text: str) -> list[str]:
    return [match[0].replace(",", "").replace("−", "-") for match in _NUMBER.finditer(text)]


def _last(items: list[str]) -> str | None:
    return items[-1] if items else None
