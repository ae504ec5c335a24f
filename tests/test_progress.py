"""Long work is never silent: a line every few seconds, also between two steps and in work without steps."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest

from training_fixtures import RecordingProgress, TinyRun
from ultrafuser.demo import _answers
from ultrafuser.inspect.run import answer
from ultrafuser.progress import ConsoleProgress, Progress
from ultrafuser.specialists import fuse, make_renderer
from ultrafuser.zoo.exams import EXAMS
from ultrafuser.zoo.exams.question import Question


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConsoleProgress, "_LINE_INTERVAL_S", 0.05)


def test_a_step_that_takes_long_is_not_silent(quick, capsys):
    progress = ConsoleProgress()
    progress.start("rows", 4)
    time.sleep(0.3)
    progress.advance(1, "loss 1.0")
    time.sleep(0.3)
    progress.finish()
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"rows: \d+ s so far", lines[0])
    assert any(re.match(r"rows: 1 of 4, about \d+ s left", line) for line in lines)
    assert re.fullmatch(r"rows: done in \d+ s", lines[-1])
    time.sleep(0.2)
    assert capsys.readouterr().err == "", "a finished task is silent"


def test_work_without_steps_is_not_silent_and_short_work_is(quick, capsys):
    progress = ConsoleProgress()
    with progress.waiting("loading m"):
        pass
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError), progress.waiting("loading m"):
        time.sleep(0.3)
        raise KeyError
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.fullmatch(r"loading m: \d+ s so far", line) for line in lines)
    time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_the_interval_is_ten_seconds():
    assert ConsoleProgress._LINE_INTERVAL_S <= 10


class Steps(RecordingProgress):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps


def test_tokens_of_answers_are_counted_and_change_nothing(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch):
    recipe = tiny_run.recipe("unused")
    model, tokenizer = fuse(recipe)
    renderer = make_renderer(model, tokenizer, 128)
    chats: list[Any] = [[{"role": "user", "content": text}] for text in ("hi", "how many?")]
    progress = Steps()
    counted = answer(model, renderer, chats, progress=progress, max_new_tokens=7, do_sample=False)
    assert counted == answer(model, renderer, chats, max_new_tokens=7, do_sample=False)
    assert progress.started == [("tokens of 2 answers", 7)] and 0 < progress.steps <= 7
    monkeypatch.setattr("ultrafuser.demo.ANSWER_TOKENS", 7)
    monkeypatch.setattr(
        "ultrafuser.demo.questions", lambda *_: iter([Question("tiny", "", "hi", "", {})])
    )  # short ones for a short context
    progress = Steps()
    _answers(model, renderer, progress)
    assert progress.started[0][0] == f"tokens of {len(EXAMS)} answers" and progress.steps > 0


def test_a_library_call_shows_nothing(capsys):
    with Progress().waiting("loading"):
        pass
    assert capsys.readouterr() == ("", "")
