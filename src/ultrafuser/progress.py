"""Progress of long work. Library code reports it, and the command line shows it on stderr."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
from typing import Any

from ultrafuser.errors import hide_logins


class Progress:
    """Receives reports of long work. This one shows nothing, for use as a library."""

    def start(self, label: str, total: int) -> None:
        """Start a task of `total` steps."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Report finished steps. `note` is shown beside the bar."""

    def finish(self) -> None:
        """End the task."""

    def log(self, text: str) -> None:
        """Show one line of text."""


class ConsoleProgress(Progress):
    """Shows bars with the remaining time on a terminal, and a line every few seconds elsewhere."""

    _LINE_INTERVAL_S = 15.0

    def __init__(self) -> None:
        from ultrafuser.printing import PlainConsole

        atexit.register(self._close)  # a bar that is not stopped keeps the cursor hidden
        self._console = PlainConsole(file=sys.stderr)
        self._bar: Any = None
        self._task: Any = None
        self._label, self._total, self._steps, self._start, self._last_line = "", 0, 0, 0.0, 0.0

    def start(self, label: str, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._label, self._total, self._steps = label, total, 0
        self._start = self._last_line = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()),
                TextColumn("{task.fields[note]}", markup=False),
            )
            self._bar = Bars(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, note="")

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._steps += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note)
        elif time.monotonic() - self._last_line > self._LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            remaining_s = (self._last_line - self._start) / max(self._steps, 1) * (self._total - self._steps)
            self.log(f"{self._label}: {self._steps} of {self._total}, about {remaining_s:.0f} s left {note}".rstrip())

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def finish(self) -> None:
        if self._bar is not None:
            self._close()
        else:
            self.log(f"{self._label}: done in {time.monotonic() - self._start:.0f} s")

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
