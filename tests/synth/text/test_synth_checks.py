"""Checks: code that parses and passes its tests, arithmetic that holds, samples that agree."""

from __future__ import annotations

import os
import random
import threading
from fractions import Fraction

import pytest

from ultrafuser import sandbox
from ultrafuser.errors import SandboxError
from ultrafuser.synth.text import checks

SQUARE = "Here:\n```python\ndef square(x):\n    return x * x\n```\nIt multiplies."


@pytest.mark.parametrize(
    "answer",
    [
        SQUARE,
        "No code at all.",
        "```\nfree text, not python (\n```",
        "```bash\nls -l | grep (\n```",
        "```python\n>>> square(3)\n9\n```",
        "```python\n    return x * x\n```",
    ],
)
def test_code_that_stays(answer):
    assert checks.check_code(answer) is None


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("```python\ndef square(x:\n    return\n```", "code does not parse"),
        ("```\ndef square(x):\nreturn x\n```", "code does not parse"),
        ("```python\ndef square(x):\n    return x", "code cut off"),
        ("```python\n" + "(" * 5000 + "\n```", "code does not parse"),
    ],
)
def test_code_that_goes(answer, reason):
    assert checks.check_code(answer) == reason


needs_sandbox = pytest.mark.skipif(sandbox.available() is not None, reason="no sandbox here")


@needs_sandbox
def test_code_is_run_with_its_tests():
    cases = [
        (SQUARE, "assert square(3) == 9"),
        (SQUARE, "assert square(3) == 8"),
        ("No code.", "assert square(3) == 9"),
        ("```python\nimport sys\nsys.exit(0)\n```", "assert False"),
    ]
    assert checks.run_tests(cases) == [None, "tests: failed", "tests without code", "tests: failed"]


def test_as_many_are_run_at_once_as_there_are_processors(monkeypatch):
    together = threading.Barrier(4)

    def wait(*_, **__):
        together.wait(timeout=10)  # breaks with fewer
        return sandbox.Outcome("passed")

    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(sandbox.execute, "check", wait)
    assert checks.run_tests([(SQUARE, f"assert {operand}") for operand in range(1, 5)]) == [None] * 4


def test_without_a_sandbox_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sandbox.execute, "available", lambda: "bubblewrap is not installed")
    with pytest.raises(SandboxError, match="generated code runs only in a sandbox"):
        checks.run_tests([(SQUARE, "assert True")])


@pytest.mark.parametrize(
    "answer",
    [
        "9 * 36 = 324 books, and 14 - 9 = 5 boxes hold 5 * 28 = 140. Together 324 + 140 = 464.",
        "10 / 3 = 3.33, or 10 / 3 = 3.3333.",
        r"So \(2 \times 3 = 6\) and $5 \cdot 4 = 20$.",
        "$5 * 3 = $15",
        "1,200 + 300 = 1,500",
        "(3 + 4) * 2 = 14",
        "2^10 = 1024",
        "x = 5 + 3 = 8",
        "Then 2x + 3 = 7 gives x = 2.",
        "Half of 10 + 2 = 7",
        "9 / 2 = 4 remainder 1",
        "8 / 3 = 2 and 2/3",
        "3 + 4 = 7 and 5/5 = 1",
        "20% of 50 = 10",
        "7 mod 3 + 1 = 2",
        "f(2) + 3 = 9",
        "12:30 + 15 = 12:45",
        "3 + 4 = 7x",
        "sqrt(16) + 1 = 5",
        "1 1/2 + 2 = 3 1/2",
        "5! = 120",
        "10 // 3 = 3",
        "9**9**9 = 1",
        "1 / 0 = 7",
        "100 cm / 4 = 25 cm",
        "",
    ],
)
def test_arithmetic_that_stays(answer):
    assert checks.check_arithmetic(answer) is None


@pytest.mark.parametrize(
    "answer",
    [
        "9 * 36 = 325 books",
        "First 3 + 4 = 7, then 7 * 2 = 15.",
        "10 / 3 = 3.5",
        r"\(2 \times 3 = 7\)",
        "**12 - 5 = 8**",
        "(3 + 4 = 8)",
        "$5 * 3 = $16",
        "x = 5 + 3 = 9",
        "3 + 4 = 7 and 5 + 1 = 7",
        "3 + 4 = 7 * 2 = 14",
        "2^10 = 1000",
    ],
)
def test_arithmetic_that_goes(answer):
    assert checks.check_arithmetic(answer) == "wrong arithmetic"


def test_sums_are_right_or_wrong_as_python_says():
    rng = random.Random(0)
    for _ in range(300):
        numbers = [rng.randrange(1, 500) for _ in range(rng.randrange(2, 5))]
        text = str(numbers[0])
        for operand in numbers[1:]:
            text += f" {rng.choice('+-*')} {operand}"
        value = eval(text)
        assert checks.check_arithmetic(f"So {text} = {value}.") is None, text
        assert checks.check_arithmetic(f"So {text} = {value + 1}.") == "wrong arithmetic", text


def test_values():
    assert checks.evaluate("1 + 2 * 3") == 7
    assert checks.evaluate("0.1 + 0.2") == Fraction(3, 10)
    assert checks.evaluate("007 + 1") == 8
    for text in ("", "1 +", "a + 1", "2 ** 1000", "1e999", "9" * 60, "__import__('os')", "(" * 500):
        assert checks.evaluate(text) is None


def test_hostile_lines_are_read_to_their_end():
    for line in ("1 + " * 20000, "(" * 20000, "3 = " * 20000, "1 2 " * 20000, "$ " * 20000):
        assert checks.check_arithmetic(line) in (None, "wrong arithmetic")
        assert checks.check_arithmetic(f"{line}\n2 + 2 = 5") == "wrong arithmetic"


def test_samples_agree():
    answer = "3 + 4 = 7, so the answer is 7."
    assert checks.final_result(answer) == "7"
    assert checks.agreement(answer, ["I get 7.", "The answer is 8.", "No idea", "The answer is 7.0."]) == 0.5
    assert checks.agreement(answer, []) == 1.0
    assert checks.agreement("I do not know.", ["The answer is 8."]) == 0.0
