"""The loop of a chat: read a message or a command, stream the answer, say who wrote it."""

from __future__ import annotations

import asyncio
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager, suppress

from ultrafuser.chat.commands import NAMES, ChatState, help_text, split_command, unknown_command
from ultrafuser.chat.conversation import Conversation, Turn
from ultrafuser.chat.model import ChatModel, Question
from ultrafuser.chat.screen import Screen
from ultrafuser.chat.settings import ChatSettings
from ultrafuser.data.json_text import has_lone_surrogate
from ultrafuser.endpoint.stream import Piece
from ultrafuser.errors import DataError, UltraFuserError

_BLOCK = '"""'  # begins and ends a message of several lines


class Chat:
    """One chat with a model, on the terminal.

    Args:
        loop: the event loop that the model was made in.
        read_line: prints a prompt and reads a line. It raises EOFError at the end of the input.
    """

    def __init__(
        self,
        model: ChatModel,
        settings: ChatSettings,
        screen: Screen,
        loop: asyncio.AbstractEventLoop,
        *,
        system: str | None = None,
        specialists: tuple[str, ...] | None = None,
        read_line: Callable[[str], str] = input,
    ) -> None:
        self.model, self.screen = model, screen
        self.state = ChatState(model.name, model.specialists, settings, Conversation(system), specialists)
        self._loop, self._read_line = loop, read_line
        self._answers = 0

    def run(self) -> None:
        """Read and answer until the input ends, or /exit.

        Raises:
            KeyboardInterrupt: Ctrl-C where no user types, as in a pipe, or twice at the prompt.
        """
        if self.model.specialists:
            self.screen.names(self.model.specialists)
        self.screen.note("/help lists the commands, Ctrl-C stops an answer, /exit ends the chat")
        for line in self._lines():
            command = split_command(line)
            try:
                if command is None:
                    self.ask(line.strip())
                elif command[0] in ("/exit", "/quit", "/bye"):
                    return
                else:
                    self._run_command(*command)
            except UltraFuserError as error:
                self.screen.error(str(error))

    def _run_command(self, name: str, argument: str) -> None:
        match name:
            case "/help":
                self.screen.note(help_text())
            case "/weights":
                self.screen.weights(self.state.last_turn)
            case "/retry":
                self.ask(self.state.take_last_question())
            case _ if name not in NAMES:
                self.screen.error(unknown_command(name))
            case _:
                self.screen.note(self.state.change(name, argument))

    # ---------------------------------------------------------------- input

    def _lines(self) -> Iterator[str]:
        """The messages and commands. Empty ones are left out."""
        interrupted = False
        while True:
            try:
                line = self._read_message()
            except EOFError:
                if sys.stdin.isatty():
                    self.screen.note("")
                return
            except KeyboardInterrupt:
                if interrupted or not sys.stdin.isatty():
                    raise
                interrupted = True
                self.screen.note("\n/exit or Ctrl-D ends the chat, and so does another Ctrl-C")
                continue
            interrupted = False
            if line.strip():
                yield line

    def _read_message(self) -> str:
        line = self._read_line("> ")
        if not line.startswith(_BLOCK):
            return line.rstrip()
        lines = [line.removeprefix(_BLOCK)]
        while not lines[-1].rstrip().endswith(_BLOCK):
            lines.append(self._read_line("... "))
        return " " + "\n".join(lines).rstrip().removesuffix(_BLOCK)  # never a command

    # ---------------------------------------------------------------- answers

    def ask(self, text: str) -> None:
        """Ask a question and stream the answer. An answer that breaks off does not join the conversation.

        Raises:
            UltraFuserError: there is no answer.
            KeyboardInterrupt: Ctrl-C where no user types.
        """
        if has_lone_surrogate(text):
            raise DataError("a message holds a lone surrogate, half of a character. Remove it")
        state = self.state
        state.last_question = text
        settings = state.settings
        if settings.seed is not None:  # else /retry would give the same answer
            settings = settings.model_copy(update={"seed": settings.seed + self._answers})
        self._answers += 1
        question = Question(state.conversation.messages(text), settings, state.specialists)
        pieces, started = list[Piece](), time.monotonic()
        self.screen.start()
        try:
            stopped = self._stream(question, pieces)
        except UltraFuserError as error:
            if not pieces:
                raise
            raise UltraFuserError(f"{error}. The answer so far is not part of the chat: /retry asks again") from error
        turn = Turn(text, tuple(pieces), state.names)
        if turn.answer or not stopped:
            state.conversation.turns.append(turn)
        self.screen.finish(turn, time.monotonic() - started, _note(pieces, stopped))
        if stopped and not sys.stdin.isatty():
            raise KeyboardInterrupt

    def _stream(self, question: Question, pieces: list[Piece]) -> bool:
        """Show the pieces of an answer and collect them. Whether Ctrl-C stopped it."""

        async def read() -> None:
            async with aclosing(self.model.stream(question)) as stream:
                async for piece in stream:
                    pieces.append(piece)
                    self.screen.show(piece)

        task = self._loop.create_task(read())
        with _interrupts(lambda: self._loop.call_soon_threadsafe(task.cancel)):
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(task)
        return task.cancelled()


def _note(pieces: list[Piece], stopped: bool) -> str:
    """What to say about the end of an answer."""
    if stopped:
        kept = any(piece.text for piece in pieces)
        return "stopped, kept so far: /retry asks again, /undo removes it" if kept else "stopped"
    if not any(piece.text for piece in pieces):
        return "an empty answer"
    is_cut = pieces[-1].finish_reason == "length"
    return "cut at the limit of tokens: /set max_new_tokens=N" if is_cut else ""


@contextmanager
def _interrupts(action: Callable[[], object]) -> Iterator[None]:
    """Ctrl-C runs `action` instead of ending the program."""
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread alone
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
