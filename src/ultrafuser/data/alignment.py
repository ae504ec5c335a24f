"""The answers of one conversation as the same tokens in K readings of it."""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

from ultrafuser.data.reading import Reading


@dataclass(frozen=True)
class AnswerRule:
    """What answers consist of.

    Attributes:
        end_token_id: the label at the end of an answer.
        vocab_size, masked_token_ids: the common tokens: those below the size that are not masked. None: all.
        apart: whether blanks around an answer belong to the template.
    """

    end_token_id: int
    vocab_size: int | None
    masked_token_ids: Set[int]
    apart: bool

    def is_common(self, token: int) -> bool:
        """Whether every specialist has the token."""
        return token not in self.masked_token_ids and (self.vocab_size is None or token < self.vocab_size)


class Aligned(NamedTuple):
    """One answer in all readings.

    Attributes:
        labels: its response tokens. Empty if the specialists have none in common.
        tokens: the tokens to put in place of each reading's own. None if these are the same.
        spans: the characters of the answer in each reading.
    """

    labels: list[int]
    tokens: list[int] | None
    spans: list[tuple[int, int]]


def align(readings: Sequence[Reading], i: int, rule: AnswerRule) -> Aligned:
    """The response tokens of the i-th answer of K readings."""
    answers = [answer for reading in readings if (answer := reading.answers[i]) is not None]
    if len(answers) < len(readings):
        return Aligned([], None, [])
    pairs = list(zip(readings, answers, strict=True))
    tokens = [reading.tokens(answer) for reading, answer in pairs]
    if any(t.first == t.stop for t in tokens):  # an empty answer
        return Aligned([], None, [])
    ended = all(t.end is not None for t in tokens)
    end = [rule.end_token_id] if ended else []
    spans = [(answer.lead, answer.stop) for answer in answers]
    bodies = [reading.ids[t.first : t.end if ended else t.stop] for reading, t in zip(readings, tokens, strict=True)]
    edges = [
        (reading.offsets[t.first][0] - answer.lead, reading.offsets[t.stop - 1][1] - answer.stop)
        for (reading, answer), t in zip(pairs, tokens, strict=True)
    ]
    clean = set(edges) == {(0, 0)} if rule.apart else len(set(edges)) == 1
    if clean and all(body == bodies[0] for body in bodies) and all(map(rule.is_common, bodies[0])):
        return Aligned(bodies[0] + end, None, spans)
    texts = [reading.text[answer.lead : answer.stop] for reading, answer in pairs]
    if len({text[len(text.rstrip()) :] for text in texts}) > 1:  # some templates strip its end
        texts = [text.rstrip() for text in texts]
    size = len(os.path.commonprefix([text[::-1] for text in texts]))
    if size < min(map(len, texts)):  # a template may drop the beginning of an answer, but not change its end
        return Aligned([], None, [])
    stops = [answer.lead + len(text) for answer, text in zip(answers, texts, strict=True)]
    spans = [(stop - size, stop) for stop in stops]
    for reading, span in zip(readings, spans, strict=True):
        body = _tokens_within(reading, span)
        if size and body and all(map(rule.is_common, body)):
            return Aligned(body + end, body, spans)
    for reading in readings if size else ():  # in every reading a token reaches over an edge
        body, _ = reading.format.encode(texts[0][-size:])
        if body and all(map(rule.is_common, body)):
            return Aligned(body + end, body, spans)
    return Aligned([], None, [])


def assemble(reading: Reading, k: int, aligned: Sequence[Aligned]) -> tuple[list[int], list[int]]:
    """A reading's tokens with the common ones in place of its own answers, and where each answer begins."""
    ids: list[int] = []
    starts: list[int] = []
    position = 0  # of the first token of the reading that is not in `ids` yet
    for answer, alignment in zip(reading.answers, aligned, strict=True):
        if alignment.tokens is None:
            first = reading.tokens(answer).first if answer is not None else position
            starts.append(len(ids) + first - position)
            continue
        begin, stop = alignment.spans[k]
        first = reading.first_token(begin)
        ids += reading.ids[position:first]
        if first < len(reading.ids) and reading.offsets[first][0] < begin:  # a token over the answer's start
            ids += _tokens_before(reading, first, begin)
        starts.append(len(ids))
        ids += alignment.tokens
        position = bisect.bisect_left(reading.offsets, stop, lo=first, key=lambda offset: offset[0])
        behind = reading.offsets[position - 1][1] if position else 0
        if behind > stop:  # a token over the answer's end
            ids += reading.format.encode(reading.text[stop:behind])[0]
    return ids + reading.ids[position:], starts


def _tokens_within(reading: Reading, span: tuple[int, int]) -> list[int]:
    """The tokens of some characters, if no token reaches over an edge. Otherwise those of the text up to their end."""
    begin, stop = span
    ids, offsets = reading.ids, reading.offsets
    for _ in range(2):
        first = bisect.bisect_right(offsets, begin, key=lambda offset: offset[1])
        last = bisect.bisect_left(offsets, stop, lo=first, key=lambda offset: offset[0])
        if first == last or offsets[first][0] < begin:
            return []
        if offsets[last - 1][1] <= stop:
            return ids[first:last]
        ids, offsets = reading.format.encode(reading.text[:stop])
    return []


def _tokens_before(reading: Reading, first: int, begin: int) -> list[int]:
    """The tokens of the characters between the start of a token that reaches over `begin` and `begin`."""
    ids, offsets = reading.format.encode(reading.text[:begin])
    start = reading.offsets[first][0]
    return [token for token, offset in zip(ids, offsets, strict=True) if offset[0] >= start]
