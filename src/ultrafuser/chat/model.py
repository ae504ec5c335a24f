"""What a chat asks a model for: the pieces of one answer, whether it runs in this process or behind an endpoint."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ultrafuser.chat.settings import ChatSettings
from ultrafuser.endpoint.stream import Piece

Messages = Sequence[Mapping[str, str]]
LONG_CHAT = "/undo removes the last question and its answer, /reset starts a new chat"


@dataclass(frozen=True)
class Question:
    """One answer to generate.

    Attributes:
        specialists: those that take part. None: all.
    """

    messages: Messages
    settings: ChatSettings
    specialists: tuple[str, ...] | None = None


class ChatModel(Protocol):
    """A model that answers."""

    @property
    def name(self) -> str:
        """How the chat calls it."""

    @property
    def specialists(self) -> tuple[str, ...]:
        """The K specialists. Empty: it has none that can be told apart."""

    def stream(self, question: Question) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer. Closing the iterator stops it.

        Raises:
            UltraFuserError: there is no answer, or it broke off.
        """

    async def close(self) -> None:
        """Free what the model holds."""
