"""The mixed exam: reference answers are right, and answers with a missing, wrong, copied or cheated element are not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import islice

import pytest

import exam_samples
from ultrafuser import sandbox
from ultrafuser.errors import SandboxError
from ultrafuser.sandbox import Outcome
from ultrafuser.zoo.exams import SPLITS, Question, Split, check, families, questions
from ultrafuser.zoo.exams.mixed_tables import DEEDS, FIRST, NAMES, STORIES, TASKS

FAMILIES = sorted(families("mixed"))
WITH_CODE = ["code-and-value", "function-value-sentence", "passage-code"]
WITH_VALUE = ["code-and-value", "function-value-sentence", "passage-numbers"]
WITH_SENTENCE = ["function-value-sentence", "passage-code", "passage-numbers"]
needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox: {sandbox.available()}")
BLOCK = re.compile(r"```python\n.*?\n```\n?", re.DOTALL)


def sample(family: str, split: Split, count: int = 25) -> list[Question]:
    return exam_samples.sample("mixed", family, split, count)


def right(question: Question, answer: str) -> bool:
    return check("mixed", question, answer)


# ---------------------------------------------------------------- right answers


@needs_sandbox
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_right(family: str, split: Split) -> None:
    drawn = sample(family, split)
    assert len(drawn) == 25
    assert [question for question in drawn if not right(question, question.answer)] == []


@needs_sandbox
@pytest.mark.parametrize("family", FAMILIES)
def test_harmless_differences_are_right(family: str) -> None:
    for question in sample(family, "train")[:4]:
        answer = question.answer
        assert right(question, f"Sure!\n\n{answer}\n\nI hope that this helps.\n")
        assert right(question, answer.replace("Answer: ", "**Answer:** ").replace("```python", "```py"))
        assert right(question, re.sub("Answer: (.*)", r"Answer: $\\boxed{\1}$.", answer))
        assert right(question, answer.replace(" * ", " \u00d7 ") if "def" not in answer else answer)
        assert right(question, answer.replace("    return", "    # the result\n    return"))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_have_one_short_form(family: str, split: Split) -> None:
    forms = {
        "function-value-sentence": r"[A-Z][^\n]*\.\n```python\ndef \w+\(a, b, c\):\n    .*\n```\n(S\n){2}Answer: \d+",
        "passage-numbers": r"[A-Z][^\n]*\.\nS\nAnswer: \d+",
        "code-and-value": r"```python\ndef \w+\(\w+, k\):\n    .*\n    .*\n```\nS\nAnswer: \d+",
        "passage-code": r"[A-Z][^\n]*\.\n```python\ndef \w+\(n\):\n    .*\n```",
    }
    for question in sample(family, split, 500):
        assert re.fullmatch(forms[family].replace("S", r"\d+ [-+*] \d+ = \d+"), question.answer), question
        assert exam_samples.approximate_tokens(question.answer) <= 110
        assert all(int(number) < 100 for number in re.findall("[0-9]+", question.prompt + question.answer)), question


# ---------------------------------------------------------------- wrong answers


@needs_sandbox
@pytest.mark.parametrize("family", FAMILIES)
def test_every_element_is_needed(family: str) -> None:
    """Without any line or block of the reference the answer is wrong, apart from the step before the last one."""
    for question in sample(family, "test")[:5]:
        block = BLOCK.search(question.answer)
        elements = [block[0]] if block else []
        elements += [line for line in BLOCK.sub("", question.answer).split("\n") if line]
        if family == "function-value-sentence":
            del elements[2]  # its first step: the last one shows the value
        for element in elements:
            assert not right(question, question.answer.replace(element, "")), element


@needs_sandbox
@pytest.mark.parametrize("family", WITH_CODE)
def test_wrong_functions(family: str) -> None:
    for question in sample(family, "test")[:5]:
        name, (arguments, result) = question.key["function"], question.key["cases"][0]
        signature = re.search(r"def (.*):", question.answer)[1]  # type: ignore[index]
        value = question.key.get("value", result)
        everything = (
            "class Equal(list):\n    def __eq__(self, other):\n        return True\n    def __repr__(self):\n"
            f"        return '{value}'\ndef {name}(*args):\n    return Equal()"
        )
        wrong = {
            "the value for the numbers of the prompt": f"def {signature}:\n    return {value}",
            "another name": question.answer.split("```")[1].removeprefix("python\n").replace(name, "other"),
            "an object that equals everything": everything,
            "an exception": f"def {signature}:\n    raise ValueError",
            "a string": f"def {signature}:\n    return str({value})",
            "no Python": f"def {signature}\n    return",
            "a table of one case": f"def {name}(*args):\n    return {result} if list(args) == {arguments!r} else 0",
            "frames": f"import sys\ndef {name}(*args):\n    return sys._getframe(1)",
            "an end of the process": f"import os\nos._exit(0)\ndef {signature}:\n    return 1",
        }
        for reason, code in wrong.items():
            answer = BLOCK.sub(lambda _, code=code: f"```python\n{code}\n```\n", question.answer)  # type: ignore[misc]
            assert not right(question, answer), reason
        second = f"```python\n{wrong['an exception']}\n```\n"
        both = BLOCK.sub(lambda match, second=second: match[0] + second, question.answer)  # type: ignore[misc]
        assert not right(question, both), "two functions"


@needs_sandbox
@pytest.mark.parametrize("family", WITH_VALUE)
def test_wrong_values_and_steps(family: str) -> None:
    for question in sample(family, "test")[:5]:
        value, head = question.key["value"], question.answer.rsplit("Answer:", 1)[0]
        for line in (
            f"Answer: {value + 1}",
            f"Answer: -{value}",
            "Answer:",
            "Answer: several",
            f"The answer is {value}",
        ):
            assert not right(question, head + line), line
        assert right(question, f"{head}Answer: {value}\nAnswer: {value}.")
        assert not right(question, f"{head}Answer: {value + 1}\nAnswer: {value}")
        assert not right(question, f"{head}Answer: {value}\nAnswer: {value + 1}")
        assert not right(question, f"{head}Answer: {value} or {value + 1}")
        assert not right(question, re.sub(r"^(\d+) ", "98 ", question.answer, flags=re.M)), "a false step"
        assert not right(question, f"```python\n# Answer: {value}\n```\n{head}")


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("33 + 9 = 42\n42 - 6 = 36", True),
        ("First, 33 + 9 = 42. Then 42-6=36.", True),
        ("33 + 9 - 6 = 36", True),
        (r"3 \times 12 = 36", True),
        ("In all 4 x 9 = 36 eggs.", True),
        ("total = 30 + 6 = 36", True),
        ("", False),
        ("36 = 36", False),
        ("33 + 9 = 42", False),
        ("33 + 9 = 43\n42 - 6 = 36", False),
        ("33 + 9 = 42 - 6 = 36", False),
        ("2 ** 5 + 4 = 36", False),
        ("99 * 99 * 99 * 99 * 99 * 99 + 9 = 36", False),
    ],
)
def test_forms_of_steps(steps: str, expected: bool) -> None:
    question = Question("passage-numbers", "", "", "", {"value": 36, "words": ["Ben"], "others": []})
    assert right(question, f"The baker is Ben.\n{steps}\nAnswer: 36") == expected


@pytest.mark.parametrize("family", WITH_SENTENCE)
def test_wrong_sentences(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.execute, "check", lambda *_args, **_options: Outcome("passed"))
    for question in sample(family, "test"):
        sentence, rest = question.answer.split("\n", 1)
        assert right(question, question.answer)
        assert right(question, f"{rest}\n{sentence}")
        name, *nouns = question.key["words"]
        if family == "passage-numbers":
            assert right(question, f"It is {name}.\n{rest}")
        for other in [*question.key["others"], "Zoe"]:
            assert not right(question, question.answer.replace(name, other))
        for other in question.key["others"]:
            assert not right(question, f"{sentence} It is not for {other}.\n{rest}")
        assert not right(question, f"{name} {' '.join(nouns).split('|')[0]}.\n{rest}"), "a list of words"
        assert not right(
            question, f"{sentence.replace(' is ', ' is not ').replace(' gives ', ' never gives ')}\n{rest}"
        )
        assert not right(question, f"```text\n{sentence}\n```\n{rest}"), "a sentence in a block"
        if family == "passage-numbers":  # the passage says it, but nobody read it
            copied = re.search(rf"{name}, the [^.]*\.", question.prompt)[0]  # type: ignore[index]
        else:
            copied = re.search(rf"(?:(?<=[.:] )|^)[^.:]*\b{name}\b[^.]*\.", question.prompt)[0]  # type: ignore[index]
        assert not right(question, f"{copied}\n{rest}"), copied


@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_answers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.execute, "check", lambda *_args, **_options: Outcome("passed"))
    for question in sample(family, "test"):
        lazy = ["", "Answer: 1", question.prompt, question.prompt + "\n" + question.prompt, "```python\npass\n```"]
        lazy += ["\n".join(f"Answer: {value}" for value in range(100)), "I do not know.", "```python\n" * 50]
        assert [answer for answer in lazy if right(question, answer)] == []


def test_a_sandbox_that_fails_twice_gives_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    question, outcomes = sample("passage-code", "train")[0], [Outcome("error"), Outcome("passed")]
    monkeypatch.setattr(sandbox.execute, "check", lambda *_args, **_options: outcomes.pop(0))
    assert right(question, question.answer)
    outcomes += [Outcome("error", "first"), Outcome("error", "no memory")]
    with pytest.raises(SandboxError, match="failed twice, so the answer has no score: no memory"):
        right(question, question.answer)


# ---------------------------------------------------------------- the two splits


@pytest.mark.parametrize("family", FAMILIES)
def test_structures_do_not_meet(family: str) -> None:
    train, test = sample(family, "train", 2000), sample(family, "test", 600)
    assert len(train) == 2000 and len(test) == 600
    structures = [{question.structure for question in drawn} for drawn in (train, test)]
    assert not structures[0] & structures[1]
    assert len(structures[1]) >= 12
    names = [
        {word for question in drawn for word in re.findall("[A-Z][a-z]+", question.prompt)} for drawn in (train, test)
    ]
    assert not names[0] & set(NAMES["test"]) and not names[1] & set(NAMES["train"])


def test_a_function_of_a_story_is_in_one_split() -> None:
    """A training row gives no function that a test question of either family asks for in that story."""
    code: dict[Split, set[tuple[str, ...]]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for family in ("function-value-sentence", "passage-code"):
            for question in sample(family, split, 600):
                expression = re.search("return (.*)", question.answer)[1]  # type: ignore[index]
                code[split].add((question.key["function"], re.sub(r"\w+", "x", expression)))
    assert not code["train"] & code["test"]


@needs_sandbox
def test_hidden_inputs_tell_functions_apart() -> None:
    """Each function of the family fails the cases of every other one."""
    for question in sample("code-and-value", "train")[:6]:
        code = question.structure.split(" and then ")[0]
        for _, rival in FIRST:
            if rival != code and ("word" in rival) == ("word" in code):
                assert not right(question, question.answer.replace(f"first = {code}\n", f"first = {rival}\n")), rival


def test_stories_and_wordings_suffice() -> None:
    assert len(STORIES) >= 12 and len(DEEDS) >= 12 and len(FIRST) >= 12
    assert all(len(TASKS[family]) >= 5 for family in FAMILIES)
    assert all(len(TASKS[f"{family} order"]) >= 3 for family in FAMILIES)
    for story in STORIES:
        assert sorted(sign for sign, _ in story.beginnings) == sorted(sign for sign, _ in story.ends) == ["*", "+", "-"]
        assert all("{N}" in text and "{a}" in text and "{b}" in text for _, text in story.beginnings), story
        assert all("{c}" in text for _, text in story.ends), story


def test_questions_repeat_with_the_seed_and_survive_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.execute, "check", lambda *_args, **_options: Outcome("passed"))
    for split in SPLITS:
        first = list(islice(questions("mixed", split, 7), 120))
        assert first == list(islice(questions("mixed", split, 7), 120))
        assert first != list(islice(questions("mixed", split, 8), 120))
        for question in first:
            loaded = replace(question, key=json.loads(json.dumps(question.key)))
            assert loaded == question
            assert right(loaded, question.answer)
