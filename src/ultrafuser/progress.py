"""Progress of long work. Library code reports it, and the command line shows it on stderr."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ultrafuser.errors import hide_logins


class Progress:
    """Receives reports of long work. This one shows nothing, for use as a library."""

    def start(self, label: str, total: int) -> None:
        """Start a task of `total` steps. 0: their number is not known."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report finished steps. `note` is shown beside the bar."""

    def finish(self) -> None:
        """End the task."""

    def log(self, text: str) -> None:
        """Show one line of text."""

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Show that work without steps goes on, such as loading a model. No task may start in the block."""
        yield


class ConsoleProgress(Progress):
    """Shows bars with the remaining time on a terminal, and a line every few seconds elsewhere, also between two steps."""

    _LINE_INTERVAL_S = 10.0

    def __init__(self) -> None:
        from ultrafuser.printing import PlainConsole

        atexit.register(self._close)  # a bar that is not stopped keeps the cursor hidden
        self._console = PlainConsole(file=sys.stderr)
        self._bar: Any = None
        self._task: Any = None
        self._label, self._total, self._steps, self._start, self._last_line = "", 0, 0, 0.0, 0.0
        self._finished: threading.Event | None = None  # ends the lines of the current task
        self._line_lock = threading.Lock()

    def start(self, label: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._close()
        self._label, self._total, self._steps = label, total, 0
        self._start = self._last_line = time.monotonic()
        if not self._console.is_terminal:
            self._finished = threading.Event()
            threading.Thread(target=self._show_lines, args=(self._finished,), daemon=True).start()
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
            TextColumn("{task.fields[note]}", markup=False),
        )
        self._bar = Bars(*columns, console=self._console)
        self._bar.start()
        self._task = self._bar.add_task(label, total=total or None, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._steps += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note)
        else:
            self._show_line(note)

    def _show_lines(self, finished: threading.Event) -> None:
        while not finished.wait(self._LINE_INTERVAL_S / 10):
            try:
                self._show_line()
            except ValueError:  # standard error was closed
                return

    def _show_line(self, note: str = "") -> None:
        """Show the state of the task, unless a line was shown a moment ago."""
        with self._line_lock:
            now = time.monotonic()
            if now - self._last_line < self._LINE_INTERVAL_S:
                return
            self._last_line = now
        if not self._steps:
            self.log(f"{self._label}: {now - self._start:.0f} s so far")
            return
        if not self._total:
            self.log(f"{self._label}: {self._steps} so far {note}".rstrip())
            return
        remaining_s = (now - self._start) / self._steps * (self._total - self._steps)
        self.log(f"{self._label}: {self._steps} of {self._total}, about {remaining_s:.0f} s left {note}".rstrip())

    def _close(self) -> None:
        if self._finished is not None:
            self._finished.set()
            self._finished = None
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finish(self) -> None:
        is_terminal = self._bar is not None
        self._close()
        if not is_terminal:
            self.log(f"{self._label}: done in {time.monotonic() - self._start:.0f} s")

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        self.start(label, 0)
        try:
            yield
        finally:
            self._close()

    def log(self, text: str) -> None:
        self._console.print(hide_logins(text))


def quiet_libraries() -> None:
    """Turn off the bars and hints of other libraries. Call it before importing them."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
