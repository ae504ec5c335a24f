"""Read the final result of an answer in prose: its box, the text after "the answer is", its last formula or number."""

from __future__ import annotations

import re
from collections import deque

from ultrafuser.data.answer_text import after_thinking
from ultrafuser.evaluate.tasks.number_spellings import join_digits, join_indian_digits, latex_powers, without_currency

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-z])\s*")
# Each opening mark of a formula, with its closing mark. "$$" without another one is "$" before a formula with a dollar.
_OPENING = re.compile(r"\$\$|\\\[|\\\(|(?<!\\)\$")
_CLOSING = {
    opening: re.compile(closing)
    for opening, closing in {"$$": r"\$\$", "\\[": r"\\\]", "\\(": r"\\\)", "$": r"(?<!\\)\$"}.items()
}
_BRACE = re.compile(r"(?<!\\)[{}]")
_MARKS = re.compile(r"[\s:*_]*")
MAX_CUES = 100  # the last ones
MAX_CUE_CHARS = 2000
# In all of these, a minus after a digit, a letter or a bracket is an operator, and digits after "^" are an exponent.
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"  # 1,319 or 18.5
_EXPONENT = r"\^\{-?\d+\}"
_NUMBER = re.compile(
    r"(?:(?<![\w.)\]}])[-−])?(?<![\w.^])(?<!\^[-−{])(?<!\^\{[-−])"
    rf"(?:(?:\d+ ?)?\\[dt]?frac *(?:\{{-?{_DIGITS}\}}\{{-?{_DIGITS}\}}|\d\d)"  # \frac{10}{2}, 1\frac12
    r"|\d+ +\d{1,2}/\d{1,3}(?!\d)"  # 2 1/2
    rf"|{_DIGITS}(?: \\times 10{_EXPONENT}|{_EXPONENT}|[eE][-+]?\d+(?!\w)|/\d+)?)"  # 1.5 \times 10^{3}, 10^{3}, 1e3, 3/4
)
# "#### 13" of GSM8K's format. "#### 1. Add the boxes" is a heading.
_MARKED = re.compile(r"(?<!#)####(?!#)[\s*_`]*(?![-−]?\d+(?:[.)]\s+[A-Za-z]|:))(?=[-−]?[.\\]?[\d]|\\[dt]?frac)([^\n]*)")


def number(answer: str) -> str | None:
    """The final number of an answer, e.g. "1319", or None if there is none.

    The first of these that has one:

    1. the whole last box, if it holds a digit
    2. the number after the first "####" that has one directly after it
    3. the first number after the last "answer is", "answer:" or the like, behind the last "=" of that line
    4. the last number of the answer
    """
    text = _plain(after_thinking(answer))
    if (box := boxed(text)) and re.search(r"\d", box):
        return box
    marked = [match[1] for match in _MARKED.finditer(text)][:1] or _last_heading(text)
    marked = [result.rsplit("=", 1)[-1] for result in marked]
    for result in [*marked, *(cue.rsplit("=", 1)[-1] for cue in after_cues(text, "answer"))]:
        if numbers := _numbers(result):
            return numbers[0]
    return _last(_numbers(text))


def expression(answer: str) -> str | None:
    """The final formula, value or word of an answer, or None if there is none.

    The first of these that has one:

    1. the last box
    2. the text after the last "answer is", "answer:" or the like that has a formula or a digit, else after the last one
    3. the last formula
    4. the last number
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
    closing = _closing_braces(text)
    for start in [match.end() for match in _BOX.finditer(text)][::-1]:
        is_braced = text[start : start + 1] == "{"
        if is_braced and start not in closing:
            continue
        content = text[start + 1 : closing[start]] if is_braced else text[start : start + 1]
        if content.strip():
            return content.strip()
    return None


def after_cues(text: str, words: str) -> list[str]:
    """The text after each "answer is", "answer:" or "answer =", from the last to the first.

    It is the rest of the line, or the next line that has text. Each is read up to `MAX_CUE_CHARS` characters.

    Args:
        words: a regular expression for "answer" and its synonyms.
    """
    cues = re.finditer(rf"(?i:{words})\b[^.\n]{{0,60}}?(?:\b(?:is|are)\b|[:=])", text)
    texts = []
    for cue in deque(cues, MAX_CUES):
        start = _MARKS.match(text, cue.end()).end()  # type: ignore[union-attr]  # it matches everywhere
        texts.append(text[start : start + MAX_CUE_CHARS].split("\n", 1)[0].strip())
    return [text for text in reversed(texts) if text]


def formulas(text: str) -> list[str]:
    """The text between dollars, \\( \\) or \\[ \\]."""
    results, position = [], 0
    unclosed: set[str] = set()  # marks that no later mark closes, so that each is looked for once
    while opening := _OPENING.search(text, position):
        begin = opening.start()
        position = begin + 1
        is_escaped = text[max(begin - 1, 0) : begin] == "\\"
        for mark in ("$$", "$") if opening[0] == "$$" and not is_escaped else (opening[0],):
            start = begin + len(mark)
            closing = None if mark in unclosed else _CLOSING[mark].search(text, start + 1)
            if closing is not None:
                results.append(text[start : closing.start()].strip())
                position = closing.end()
                break
            unclosed.add(mark)
    return results


def _closing_braces(text: str) -> dict[int, int]:
    """The position of the closing brace for each opening one that is closed."""
    closing, opened = {}, []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            closing[opened.pop()] = brace.start()
    return closing


def _plain(text: str) -> str:
    r"""Without currency signs and separators of thousands, and with powers as 10^{3}."""
    return latex_powers(join_indian_digits(join_digits(without_currency(text))))


def _last_heading(text: str) -> list[str]:
    """The last line, if it begins with "####"."""
    line = text.rstrip().rsplit("\n", 1)[-1].strip()
    return [line.lstrip("#")] if line.startswith("####") else []


def _numbers(text: str) -> list[str]:
    return [match[0].replace(",", "").replace("−", "-") for match in _NUMBER.finditer(text)]


def _last(items: list[str]) -> str | None:
    return items[-1] if items else None
