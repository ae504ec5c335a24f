"""The exams as tasks: their questions, the run of lm-eval over them, and the sandbox that their programs need."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from task_rows import Student
from ultrafuser import sandbox
from ultrafuser.errors import SandboxError
from ultrafuser.evaluate.lm.chat import decode_chat
from ultrafuser.evaluate.options import SUITES
from ultrafuser.evaluate.scoring import score_tasks
from ultrafuser.evaluate.tasks import TASKS, TaskOptions, exams, load_tasks
from ultrafuser.zoo.exams import EXAMS, MAX_NEW_TOKENS, questions

NAMES = [f"exam_{exam}" for exam in EXAMS]
needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox: {sandbox.available()}")


class Candidate(Student):
    """Gives the reference answers after some reasoning, or does without."""

    def _answer(self, request: Any) -> str:
        assert decode_chat(request.args[0]) == [{"role": "user", "content": request.doc["question"]}]
        answer = request.doc["answer"]
        return f"<think>Answer: -1</think>{answer}" if self.right else "I do not know."


def test_the_suite_has_every_exam() -> None:
    assert SUITES["exams"] == NAMES
    assert [name for name in NAMES if TASKS[name].runs_code] == ["exam_code", "exam_mixed"]
    assert [(TASKS[name].file, TASKS[name].hub) for name in NAMES] == [(None, None)] * 4


@needs_sandbox
@pytest.mark.parametrize("exam", EXAMS)
def test_the_task_asks_the_first_questions_of_the_test_split(exam: str) -> None:
    name = f"exam_{exam}"
    task = load_tasks([name])[name]
    expected = list(islice(questions(exam, "test", 0), 300))
    assert [doc["question"] for doc in task.eval_docs] == [question.prompt for question in expected]
    assert [exams._question(doc) for doc in task.eval_docs] == expected
    assert task.task_name == TASKS[name].lm_eval_name and task.VERSION == 1.0
    assert next(iter(task.aggregation())) == TASKS[name].metric == "acc" and task.higher_is_better()["acc"]
    assert (task.OUTPUT_TYPE, task.get_config("num_fewshot")) == ("generate_until", 0)
    generation = {"until": [], "do_sample": False, "max_gen_toks": MAX_NEW_TOKENS[exam]}
    assert task.config.generation_kwargs == generation
    assert [doc["structure"] for doc in exams.load(exam, count=8, seed=1)["test"]] == [
        question.structure for question in islice(questions(exam, "test", 1), 8)
    ]


@needs_sandbox
@pytest.mark.parametrize("exam", EXAMS)
def test_right_answers_score_one_and_others_nothing(exam: str) -> None:
    name = f"exam_{exam}"
    for right in (True, False):
        scores = score_tasks(Candidate(right), [name], TaskOptions(), limit=24)[name]
        assert (scores.metric, scores.version) == ("acc", "1.0")
        assert list(scores.scores.values()) == [float(right)] * 24


def test_without_a_sandbox_no_program_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exams run programs in the sandbox alone, so it is missed before the first question."""
    monkeypatch.setattr(sandbox.execute, "available", lambda: "bubblewrap is gone")
    for unsafe in (False, True):
        with pytest.raises(SandboxError, match="bubblewrap is gone"):
            load_tasks(["exam_mixed"], TaskOptions(unsafe_code=unsafe))
    assert list(load_tasks(["exam_math"])) == ["exam_math"]


def test_rows_are_plain_texts() -> None:
    (row,) = exams.load("math", count=1)["test"]
    assert {type(value) for value in row.values()} == {str}
    assert isinstance(json.loads(row["key"]), dict)
    assert exams.score(row, [row["answer"]]) == {"acc": 1.0}
    assert exams.score(row, ["I do not know."]) == {"acc": 0.0}
