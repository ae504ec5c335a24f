"""Conversations as strings: lm-eval hands a model strings, so every specialist can render them its own way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CHAT_MARK = "\x02ultrafuser-chat\x02"


def encode_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages (role, content) -> the string that stands for them in an lm-eval request."""
    return CHAT_MARK + json.dumps([dict(message) for message in messages], ensure_ascii=False)


def decode_chat(text: str) -> list[dict[str, str]] | None:
    """The messages of such a string. None for ordinary text."""
    return json.loads(text[len(CHAT_MARK) :]) if text.startswith(CHAT_MARK) else None


def answer_chats(lm: Any, task: str, chats: Sequence[Sequence[Mapping[str, str]]], max_tokens: int) -> list[str]:
    """An lm-eval model's greedy answer to each chat.

    Args:
        lm: the model, with its own way of writing a chat as a string.
        task: the benchmark that the chats belong to.
        max_tokens: length of an answer at most.
    """
    from lm_eval.api.instance import Instance

    options = {"until": [], "do_sample": False, "max_gen_toks": max_tokens}
    prompts = [lm.apply_chat_template([dict(message) for message in chat]) for chat in chats]
    return lm.generate_until(
        [Instance("generate_until", {}, (prompt, dict(options)), i, (task, i, 1)) for i, prompt in enumerate(prompts)]
    )
