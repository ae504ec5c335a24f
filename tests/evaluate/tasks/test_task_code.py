"""Programs taken from answers, and pass@k."""

from __future__ import annotations

import itertools
import textwrap

import pytest

pytest.importorskip("lm_eval", reason="the eval extra is not installed")

from ultrafuser import sandbox
from ultrafuser.errors import SandboxError
from ultrafuser.evaluate.tasks import code

FUNCTION = "def total(numbers):\n    return sum(numbers)"
HELPER = "import math\n\ndef help(x):\n    return x"


def fenced(body: str, language: str = "python") -> str:
    return f"```{language}\n{body}\n```"


@pytest.mark.parametrize(
    "answer",
    [
        fenced(FUNCTION),
        fenced(FUNCTION, ""),
        fenced(FUNCTION, "Python"),
        f"~~~py\n{FUNCTION}\n~~~",
        f"Here is the function:\n\n{fenced(FUNCTION)}\n\nIt adds the numbers.",
        f"```python\n{FUNCTION}\n",  # cut off before the fence closes
        f"{fenced('pip install numpy', 'bash')}\n{fenced(FUNCTION)}\n{fenced('6', 'text')}",
        f"{fenced(FUNCTION)}\nUse it so:\n{fenced('print(total([1, 2]))')}",
        f"{fenced(FUNCTION)}\nor, in one line:\n{fenced('total = sum')}",
        f"{fenced('print(total([1, 2]))')}\nis what you call, with\n{fenced(FUNCTION)}",
        FUNCTION,
        f"Sure! Here it is.\n\n{FUNCTION}\n\nThis function adds them up.",
        f"<think>def total(): no</think>{fenced(FUNCTION)}",
        fenced(FUNCTION).replace("\n", "\r\n"),
    ],
)
def test_the_function_alone_is_taken(answer):
    assert code.extract_code(answer, "total") == FUNCTION


LIST_ITEM = textwrap.indent(fenced(FUNCTION), "   ")
DOCUMENTED = '''def total(numbers):
    """Add numbers.

    ```
    total([1, 2])
    ```
    """
    return sum(numbers)'''


@pytest.mark.parametrize(
    "answer",
    [
        f"1. Write the function:\n\n{LIST_ITEM}\n\n2. Call it:\n\n   ```python\n   total([1, 2])\n   ```",
        f"- The function:\n  ```python\n{textwrap.indent(FUNCTION, '      ')}\n  ```",  # deeper than its fence
        f"````markdown\nSee below\n````\n````python\n{FUNCTION}\n````",
        f"~~~~\n{FUNCTION}\n~~~~",
    ],
)
def test_code_in_list_items_and_long_fences(answer):
    assert code.extract_code(answer, "total") == FUNCTION


def test_a_fence_in_a_docstring_does_not_end_the_code():
    assert code.extract_code(f"Here:\n{fenced(DOCUMENTED)}\nThat is all.", "total") == DOCUMENTED


def test_a_body_in_a_list_item_completes_the_signature():
    answer = "1. The body:\n   ```python\n       return sum(numbers)\n   ```"
    assert code.extract_code(answer, "total", "def total(numbers):\n") == FUNCTION + "\n"


def test_definitions_of_earlier_blocks_come_along():
    answer = f"A helper:\n{fenced(HELPER)}\nand\n{fenced(FUNCTION)}"
    assert code.extract_code(answer, "total") == f"{HELPER}\n\n{FUNCTION}"


def test_prose_between_bare_functions_ends_the_code():
    answer = f"import math\n\n{FUNCTION}\n\nIt's simple: add them.\nTime complexity: O(n)."
    assert code.extract_code(answer, "total") == f"import math\n\n{FUNCTION}"


@pytest.mark.parametrize(
    "body",
    [
        "    return sum(numbers)\n",
        "    # add\n    return sum(numbers)\n\nThat is all.",
    ],
)
@pytest.mark.parametrize("wrap", [fenced, str])
def test_an_indented_text_completes_the_signature(body, wrap):
    context = "import math\n\n\ndef total(numbers):\n"
    result = code.extract_code(wrap(body), "total", context)
    names: dict = {}
    exec(result, names)
    assert names["total"]([1, 2]) == 3
    assert "That is all" not in result


def test_code_that_defines_something_else_is_still_the_answer():
    assert code.extract_code(fenced("print(1)"), "total") == "print(1)"
    assert code.extract_code(fenced(HELPER), "total") == HELPER


@pytest.mark.parametrize("answer", ["", "I would rather not.", fenced("ls", "bash"), fenced("  ")])
def test_no_code(answer):
    assert code.extract_code(answer, "total") is None


@pytest.mark.parametrize(
    "hostile", ["def total(:\n" * 50, "def total():\n    return " + "(" * 5000, "def total(): '\x00'"]
)
def test_text_that_the_parser_refuses_is_kept_for_the_sandbox_to_refuse(hostile):
    assert code.extract_code(hostile, "total")


def test_pass_at_k_equals_counting_all_draws():
    for size in range(1, 7):
        for passed in range(size + 1):
            results = [1] * passed + [0] * (size - passed)
            for k in range(1, size + 1):
                draws = list(itertools.combinations(results, k))
                expected = sum(any(draw) for draw in draws) / len(draws)
                assert code.pass_at_k(size, passed, k) == pytest.approx(expected)


DOC = {"task_id": 1, "entry_point": "total", "tests": "assert total([1, 2]) == 3", "setup": ""}


def test_equal_answers_run_once(monkeypatch):
    ran = []

    def check(answer, tests, *, setup="", unsafe=False):
        ran.append(answer)
        return sandbox.Outcome("passed" if answer == FUNCTION else "failed")

    monkeypatch.setattr(sandbox.execute, "check", check)
    result = code.score(DOC, [[fenced(FUNCTION)] * 3 + [fenced("x = 1")] * 2 + ["Sorry."]], ks=(1, 6))
    assert sorted(ran) == [FUNCTION, "x = 1"]
    assert result == {"pass@1": pytest.approx(0.5), "pass@6": 1.0, "unparsed": pytest.approx(1 / 6)}


def test_a_sandbox_that_fails_gives_no_score(monkeypatch):
    tried = []
    outcomes = [sandbox.Outcome("error", "fork failed"), sandbox.Outcome("passed")]

    def check(*args, **kwargs):
        tried.append(args)
        return outcomes[len(tried) - 1]

    monkeypatch.setattr(sandbox.execute, "check", check)
    assert code.passes(FUNCTION, DOC)
    tried.clear()
    outcomes[1] = outcomes[0]
    with pytest.raises(SandboxError, match="1: the sandbox failed twice.*fork failed"):
        code.passes(FUNCTION, DOC)


@pytest.mark.skipif(sandbox.available() is not None, reason=f"no sandbox: {sandbox.available()}")
@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        (FUNCTION, True),
        ("def total(numbers):\n    return 0", False),
        ("raise SystemExit(0)", False),
        ("def total(numbers):\n    while True: pass", False),
        ("def total(numbers:", False),
    ],
    ids=["right", "wrong", "exits", "hangs", "broken"],
)
def test_in_the_sandbox(answer, passes, monkeypatch):
    check = sandbox.check
    monkeypatch.setattr(sandbox.execute, "check", lambda *a, **k: check(*a, limits=sandbox.Limits(timeout_s=1.0), **k))
    assert code.passes(answer, DOC) == passes
