"""A conversation as one string, since lm-eval hands a model strings: every specialist can then render it its own way."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

CHAT_MARK = "\x02ultrafuser-chat\x02"


def encode_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """Messages (role, content) -> the string that stands for them in an lm-eval request."""
    return CHAT_MARK + json.dumps([dict(message) for message in messages], ensure_ascii=False)


def decode_chat(text: str) -> list[dict[str, str]] | None:
    """The messages of such a string; None for ordinary text."""
    return json.loads(text[len(CHAT_MARK) :]) if text.startswith(CHAT_MARK) else None
