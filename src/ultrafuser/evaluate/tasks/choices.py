"""Questions with lettered options: read the options without their labels, and the letter that an answer states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ultrafuser.data.answer_text import after_thinking
from ultrafuser.evaluate.tasks import read_answers as answers

LETTERS = "ABCDEFGH"
_LABEL = re.compile(r"\s*\(?([A-H])\)\s*(?:\(?\1\)\s*)*")  # AQuA has an "A)A)59"
_STYLE = re.compile(r"\\(?:text|math)\w*\s*(?=\{)")


def split_label(option: str) -> tuple[str | None, str]:
    """("A", "2") from "(A)2" or "A)2". (None, the text) without a label."""
    match = _LABEL.match(option)
    return (match[1], option[match.end() :].strip()) if match else (None, option.strip())


def score_stated_letter(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the answer states the right letter."""
    letter = stated_letter(results[0], len(doc["options"]))
    return {"acc": float(letter == LETTERS[doc["target"]]), "unparsed": float(letter is None)}


def stated_letter(answer: str, num_options: int) -> str | None:
    """The final letter of an answer, or None if it states none.

    The first of these that has a letter:

    1. the last box
    2. the text after the last "answer is", "answer:" or the like
    3. "option B is correct"
    4. the only letter that is alone on a line, opens a line as in "B) 21", or is in parentheses
    """
    text = _STYLE.sub("", after_thinking(answer))
    rest = LETTERS[1:num_options]
    # A letter that does not begin a word. "A" before a word is the article, unless the word continues the sentence.
    letter = rf"(?:[{rest}]|A(?! +(?!(?:as|because|since|with)\b)[a-z]))(?![A-Za-z'’])"
    # 1. and 2.
    stated = re.compile(rf"[\W_]*(?:(?i:option|choice|letter)\b[\W_]*)?({letter})")
    for result in (answers.boxed(text) or "", *answers.after_cues(text, "answer|option|choice")):
        if match := stated.match(result):
            return match[1]
    # 3.
    if correct := re.findall(rf"(?i:option|choice) \(?([A{rest}])\)? is (?:the )?(?i:correct|right|best)", text):
        return correct[-1]
    # 4.
    single = re.findall(
        rf"^[\W_]{{0,20}}([A{rest}])(?:[\W_]{{0,20}}$|[).:]\W{{0,20}}\s)|\(([A{rest}])\)", text, re.MULTILINE
    )
    letters = {on_line or in_parentheses for on_line, in_parentheses in single}
    return letters.pop() if len(letters) == 1 else None
