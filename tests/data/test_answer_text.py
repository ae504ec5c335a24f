"""Reasoning, code blocks and refusals in answers."""

from __future__ import annotations

import pytest

from ultrafuser.data.answer_text import CLOSED_BLOCK, CodeBlock, after_thinking, code_blocks, is_refusal, without_code

TEXT = "Before.\n```python\nx = 1\n```\nBetween.\n  ~~~\ny\n~~~\nAfter.\n```c++\ncut off"


@pytest.mark.parametrize(
    ("answer", "rest"),
    [
        ("<think>4 or 5</think>6", "6"),
        ("the template opened it</think>6", "6"),
        ("6 <think>cut off", "6 "),
        ("<think>a</think>b<think>c</think>d", "d"),
        ("6", "6"),
    ],
)
def test_reasoning_is_left_out(answer: str, rest: str):
    assert after_thinking(answer) == rest


def test_code_blocks_with_their_languages():
    assert list(code_blocks(TEXT)) == [
        CodeBlock("python", "x = 1\n"),
        CodeBlock("", "y\n"),
        CodeBlock("c++", "cut off"),
    ]
    assert [match[2] for match in CLOSED_BLOCK.finditer(TEXT)] == ["x = 1\n"]
    assert without_code(TEXT).split() == ["Before.", "Between.", "After."]
    assert without_code("Prose.\n```") == "Prose.\n\n"


@pytest.mark.parametrize(
    "text", ["I'm sorry, but no.", "Unfortunately, I cannot judge.", "As an AI, I ...", "I won’t."]
)
def test_refusals(text: str):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["Sorry states of affairs", "I can", "He said that I can't"])
def test_what_is_no_refusal(text: str):
    assert not is_refusal(text)
