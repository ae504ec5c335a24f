"""SIGTERM, with which schedulers take a machine back: save the step that is running, then stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from transformers import TrainerCallback

from ultrafuser.errors import Preempted


class Preemption(TrainerCallback):
    """Stop a run when SIGTERM arrives: in a stage's steps at the end of the step, with a checkpoint, and elsewhere at once.

    What is written between the steps is whole after every file, so that nothing needs to be finished there. All
    processes stop at the same step if one of them is asked to.
    """

    def __init__(self) -> None:
        self._asked, self._in_steps = False, False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM in the block. Only the main thread of a process can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)

    def _on_signal(self, *_: Any) -> None:
        if self._asked or not self._in_steps:  # a second signal does not wait
            raise Preempted("stopped by SIGTERM")
        self._asked = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_steps = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if PartialState().num_processes > 1:
            asked = torch.tensor([float(self._asked)], device=args.device)
            self._asked = bool(reduce(asked, "sum").item())
        if self._asked:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._in_steps = False
        if self._asked and state.global_step < state.max_steps:
            raise Preempted(f"stopped by SIGTERM after step {state.global_step} of {state.max_steps}, which is saved")
