"""A slow, obvious reference: the token ids of a whole rendered conversation, and which of them an answer trains.

It knows nothing about templates. An answer is replaced by a word that occurs nowhere else, and the word is looked up in the
rendered text: all before it and all after it is the template's, so the rest of the real text is the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from chat_formats import Chat
from transformers import PreTrainedTokenizerFast

THOUGHT, ANSWER = "Qzthoughtzq", "Qzanswerzq"


@dataclass(frozen=True)
class ReferenceTokens:
    """A conversation as tokens. A span is (start, end) in characters of the text, from an answer to its end of turn."""

    text: str
    token_ids: list[int]
    supervised: list[int]  # the positions of the tokens that an answer trains, in order
    spans: list[tuple[int, int]]


def render_text(tokenizer: PreTrainedTokenizerFast, template: str, chat: Chat, **template_kwargs: Any) -> str:
    """The conversation as the template writes it."""
    text = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **template_kwargs)
    assert isinstance(text, str)
    return text


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, template: str, chat: Chat, **template_kwargs: Any) -> list[int]:
    """The token ids of a conversation that asks for an answer."""
    text = render_text(tokenizer, template, chat, add_generation_prompt=True, **template_kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def reference_tokens(
    tokenizer: PreTrainedTokenizerFast, template: str, chat: Chat, end_of_turn: str, **template_kwargs: Any
) -> ReferenceTokens:
    """The tokens of the whole conversation. Supervised are those that overlap the span of an answer."""
    text = render_text(tokenizer, template, chat, **template_kwargs)
    spans = [
        answer_span(tokenizer, template, chat, turn, end_of_turn, **template_kwargs)
        for turn, message in enumerate(chat)
        if message["role"] == "assistant"
    ]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    supervised = [
        position
        for position, (start, end) in enumerate(encoding["offset_mapping"])
        if any(start < span_end and end > span_start for span_start, span_end in spans)
    ]
    return ReferenceTokens(text, encoding["input_ids"], supervised, spans)


def answer_span(
    tokenizer: PreTrainedTokenizerFast, template: str, chat: Chat, turn: int, end_of_turn: str, **template_kwargs: Any
) -> tuple[int, int]:
    """Start and end of an answer: blanks after the generation prompt, thought (if the template writes it), end of turn."""
    text = render_text(tokenizer, template, chat, **template_kwargs)
    start, end = answer_characters(tokenizer, template, chat, turn, **template_kwargs)
    prompt = render_text(tokenizer, template, chat[:turn], add_generation_prompt=True, **template_kwargs)
    before = text[:start].rstrip()
    prompt_blanks = prompt[len(prompt.rstrip()) :]
    if before.split()[-1] == prompt.split()[-1]:  # only blanks stand between the generation prompt and the answer
        assert text[len(before) :].startswith(prompt_blanks)
        start = len(before) + len(prompt_blanks)
    ending = text.find(end_of_turn, end)
    return start, end if ending < 0 else ending + len(end_of_turn)


def answer_characters(
    tokenizer: PreTrainedTokenizerFast, template: str, chat: Chat, turn: int, **template_kwargs: Any
) -> tuple[int, int]:
    """Start and end of what the template writes of one answer's own characters."""
    text = render_text(tokenizer, template, chat, **template_kwargs)
    marked_answer = ANSWER if "</think>" not in chat[turn]["content"] else f"<think>\n{THOUGHT}\n</think>{ANSWER}"
    marked_chat = [*chat[:turn], {**chat[turn], "content": marked_answer}, *chat[turn + 1 :]]
    marked = render_text(tokenizer, template, marked_chat, **template_kwargs)
    assert marked.count(ANSWER) == 1 and marked.count(THOUGHT) <= 1
    start = marked.index("<think>", marked.index(THOUGHT) - 10) if THOUGHT in marked else marked.index(ANSWER)
    after = marked[marked.index(ANSWER) + len(ANSWER) :]
    assert text.startswith(marked[:start]) and text.endswith(after)
    return start, len(text) - len(after)
