"""A rendered conversation as tokens, and where its answers are."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Answer:
    """An answer's characters in a rendered conversation.

    Attributes:
        lead: where the blanks begin that the template writes before the answer.
        start, stop: the answer itself.
        rewritten: whether the template changed it, for example dropped its thoughts.
    """

    lead: int
    start: int
    stop: int
    rewritten: bool = False


@dataclass(frozen=True)
class Reading:
    """A whole conversation as one specialist reads it.

    Attributes:
        text: the rendered conversation.
        ids, offsets: its tokens, and the characters of each.
        format: the `ChatFormat` that reads it.
        answers: one for each assistant turn. None where the template leaves the turn out.
    """

    text: str
    ids: list[int]
    offsets: list[tuple[int, int]]
    answers: list[Answer | None]
    format: Any

    def first_token(self, begin: int) -> int:
        """The index of the token that holds a character. A special token that takes blanks behind it is before them."""
        first = bisect.bisect_right(self.offsets, begin, key=lambda offset: offset[1])
        if first < len(self.ids) and self.offsets[first][0] < begin and self.ids[first] in self.format.special_ids:
            return first + 1
        return first

    def tokens(self, answer: Answer) -> AnswerTokens:
        """The tokens of an answer, and the end token behind it if only blanks are between them."""
        first = self.first_token(answer.lead)
        stop = bisect.bisect_left(self.offsets, answer.stop, lo=first, key=lambda offset: offset[0])
        for t in range(max(stop - 1, first), len(self.ids)):
            start, end = self.offsets[t]
            if t >= stop and self.ids[t] == self.format.end_token_id:
                return AnswerTokens(first, stop, t)
            if self.text[max(start, answer.stop) : end].strip():
                break
        return AnswerTokens(first, stop, None)


class AnswerTokens(NamedTuple):
    """Indices of an answer's first token, of the one after its last, and of its end token (None: there is none)."""

    first: int
    stop: int
    end: int | None
