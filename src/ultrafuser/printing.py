"""Text on its way to the terminal. Parts of it were written by data, models, endpoints and other libraries."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ultrafuser.errors import hide_logins

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """The text with control characters and lone surrogates escaped as in JSON. Tabs and line ends stay."""
    return _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text.replace("\r\n", "\n"))


def echo(text: str, end: str = "\n") -> None:
    """Print results on stdout."""
    sys.stdout.write(printable(text) + end)
    sys.stdout.flush()  # long work may follow


def echo_answer(text: str, end: str = "\n") -> None:
    """Print a model's text: as it is into a file or pipe, and escaped on a terminal."""
    if sys.stdout.isatty():
        echo(text, end)
    else:
        sys.stdout.write(text + end)
        sys.stdout.flush()


def echo_error(text: str) -> None:
    """Print text on stderr, without passwords."""
    sys.stderr.write(printable(hide_logins(text)) + "\n")


class PlainConsole(Console):
    """rich's console for text of any origin: brackets are no markup, and control characters are escaped."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, highlight=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


def show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A hook for errors that nobody expected: the usual traceback, without passwords and control characters."""
    echo_error("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))
