"""Callbacks of the Trainer: the progress bar, and checkpoints between validations."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ultrafuser.progress import Progress


class StepBar(TrainerCallback):
    """Show each step with its losses."""

    def __init__(self, progress: Progress, stage: str) -> None:
        self.progress, self.stage, self.note = progress, stage, ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.start(f"stage {self.stage}", state.max_steps)
        if state.global_step:
            self.progress.advance(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        losses = {key.removeprefix("loss/"): loss for key, loss in (logs or {}).items() if key.startswith("loss/")}
        if losses:
            self.note = " ".join(f"{domain} {loss:.3f}" for domain, loss in losses.items())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.advance(1, self.note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.finish()


class SaveEvery(TrainerCallback):
    """Also save checkpoints between validations: to keep the best one, transformers saves at validations alone."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            control.should_save = True
