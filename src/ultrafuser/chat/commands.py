"""The /commands of a chat: their names, and what those do that change the chat without asking the model."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path

from ultrafuser.chat.conversation import Conversation, Turn
from ultrafuser.chat.settings import ChatSettings, read_settings
from ultrafuser.data.json_text import has_lone_surrogate
from ultrafuser.errors import DataError

COMMANDS = {
    "/help": "list the commands",
    "/reset": "start a new chat, with the same settings and system message",
    "/undo": "remove the last question and its answer",
    "/retry": "ask the last question again",
    "/weights": "show the weights of every token of the last answer",
    "/specialists [NAME,...|all]": "let only these specialists answer, or show who does",
    "/set [KEY=VALUE ...]": "change how answers are drawn, or show it",
    "/system [TEXT]": "set the system message, or remove it",
    "/save FILE": "write the chat to a .json file, or to a .html page with its weights",
    "/load FILE": "go on with a chat from a .json file",
    "/exit": "end the chat (Ctrl-D too). Ctrl-C stops an answer",
}
NAMES = tuple(usage.split()[0] for usage in COMMANDS)
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)", re.IGNORECASE)


def split_command(line: str) -> tuple[str, str] | None:
    """A command and its argument. None: the line is a message, such as one that begins with a path."""
    match = _COMMAND.match(line)
    return (match[0].lower(), line[match.end() :].strip()) if match else None


def unknown_command(name: str) -> str:
    """What to say about a command that there is not."""
    nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]}? " if nearest else ""
    return f"{name}: no such command. {hint}/help lists them. A space before the / makes it a message"


def help_text() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    lines = [f"{usage:<{width}}  {text}" for usage, text in COMMANDS.items()]
    return "\n".join([*lines, 'A message of several lines begins and ends with """'])


@dataclass
class ChatState:
    """What the commands change.

    Attributes:
        names: the specialists of the model.
        last_question: what /retry asks again. It may have no answer.
    """

    model: str
    names: tuple[str, ...]
    settings: ChatSettings
    conversation: Conversation
    specialists: tuple[str, ...] | None = None
    last_question: str | None = None
    _saved: set[Path] = field(default_factory=set)

    @property
    def last_turn(self) -> Turn | None:
        return self.conversation.turns[-1] if self.conversation.turns else None

    def change(self, command: str, argument: str) -> str:
        """Run one of the commands that change the state. Returns the line that says what changed.

        Raises:
            UltraFuserError: the argument cannot be used. Nothing is changed.
        """
        match command:
            case "/reset":
                return self._reset()
            case "/undo":
                return self._undo()
            case "/specialists":
                return self._choose(argument)
            case "/set":
                return self._set(argument)
            case "/system":
                return self._set_system(argument)
            case "/save":
                return self._save(argument)
            case "/load":
                return self._load(argument)
        raise DataError(unknown_command(command))

    def take_last_question(self) -> str:
        """The question to ask again. Its answer leaves the conversation.

        Raises:
            DataError: there is none.
        """
        if self.last_question is None:
            raise DataError("no question yet")
        if self.last_turn is not None and self.last_turn.question == self.last_question:
            self.conversation.turns.pop()
        return self.last_question

    # ---------------------------------------------------------------- one method for each command

    def _reset(self) -> str:
        self.conversation.turns.clear()
        self.last_question = None
        return "a new chat"

    def _undo(self) -> str:
        if not self.conversation.turns:
            return "nothing to undo"
        self.conversation.turns.pop()
        self.last_question = self.last_turn.question if self.last_turn else None
        count = len(self.conversation.turns)
        return f"removed, {count} {'question' if count == 1 else 'questions'} left"

    def _choose(self, argument: str) -> str:
        if not self.names:
            raise DataError(f"{self.model} has no specialists that can be told apart")
        chosen = tuple(filter(None, (name.strip() for name in argument.split(","))))
        if chosen and chosen != ("all",):
            if unknown := [name for name in chosen if name not in self.names]:
                nearest = difflib.get_close_matches(unknown[0], self.names, n=1, cutoff=0.5)
                hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
                raise DataError(f"no specialist {unknown[0]!r}. {hint}Known: {', '.join(self.names)}, or all")
            self.specialists = tuple(name for name in self.names if name in chosen)
        elif chosen:
            self.specialists = None
        return f"answering: {', '.join(self.specialists or self.names)}"

    def _set(self, argument: str) -> str:
        if argument:
            self.settings = read_settings(self.settings.model_dump(), argument)
        return "  ".join(f"{key}={_shown(value)}" for key, value in self.settings.model_dump().items())

    def _set_system(self, argument: str) -> str:
        if has_lone_surrogate(argument):
            raise DataError("the system message is not UTF-8, or holds half of a character")
        self.conversation.system = argument or None
        return "system message set" if argument else "no system message"

    def _save(self, argument: str) -> str:
        if not argument:
            raise DataError("/save needs a file: /save chat.json, or /save chat.html for a page")
        if not self.conversation.turns:
            raise DataError("no answer yet, so there is nothing to save")
        file = Path(argument).expanduser()
        settings = self.settings.model_dump() | {"specialists": self.specialists}
        self.conversation.save(file, model=self.model, settings=settings, force=file.absolute() in self._saved)
        self._saved.add(file.absolute())  # this chat may write it again, but no other file
        return f"saved: {file}"

    def _load(self, argument: str) -> str:
        if not argument:
            raise DataError("/load needs a file: /load chat.json")
        self.conversation = Conversation.load(Path(argument).expanduser())
        self.last_question = self.last_turn.question if self.last_turn else None
        return f"loaded: {len(self.conversation.turns)} questions and answers"


def _shown(value: object) -> str:
    return "null" if value is None else str(value)
