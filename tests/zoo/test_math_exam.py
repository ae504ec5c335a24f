"""The exam of mathematics: reference answers and their steps are right, and wrong, lazy or cheating answers fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from itertools import islice, pairwise

import pytest
import sympy

import exam_samples
from ultrafuser.zoo.exams import MAX_NEW_TOKENS, Question, Split, check, families, questions
from ultrafuser.zoo.exams.math_exam import _STORIES, _TASKS

FAMILIES = sorted(families("math"))
SPLITS: tuple[Split, ...] = ("train", "test")
NUMBER = r"-?[0-9]+"
STEP = re.compile(rf"(?:[0-9]+%: )?({NUMBER}) ([-+*/]) ({NUMBER}) = ({NUMBER})")
EQUALITY = re.compile(r"([0-9]+)/([0-9]+) = ([0-9]+)/([0-9]+)")
NOTE = re.compile(r"(?:Common|Divisor): [0-9]+")
COMPUTE: dict[str, Callable[[int, int], Fraction | int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": Fraction,
}


def sample(family: str, split: Split, count: int = 1000) -> list[Question]:
    return exam_samples.sample("math", family, split, count)


def value_of(question: Question) -> Fraction:
    """The value in the reference answer."""
    return Fraction(question.answer.rsplit("Answer: ", 1)[1])


def passes(question: Question, line: str) -> bool:
    return check("math", question, line)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_references_are_right_and_so_is_every_step(family: str, split: Split) -> None:
    for question in sample(family, split):
        assert check("math", question, question.answer), question
        *steps, last = question.answer.splitlines()
        assert len(steps) >= 1 and last.startswith("Answer: ")
        results: list[str] = []
        for line in steps:
            if step := STEP.fullmatch(line):
                left, operation, right, result = step.groups()
                assert COMPUTE[operation](int(left), int(right)) == int(result), question
                results.append(result)
            elif equality := EQUALITY.fullmatch(line):
                a, b, c, d = map(int, equality.groups())
                assert a * d == b * c, question
            else:
                assert NOTE.fullmatch(line), question
        if family != "fractions":
            assert results[-1] == last.removeprefix("Answer: "), question
        assert exam_samples.approximate_tokens(question.answer) < 90 < MAX_NEW_TOKENS["math"], question
        assert "`Answer: X`" in question.prompt and "step" in question.prompt.lower()
        assert exam_samples.approximate_tokens(question.prompt) <= 70, question


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_values_are_wrong(family: str, split: Split) -> None:
    drawn = sample(family, split)
    for question, other in zip(drawn, drawn[1:] + drawn[:1], strict=True):
        value = value_of(question)
        for wrong in (value + 1, value - 1, -value, 10 * value, value / 10 + 1000):
            if wrong != value:
                assert not passes(question, question.answer.replace(f"Answer: {value}", f"Answer: {wrong}")), question
        assert passes(question, other.answer) == (value_of(other) == value), question
        assert not passes(question, f"Answer: {value}\nAnswer: {value + 1}")
        assert not passes(question, f"Answer: {value + 1}\nAnswer: {value}")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lazy_and_cheating_answers_are_wrong(family: str, split: Split) -> None:
    for question in sample(family, split):
        value = question.answer.rsplit("Answer: ", 1)[1]
        asked = re.search(r"[(]*[0-9][0-9a-z+\-*/=()%, ]*", question.prompt.rsplit("`Answer", 1)[0])
        assert asked
        expression = asked[0].strip()
        lazy = ["", question.prompt, "Answer:", "Answer: X", "I don't know", f"Answer: {expression}", value]
        lazy += [f"The answer is {value}.", f"Answer: {question.prompt}", "Answer:\n" + value, "Answer: 3 + 4"]
        lazy += ["Answer: " + step.split(" = ")[0] for step in question.answer.splitlines() if STEP.fullmatch(step)]
        listed = ", ".join(map(str, range(200)))
        cheating = [f"Answer: {value} or {value}", f"Answer: 1 or {value}", f"Answer: {value} to {value}"]
        cheating += [f"Answer: {listed}", f"Answer: 0-{value}", f"Answer: {value}?", f"Answer: not {value}"]
        cheating += [f"Answer: {value} Answer: {value}", f"Answer: {value}, {value}", f"Answer: {value} ({value})"]
        cheating += [f"Answer: 0 + {value}", f"Answer: {value} * 1", f"Answer: {value}/1/1", f"Answer: {value} {value}"]
        for response in lazy + cheating:
            assert not passes(question, response), (question, response)


def constant(value: int, family: str = "chain") -> Question:
    return Question(family, "", "", "", {"tree": ["+", value, 0]})


@pytest.mark.parametrize(
    "line",
    ["Answer: 12", "Answer: 12.", "Answer: $12", "Answer: 12 apples", "Answer: x = 5 ", "**Answer:** 12", "answer: 12"]
    + ["**Answer**: 12", "**Answer: 12**", "Final Answer: 12", r"Answer: $\boxed{12}$", "Answer: 12.0", "Answer: 12.00"]
    + ["Answer: x=12", "Answer: $12$", "Answer: `12`", "Answer: 12 km/h", "Answer: 12%", r"Answer: \(12\)"]
    + ["2 * 6 = 12\n\nAnswer: 12\n", "Answer: 12\nAnswer: 12", "Answer: **12** apples.", "Answer: 12 dollars in all"],
)
def test_usual_forms_are_read(line: str) -> None:
    question = constant(5 if "x = 5" in line else 12)
    assert passes(question, line)
    assert not passes(constant(13), line)


@pytest.mark.parametrize(
    "line", ["Answer: 24/2", r"Answer: \frac{24}{2}", "Answer: 12/1", "Answer: 12/0", "Answer: 12e0", "Answer: twelve"]
    + ["Answer: 3*4", "Answer: 012,0", "Answer: 12 to", "Answer: 1 2", "Answer: 12 thousand", "Answer: " + "1" * 9999]
    + ["Answer: 12" + 300 * " " + "13", "Answer: 12 " + "a" * 50_000 + "!", "Answer: 12 = 12"]
)  # fmt: skip
def test_other_forms_are_not_read(line: str) -> None:
    assert not passes(constant(12), line)


def test_thousands_signs_and_fractions_are_read() -> None:
    assert passes(constant(1200), "Answer: 1,200") and passes(constant(1200), "Answer: $1,200.00")
    assert passes(constant(-5), "Answer: -5") and passes(constant(-5), "Answer: \u22125")
    assert not passes(constant(5), "Answer: -5")
    fraction = Question("fractions", "", "", "", {"tree": ["*", ["/", 1, 2], ["/", 3, 2]]})
    for line in ("3/4", "3 / 4", "0.75", r"\frac{3}{4}", r"$\frac{3}{4}$", r"\(\dfrac{3}{4}\).", "**3/4**"):
        assert passes(fraction, f"Answer: {line}"), line
    for line in ("6/8", "75/100", "4/3", "0.7", "3", "-3/4", "1/2 * 3/2", "3/4 or 6/8", "0 3/4"):
        assert not passes(fraction, f"Answer: {line}"), line


@pytest.mark.parametrize("split", SPLITS)
def test_sympy_agrees_on_the_prompts(split: Split) -> None:
    """The value is computed from the prompt alone, not from the key."""
    verbs = {"add": "+", "subtract": "-", "multiply by": "*"}
    for question in sample("chain", split)[:400]:
        if question.prompt.startswith("Start with"):
            expression = re.match("Start with ([0-9]+)", question.prompt)[1]  # type: ignore[index]
            for verb, number in re.findall("(add|subtract|multiply by) ([0-9]+)", question.prompt):
                expression = f"({expression}) {verbs[verb]} {number}"
        else:
            expression = re.search(r"[(]*[0-9][0-9+\-*() ]*[0-9]", question.prompt)[0]  # type: ignore[index]
        assert sympy.sympify(expression) == sympy.Rational(value_of(question)), question
    for question in sample("fractions", split)[:400]:
        expression = re.search("[0-9]+/[0-9]+ [-+*] [0-9]+/[0-9]+", question.prompt)[0]  # type: ignore[index]
        expected = sympy.nsimplify(sympy.sympify(expression))
        assert str(expected) == question.answer.rsplit("Answer: ", 1)[1], question
    for question in sample("equation", split)[:400]:
        equation = re.search(r"([0-9]+[a-z] [-+] [0-9]+) = ((?:[0-9]*[a-z] \+ )?[0-9]+)", question.prompt)
        assert equation, question
        left, right = (sympy.sympify(re.sub("([0-9]+)([a-z])", r"\1*\2", side)) for side in equation.groups())
        (solution,) = sympy.solve(left - right)
        assert solution == sympy.Integer(int(value_of(question))), question


@pytest.mark.parametrize("family", FAMILIES)
def test_structures_do_not_meet(family: str) -> None:
    train, test = sample(family, "train", 3000), sample(family, "test", 1000)
    assert len(train) == 3000 and len(test) == 1000  # so many different questions exist
    assert not {question.structure for question in train} & {question.structure for question in test}
    if family != "word-problem":  # stories may share their numbers
        assert not {json.dumps(question.key) for question in train} & {json.dumps(question.key) for question in test}
    assert len({question.structure for question in test}) >= 40


def task_of(question: Question) -> str:
    """The prompt without the request for steps."""
    (request,) = [request for request in _TASKS["last line"] if question.prompt.endswith(" " + request)]
    return question.prompt.removesuffix(" " + request)


def test_no_task_is_in_both_splits() -> None:
    tasks = {
        split: {task_of(question) for family in FAMILIES for question in sample(family, split)} for split in SPLITS
    }
    assert not tasks["train"] & tasks["test"]


def essence(question: Question) -> object:
    """The combination that a training row may not share with a test question, read from the task alone."""
    task = task_of(question)
    numbers = [int(number) for number in re.findall("[0-9]+", task)]
    if question.family == "fractions":  # the order of the two fractions does not matter
        return re.findall(" ([-+*]) [0-9]", task), sorted(re.findall("[0-9]+/[0-9]+", task))
    if question.family == "percentages":  # p% of n, whatever happens with it
        return re.findall("([0-9]+)(?:%| percent)", task), sorted(numbers)
    if question.family == "average":
        return len(numbers), sorted(numbers)[:2]
    return [later - earlier for earlier, later in pairwise(numbers)]  # a sequence, wherever it starts


@pytest.mark.parametrize("family", ["fractions", "percentages", "average", "sequence"])
def test_the_essence_of_a_task_is_in_one_split(family: str) -> None:
    train, test = ({repr(essence(question)) for question in sample(family, split, 3000)} for split in SPLITS)
    assert not train & test


def test_chains_of_the_test_split_are_longer() -> None:
    lengths = {split: {q.answer.count(" = ") for q in sample("chain", split)} for split in SPLITS}
    assert lengths == {"train": {3, 4}, "test": {3, 4, 5}}


def test_wordings_and_stories_suffice() -> None:
    assert len(_STORIES) >= 20
    assert all(len(story[phase]) >= 3 for story in _STORIES for phase in "12")
    assert all(len(wordings) >= 5 for wordings in _TASKS.values()) and len(_TASKS) == 9


def test_every_sentence_of_the_stories_is_in_training() -> None:
    """The test split recombines sentences that training has."""
    prompts = [question.prompt for question in sample("word-problem", "train", 3000)]
    for story in _STORIES:
        for operation, sentence in story["1"] + story["2"]:
            pattern = re.compile(r".+?".join(map(re.escape, re.split(r"\{.\}", sentence))))
            assert any(pattern.search(prompt) for prompt in prompts), (operation, sentence)


def test_questions_repeat_with_the_seed_and_survive_json() -> None:
    for split in SPLITS:
        first = list(islice(questions("math", split, 7), 140))
        assert first == list(islice(questions("math", split, 7), 140))
        assert first != list(islice(questions("math", split, 8), 140))
        for question in first:
            loaded = replace(question, key=json.loads(json.dumps(question.key)))
            assert loaded == question
            assert check("math", loaded, question.answer)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_constant_answer_pays(family: str, split: Split) -> None:
    drawn = sample(family, split)
    values = [value_of(question) for question in drawn]
    most = max(set(values), key=values.count)
    assert sum(passes(question, f"Answer: {most}") for question in drawn) <= 0.15 * len(drawn)
