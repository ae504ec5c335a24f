"""What a chat paints on a terminal."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout

import pytest

from ultrafuser.chat.conversation import Turn
from ultrafuser.chat.screen import Screen
from ultrafuser.endpoint.stream import Piece
from ultrafuser.inspect.terminal import token_style

ERASE = "\x1b[0K"


class Terminal(io.StringIO):
    """Standard output that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


def painted(terminal: Terminal, *tokens: str, weights: tuple[float, ...] = (0.1, 0.9), **options: bool) -> str:
    with redirect_stdout(terminal):
        screen = Screen(**options)
        screen.start()
        for token in tokens:
            screen.show(Piece(token, weights))
    return terminal.getvalue()


def test_each_token_is_on_the_colour_of_its_specialist(terminal):
    red, green, blue = token_style(1, 0.8).bgcolor.triplet
    assert painted(terminal, "hello") == f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}mhello\x1b[0m"


def test_line_ends_are_not_painted_and_blanks_stay(terminal):
    text = painted(terminal, "if x:\n    y", "\n\n", "中\tz\r\n")
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == "if x:\n    y\n\n中\tz\n"
    assert all("\n" not in body for body in re.findall(r"\x1b\[38[\d;]*m(.*?)\x1b\[0m", text, re.S))


def test_control_characters_do_not_act(terminal):
    assert "\x1b[2J" not in painted(terminal, "a\x1b[2Jb") and "\\u001b[2J" in terminal.getvalue()


@pytest.mark.parametrize(
    ("tokens", "erased"),
    [
        (["x" * 20], 0),  # the cursor waits at the edge: clearing would remove the last character
        (["x" * 20, "y"], 1),
        (["x" * 25], 1),
        (["x" * 15 + "\n" + "y" * 10], 0),
        (["中" * 10, "中"], 1),
        (["x" * 19, "中"], 1),  # it does not fit into the last column
        (["x" * 10, "\n", "x" * 15], 0),
        (["\t\t\t"], 0),
    ],
)
def test_the_rest_of_a_wrapped_line_is_cleared(terminal, tokens, erased):
    """Terminals fill a line that scrolls into view with the current background."""
    assert painted(terminal, *tokens).count(ERASE) == erased


@pytest.mark.parametrize("how", ["option", "NO_COLOR", "dumb", "pipe"])
def test_plain_text(terminal, monkeypatch, how):
    if how == "NO_COLOR":
        monkeypatch.setenv("NO_COLOR", "1")
    elif how == "dumb":
        monkeypatch.setenv("TERM", "dumb")
    elif how == "pipe":
        monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    turn = Turn("q", (Piece("hello\t", (0.1, 0.9)), Piece("you", (0.5, 0.5), "stop")), ("text", "code"))
    with redirect_stdout(terminal):
        screen = Screen(colour=how != "option")
        for piece in turn.pieces:
            screen.show(piece)
        screen.finish(turn, 0.5)
        screen.weights(turn)
        screen.names(turn.specialists)
        screen.error("no")
    out = terminal.getvalue()
    assert out.startswith("hello\tyou\n[text 0.30  code 0.70   2 tokens, 4.0 tokens/s]\n"), out
    assert "\x1b[3" not in out and "\x1b[4" not in out and "specialists: text, code\n" in out


def test_a_pipe_gets_the_bytes_of_the_answer(terminal, monkeypatch):
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    assert painted(terminal, "a\x1b[1m\r\n") == "a\x1b[1m\r\n"


def test_the_line_below_an_answer_shows_the_shares(terminal):
    turn = Turn("q", (Piece("hi", (0.25, 0.75)), Piece("", (1.0, 0.0), "stop")), ("text", "code"))
    with redirect_stdout(terminal):
        Screen().finish(turn, 2.0, "cut")
    text = re.sub(r"\x1b\[[\d;]*m", "", terminal.getvalue())
    assert " text  0.25" in text and " code  0.75" in text and "1 token, 0.5 tokens/s   cut" in text
