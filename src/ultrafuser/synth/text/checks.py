"""Checks of answers by machine: code is parsed and run with its tests, arithmetic is computed again."""

from __future__ import annotations

import ast
import hashlib
import operator
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

from ultrafuser import sandbox
from ultrafuser.data.answer_text import PYTHON_NAMES, code_blocks

MAX_DIGITS = 40  # numbers with more digits are not computed
MAX_EXPONENT = 64
MAX_EQUATIONS = 2000  # further ones are not computed
MAX_CHARS = 300  # longer expressions are not computed
LIMITS = sandbox.Limits(timeout_s=10.0, memory_bytes=1 << 29)
_LOOKS_LIKE_PYTHON = re.compile(r"^(?:def |class |import |from \w[\w.]* import |@\w|async def )", re.M)
_SESSION = re.compile(r"^>>> ", re.M)


def check_answer(kind: str, answer: str) -> str | None:
    """Why an answer fails the `check` of a domain: `python`, `math` or `none`. None: it passes."""
    return {"python": check_code, "math": check_arithmetic}.get(kind, lambda _: None)(answer)


# ---------------------------------------------------------------- code


def check_code(answer: str) -> str | None:
    """Why the code of an answer is rejected: a Python block does not parse or is cut off. None: all blocks parse."""
    if answer.count("```") % 2:
        return "code cut off"
    return None if all(map(_parses, python_blocks(answer))) else "code does not parse"


def python_blocks(answer: str) -> list[str]:
    """The Python blocks of an answer: named ones, and unnamed ones that look like Python. Interpreter sessions are ignored."""
    blocks = []
    for language, body in code_blocks(answer):
        named = language.lower() in PYTHON_NAMES
        if (named or (not language and _LOOKS_LIKE_PYTHON.search(body))) and not _SESSION.search(body):
            blocks.append(body)
    return blocks


def _parses(code: str) -> bool:
    """Whether code parses. An indented excerpt, as from the middle of a function, is tried inside a block."""
    for text in (code, "if True:\n" + "\n".join(f" {line}" for line in code.splitlines())):
        try:
            ast.parse(text)
        except IndentationError:
            continue
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # the parser raises all of these
            return False
        return True
    return False


Case = tuple[str, str]  # an answer, and the tests that its code must pass


def case_key(case: Case) -> str:
    """Key of a verdict: a hash of the code, the tests and the sandbox limits."""
    answer, tests = case
    return hashlib.sha256(repr((python_blocks(answer), tests, LIMITS)).encode()).hexdigest()


def run_tests(cases: Sequence[Case], *, unsafe: bool = False) -> list[str | None]:
    """For each answer with its tests, why it is rejected. None: the tests pass.

    Raises:
        SandboxError: there is no sandbox and `unsafe` is not set, or the sandbox failed twice for an answer.
    """

    def run_case(case: Case) -> str | None:
        answer, tests = case
        code = "\n\n".join(python_blocks(answer))
        if not code.strip():
            return "tests without code"
        outcome = sandbox.decide(code, tests, limits=LIMITS, unsafe=unsafe)
        return None if outcome.passed else f"tests: {outcome.status}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(run_case, cases))


# ---------------------------------------------------------------- mathematics

# The tokens of a line. `other` is a word or a single character that is not part of arithmetic.
_TOKEN = re.compile(
    r"(?P<number>(?:\\?[$€£] ?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"  # 1,200.50 or $5
    r"|(?P<operator>\*\*|[-+*/^×÷·−–]|\\times(?![a-z])|\\cdot(?![a-z])|\\div(?![a-z]))"
    r"|(?P<bracket>[()])|(?P<equals>=)|(?P<space>\s+)|(?P<other>\\?[A-Za-z]+|.)"
)
_PYTHON_OPERATORS = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "\\times": "*", "\\cdot": "*", "\\div": "/"}  # fmt: skip
# Words that take in the numbers next to them: "half of 10 + 2", "9 / 2 = 4 remainder 1".
_WORDS_BEFORE = set("of times over by plus minus mod log ln sin cos tan sqrt root base".split())
_WORDS_AFTER = set("r remainder rem mod of times plus minus percent base over rounded".split())
# Characters that may touch a run without being part of it.
_OPENING_MARKS = set("[{\"'“‘*_`$")
_CLOSING_MARKS = set("]}\"'”’*_`:,;.!?$\\")
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w(])")  # not a power, as in 2**3**2
_OPEN_SIDE = "#"  # marks a side of a run that continues outside of it


def check_arithmetic(answer: str) -> str | None:
    """Why an answer is rejected: an equation between plain numbers in it does not hold. None: all equations hold."""
    for left, right in equations(answer)[:MAX_EQUATIONS]:
        left_value, right_value = evaluate(left), evaluate(right)
        if left_value is None or right_value is None:
            continue
        # A result with decimals may be rounded in its last place, a whole number is exact.
        decimals = [len(digits) for digits in re.findall(r"\.(\d+)", right)]
        if abs(left_value - right_value) > (Fraction(1, 10 ** max(decimals)) if decimals else 0):
            return "wrong arithmetic"
    return None


def equations(answer: str) -> list[tuple[str, str]]:
    """(left, right) of each equation between plain numbers whose left side computes something.

    Anything that touches a letter, a percent sign or a word such as `of` or `remainder` is ignored.
    """
    pairs: list[tuple[str, str]] = []
    # 1. Remove LaTeX brackets and spaces, and bold type. Write mixed numbers (2 and 2/3) as sums.
    text = re.sub(r"\\left|\\right|\\[,;!]", "", answer)
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = re.sub(r"\b(\d+) and (\d+/\d+)\b(?!\s*[-+*/=])", r"\1 + \2", text)
    text = _BOLD.sub(r"\1", text)
    # 2. Split each run of arithmetic at its equals signs. Neighbours are an equation if the left one has an operator.
    for line in text.splitlines():
        for run in _runs(line):
            sides = [_balanced(side) for side in run.split("=")]
            neighbours = zip(sides, sides[1:], strict=False)
            pairs += [(left, right) for left, right in neighbours if re.search(r"\d.*[-+*/].*\d", left) and right]
    return pairs


def _runs(line: str) -> list[str]:
    """The longest runs of numbers, operators, brackets and equals signs that hold an equation, in Python's notation."""
    runs, run = [], ""
    previous, after_space = "", True  # the last token outside of a run, and whether a space precedes this token
    for match in [*_TOKEN.finditer(line + " "), None]:
        kind, text = (match.lastgroup, match[0]) if match is not None else ("other", ".")
        if kind == "space":
            run += " " if run else ""
            after_space = True
            continue
        if kind != "other":
            # A run starts here. Its first side is open if it touches a letter, or a word takes it in.
            if not run and (previous.lower() in _WORDS_BEFORE or not (after_space or previous in _OPENING_MARKS)):
                run = _OPEN_SIDE
            # Numbers lose currency signs and thousands separators.
            run += re.sub(r"\\?[$€£] ?|,", "", text) if kind == "number" else _PYTHON_OPERATORS.get(text, text)
        else:
            # The run ends here. Its last side is open for the same reasons.
            if run:
                touches = not run.endswith(" ") and text not in _CLOSING_MARKS
                runs.append(run.strip() + (_OPEN_SIDE if touches or text.lower() in _WORDS_AFTER else ""))
                run = ""
            previous = text
        after_space = False
    return [_without_open_sides(run) for run in runs if "=" in run]


def _without_open_sides(run: str) -> str:
    """A run whose first or last side is empty if that side continues outside of it, or lacks a number at its end."""
    sides = run.split("=")
    if _OPEN_SIDE in sides[0] or re.match(r"\s*[-+*/]", sides[0]):
        sides[0] = ""
    if _OPEN_SIDE in sides[-1] or re.search(r"[-+*/]\s*$", sides[-1]):
        sides[-1] = ""
    return "=".join(sides)


def _balanced(side: str) -> str:
    """A side without brackets that are opened or closed outside of it."""
    side = side.strip()
    while side.count("(") > side.count(")") and side.startswith("("):
        side = side[1:].strip()
    while side.count(")") > side.count("(") and side.endswith(")"):
        side = side[:-1].strip()
    return side


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an arithmetic expression. None: it has no value, or is too large to compute."""
    if len(expression) > MAX_CHARS:
        return None
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # Python does not read 007
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


_OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _value(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        text = repr(node.value)
        if len(text) > MAX_DIGITS or "inf" in text:
            raise ValueError("too long")
        return Fraction(text)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand)
        return -value if isinstance(node.op, ast.USub) else value
    if not isinstance(node, ast.BinOp):
        raise ValueError("not arithmetic")
    left, right = _value(node.left), _value(node.right)
    if isinstance(node.op, ast.Pow):
        if right.denominator != 1 or abs(right) > MAX_EXPONENT or len(str(left)) > MAX_DIGITS:
            raise ValueError("too large")
        return Fraction(left**right.numerator)
    if type(node.op) not in _OPERATIONS:
        raise ValueError("not arithmetic")
    return _OPERATIONS[type(node.op)](left, right)


def final_result(answer: str) -> str | None:
    """The final result of a mathematical answer. None: it has none."""
    from ultrafuser.evaluate.tasks.read_answers import expression

    return expression(answer)


def agreement(answer: str, samples: Sequence[str]) -> float:
    """The share of the samples with the same result as the answer. 1 without samples."""
    from ultrafuser.evaluate.tasks.mathematics import equal

    result = final_result(answer)
    if result is None:
        return 0.0
    sample_results = [final_result(sample) for sample in samples]
    matches = sum(sample is not None and equal(sample, result) for sample in sample_results)
    return matches / len(samples) if samples else 1.0
