"""Render one conversation as K token sequences with the same response tokens.

Every specialist reads the conversation in the chat template it was trained with, tokenised as a whole. Its answers are the
tokens that the specialists' logits are mixed for (paper, section 3.1 and table 12), so they must be the same tokens for
all. Where the templates make them differ, such as by a blank before the answer, the answer is tokenised once and
everything around it counts as the prompt.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from ultrafuser.data.alignment import Aligned, AnswerRule, align, assemble
from ultrafuser.data.chat_format import Chat, ChatFormat
from ultrafuser.data.reading import Reading
from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError

_CHECKED_ROWS = 4  # of each domain
_QUESTION = [{"role": "user", "content": "Hi"}]
_CONTEXT = "A"


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
    thoughts: Counter[str] = field(default_factory=Counter)

    def add(self, other: RenderStats) -> None:
        """Add the counts of other rows."""
        for counter in fields(self):
            setattr(self, counter.name, getattr(self, counter.name) + getattr(other, counter.name))

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
            parts.append(
                f"{self.unsupervised_answers} answers not supervised, because the templates have no tokens of them in common"
            )
        for name, count in self.rewritten.items():
            parts.append(f"the template of {name!r} rewrote {count} answers, of which the common end is supervised")
        for name, count in self.thoughts.items():
            parts.append(
                f"{count} answers of {name!r} begin with a thought, for which its prompts do not ask. To ask for thoughts, set "
                "template_kwargs: {enable_thinking: true}"
            )
        return ". ".join(parts) or "none truncated"


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
        apart: bool | None = None,
    ) -> None:
        """
        Args:
            tokenizer: decodes answers, and reads the templates that are given as text.
            chat_templates: K Jinja texts, or chat formats with their own tokenizers.
            max_length: maximum tokens of a sequence. None: no limit.
            end_token_id: the label at the end of an answer. Default: the end token of the first specialist.
            vocab_size, masked_token_ids: the tokens that all specialists have: those below the size that are not masked.
            apart: whether blanks around an answer belong to the template. Default: if the formats write different ones.

        Raises:
            DataError: a format without an end token or without character offsets.
        """
        self.tokenizer = tokenizer
        self.formats = [
            ChatFormat(tokenizer, template) if isinstance(template, str) else template for template in chat_templates
        ]
        self.max_length = max_length
        end = self.formats[0].end_token_id if end_token_id is None else end_token_id
        blanks = {(chat_format.lead, chat_format.tail) for chat_format in self.formats}
        apart = len(blanks) > 1 if apart is None else apart
        self.rule = AnswerRule(end, vocab_size, masked_token_ids, apart)

    @property
    def chat_templates(self) -> tuple[str, ...]:
        """The K Jinja texts."""
        return tuple(chat_format.template for chat_format in self.formats)

    @property
    def end_token_id(self) -> int:
        """The label at the end of an answer."""
        return self.rule.end_token_id

    @property
    def pad_id(self) -> int:
        """The token that pads the shorter prompts of a batch."""
        pad_id = self.tokenizer.pad_token_id
        return self.end_token_id if pad_id is None or not self.rule.is_common(pad_id) else pad_id

    def answer_text(self, ids: Sequence[int]) -> str:
        """Generated tokens as the text of an answer, without the blanks that the templates write around it."""
        before, behind = self.answer_blanks
        return self._text_behind(ids).removeprefix(before).removesuffix(behind)

    @cached_property
    def answer_blanks(self) -> tuple[str, str]:
        """The blanks that the templates write before and behind an answer, as far as its decoded tokens bring them."""
        return self._blanks_before(), "" if self.rule.apart else self.formats[0].tail

    def _blanks_before(self) -> str:
        """The blanks that the first token of a decoded answer brings with it."""
        reading = self._read(lambda chat_format: chat_format.read_prompt(_QUESTION))[0]
        answer = reading.answers[-1]
        assert answer is not None
        probe = self._text_behind(reading.ids[reading.tokens(answer).first :])
        return probe[: len(probe) - len(probe.lstrip(" "))]

    @cached_property
    def answer_context(self) -> list[int]:
        """The tokens of some text, for an answer to be decoded behind."""
        return self.tokenizer.encode(_CONTEXT, add_special_tokens=False)

    def _text_behind(self, ids: Sequence[int]) -> str:
        """The text of tokens behind other text. Alone, some tokenizers take a blank from the first one."""
        context = self.answer_context
        text = self.tokenizer.decode([*context, *ids], skip_special_tokens=True)
        return text[len(self.tokenizer.decode(context, skip_special_tokens=True)) :]

    # ---------------------------------------------------------------- prompts

    def prompt(self, messages: Chat) -> list[list[int]]:
        """K prompts, up to the start of the next answer: the tokens that training puts before it.

        If the last message is an assistant's, it is the beginning of the answer.

        Raises:
            DataError: a template refuses the messages.
        """
        history, beginning = _split_beginning(messages)
        sequences, starts, _ = self._with_answer(history, beginning)
        prompts = sequences if beginning else [ids[:start] for ids, start in zip(sequences, starts, strict=True)]
        if empty := [chat_format.name for chat_format, ids in zip(self.formats, prompts, strict=True) if not ids]:
            raise DataError(
                f"specialist {empty[0]!r}: its chat template gives an empty prompt, so nothing can follow it"
            )
        return prompts

    def continuation(self, messages: Chat, text: str) -> Rendered:
        """The next answer, or more of the one that the last message begins, as labels without an end.

        Blanks and line breaks that end all prompts alike belong to the answer, as in lm-eval.

        Raises:
            DataError: a template refuses the messages, or the text has no tokens.
        """
        history, beginning = _split_beginning(messages)
        sequences, starts, labels = self._with_answer(history, beginning + text, with_blanks=not beginning)
        skipped = 0
        if beginning:
            _, _, begun = self._with_answer(history, beginning)
            skipped = len(os.path.commonprefix([begun, labels]))
        labels = labels[skipped:]
        if not labels:
            raise DataError(f"the continuation {text!r} has no tokens, so it has no log-likelihood")
        index = [tuple(range(start + skipped - 1, start + skipped - 1 + len(labels))) for start in starts]
        return Rendered(
            row_id="",
            domain="",
            input_ids=tuple(tuple(ids[: i[-1] + 1]) for ids, i in zip(sequences, index, strict=True)),
            response_index=tuple(index),
            labels=tuple(labels),
        )

    def _with_answer(
        self, history: Chat, text: str, with_blanks: bool = False
    ) -> tuple[list[list[int]], list[int], list[int]]:
        """K sequences with an answer that is not ended, where it begins in each, and its labels.

        Args:
            with_blanks: count blanks and line breaks that stand before it in all sequences as its own.
        """
        readings = self._read(lambda chat_format: chat_format.read_prompt(history, text))
        if with_blanks:
            readings = _with_blanks(readings)
        aligned = self._align_all(readings)
        sequences, starts = [], []
        for k, reading in enumerate(readings):
            ids, begins = assemble(reading, k, aligned)
            self._check_ids(ids, k)
            sequences.append(ids)
            starts.append(begins[-1])
        return sequences, starts, aligned[-1].labels

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
            if not chat_format.thinks and "</think>" in _supervised_text(reading):
                stats.thoughts[chat_format.name] += 1
        stats.unsupervised_answers += sum(not a.labels for a, weight in zip(aligned, weights, strict=True) if weight)
        if not any(labels):
            stats.unsupervised_rows += 1
            return None
        sequences, positions = [], []
        for k, reading in enumerate(readings):
            ids, starts = assemble(reading, k, aligned)
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
        num_before = len(bad_rows or [])
        results, stats = self.render_some(rows, bad_rows)
        self.check_count(len(rows), len(results), stats, (bad_rows or [])[num_before:])
        return results, stats

    def render_some(
        self, rows: Sequence[Row], bad_rows: list[dict[str, str]] | None = None
    ) -> tuple[list[Rendered], RenderStats]:
        """As `render_all`, but it is no error if no row fits."""
        stats, results = RenderStats(), []
        seen: Counter[str] = Counter()
        for row in rows:
            try:
                rendered = self.render(row, stats)
                if rendered is not None and seen[row.domain] < _CHECKED_ROWS:
                    self.check(row, rendered)
            except DataError as error:
                if bad_rows is None:
                    raise
                bad_rows.append({"where": f"row {row.id!r}", "problem": str(error)})
                continue
            if rendered is None:
                continue
            seen[row.domain] += 1
            stats.rows += 1
            stats.truncated_rows += rendered.truncated > 0
            stats.truncated_tokens += rendered.truncated
            results.append(rendered)
        return results, stats

    def check_count(
        self, num_rows: int, num_rendered: int, stats: RenderStats, refused: Sequence[dict[str, str]]
    ) -> None:
        """Raises DataError: there were rows, but none of them fits. `refused`: the rows that a template refused."""
        if not num_rows or num_rendered:
            return
        if len(refused) == num_rows:
            raise DataError(f"none of {num_rows} rows can be read. The first: {refused[0]['problem']}")
        if stats.unsupervised_rows == num_rows:
            raise DataError(f"none of {num_rows} rows has a supervised answer: {stats}")
        raise DataError(f"none of {num_rows} rows fits into max_length={self.max_length} tokens. Raise it")

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
            ours, theirs = ("".join(decode(tokens).rstrip("\ufffd").split()) for tokens in (list(ids), expected))
            if not theirs.startswith(ours):
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
                if self.rule.apart:
                    answers = [a and replace(a, lead=a.start) for a in reading.answers]
                    reading = replace(reading, answers=answers)
                shared[chat_format.key] = reading
            readings.append(shared[chat_format.key])
        return readings

    def _align_all(self, readings: Sequence[Reading]) -> list[Aligned]:
        return [align(readings, i, self.rule) for i in range(len(readings[0].answers))]

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
    if not messages:
        raise DataError("the conversation has no messages. Expected at least a user's")
    if odd := next((turn for turn in messages if not isinstance(turn.get("content"), str | None)), None):
        raise DataError(f"the content of a {odd['role']} is a {type(odd['content']).__name__}, expected text")
    if messages[-1]["role"] == "assistant":
        return messages[:-1], str(messages[-1]["content"])
    return messages, ""


def _with_blanks(readings: Sequence[Reading]) -> list[Reading]:
    """Let the last answers begin with the blanks before them, if these are the same in all readings."""
    answers = [answer for reading in readings if (answer := reading.answers[-1]) is not None]
    prompts = [reading.text[: answer.start] for reading, answer in zip(readings, answers, strict=True)]
    blanks = {prompt[len(prompt.rstrip()) :] for prompt in prompts}
    if len(blanks) > 1:
        return list(readings)
    size = len(blanks.pop())
    return [
        replace(reading, answers=[*reading.answers[:-1], replace(answer, lead=answer.start - size)])
        for reading, answer in zip(readings, answers, strict=True)
    ]


def _supervised_text(reading: Reading) -> str:
    return "".join(reading.text[answer.lead : answer.stop] for answer in reading.answers if answer is not None)
