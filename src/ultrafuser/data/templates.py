"""One conversation -> K token sequences whose response tokens line up.

Every specialist reads the conversation in the chat template it was trained with. The answers are tokenised once,
on their own, and put into every sequence as the same tokens, so that the specialists' logits for them can be mixed
(paper, section 3.1 and table 12).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultrafuser.data.schema import Row
from ultrafuser.errors import DataError

# Our own Jinja of the layouts in the paper's table 12, and of ChatML without a default system message.
BUILTIN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'user' %}User: {{ m.content }}\n"
        "{% else %}Assistant: {{ m.content }}{{ eos_token or '' }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant: {% endif %}"
    ),
    "inst": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'user' %}{{ bos_token or '' }}[INST] {{ ns.system + m.content }} [/INST] "
        "{% set ns.system = '' %}{% else %}{{ m.content }}{{ eos_token or '' }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{{ bos_token or '' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "{% endif %}{{ '\n\n' }}{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token or '' }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}


def resolve_template(template: str | None, tokenizer: Any, specialist: str) -> str:
    """The Jinja text of a specialist's chat template.

    Args:
        template: a built-in name, a path to a Jinja file, Jinja text, or None for the tokenizer's own.

    Raises:
        DataError: the tokenizer has none and none was given, or it names nothing known.
    """
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, Mapping):  # several named templates
            own = own.get("default")
        if not own:
            raise DataError(
                f"specialist {specialist!r}: its tokenizer has no chat template; give one: a built-in "
                f"({', '.join(BUILTIN)}), a Jinja file, or Jinja text"
            )
        return own
    if template in BUILTIN:
        return BUILTIN[template]
    if "{{" in template or "{%" in template:
        return template
    if os.path.isfile(template):  # False, not an error, for text too long for a path
        return Path(template).read_text(encoding="utf-8")
    raise DataError(
        f"specialist {specialist!r}: chat template {template!r} is neither built in ({', '.join(BUILTIN)}), "
        "nor a file, nor Jinja text"
    )


@dataclass(frozen=True)
class Rendered:
    """One row as K token sequences.

    Attributes:
        input_ids: K sequences; they may differ in length, since templates do.
        response_index: K lists of R positions: the hidden state at that position predicts the r-th response token.
        labels: the R response tokens, the same for every specialist.
        truncated: response tokens that did not fit.
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
    """What did not fit into `max_length`; nothing is dropped without being counted here."""

    rows: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped_rows: int = 0

    def __str__(self) -> str:
        if not self.truncated_rows and not self.dropped_rows:
            return "all of them whole"
        return (
            f"{self.rows} rows kept; {self.truncated_rows} of them lost {self.truncated_tokens} response tokens at the "
            f"end; {self.dropped_rows} rows dropped because their prompt alone fills max_length"
        )


class Renderer:
    """Renders conversations for K specialists that share one tokenizer."""

    def __init__(self, tokenizer: Any, chat_templates: Sequence[str], max_length: int | None = None) -> None:
        """
        Args:
            tokenizer: the shared tokenizer; its `eos_token` ends every answer.
            chat_templates: K Jinja texts, one for each specialist.
            max_length: tokens that a sequence may have.

        Raises:
            DataError: the tokenizer has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token, so that answers would never end; set one")
        self.tokenizer = tokenizer
        self.chat_templates = tuple(chat_templates)
        self.max_length = max_length

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """K prompts, up to where the next answer begins.

        Raises:
            DataError: the template refuses the messages.
        """
        return [self._encode(text) for text in self.prompt_texts(messages)]

    def prompt_texts(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """The K prompts as text; a last message of the assistant's is the beginning of the answer.

        Raises:
            DataError: the template refuses the messages.
        """
        begun = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        asked = messages[:-1] if begun else messages
        return [self._apply(jinja, asked) + begun for jinja in self.chat_templates]

    @property
    def pad_id(self) -> int:
        """The token that fills up shorter prompts of a batch."""
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def render(self, row: Row) -> Rendered | None:
        """One row, cut on the right to `max_length`; None when a prompt alone fills it.

        Where a template rewrites earlier answers (dropping their reasoning, say) only the last answer is a response.
        """
        chat = row.chat()
        answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        pieces = [self._segments(jinja, chat, answers) for jinja in self.chat_templates]
        if any(segments is None for segments in pieces):
            answers = answers[-1:]
            pieces = [[self._apply(jinja, chat[: answers[0]])] for jinja in self.chat_templates]
        responses = [self._encode(chat[i]["content"]) + [self.tokenizer.eos_token_id] for i in answers]

        cut: dict[str, list[int]] = {segment: self._encode(segment) for own in pieces for segment in own or ()}
        sequences, positions = [], []
        for own in pieces:
            ids: list[int] = []
            index: list[int] = []
            for segment, response in zip(own or (), responses, strict=True):
                ids += cut[segment]
                index += range(len(ids) - 1, len(ids) + len(response) - 1)
                ids += response
            sequences.append(ids)
            positions.append(index)
        labels = [token for response in responses for token in response]
        if min(index[0] for index in positions) < 0:
            raise DataError(
                f"row {row.id!r}: a chat template gives an empty prompt, so nothing predicts its first token"
            )
        limit = self.max_length or max(map(len, sequences))
        # the hidden state that predicts a token lies one before it: the last token itself is never read
        kept = min(sum(position < limit for position in index) for index in positions)
        if kept == 0:
            return None
        return Rendered(
            row_id=row.id,
            domain=row.domain,
            input_ids=tuple(tuple(ids[: index[kept - 1] + 1]) for ids, index in zip(sequences, positions, strict=True)),
            response_index=tuple(tuple(index[:kept]) for index in positions),
            labels=tuple(labels[:kept]),
            truncated=len(labels) - kept,
        )

    def render_all(self, rows: Sequence[Row]) -> tuple[list[Rendered], RenderStats]:
        """Every row that fits, and the count of what did not.

        Raises:
            DataError: no row fits.
        """
        stats, kept = RenderStats(), []
        for row in rows:
            rendered = self.render(row)
            if rendered is None:
                stats.dropped_rows += 1
                continue
            stats.rows += 1
            stats.truncated_rows += rendered.truncated > 0
            stats.truncated_tokens += rendered.truncated
            kept.append(rendered)
        if rows and not kept:
            raise DataError(f"none of {len(rows)} rows fits into max_length={self.max_length} tokens; raise it")
        return kept, stats

    def _apply(self, jinja: str, messages: Sequence[Mapping[str, str]]) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                list(messages), chat_template=jinja, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise DataError(f"chat template {jinja[:60]!r}...: {error}") from error

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _segments(self, jinja: str, chat: list[dict[str, str]], answers: list[int]) -> list[str] | None:
        """The template's text before each answer, or None when it rewrites an earlier answer."""
        segments, read = [], ""
        for i in answers:
            text = self._apply(jinja, chat[:i])
            if not text.startswith(read):
                return None
            # the end-of-sequence token belongs to the answer before, not to the template
            segments.append(text[len(read) :].removeprefix(self.tokenizer.eos_token if read else ""))
            read = text + chat[i]["content"]
        return segments
