"""How far long work is: library code reports here, the command line shows it on stderr."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from typing import Any


class Progress:
    """Reports of long work; this one shows nothing, for use as a library."""

    def start(self, what: str, total: int) -> None:
        """A piece of work of `total` steps begins."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Some steps are done; `note` says how it goes."""

    def finish(self) -> None:
        """The piece of work is over."""

    def log(self, text: str) -> None:
        """One line of news."""


class ConsoleProgress(Progress):
    """Bars with the time left on a terminal; elsewhere a line now and then."""

    _LINE_EVERY_S = 15.0

    def __init__(self) -> None:
        from rich.console import Console

        atexit.register(self._close)  # a bar that an error left would keep the cursor hidden
        self._console = Console(file=sys.stderr)
        self._bar: Any = None
        self._task: Any = None
        self._what, self._total, self._done, self._began, self._last_line = "", 0, 0, 0.0, 0.0

    def start(self, what: str, total: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self._what, self._total, self._done = what, total, 0
        self._began = self._last_line = time.monotonic()
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self._bar = Bars(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note)
        elif time.monotonic() - self._last_line > self._LINE_EVERY_S:
            self._last_line = time.monotonic()
            left = (self._last_line - self._began) / max(self._done, 1) * (self._total - self._done)
            self.log(f"{self._what}: {self._done} of {self._total}, about {left:.0f} s left {note}".rstrip())

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finish(self) -> None:
        if self._bar is not None:
            self._close()
        else:
            self.log(f"{self._what}: done in {time.monotonic() - self._began:.0f} s")

    def log(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


def quiet_libraries() -> None:
    """Keep other libraries' bars and hints off the terminal; ours say what goes on. Call it before importing them."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
