"""The exam of code: reference programs are right, and wrong, lazy or cheating answers fail."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import islice
from random import Random
from typing import Any

import pytest

from exam_samples import approximate_tokens
from ultrafuser import sandbox
from ultrafuser.errors import SandboxError
from ultrafuser.zoo.exams import MAX_NEW_TOKENS, SPLITS, Question, Split, check, families, questions
from ultrafuser.zoo.exams.code_exam import (
    _BUGS,
    _FORMS,
    _MEND,
    _WRITE,
    Plan,
    Tables,
    _draw,
    _inputs,
    _is_always,
    _lists,
    _loop,
    _loop_code,
    _neighbours,
    _program,
)
from ultrafuser.zoo.exams.code_snippets import _PRINT, _PRINT_FORMS, _trace
from ultrafuser.zoo.exams.programs import is_plain

FUNCTION_FAMILIES = ["mend-bug", "write-list-function", "write-number-function", "write-string-function"]
needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox: {sandbox.available()}")


@cache
def sample(split: Split) -> dict[str, list[Question]]:
    """The first questions of each family: 3,000 for training and 1,000 for the test in all."""
    drawn = defaultdict(list)
    for question in islice(questions("code", split, 1), 3000 if split == "train" else 1000):
        drawn[question.family].append(question)
    return drawn


def code_of(question: Question) -> str:
    return question.answer.removeprefix("```python\n").removesuffix("\n```")


def block(code: str) -> str:
    return f"```python\n{code}\n```"


def results(code: str, function: str, inputs: list[Any]) -> str:
    """The results of a program of ours, as the checker compares them."""
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    return repr([namespace[function](deepcopy(value)) for value in inputs])


def passes(question: Question, response: str) -> bool:
    return check("code", question, response)


def test_families() -> None:
    assert sorted(families("code")) == [
        *FUNCTION_FAMILIES[:1], "print-output", *FUNCTION_FAMILIES[1:],
    ]  # fmt: skip
    assert min(map(len, (_WRITE, _MEND, _PRINT, _FORMS, _PRINT_FORMS))) >= 5


def test_the_splits_share_no_structure_and_no_prompt() -> None:
    for family in families("code"):
        train, test = sample("train")[family], sample("test")[family]
        assert len({question.prompt for question in [*train, *test]}) == len(train) + len(test) == 800
        assert not {question.structure for question in train} & {question.structure for question in test}
        assert len({question.structure for question in test}) >= 60
    programs = [{code_of(q).partition("(")[2] for q in sample(split)["mend-bug"]} for split in SPLITS]
    assert not programs[0] & programs[1]  # no mended function of the test split is an answer in training


def test_there_are_enough_questions_of_the_smallest_family() -> None:
    random, generate = Random(0), families("code")["print-output"].generate
    for split, count in zip(SPLITS, (2000, 200), strict=True):
        drawn = (generate(random, split) for _ in range(20 * count))
        assert len({question.prompt for question in drawn if question}) >= count


def test_the_same_seed_gives_the_same_questions() -> None:
    assert list(islice(questions("code", "train", 1), 40)) == [
        sample("train")[family][index] for index in range(8) for family in families("code")
    ]
    assert list(islice(questions("code", "train", 2), 5)) != list(islice(questions("code", "train", 1), 5))


def test_keys_survive_json_and_answers_are_short() -> None:
    for split in SPLITS:
        for drawn in sample(split).values():
            for question in drawn:
                assert json.loads(json.dumps(question.key)) == question.key
                assert approximate_tokens(question.answer) <= MAX_NEW_TOKENS["code"]


@pytest.mark.parametrize("family", FUNCTION_FAMILIES)
@pytest.mark.parametrize("split", SPLITS)
def test_reference_programs_give_the_expected_values(family: str, split: Split) -> None:
    for question in sample(split)[family][:300]:
        name, cases = question.key["function"], question.key["cases"]
        inputs = [value for value, _ in cases]
        assert results(code_of(question), name, inputs) == repr([value for _, value in cases])
        assert len(cases) >= 6 and ([] in inputs or "" in inputs or 0 in inputs)
        assert f"{name}" in question.prompt and is_plain(code_of(question))
        for example in re.findall(rf"`{name}\((.*?)\)` returns", question.prompt):
            assert example not in [repr(value) for value in inputs]


@pytest.mark.parametrize("family", FUNCTION_FAMILIES)
def test_hidden_inputs_tell_a_program_from_its_neighbours(family: str) -> None:
    """One operation or parameter changed gives other results, by the code of the changed program."""
    random, compared = Random(0), 0
    options = getattr(families("code")[family].generate, "keywords", None) or {
        "shapes": (_BUGS,), "draw": _lists, "compute": _loop, "code": _loop_code,
    }  # fmt: skip
    while compared < 300:
        tables: Tables = random.choice(options["shapes"])
        plan: Plan = _draw(random, tables)
        cases = _inputs(random, plan, options["draw"], options["compute"], tables)
        if cases is None:
            continue
        expected = results(options["code"](plan, "f", "x"), "f", cases[0])
        for other in _neighbours(plan, tables):
            if family == "mend-bug" and _is_always(other) != _is_always(plan):
                continue
            assert results(options["code"](other, "f", "x"), "f", cases[0]) != expected
            compared += 1


def test_mend_bug_shows_a_wrong_program() -> None:
    for question in sample("test")["mend-bug"]:
        name, cases = question.key["function"], question.key["cases"]
        shown = re.findall(r"```python\n(.*?)\n```\n?", question.prompt, re.S)[0]
        example = re.findall(rf"`{name}\((\[.*?\])\)` returns (\w+|-\w+)", question.prompt)
        assert len(example) == 1
        value = json.loads(example[0][0])
        assert results(shown, name, [value]) == f"[{example[0][1]}]" != results(code_of(question), name, [value])
        assert results(shown, name, [case for case, _ in cases]) != repr([result for _, result in cases])


@needs_sandbox
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("family", sorted(families("code")))
def test_reference_answers_are_right(family: str, split: Split) -> None:
    for question in sample(split)[family][:25]:
        assert passes(question, question.answer), question


@needs_sandbox
@pytest.mark.parametrize("family", FUNCTION_FAMILIES)
def test_forms_of_a_right_program(family: str) -> None:
    question = sample("test")[family][0]
    code, name = code_of(question), question.key["function"]
    assert passes(question, code)
    assert passes(question, f"Here it is:\n{code}\n\nIt does what you asked for.")
    assert passes(question, f"Use this:\n{block('import os')}\nthen\n{block(code)}\nand {block('print(1)')}")
    assert passes(question, block(f"from functools import reduce\nimport math\n\n{code}\n\nprint({name!r})"))


@needs_sandbox
@pytest.mark.parametrize("family", FUNCTION_FAMILIES)
def test_lazy_and_cheating_programs_are_wrong(family: str) -> None:
    question = sample("test")[family][1]
    code, name = code_of(question), question.key["function"]
    head = f"def {name}(x):\n    "
    some, result = question.key["cases"][0]
    printing = code.replace("    return ", "    print(")
    assert printing != code
    for response in (
        "",
        question.prompt,
        code.split("\n")[0],
        block(code.split("\n")[0]),
        block(f"{head}pass"),
        block(f"{head}return x"),
        block(f"{head}return {result!r}"),
        block(f"{head}return {result!r} if x == {some!r} else None"),
        block("\n".join(f"{line})" if "print(" in line else line for line in printing.split("\n"))),
        block(f"{head}raise SystemExit(0)"),
        block(f"raise SystemExit(0)\n{code}"),
        block(f"import sys\nsys.exit(0)\n{code}"),
        block(f"{head}import os\n    os._exit(0)"),
        block(f"class Same:\n    def __eq__(self, other):\n        return True\n{head}return Same()"),
        block(f"{head}return type('Same', (), dict(__eq__=lambda *_: True))()"),
        block(f"import builtins\nbuiltins.repr = builtins.str = lambda _: ''\n{head}return 0"),
        block(f"{head}return 0\nlist = str = repr = all = lambda *_: True"),
        block(f"{head}return str(x)\ndef check(*_):\n    return True"),
        code.replace(f"def {name}(", "def other_name("),
    ):
        assert not passes(question, response), response


@needs_sandbox
@pytest.mark.parametrize("family", FUNCTION_FAMILIES)
def test_wrong_programs_fail_in_the_sandbox(family: str) -> None:
    """A right program for another question, under the name that this question asks for."""
    # Loops over digits have large inputs, and loops over a range small ones.
    drawn = [question for question in sample("test")[family] if "|digits|" not in question.structure]
    for question, other in zip(drawn[:8], drawn[8:16], strict=True):
        code = code_of(other).replace(f"def {other.key['function']}(", f"def {question.key['function']}(")
        inputs = [value for value, _ in question.key["cases"]]
        expected = repr([value for _, value in question.key["cases"]])
        assert results(code, question.key["function"], inputs) != expected
        assert not passes(question, block(code))


@needs_sandbox
def test_true_is_not_one() -> None:
    (question,) = sample("test")["write-list-function"][:1]
    for value, right in ((1, True), (True, False), (1.0, False)):
        changed = replace(question, key={"function": "f", "cases": [[[3], 1]]})
        assert passes(changed, block(f"def f(numbers):\n    return {value!r}")) is right


@pytest.mark.parametrize(
    "code",
    [
        "def f(x):\n    return f.__globals__",
        "def f(x):\n    return (i for i in x).gi_frame",
        "def f(x):\n    return '{0.gi_frame}'.format(x)",
        "def f(x):\n    return eval('x')",
        "def f(x):\n    return __builtins__",
        "from sys import exit\ndef f(x):\n    return x",
        "import functools as t\ndef f(x):\n    return x",
        "def f(x):\n    match x:\n        case object(gi_frame=y):\n            return y",
        "def f(x)",
        "def f(x):\n    return '\0'",
    ],
)
def test_programs_that_are_not_plain(code: str) -> None:
    assert not is_plain(code)


def test_no_program() -> None:
    assert _program("f(x) returns x", "f") is None
    assert _program(block("x = 1"), "f") is None
    assert _program("def f(x):\nreturn x", "f") is None


def test_a_sandbox_that_fails_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    question = sample("test")["write-list-function"][0]
    outcomes = [sandbox.Outcome("error", "fork failed"), sandbox.Outcome("passed")]
    monkeypatch.setattr(sandbox.execute, "check", lambda *_: outcomes.pop(0))
    assert passes(question, question.answer) and not outcomes
    outcomes += [sandbox.Outcome("error", "fork failed")] * 2
    with pytest.raises(SandboxError, match=f"{question.key['function']}.*failed twice.*fork failed"):
        passes(question, question.answer)


def test_a_trace_has_every_change():
    code = 'd = {"pen": 6, "key": 5}\nd["key"] += 3\ntotal = 0\nfor n in [4, 2]:\n    total += n\n    print(total, n)'
    assert _trace(code) == [
        'd["key"] = 8', "total = 0", "n = 4", "total = 4", "print 4 4", "n = 2", "total = 6", "print 6 2",
    ]  # fmt: skip
    assert _trace('s = "a4"\ns = s[1:]\nprint(s)') == ['s = "a4"', 's = "4"', "print 4"]


@pytest.mark.parametrize("split", SPLITS)
def test_programs_print_the_expected_output(split: Split) -> None:
    for question in sample(split)["print-output"]:
        (code,) = re.findall(r"```python\n(.*?)\n```", question.prompt, re.S)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, {})
        assert " ".join(printed.getvalue().split()) == question.key["printed"] != ""
        steps = question.answer.splitlines()
        traced = [step.removeprefix("print ") for step in steps if step.startswith("print ")]
        assert " ".join(traced) == question.key["printed"]
        assert passes(question, question.answer)
        assert 2 <= code.count("\n") + 1 <= 5


def test_forms_of_an_output() -> None:
    question = replace(sample("test")["print-output"][0], key={"printed": "12 15"})
    for response in (
        "Output: 12 15", "First 12, then 15.\n\n**Output:** 12 15\n", "`Output: 12 15`", "output:  12  15",
        "```\nOutput: 12 15\n```", "Output: 12 15\nOutput: 12 15",
    ):  # fmt: skip
        assert passes(question, response), response
    for response in (
        "", "12 15", question.prompt, "Output:", "Output: 12", "Output: 15 12", "Output: 12 16", "Output: 12 15 18",
        "Output: 12 15\nOutput: 12 16", "Output: 12 16\nOutput: 12 15", "Output: 12 15\nor 12 16", "Output: 12 15 or 16",
        "Output: 12, 15", "Output: 1215",
    ):  # fmt: skip
        assert not passes(question, response), response
