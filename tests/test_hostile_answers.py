r"""Every reader of what models write is done with 100 kB of any text well within a second.

The inputs are openings that nothing closes, runs of blanks and marks, and both repeated: quadratic readers need minutes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ultrafuser.data import answer_text, layouts
from ultrafuser.data.tools import ngrams
from ultrafuser.endpoint.errors import read_failure
from ultrafuser.endpoint.messages import Reply
from ultrafuser.errors import hide_logins
from ultrafuser.evaluate.judged import judge
from ultrafuser.evaluate.tasks import choices, code, mathematics, read_answers
from ultrafuser.inspect.html import _CODE_LIKE
from ultrafuser.printing import printable
from ultrafuser.synth.recipe import FiltersRecipe
from ultrafuser.synth.text import checks, filters, parsing

SIZE = 100_000
FILTERS = FiltersRecipe(max_answer_chars=10**9, max_instruction_chars=10**9)


def or_unreadable(read: Callable[[str], Any]) -> Callable[[str], Any]:
    def reader(text: str) -> Any:
        try:
            return read(text)
        except parsing.Unreadable:
            return None

    return reader


READERS: dict[str, Callable[[str], Any]] = {
    "number": read_answers.number,
    "expression": read_answers.expression,
    "letter": lambda text: choices.stated_letter(text, 8),
    "label": choices.split_label,
    "equal": lambda text: mathematics.equal(text, "12"),
    "extract_code": lambda text: code.extract_code(text, "f"),
    "extract_body": lambda text: code.extract_code(f"    x = 1\n{text}", "f", "def f():\n"),
    "after_thinking": answer_text.after_thinking,
    "is_refusal": answer_text.is_refusal,
    "code_blocks": lambda text: list(answer_text.code_blocks(text)),
    "without_code": answer_text.without_code,
    "check_answer": lambda text: filters.check_answer(text, FILTERS),
    "check_instruction": lambda text: filters.check_instruction(text, FILTERS),
    "language": lambda text: filters.is_other_language(text, FILTERS),
    "repetition": filters.repetition,
    "read_list": or_unreadable(parsing.read_list),
    "as_name": or_unreadable(parsing.as_name),
    "as_named_concepts": or_unreadable(lambda text: parsing.as_named_concepts(text, 5)),
    "as_instruction": or_unreadable(parsing.as_instruction),
    "read_text": or_unreadable(parsing.read_text),
    "read_instruction": or_unreadable(parsing.read_instruction),
    "read_rating": or_unreadable(parsing.read_rating),
    "split_tests": parsing.split_tests,
    "check_code": checks.check_code,
    "check_arithmetic": checks.check_arithmetic,
    "verdict": lambda text: judge.read_verdict(Reply(text), ("A", "B")),
    "failure": lambda text: read_failure(500, text.encode()),
    "words": ngrams.words,
    "signs": ngrams.word_and_sign_tokens,
    "clean": layouts.clean,
    "code_like": _CODE_LIKE.search,
    "hide_logins": hide_logins,
    "printable": printable,
}
REPEATED = [
    "\\boxed{", "\\(", "\\[", "$$", "$", "answer is ", "answer:\n", "option ", "A) ", "\n", " \n", "\t\n", "_", "1 ", "1,",
    "1 and 1/1 ", "1+1=", "(", "[", "{}", '{"a":', "```python\n", "~~~\n", "**", "<think>", "\n=== ", "http://a:", "#### ",
    "def f():\n", "√", "'", "a",
]  # fmt: skip
HOSTILE = {text: text * (SIZE // len(text)) for text in REPEATED}
HOSTILE |= {f"1{text} and x": f"1{text * (SIZE // len(text))}x" for text in (" ", "\n", " .", "_", ",")}
HOSTILE |= {
    "try, cut off": "def f():\n  try:\n" + "    x = 1\n" * (SIZE // 10),
    "def, then prose": "def f():\n  return 1\n" + "Some words of prose.\n" * (SIZE // 21),
    "boxes, then a brace": "\\boxed{" * (SIZE // 14) + "}" * (SIZE // 14),
}


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Objects of other tests in this process are not collected in the reader's time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.usefixtures("frozen_heap")
def test_a_reader_is_done_in_a_moment(reader):
    slow = {}
    for name, text in HOSTILE.items():
        begin = time.process_time()
        READERS[reader](text)
        if (seconds := time.process_time() - begin) > 0.8:
            slow[name] = seconds
    assert slow == {}


def test_the_readers_still_read():
    text = "\\boxed{" * 1000 + "The answer is \\boxed{7}."
    assert read_answers.number(text) == "7"
    assert read_answers.expression("$$" * 1000 + " \\(x\\)") is not None
    assert parsing.read_list('{"name": "a"}\n' * 3000) == [{"name": "a"}] * 3000
    program = "def f(x):\n    return x"
    assert code.extract_code(f"{program}\n\nThis is a function.\nIt returns x.", "f") == program
    assert code.extract_code(f"{program}\n\ndef g(:\n" + "    y\n" * 500, "f") == program
    assert mathematics.equal("x" * 5000, "x" * 5000) and not mathematics.equal("x" * 5000, "x" * 5001)
