"""What a chat prints: answers as they are written, each token on the colour of its specialist, and lines about them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import RenderableType
from rich.control import Control
from rich.segment import ControlType, Segment, Segments
from rich.style import Style
from rich.text import Text

from ultrafuser.chat.conversation import Turn
from ultrafuser.endpoint.stream import Piece
from ultrafuser.inspect.terminal import legend, render_terminal, token_style
from ultrafuser.inspect.trace import leader, mean_weights
from ultrafuser.printing import PlainConsole, echo, echo_answer

_ERASE = Control((ControlType.ERASE_IN_LINE, 0))
_TAB = 8


class Screen:
    """Standard output. Colours are for terminals. In files and pipes an answer is its text, byte for byte.

    Args:
        colour: paint if the terminal can. `NO_COLOR` in the environment switches it off too.
    """

    def __init__(self, *, colour: bool = True) -> None:
        console = PlainConsole()
        can_paint = console.is_terminal and not console.no_color and console.color_system is not None
        self.is_coloured = colour and can_paint
        self._console = console if self.is_coloured else PlainConsole(color_system=None)
        self._column = 0

    # ---------------------------------------------------------------- answers

    def start(self) -> None:
        """An answer begins, at the left edge."""
        self._column = 0

    def show(self, piece: Piece) -> None:
        """The next piece of an answer."""
        if not piece.text:
            return
        if not self.is_coloured or piece.weights is None:
            echo_answer(piece.text, "")
            self._move(piece.text)
            return
        style = token_style(*leader(piece.weights))
        for index, line in enumerate(piece.text.replace("\r\n", "\n").split("\n")):
            segments = [Segment("\n")] * (index > 0) + [Segment(line, style)] * bool(line)
            self._console.print(Segments(segments), end="", soft_wrap=True)
            self._column = 0 if index else self._column
            if self._move(line) and self._column < self._console.width:
                # A line that scrolls into view has the colour of the token that wrapped into it. Clear what follows.
                self._console.control(_ERASE)

    def _move(self, text: str) -> bool:
        """Follow the cursor over a text. Whether it wrapped into another line."""
        wrapped = False
        for character in text:
            if character == "\n":
                self._column, wrapped = 0, False
                continue
            width = _TAB - self._column % _TAB if character == "\t" else cell_len(character)
            if self._column + width > self._console.width:
                self._column, wrapped = 0, character != "\t"
            self._column += width
        return wrapped

    def finish(self, turn: Turn, elapsed_s: float, note: str = "") -> None:
        """The line below an answer: the share of each specialist, and how fast it came."""
        if self._column:
            echo("")
        trace = turn.trace()
        speed = f"{elapsed_s:.1f} s"
        if trace is not None and trace.tokens:
            count = len(trace.tokens)
            speed = f"{count} token{'s' * (count > 1)}, {count / max(elapsed_s, 1e-3):.1f} tokens/s"
        tail = "   ".join(filter(None, (speed, note)))
        if trace is None or not trace.tokens:
            self.note(f"[{tail}]")
        elif self.is_coloured:
            self._console.print(legend(trace), Text(tail, "dim"), sep="   ", soft_wrap=True)
        else:
            shares = "  ".join(f"{name} {share:.2f}" for name, share in mean_weights([trace]).items())
            self.note(f"[{shares}   {tail}]")

    def weights(self, turn: Turn | None) -> None:
        """The weights of every token of an answer."""
        if turn is None:
            return self.note("no answer yet")
        trace = turn.trace()
        if trace is None:
            return self.note("the server gave no weights with this answer")
        self._print(render_terminal(trace, weights=True))

    # ---------------------------------------------------------------- lines

    def note(self, text: str) -> None:
        """A line of the chat itself."""
        self._print(Text(text, "dim"))

    def error(self, text: str) -> None:
        """What went wrong, and the next step."""
        if self._column:
            echo("")
        self._column = 0
        self._print(Text(" ".join(text.split()), "red"))

    def names(self, names: Sequence[str]) -> None:
        """The specialists on their colours."""
        line = Text("specialists: ")
        for index, name in enumerate(names):
            style = token_style(index, 1.0) if self.is_coloured else Style()
            line.append(f" {name} " if self.is_coloured else name, style)
            line.append(" " if self.is_coloured else ", " if index < len(names) - 1 else "")
        self._print(line)

    def _print(self, line: RenderableType) -> None:
        self._console.print(line, soft_wrap=True)
        sys.stdout.flush()
