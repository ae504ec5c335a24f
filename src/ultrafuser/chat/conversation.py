"""The conversation of a chat: questions, answers with the weights of their tokens, and the files they are saved in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultrafuser.data.json_text import decode_json
from ultrafuser.data.records import read_text
from ultrafuser.endpoint.stream import Piece
from ultrafuser.errors import DataError
from ultrafuser.inspect.trace import TokenTrace


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
        specialists: (K) the names that the weights belong to.
    """

    question: str
    pieces: tuple[Piece, ...]
    specialists: tuple[str, ...] = ()

    @property
    def answer(self) -> str:
        """The text of the answer."""
        return "".join(piece.text for piece in self.pieces)

    def trace(self) -> TokenTrace | None:
        """The answer with its weights. None: it has none."""
        pieces = list(self.pieces)
        if pieces and not pieces[-1].text and pieces[-1].finish_reason is not None:
            pieces.pop()  # the end token
        rows = [piece.weights for piece in pieces if piece.weights is not None]
        if not rows or len(rows) < len(pieces) or not self.specialists:
            return None
        return TokenTrace(
            [piece.text for piece in pieces], [list(row) for row in rows], list(self.specialists), self.question
        )


@dataclass
class Conversation:
    """All turns so far, after an optional system message."""

    system: str | None = None
    turns: list[Turn] = field(default_factory=list)

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """The messages of the API, the next question last."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.question})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages + ([{"role": "user", "content": question}] if question is not None else [])

    # ---------------------------------------------------------------- files

    def save(self, file: Path, *, model: str, settings: dict[str, Any], force: bool) -> None:
        """Write the conversation as JSON, or as a page if the file is named `.html`.

        Raises:
            DataError: it cannot be written, or the page has no answer with weights to show.
        """
        from ultrafuser.data.files import write_json, write_text

        if file.suffix.lower() not in (".html", ".htm"):
            return write_json(file, self._as_dict(model, settings), force=force)
        traces = [trace for turn in self.turns if (trace := turn.trace())]
        if not traces:
            raise DataError(f"{file}: no answer of this chat has weights to show on a page. Save it as a .json file")
        from ultrafuser.inspect.html import trace_page

        write_text(file, trace_page(f"Chat with {model}", traces), force=force)

    def _as_dict(self, model: str, settings: dict[str, Any]) -> dict[str, Any]:
        messages: list[dict[str, Any]] = list(self.messages())
        answers = [message for message in messages if message["role"] == "assistant"]
        for turn, message in zip(self.turns, answers, strict=True):
            if trace := turn.trace():
                message["specialists"] = trace.specialists
                message["tokens"] = trace.tokens
                message["weights"] = [[round(weight, 4) for weight in row] for row in trace.weights]
        return {"model": model, "settings": settings, "messages": messages}

    @classmethod
    def load(cls, file: Path) -> Conversation:
        """Read a conversation that `save` wrote as JSON, or any `{"messages": [...]}`.

        Raises:
            DataError: no such file, or no conversation of questions and answers.
        """
        if not file.is_file():
            raise DataError(f"{file}: no such file. Expected a chat that /save wrote as .json")
        try:
            tree = decode_json(read_text(file))
            messages = tree["messages"] if isinstance(tree, dict) else tree
            system, *rest = messages if messages[0]["role"] == "system" else [None, *messages]
            turns = list(_turns(rest))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise DataError(
                f"{file}: no chat ({type(error).__name__}: {error}). Expected JSON with `messages`: questions of the user and "
                "answers of the assistant in turn, as /save writes it"
            ) from error
        return cls(None if system is None else _text(system), turns)


def _turns(messages: Sequence[dict[str, Any]]) -> Iterator[Turn]:
    """
    Raises:
        ValueError, KeyError, TypeError: the messages are no turns.
    """
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        if (question["role"], answer["role"]) != ("user", "assistant"):
            raise ValueError(f"{question['role']} before {answer['role']}, expected user before assistant")
        specialists = tuple(answer.get("specialists") or ())
        pieces: tuple[Piece, ...] = (Piece(_text(answer)),)
        if specialists:
            trace = TokenTrace(answer["tokens"], answer["weights"], list(specialists))
            if trace.text != pieces[0].text:
                raise ValueError("the tokens of an answer are not its text")
            pieces = tuple(Piece(token, tuple(row)) for token, row in zip(trace.tokens, trace.weights, strict=True))
        yield Turn(_text(question), pieces, specialists)


def _text(message: dict[str, Any]) -> str:
    if not isinstance(message["content"], str):
        raise TypeError(f"a message has {type(message['content']).__name__}, expected text")
    return message["content"]
