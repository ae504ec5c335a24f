"""Questions with lettered options: the options without their labels, and the letter that an answer states."""

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
    """("A", "2") from "(A)2" or "A)2"; without a label: (None, the text)."""
    match = _LABEL.match(option)
    return (match[1], option[match.end() :].strip()) if match else (None, option.strip())


def score_stated_letter(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 where the letter that the answer states is the right one."""
    given = stated_letter(results[0], len(doc["options"]))
    return {"acc": float(given == LETTERS[doc["target"]]), "unparsed": float(given is None)}


def stated_letter(answer: str, num_options: int) -> str | None:
    """The letter an answer settles on; None if it states none.

    In this order: the last box; the letter after the last "answer is", "answer:" or the like that has one; "option B is correct"; the
    only letter that stands on a line of its own, opens a line as in "B) 21", or stands in parentheses.
    """
    text = _STYLE.sub("", after_thinking(answer))
    rest = LETTERS[1:num_options]
    # "A" before a word is the article, unless the word goes on about the answer.
    letter = rf"(?:[{rest}]|A(?! +(?!(?:as|because|since|with)\b)[a-z]))(?![A-Za-z'’])"
    stated = re.compile(rf"[\W_]*(?:(?i:option|choice|letter)\b[\W_]*)?({letter})")
    for place in (answers.boxed(text) or "", *answers.after_cues(text, "answer|option|choice")):
        if match := stated.match(place):
            return match[1]
    if correct := re.findall(rf"(?i:option|choice) \(?([A{rest}])\)? is (?:the )?(?i:correct|right|best)", text):
        return correct[-1]
    alone = re.findall(rf"^[\W_]*([A{rest}])(?:[\W_]*$|[).:]\W*\s)|\(([A{rest}])\)", text, re.MULTILINE)
    found = {first or second for first, second in alone}
    return found.pop() if len(found) == 1 else None
