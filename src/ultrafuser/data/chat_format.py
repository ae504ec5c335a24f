"""One specialist's chat format: where its template puts each answer, and the token that ends an answer.

The template is the only source. A conversation is rendered as a whole and tokenised as a whole. The answers are located
by rendering it again with a sentinel in place of each answer.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Literal

from ultrafuser.data.json_text import LONE_SURROGATE, has_lone_surrogate
from ultrafuser.data.reading import Answer, Reading
from ultrafuser.errors import DataError

# Our own Jinja of the layouts in the paper's table 12, and of ChatML without a default system message.
BUILTIN = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "plain": (
        "{{ bos_token or '' }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ m.content }}\n{% elif m.role == 'assistant' %}"
        "Assistant: {{ m.content }}{{ eos_token or '' }}\n{% else %}{{ m.role|capitalize }}: {{ m.content }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
    "inst": (
        "{% set ns = namespace(system='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}"
        "{% elif m.role == 'assistant' %}{{ ' ' + m.content }}{{ eos_token or '' }}{% else %}{{ bos_token or '' }}[INST] "
        "{{ ns.system + m.content }} [/INST]{% set ns.system = '' %}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{{ bos_token or '' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "{% endif %}{{ '\n\n' }}{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% elif m.role == 'tool' %}### Input:\n{{ m.content }}\n\n{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token or '' }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}

SystemPolicy = Literal["keep", "merge", "drop"]
Chat = Sequence[Mapping[str, Any]]
# A private-use character that no data holds: an answer is found between two renderings by where they differ.
_SENTINEL = "\ue0c5"
_PROBE = "A"
_RESERVED = {"add_generation_prompt", "chat_template", "continue_final_message", "conversation", "messages", "tokenize"}
# What the expressions of a template can raise.
_CODE_ERRORS = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
# Takes the place of transformers' clock. A function cannot be handed to a template, so the day's texts are.
_PINNED_CLOCK = (
    "{% macro strftime_now(layout) %}{% set ns = namespace(text=layout) %}{% for code, text in pinned_clock.items() %}"
    "{% set ns.text = ns.text.replace(code, text) %}{% endfor %}{{ ns.text }}{% endmacro %}"
)
_CLOCK_CODES = [*(f"%-{code}" for code in "dmyHIMSj"), *(f"%{code}" for code in "aAwdbBmyYHIpMSfzZjUWcxXGuV")]


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
        if not (default or "").strip():
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


class TemplateSyntaxError(DataError):
    """A chat template that is no Jinja."""


class ChatFormat:
    """How one specialist reads a conversation.

    Attributes:
        end_token_id: the token that ends an answer: the one that the template writes, or the tokenizer's `eos_token` if
            it writes none.
        writes_end: whether the template writes it.
        writes_prompts_only: whether the template leaves answers out.
        lead, tail: the blanks that the template writes before an answer, and between it and the end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        *,
        name: str = "model",
        template_kwargs: Mapping[str, Any] | None = None,
        system: SystemPolicy = "keep",
        date: str | None = None,
        table_rows: int | None = None,
    ) -> None:
        """
        Args:
            tokenizer: the tokenizer of the specialist.
            template: the Jinja text.
            name: the specialist, for errors.
            template_kwargs: further variables of the template, such as `enable_thinking`, `date_string` or `tools`.
            system: `keep` passes system turns to the template, `merge` puts them before the first user turn, `drop`
                leaves them out.
            date: the day, as YYYY-MM-DD, that a template which reads the clock sees. Default: today.
            table_rows: rows of the specialist's embedding table, for errors. None: unknown.

        Raises:
            DataError: no end token, or a tokenizer without character offsets.
        """
        self.tokenizer, self.template, self.name = tokenizer, template, name
        self.template_kwargs, self.system, self.date = dict(template_kwargs or {}), system, date
        self.table_rows = table_rows
        self.reads_clock = "strftime_now" in template
        self.key = repr((id(tokenizer), template, self.template_kwargs, system, date))  # equal for equal readings
        if not getattr(tokenizer, "is_fast", False):
            raise DataError(
                f"specialist {name!r}: its tokenizer {type(tokenizer).__name__} tells no character offsets, by which "
                "answers are found. Convert it to a fast tokenizer (tokenizer.json)"
            )
        if reserved := sorted(_RESERVED & self.template_kwargs.keys()):
            raise DataError(f"specialist {name!r}: template_kwargs cannot set {reserved[0]!r}, which the renderer sets")
        self.lead = self.tail = ""
        self.writes_prompts_only = False
        self.special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        end = self._probe()
        self.writes_end = end is not None
        self.end_token_id: int = tokenizer.eos_token_id if end is None else end
        if self.end_token_id is None:
            raise DataError(
                f"specialist {name!r}: its template writes no end token after an answer and its tokenizer has no "
                "eos_token, so answers would never end. Set one"
            )

    @property
    def thinks(self) -> bool:
        """Whether the specialist is asked for thoughts before its answers."""
        return any(self.template_kwargs.get(key) is True for key in ("enable_thinking", "thinking"))

    # ---------------------------------------------------------------- render

    def pinned_template(self) -> tuple[str, dict[str, Any]]:
        """The Jinja text, which reads `date` in place of the clock, and its further variables."""
        variables = {**self.template_kwargs}
        if not self.reads_clock or self.date is None:
            return self.template, variables
        day = datetime.datetime.fromisoformat(self.date)
        return _PINNED_CLOCK + self.template, {**variables, "pinned_clock": {c: day.strftime(c) for c in _CLOCK_CODES}}

    def render(self, chat: Chat, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            DataError: the template refuses it.
        """
        import jinja2

        template, options = self.pinned_template()
        messages = self._messages(chat)
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        except jinja2.TemplateSyntaxError as error:
            raise TemplateSyntaxError(
                f"specialist {self.name!r}: its chat template {self.template[:60]!r} is no Jinja: {error}"
            ) from error
        except (jinja2.TemplateError, *_CODE_ERRORS) as error:
            advice = ""
            if any(message["role"] == "system" for message in messages):
                advice = ". If it takes no system turn, set `system: merge` or `system: drop` for this specialist"
            raise DataError(
                f"specialist {self.name!r}: its chat template refuses the conversation: {error}{advice}"
            ) from error

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        """The turns that the template sees under the policy for system turns."""
        messages = [{key: value for key, value in turn.items() if key != "weight"} for turn in chat]
        if self.system == "keep" or not any(turn["role"] == "system" for turn in messages):
            return messages
        system = "\n\n".join(str(turn["content"]) for turn in messages if turn["role"] == "system")
        messages = [turn for turn in messages if turn["role"] != "system"]
        if self.system == "merge":
            first = next((turn for turn in messages if turn["role"] == "user"), None)
            if first is not None:
                first["content"] = f"{system}\n\n{first['content']}"
        return messages

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a text and the characters of each. Special tokens are those that the text writes.

        Raises:
            DataError: the text has a lone surrogate.
        """
        if has_lone_surrogate(text):
            raise DataError(f"a message {LONE_SURROGATE}. Remove it")
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    # ---------------------------------------------------------------- read

    def read(self, chat: Chat) -> Reading:
        """A whole conversation that ends with an answer.

        The last answer gets the end token if the template writes none.

        Raises:
            DataError: the template refuses the conversation.
        """
        text = self.render(chat)
        answers = self._locate(chat, text)
        if answers[-1] is None and self.writes_prompts_only:
            text, answers[-1] = self._after_prompt(chat)
        ids, offsets = self.encode(text)
        last = answers[-1]
        reading = Reading(text, ids, offsets, answers, self)
        if last is None or reading.tokens(last).end is not None:
            return reading
        if self.writes_end and text[last.stop :].strip():  # the template goes on behind the answer
            return reading
        text = text[: last.stop]
        ids, offsets = self.encode(text)
        ids, offsets = [*ids, self.end_token_id], [*offsets, (len(text), len(text))]
        return Reading(text, ids, offsets, answers, self)

    def read_prompt(self, chat: Chat, beginning: str = "") -> Reading:
        """A conversation up to its next answer, which begins with `beginning` (a probe if there is none).

        Raises:
            DataError: the template refuses the conversation.
        """
        text, answers = self.prompt_text(chat)
        start = answers[-1].start
        text += beginning or _PROBE
        answers[-1] = Answer(answers[-1].lead, start, len(text))
        return Reading(text, *self.encode(text), answers, self)

    def prompt_text(self, chat: Chat) -> tuple[str, list[Any]]:
        """The text before the next answer, and the answers so far with an empty one at the end."""
        full = [*chat, {"role": "assistant", "content": _PROBE}]
        if self.thinks:  # the generation prompt opens the answer, which begins with thoughts
            text = self.render(chat, add_generation_prompt=True)
            earlier = self._locate(full, self.render(full))[:-1]
            return text, [*earlier, Answer(len(text), len(text), len(text))]
        text = self.render(full)
        answers = self._locate(full, text)
        if answers[-1] is None:
            text, answers[-1] = self._after_prompt(full)
        last = answers[-1]
        return text[: last.start], [*answers[:-1], Answer(last.lead, last.start, last.start)]

    # ---------------------------------------------------------------- find answers

    def _locate(self, chat: Chat, text: str) -> list[Any]:
        """The characters of each answer in the rendered text.

        Thoughts that the specialist is asked for, and calls of tools, are part of an answer.
        """
        turns = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        answers = self._locate_contents(chat, text)
        for k, i in enumerate(turns):
            calls = bool(chat[i].get("tool_calls"))
            if not calls and not self.thinks:
                continue
            prompt = self.render(chat[:i], add_generation_prompt=True)
            answer = answers[k]
            if not text.startswith(prompt) or (answer is not None and len(prompt) > answer.start):
                continue
            stop = len(prompt) if answer is None else answer.stop
            if calls:
                ending = text.find(self.tokenizer.convert_ids_to_tokens(self.end_token_id), stop)
                stop = max(stop, ending)
            if stop > len(prompt):
                answers[k] = Answer(len(prompt), len(prompt), stop, answer is not None and answer.rewritten)
        return answers

    def _locate_contents(self, chat: Chat, text: str) -> list[Any]:
        turns = [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]
        pieces = self.render(_replace(chat, turns)).split(_SENTINEL)
        answers: list[Any] = []
        if len(pieces) == len(turns) + 1 and not any(_has_thoughts(chat[i]) for i in turns):
            position = 0
            for piece, i in zip(pieces, turns, strict=False):
                content = str(chat[i]["content"])
                content = content if text.startswith(content, position + len(piece)) else content.strip()
                start = position + len(piece)
                answers.append(Answer(_before_blanks(text, start), start, start + len(content)))
                position = start + len(content)
            if _joined(pieces, [text[answer.start : answer.stop] for answer in answers]) == text:
                return answers
        return [self._locate_one(chat, i, text) for i in turns]

    def _locate_one(self, chat: Chat, turn: int, text: str) -> Answer | None:
        """An answer that the template rewrites: where the text differs from one with a sentinel in its place."""
        other = self.render(_replace(chat, [turn]))
        if _SENTINEL not in other:
            return None
        start = len(os.path.commonprefix([text, other]))
        behind = min(len(text), len(other)) - start
        stop = len(text) - len(os.path.commonprefix([text[::-1][:behind], other[::-1][:behind]]))
        content = str(chat[turn]["content"]).strip()
        lead = _before_blanks(text, start)
        if _has_thoughts(chat[turn]):
            prompt = self.render(chat[:turn], add_generation_prompt=True)
            opening = text.rfind("<think>", 0, start + len("<think>"))
            if text.startswith(prompt) and len(prompt) <= start:
                lead = start = len(prompt)
            elif opening >= 0 and not text[opening:start].replace("<think>", "").strip():
                lead = start = opening
        if start >= stop:
            return None
        return Answer(lead, start, stop, rewritten=text[start:stop].strip() != content)

    def _after_prompt(self, chat: Chat) -> tuple[str, Answer]:
        """The last answer behind the generation prompt, for a template that writes no answers."""
        text = self.render(chat[:-1], add_generation_prompt=True)
        end = len(text) + len(str(chat[-1]["content"]))
        return text + str(chat[-1]["content"]), Answer(_before_blanks(text, len(text)), len(text), end)

    def _probe(self) -> int | None:
        """Find the end token that the template writes after an answer, and the blanks before and after one.

        Without an end token the next turn's first token ends an answer, as in GLM-4.
        """
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": _PROBE}]
        for chat in (turns, [{"role": "system", "content": "Hi"}, *turns]):  # some templates need a system turn
            try:
                end = self._end_after(chat, chat, self.special_ids)
                if end is None:
                    end = self._end_after(chat, [*chat, *turns], self.special_ids - {self.tokenizer.bos_token_id})
                return end
            except TemplateSyntaxError:
                raise
            except DataError:  # a template that wants other turns. Its rows say so
                continue
        return None

    def _end_after(self, chat: Chat, turns: Chat, special_ids: Set[int]) -> int | None:
        """The first special token behind the first answer, if only blanks are between them."""
        text = self.render(turns)
        answer = self._locate_contents(turns, text)[0]
        if answer is None:
            self.writes_prompts_only = True
            text, answer = self._after_prompt(chat)
        self.lead = text[answer.lead : answer.start]
        for token, (start, end) in zip(*self.encode(text), strict=True):
            if end <= answer.stop:
                continue
            if token in special_ids:
                self.tail = text[answer.stop : start]
                return token
            if text[max(start, answer.stop) : end].strip():
                break
        return None


def _replace(chat: Chat, turns: Sequence[int]) -> list[dict[str, Any]]:
    """The conversation with the sentinel in place of some answers."""
    return [{**turn, "content": _SENTINEL} if i in turns else dict(turn) for i, turn in enumerate(chat)]


def _joined(pieces: Sequence[str], answers: Sequence[str]) -> str:
    return "".join(piece + answer for piece, answer in zip(pieces, [*answers, ""], strict=True))


def _before_blanks(text: str, position: int) -> int:
    """Where the run of blanks before a position begins. Line breaks belong to the template."""
    return len(text[:position].rstrip(" "))


def _has_thoughts(turn: Mapping[str, Any]) -> bool:
    return bool(turn.get("reasoning_content")) or "</think>" in str(turn.get("content"))
