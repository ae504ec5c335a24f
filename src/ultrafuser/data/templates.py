"""Render one conversation as K token sequences with the same response tokens.

Every specialist reads the conversation in the chat template it was trained with. The answers are tokenised once, apart
from the template, and inserted into every sequence as the same tokens. So the specialists' logits for them can be mixed
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
        template: a built-in name, a path to a Jinja file, or Jinja text. None: the template of the tokenizer.

    Raises:
        DataError: there is no template, or its name is unknown.
    """
    if template is None:
        default = tokenizer.chat_template
        if isinstance(default, Mapping):  # several named templates
            default = default.get("default")
        if not default:
            raise DataError(
                f"specialist {specialist!r}: its tokenizer has no chat template. Give one: a built-in "
                f"({', '.join(BUILTIN)}), a Jinja file, or Jinja text"
            )
        return default
    if template in BUILTIN:
        return BUILTIN[template]
    if "{{" in template or "{%" in template:
        return template
    if os.path.isfile(template):  # False, not an error, if the text is too long for a path
        return Path(template).read_text(encoding="utf-8")
    raise DataError(
        f"specialist {specialist!r}: chat template {template!r} is neither built in ({', '.join(BUILTIN)}), "
        "nor a file, nor Jinja text"
    )


@dataclass(frozen=True)
class Rendered:
    """One row as K token sequences.

    Attributes:
        input_ids: K sequences, whose lengths may differ.
        response_index: K lists of R positions. The hidden state at position r predicts the r-th response token.
        labels: the R response tokens, the same for every specialist.
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
    """Counts of the rows and tokens that did not fit into `max_length`."""

    rows: int = 0
    truncated_rows: int = 0
    truncated_tokens: int = 0
    dropped_rows: int = 0

    def __str__(self) -> str:
        if not self.truncated_rows and not self.dropped_rows:
            return "none truncated"
        return (
            f"{self.rows} rows kept, {self.truncated_rows} of them truncated by {self.truncated_tokens} response tokens. "
            f"{self.dropped_rows} rows dropped because the prompt alone fills max_length"
        )


class Renderer:
    """Renders conversations for K specialists that share one tokenizer."""

    def __init__(self, tokenizer: Any, chat_templates: Sequence[str], max_length: int | None = None) -> None:
        """
        Args:
            tokenizer: the shared tokenizer. Its `eos_token` ends every answer.
            chat_templates: K Jinja texts, one for each specialist.
            max_length: maximum tokens of a sequence. None: no limit.

        Raises:
            DataError: the tokenizer has no end-of-sequence token.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token, so answers would never end. Set one")
        self.tokenizer = tokenizer
        self.chat_templates = tuple(chat_templates)
        self.max_length = max_length

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[list[int]]:
        """K prompts, up to the start of the next answer.

        Raises:
            DataError: the template refuses the messages.
        """
        return [self._encode(text) for text in self.prompt_texts(messages)]

    def prompt_texts(self, messages: Sequence[Mapping[str, str]]) -> list[str]:
        """The K prompts as text. If the last message is an assistant's, it is the beginning of the answer.

        Raises:
            DataError: the template refuses the messages.
        """
        prefix = messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""
        history = messages[:-1] if prefix else messages
        return [self._apply(jinja, history) + prefix for jinja in self.chat_templates]

    @property
    def pad_id(self) -> int:
        """The token that pads the shorter prompts of a batch."""
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def render(self, row: Row) -> Rendered | None:
        """One row, truncated on the right to `max_length`. None if a prompt alone fills it.

        Some templates rewrite earlier answers, e.g. drop their reasoning. Then only the last answer is a response.
        """
        chat = row.chat()
        answers = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        by_template = [self._segments(jinja, chat, answers) for jinja in self.chat_templates]
        if any(segments is None for segments in by_template):
            answers = answers[-1:]
            by_template = [[self._apply(jinja, chat[: answers[0]])] for jinja in self.chat_templates]
        responses = [self._encode(chat[i]["content"]) + [self.tokenizer.eos_token_id] for i in answers]

        tokens = {segment: self._encode(segment) for segments in by_template for segment in segments or ()}
        sequences, positions = [], []
        for segments in by_template:
            ids: list[int] = []
            index: list[int] = []
            for segment, response in zip(segments or (), responses, strict=True):
                ids += tokens[segment]
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

    def render_all(self, rows: Sequence[Row]) -> tuple[list[Rendered], RenderStats]:
        """Every row that fits, and counts of the rest.

        Raises:
            DataError: no row fits.
        """
        stats, results = RenderStats(), []
        for row in rows:
            rendered = self.render(row)
            if rendered is None:
                stats.dropped_rows += 1
                continue
            stats.rows += 1
            stats.truncated_rows += rendered.truncated > 0
            stats.truncated_tokens += rendered.truncated
            results.append(rendered)
        if rows and not results:
            raise DataError(f"none of {len(rows)} rows fits into max_length={self.max_length} tokens. Raise it")
        return results, stats

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
        """The text of the template before each answer. None if it rewrites an earlier answer."""
        segments, prefix = [], ""
        for i in answers:
            text = self._apply(jinja, chat[:i])
            if not text.startswith(prefix):
                return None
            # the end-of-sequence token belongs to the previous answer, not to the template
            segments.append(text[len(prefix) :].removeprefix(self.tokenizer.eos_token if prefix else ""))
            prefix = text + chat[i]["content"]
        return segments
