"""Is an answer right, as far as a machine can tell? Code is parsed and run with its tests; arithmetic is done again."""

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
from ultrafuser.errors import SandboxError

MAX_DIGITS = 40  # of a number that is computed again
MAX_EXPONENT = 64
MAX_CHARS = 300  # of an expression
LIMITS = sandbox.Limits(timeout_s=10.0, memory_bytes=1 << 29)
_LOOKS_LIKE_PYTHON = re.compile(r"^(?:def |class |import |from \w[\w.]* import |@\w|async def )", re.M)
_SESSION = re.compile(r"^>>> ", re.M)


def check_answer(kind: str, answer: str) -> str | None:
    """Why an answer cannot be right by a domain's `check`: `python`, `math` or `none`; None: nothing speaks against it."""
    return {"python": check_code, "math": check_arithmetic}.get(kind, lambda _: None)(answer)


# ---------------------------------------------------------------- code


def check_code(answer: str) -> str | None:
    """Why the code of an answer cannot be right: a Python block that does not parse, or one that is cut off."""
    if answer.count("```") % 2:
        return "code cut off"
    for code in python_blocks(answer):
        if not _parses(code):
            return "code does not parse"
    return None


def python_blocks(answer: str) -> list[str]:
    """The Python in an answer: blocks that say so, unnamed ones that look like it, sessions left out."""
    found = []
    for language, body in code_blocks(answer):
        named = language.lower() in PYTHON_NAMES
        if (named or (not language and _LOOKS_LIKE_PYTHON.search(body))) and not _SESSION.search(body):
            found.append(body)
    return found


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except IndentationError:
        return _parses_indented(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # what the parser has for hostile text
        return False
    return True


def _parses_indented(code: str) -> bool:
    """An excerpt out of the middle of a function is code too."""
    try:
        ast.parse("if True:\n" + "\n".join(f" {line}" for line in code.splitlines()))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


Case = tuple[str, str]  # an answer, and the tests that its code has to pass


def case_key(case: Case) -> str:
    """The name of a verdict: of the code, the tests and the limits they run under."""
    answer, tests = case
    return hashlib.sha256(repr((python_blocks(answer), tests, LIMITS)).encode()).hexdigest()


def run_tests(cases: Sequence[Case], *, unsafe: bool = False) -> list[str | None]:
    """For each answer with its tests, why it is left out; None: the tests pass.

    Raises:
        SandboxError: there is no sandbox and `unsafe` is not set, or it failed twice for one answer.
    """

    def one(case: Case) -> str | None:
        answer, tests = case
        code = "\n\n".join(python_blocks(answer))
        if not code.strip():
            return "tests without code"
        for _ in range(2):
            outcome = sandbox.check(code, tests, limits=LIMITS, unsafe=unsafe)
            if outcome.status != "error":  # which says nothing about the answer
                return None if outcome.passed else f"tests: {outcome.status}"
        raise SandboxError(f"the sandbox failed twice, so an answer has no verdict: {outcome.detail}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, cases))


# ---------------------------------------------------------------- mathematics

_TOKEN = re.compile(
    r"(?P<number>(?:\\?[$€£] ?)?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)"
    r"|(?P<operator>\*\*|[-+*/^×÷·−–]|\\times(?![a-z])|\\cdot(?![a-z])|\\div(?![a-z]))"
    r"|(?P<bracket>[()])|(?P<equals>=)|(?P<space>\s+)|(?P<other>\\?[A-Za-z]+|.)"
)
_SPELLING = {"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "^": "**", "\\times": "*", "\\cdot": "*", "\\div": "/"}
# Words after which, or before which, a run of numbers is a part of something else: "half of 10 + 2", "9 / 2 = 4 remainder 1".
_BEFORE = {
    "of",
    "times",
    "over",
    "by",
    "plus",
    "minus",
    "mod",
    "log",
    "ln",
    "sin",
    "cos",
    "tan",
    "sqrt",
    "root",
    "base",
}
_AFTER = {"r", "remainder", "rem", "mod", "of", "times", "plus", "minus", "percent", "base", "over", "rounded"}
_OPENERS = set("[{\"'“‘*_`$")
_BOLD = re.compile(r"(?<![\w)])\*\*(?=\S)(.+?)(?<=\S)\*\*(?![\w(])")  # not a power, as in 2**3**2
_CLOSERS = set("]}\"'”’*_`:,;.!?$\\")


def check_arithmetic(answer: str) -> str | None:
    """Why an answer is left out: an equation between plain numbers in it does not hold."""
    for left, right in equations(answer):
        given, result = evaluate(left), evaluate(right)
        if given is not None and result is not None and abs(given - result) > _tolerance(right):
            return "wrong arithmetic"
    return None


def equations(answer: str) -> list[tuple[str, str]]:
    """What an answer claims of plain numbers: (left, right) of each equation whose left side computes something.

    Anything that touches a letter, a percent sign or a word such as `of` or `remainder` is left alone.
    """
    found = []
    text = re.sub(r"\\left|\\right|\\[,;!]", "", answer)
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = re.sub(r"\b(\d+) and (\d+/\d+)\b(?!\s*[-+*/=])", r"\1 + \2", text)  # a mixed number
    for line in _BOLD.sub(r"\1", text).splitlines():
        for run in _runs(line):
            sides = [_balanced(side) for side in run.split("=")]
            pairs = zip(sides, sides[1:], strict=False)
            found += [(left, right) for left, right in pairs if re.search(r"\d.*[-+*/].*\d", left) and right]
    return found


def _runs(line: str) -> list[str]:
    """The longest stretches of numbers, operators, brackets and equals signs, without the ends that belong to something else."""
    out, run, before, spaced = [], "", "", True
    for match in [*_TOKEN.finditer(line + " "), None]:
        kind, text = (match.lastgroup, match[0]) if match is not None else ("other", ".")
        if kind == "space":
            run += " " if run else ""
            spaced = True
            continue
        if kind != "other":
            if not run:
                run = (
                    "" if (spaced or before in _OPENERS) and before.lower() not in _BEFORE else "#"
                )  # a part of something
            run += _SPELLING.get(text, re.sub(r"\\?[$€£] ?|,", "", text) if kind == "number" else text)
        elif run:
            adjacent = not run.endswith(" ")
            loose = text.lower() in _AFTER or (adjacent and text not in _CLOSERS)
            out.append(run.strip() + ("#" if loose else ""))
            run = ""
        if kind == "other":
            before = text
        spaced = False
    return [_whole(run) for run in out if "=" in run]


def _whole(run: str) -> str:
    """A run without a first or last side that goes on outside of it."""
    sides = run.split("=")
    if "#" in sides[0] or re.match(r"\s*[-+*/]", sides[0]):
        sides[0] = ""
    if "#" in sides[-1] or re.search(r"[-+*/]\s*$", sides[-1]):
        sides[-1] = ""
    return "=".join(sides)


def _balanced(side: str) -> str:
    side = side.strip()
    while side.count("(") > side.count(")") and side.startswith("("):
        side = side[1:].strip()
    while side.count(")") > side.count("(") and side.endswith(")"):
        side = side[:-1].strip()
    return side


def evaluate(expression: str) -> Fraction | None:
    """The exact value of an expression of numbers; None where there is none, or it is too large to compute."""
    if len(expression) > MAX_CHARS:
        return None
    text = re.sub(r"(?<![\d.])0+(?=\d)", "", expression)  # 007 is no Python number
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
    operation = _OPERATIONS.get(type(node.op))
    if operation is None:
        raise ValueError("not arithmetic")
    return operation(left, right)


def _tolerance(right: str) -> Fraction:
    """A result with decimals may be rounded in its last place; a whole number is exact."""
    decimals = [len(part) for part in re.findall(r"\.(\d+)", right)]
    return Fraction(1, 10 ** max(decimals)) if decimals else Fraction(0)


def final_result(answer: str) -> str | None:
    """What a mathematical answer settles on; None: nothing."""
    from ultrafuser.evaluate.tasks.read_answers import expression

    return expression(answer)


def agreement(answer: str, samples: Sequence[str]) -> float:
    """The share of the samples that settle on the same as the answer; 1 where there are none."""
    from ultrafuser.evaluate.tasks.mathematics import equal

    mine = final_result(answer)
    if mine is None:
        return 0.0
    theirs = [final_result(sample) for sample in samples]
    return sum(one is not None and equal(one, mine) for one in theirs) / len(theirs) if theirs else 1.0
