"""The chat formats of well-known models: formats.yaml and one template per format, for the tests to loop over."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

FOLDER = Path(__file__).parent
CLOCK = datetime(2026, 11, 27)  # the day in the documented texts of the templates that read the clock

Chat = list[dict[str, str]]
SINGLE: Chat = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "I am fine."}]
MULTI: Chat = [*SINGLE, {"role": "user", "content": "What is 20 + 3?"}, {"role": "assistant", "content": "It is 23."}]
SYSTEM: Chat = [{"role": "system", "content": "Be brief."}, *SINGLE]
CHATS = {"single": SINGLE, "multi": MULTI, "system": SYSTEM}


@dataclass(frozen=True)
class ChatFormat:
    """What a model's documentation says about its chat format.

    vocabulary: a kind of tiny_tokenizers.VOCABULARIES.
    special_tokens: tokens besides bos and eos. Those `with_blanks` also take the blanks after them (rstrip).
    added_tokens: tokens that are not special, so decoding with skip_special_tokens keeps them.
    end_of_turn: the token that ends an answer. glm-4 writes none after the last answer (ends_last_answer).
    drops_thoughts: which answers lose their thought: those before the last user turn (history), all of them, or none.
    prompt: what the generation prompt adds. Where it opens a thought, the text is no prefix of the conversation.
    single, multi, system: the texts of the three conversations above.
    """

    name: str
    vocabulary: str
    eos: str
    end_of_turn: str
    prompt: str
    single: str
    multi: str
    system: str | None = None
    bos: str | None = None
    special_tokens: list[str] = field(default_factory=list)
    special_tokens_with_blanks: list[str] = field(default_factory=list)
    added_tokens: list[str] = field(default_factory=list)
    system_turn: Literal["accepted", "in the first user turn", "in the last user turn", "refused"] = "accepted"
    drops_thoughts: Literal["none", "history", "all"] = "none"
    reads_clock: bool = False
    prompt_is_a_prefix: bool = True
    ends_last_answer: bool = True
    template: str = ""
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def jinja(self) -> str:
        """The template's text."""
        return (FOLDER / f"{self.template or self.name}.jinja").read_text(encoding="utf-8")

    def documented_texts(self) -> dict[str, str]:
        """The text of each conversation that the format accepts, by its name in CHATS."""
        texts = {"single": self.single, "multi": self.multi, "system": self.system}
        return {name: text for name, text in texts.items() if text is not None}


def _read_formats() -> dict[str, ChatFormat]:
    entries = yaml.safe_load((FOLDER / "formats.yaml").read_text(encoding="utf-8"))
    return {name: ChatFormat(name=name, **entry) for name, entry in entries.items()}


FORMATS = _read_formats()


def set_clock(monkeypatch: pytest.MonkeyPatch, day: datetime = CLOCK) -> None:
    """Let every template that calls strftime_now read this day."""
    from transformers.utils import chat_template_utils

    class FixedClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return day

    monkeypatch.setattr(chat_template_utils, "datetime", FixedClock)
