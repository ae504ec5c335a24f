"""Render one conversation as K token sequences with the same response tokens.

Every specialist reads the conversation in the chat template it was trained with, tokenised as a whole. Its answers are the
tokens that the specialists' logits are mixed for (paper, section 3.1 and table 12), so they must be the same tokens for
all. Where the templates make them differ, such as by a blank before the answer, the answer is tokenised once and
everything around it counts as the prompt.
"""

from __future__ import annotations

import bisect
import os
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ultrafuser.data.chat_format import Chat, ChatFormat, Reading
from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError

_CHECKED_ROWS = 4  # of each domain


@dataclass(frozen=True)
class Rendered:
    """One row as K token sequences.

    Attributes:
        input_ids: K sequences, whose lengths may differ.
        response_index: K lists of R positions. The hidden state at position r predicts the r-th response token.
        labels: the R response tokens, the same for every specialist. The end of an answer is one label for all. Each
            sequence holds the specialist's own end token there.
        truncated: number of response tokens that did not fit.
    """

    row_id: str
    domain: str
    input_ids: tuple[tuple[int, ...], ...]
    response_index: tuple[tuple[int, ...], ...]
    labels: tuple[int, ...]
    truncated: int = 0

    @property
    def num_tokens(self) -> int:
        """Length of the longest of the K sequences."""
        return max(map(len, self.input_ids))


@dataclass
class RenderStats:
    """Counts of what did not fit into `max_length`, and of what the templates changed."""

    rows: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped_rows: int = 0
    unsupervised_rows: int = 0
    unsupervised_answers: int = 0
    rewritten: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = []
        if self.truncated_rows or self.dropped_rows:
            parts.append(
                f"{self.rows} rows kept, {self.truncated_rows} of them truncated by {self.truncated_tokens} response "
                f"tokens. {self.dropped_rows} rows dropped because the prompt alone fills max_length"
            )
        if self.unsupervised_rows:
            parts.append(f"{self.unsupervised_rows} rows dropped because they have no supervised answer")
        if self.unsupervised_answers:
            parts.append(f"{self.unsupervised_answers} answers not supervised, because a template leaves them out")
        for name, count in self.rewritten.items():
            parts.append(f"the template of {name!r} rewrote {count} answers, of which the common end is supervised")
        return ". ".join(parts) or "none truncated"


class Aligned(NamedTuple):
    """One answer in all readings.

    Attributes:
        labels: its response tokens. Empty if the specialists have none in common.
        tokens: the tokens to put in place of each reading's own. None if these are the same.
        spans: the characters of the answer in each reading.
        supervised: whether a template leaves it out.
    """

    labels: list[int]
    tokens: list[int] | None
    spans: list[tuple[int, int]]


class Renderer:
    """Renders conversations for K specialists that share one vocabulary."""

    def __init__(
        self,
        tokenizer: Any,
        chat_templates: Sequence[str | ChatFormat],
        max_length: int | None = None,
        *,
        end_token_id: int | None = None,
        vocab_size: int | None = None,
        masked_token_ids: Set[int] = frozenset(),
    ) -> None:
        """
        Args:
            tokenizer: decodes answers, and reads the templates that are given as text.
            chat_templates: K Jinja texts, or chat formats with their own tokenizers.
            max_length: maximum tokens of a sequence. None: no limit.
            end_token_id: the label at the end of an answer. Default: the end token of the first specialist.
            vocab_size, masked_token_ids: the tokens that all specialists have: those below the size that are not masked.

        Raises:
            DataError: a format without an end token or without character offsets.
        """
        self.tokenizer = tokenizer
        self.formats = [
            ChatFormat(tokenizer, template) if isinstance(template, str) else template for template in chat_templates
        ]
        self.max_length = max_length
        self.end_token_id = self.formats[0].end_token_id if end_token_id is None else end_token_id
        self.vocab_size, self.masked_token_ids = vocab_size, masked_token_ids
        self.lead = self.formats[0].lead if len({chat_format.lead for chat_format in self.formats}) == 1 else ""

    def with_max_length(self, max_length: int | None) -> Renderer:
        """The same renderer with another limit."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"max_length": max_length}
        return other

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The K Jinja texts."""
        return tuple(chat_format.template for chat_format in self.formats)

    @property
    def pad_id(self) -> int:
        """The token that pads the shorter prompts of a batch."""
        pad_id = self.tokenizer.pad_token_id
        return self.end_token_id if pad_id is None or not self._is_common(pad_id) else pad_id

    def answer_text(self, ids: Sequence[int]) -> str:
        """Generated tokens as the text of an answer, without the blanks that the templates write around it."""
        text = self.tokenizer.decode(list(ids), skip_special_tokens=True).removeprefix(self.lead)
        tails = {chat_format.tail for chat_format in self.formats}
        return text.removesuffix(tails.pop()) if len(tails) == 1 else text

    # ---------------------------------------------------------------- prompts

    def prompt(self, messages: Chat) -> list[list[int]]:
        """K prompts, up to the start of the next answer: the tokens that training puts before it.

        If the last message is an assistant's, it is the beginning of the answer.

        Raises:
            DataError: a template refuses the messages.
        """
        history, beginning = _split_beginning(messages)
        readings = self._read(lambda chat_format: chat_format.read_prompt(history, beginning))
        aligned = self._align_all(readings)
        prompts = []
        for k, reading in enumerate(readings):
            ids, starts = self._assemble(reading, k, aligned)
            self._check_ids(ids, k)
            prompts.append(ids if beginning else ids[: starts[-1]])
        return prompts

    def prompt_texts(self, messages: Chat) -> list[str]:
        """The K prompts as text. If the last message is an assistant's, it is the beginning of the answer.

        Raises:
            DataError: a template refuses the messages.
        """
        history, beginning = _split_beginning(messages)
        return [chat_format.prompt_text(history)[0] + beginning for chat_format in self.formats]

    # ---------------------------------------------------------------- rows

    def render(self, row: Row, stats: RenderStats | None = None) -> Rendered | None:
        """One row, truncated on the right to `max_length`. None if a prompt alone fills it or nothing is supervised.

        Args:
            stats: counts of what the templates changed, to add to.

        Raises:
            DataError: a template refuses the row, or gives an empty prompt.
        """
        stats = RenderStats() if stats is None else stats
        chat = row.chat()
        weights = [turn.get("weight", 1) for turn in chat if turn["role"] == "assistant"]
        try:
            readings = self._read(lambda chat_format: chat_format.read(chat))
        except DataError as error:
            raise DataError(f"row {row.id!r}: {error}") from error
        aligned = self._align_all(readings)
        labels = [a.labels if weight else [] for a, weight in zip(aligned, weights, strict=True)]
        for chat_format, reading in zip(self.formats, readings, strict=True):
            if rewritten := sum(answer is not None and answer.rewritten for answer in reading.answers):
                stats.rewritten[chat_format.name] += rewritten
        stats.unsupervised_answers += sum(not a.labels for a, weight in zip(aligned, weights, strict=True) if weight)
        if not any(labels):
            stats.unsupervised_rows += 1
            return None
        sequences, positions = [], []
        for k, reading in enumerate(readings):
            ids, starts = self._assemble(reading, k, aligned)
            self._check_ids(ids, k, f"row {row.id!r}: ")
            sequences.append(ids)
            pairs = zip(starts, labels, strict=True)
            positions.append(
                [i for start, tokens in pairs if tokens for i in range(start - 1, start - 1 + len(tokens))]
            )
        if min(index[0] for index in positions) < 0:
            raise DataError(
                f"row {row.id!r}: a chat template gives an empty prompt, so nothing predicts its first token"
            )
        rendered = self._truncate(row, sequences, positions, [token for tokens in labels for token in tokens])
        stats.dropped_rows += rendered is None
        return rendered

    def _truncate(
        self, row: Row, sequences: list[list[int]], positions: list[list[int]], labels: list[int]
    ) -> Rendered | None:
        limit = self.max_length or max(map(len, sequences))
        # the hidden state that predicts a token is one position before it: the last token itself is never read
        num_labels = min(sum(position < limit for position in index) for index in positions)
        if num_labels == 0:
            return None
        return Rendered(
            row_id=row.id,
            domain=row.domain,
            input_ids=tuple(
                tuple(ids[: index[num_labels - 1] + 1]) for ids, index in zip(sequences, positions, strict=True)
            ),
            response_index=tuple(tuple(index[:num_labels]) for index in positions),
            labels=tuple(labels[:num_labels]),
            truncated=len(labels) - num_labels,
        )

    def render_all(
        self, rows: Sequence[Row], bad_rows: list[dict[str, str]] | None = None
    ) -> tuple[list[Rendered], RenderStats]:
        """Every row that fits, and counts of the rest. The first rows of each domain are checked (`check`).

        Args:
            bad_rows: collects the rows that a template refuses. None: such a row is an error.

        Raises:
            DataError: no row fits, or a row differs from what its template writes.
        """
        stats, results = RenderStats(), []
        seen: Counter[str] = Counter()
        for row in rows:
            try:
                rendered = self.render(row, stats)
            except DataError as error:
                if bad_rows is None:
                    raise
                bad_rows.append({"where": f"row {row.id!r}", "problem": str(error)})
                continue
            if rendered is None:
                continue
            if seen[row.domain] < _CHECKED_ROWS:
                self.check(row, rendered)
            seen[row.domain] += 1
            stats.rows += 1
            stats.truncated_rows += rendered.truncated > 0
            stats.truncated_tokens += rendered.truncated
            results.append(rendered)
        if rows and not results:
            if bad_rows:
                raise DataError(f"none of {len(rows)} rows can be read. The first: {bad_rows[-1]['problem']}")
            if stats.unsupervised_rows == len(rows):
                raise DataError(f"none of {len(rows)} rows has a supervised answer: {stats}")
            raise DataError(f"none of {len(rows)} rows fits into max_length={self.max_length} tokens. Raise it")
        return results, stats

    def check(self, row: Row, rendered: Rendered) -> None:
        """Compare a row with what `apply_chat_template` gives for the whole conversation.

        The tokens must be the same. Where the templates disagree on an answer's tokens, the texts must be the same.

        Raises:
            DataError: they differ. It shows both around the first difference.
        """
        for chat_format, ids in zip(self.formats, rendered.input_ids, strict=True):
            if chat_format.writes_prompts_only:
                continue
            expected, _ = chat_format.encode(chat_format.render(row.chat()))
            if list(ids) == expected[: len(ids)]:
                continue
            decode = chat_format.tokenizer.decode
            ours, theirs = decode(list(ids)), decode(expected)
            same = len(os.path.commonprefix([ours.replace(" ", ""), theirs.replace(" ", "")]))
            if same < len(ours.replace(" ", "")):
                i = next(i for i in range(len(ids)) if i >= len(expected) or ids[i] != expected[i])
                window = slice(max(0, i - 5), i + 5)
                raise DataError(
                    f"row {row.id!r}, specialist {chat_format.name!r}: the tokens to train on differ from "
                    f"apply_chat_template's from token {i} on: got {decode(list(ids[window]))!r}, expected "
                    f"{decode(expected[window])!r}. Please report the chat template"
                )

    # ---------------------------------------------------------------- K readings as one

    def _read(self, read: Any) -> list[Reading]:
        """K readings. Specialists with the same format share one."""
        shared: dict[Any, Reading] = {}
        readings = []
        for chat_format in self.formats:
            if chat_format.key not in shared:
                reading = read(chat_format)
                if not self.lead:  # blanks that only some templates write belong to the prompt
                    answers = [a and replace(a, lead=a.start) for a in reading.answers]
                    reading = replace(reading, answers=answers)
                shared[chat_format.key] = reading
            readings.append(shared[chat_format.key])
        return readings

    def _align_all(self, readings: Sequence[Reading]) -> list[Aligned]:
        return [self._align(readings, i) for i in range(len(readings[0].answers))]

    def _align(self, readings: Sequence[Reading], i: int) -> Aligned:
        """The response tokens of the i-th answer."""
        answers = [answer for reading in readings if (answer := reading.answers[i]) is not None]
        if len(answers) < len(readings):
            return Aligned([], None, [])
        pairs = list(zip(readings, answers, strict=True))
        tokens = [reading.tokens(answer) for reading, answer in pairs]
        if any(t.first == t.stop for t in tokens):  # an empty answer
            return Aligned([], None, [])
        ended = all(t.end is not None for t in tokens)
        end = [self.end_token_id] if ended else []
        spans = [(answer.lead, answer.stop) for answer in answers]
        bodies = [
            reading.ids[t.first : t.end if ended else t.stop] for reading, t in zip(readings, tokens, strict=True)
        ]
        edges = [
            (reading.offsets[t.first][0] - answer.lead, reading.offsets[t.stop - 1][1] - answer.stop)
            for (reading, answer), t in zip(pairs, tokens, strict=True)
        ]
        if all(body == bodies[0] for body in bodies) and len(set(edges)) == 1 and all(map(self._is_common, bodies[0])):
            return Aligned(bodies[0] + end, None, spans)
        texts = [reading.text[answer.lead : answer.stop] for reading, answer in pairs]
        if len({text[len(text.rstrip()) :] for text in texts}) > 1:  # some templates strip its end
            texts = [text.rstrip() for text in texts]
        size = len(os.path.commonprefix([text[::-1] for text in texts]))  # a template may drop its beginning
        stops = [answer.lead + len(text) for answer, text in zip(answers, texts, strict=True)]
        spans = [(stop - size, stop) for stop in stops]
        for reading, span in zip(readings, spans, strict=True):
            body = _tokens_within(reading, span)
            if size and body and all(map(self._is_common, body)):
                return Aligned(body + end, body, spans)
        for reading in readings if size else ():  # in every reading a token reaches over an edge
            body, _ = reading.format.encode(texts[0][-size:])
            if body and all(map(self._is_common, body)):
                return Aligned(body + end, body, spans)
        return Aligned([], None, [])

    def _assemble(self, reading: Reading, k: int, aligned: Sequence[Aligned]) -> tuple[list[int], list[int]]:
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
            first = bisect.bisect_right(reading.offsets, begin, key=lambda offset: offset[1])
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

    def _is_common(self, token: int) -> bool:
        """Whether every specialist has the token."""
        return token not in self.masked_token_ids and (self.vocab_size is None or token < self.vocab_size)

    def _check_ids(self, ids: Sequence[int], k: int, location: str = "") -> None:
        """Raises DataError: a token that the specialist's embedding table does not reach."""
        rows = self.formats[k].table_rows
        if rows is not None and max(ids, default=0) >= rows:
            token = self.formats[k].tokenizer.convert_ids_to_tokens(max(ids))
            raise DataError(
                f"{location}specialist {self.formats[k].name!r} has no row in its embedding table for the token {token!r}. "
                "Take it out of the text"
            )


def _split_beginning(messages: Chat) -> tuple[Chat, str]:
    """The turns before the next answer, and the beginning of that answer if the last message is an assistant's."""
    if messages[-1]["role"] == "assistant":
        return messages[:-1], str(messages[-1]["content"])
    return messages, ""


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
