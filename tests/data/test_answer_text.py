"""Reasoning, code blocks and refusals in answers."""

from __future__ import annotations

import time

import pytest

from ultrafuser.data.answer_text import CodeBlock, after_thinking, code_blocks, fenced_blocks, is_refusal, without_code

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
    assert [TEXT[block.start : block.end] for block in fenced_blocks(TEXT)] == [
        "```python\nx = 1\n```",
        "  ~~~\ny\n~~~",
        "```c++\ncut off",
    ]
    assert [block.closed for block in fenced_blocks(TEXT)] == [True, True, False]
    assert without_code(TEXT).split() == ["Before.", "Between.", "After."]
    assert without_code("Prose.\n```") == "Prose.\n\n"


CODE = "def f():\n    return 1\n"
DOCUMENTED = '''def f():
    """Return 1.

    ```python
    f()
    ```
    or
    ```
    print(f())
    ```
    """
    return 1
'''


def indented(text: str, prefix: str) -> str:
    return "".join(prefix + line if line.strip() else line for line in text.splitlines(keepends=True))


@pytest.mark.parametrize(
    "text",
    [
        f"1. First:\n\n   ```python\n{indented(CODE, '   ')}   ```\n2. Then.",
        f"- First:\n\n\t```python\n{indented(CODE, chr(9))}\t```\n",
        f"1. ```python\n{indented(CODE, '   ')}   ```\n2. Then.",
        f"- ```python\n{indented(CODE, '  ')}  ```\n",
        f"   ```python\n{CODE}   ```",  # an indented fence around code at the margin
        f"> ```python\n{indented(CODE, '> ')}> ```\n> quoted",
        f"````python\n{CODE}````",
        f"`````python\n{CODE}```````\n",
        f"~~~python\n{CODE}~~~",
        f"~~~~ python\n{CODE}~~~~",
        f"``` {{.python}}\n{CODE}```",
        f"```python title=f.py\n{CODE}```",
        f"Use ```f()``` so:\n```f()```\n```python\n{CODE}```",  # code within a line
    ],
)
def test_fences_of_all_kinds(text: str):
    assert list(code_blocks(text)) == [CodeBlock("python", CODE)]


@pytest.mark.parametrize(("outer", "inner"), [("````", "```"), ("~~~", "```"), ("```", "~~~"), ("~~~~~", "~~~~")])
def test_a_shorter_or_different_fence_is_part_of_the_block(outer: str, inner: str):
    body = f"Read this:\n{inner}\nx\n{inner}\n"
    assert list(code_blocks(f"{outer}markdown\n{body}{outer}\nAfter.")) == [CodeBlock("markdown", body)]


@pytest.mark.parametrize("language", ["python", "py", "Python", ""])
@pytest.mark.parametrize("prefix", ["", "   "])
@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("quotes", ['"""', "'''"])
def test_fences_in_a_docstring_do_not_end_the_block(language: str, prefix: str, margin: bool, quotes: str):
    code = DOCUMENTED.replace('"""', quotes)
    if margin:  # a docstring whose lines have no indentation
        code = code.replace("    ```", "```").replace("    f()\n", "f()\n").replace("    print", "print")
    block = indented(f"```{language}\n{code}```\n", prefix)
    text = f"Here:\n\n{block}\nand\n\n```\nsecond\n```\n"
    assert list(code_blocks(text)) == [CodeBlock(language, code), CodeBlock("", "second\n")]
    assert without_code(text).split() == ["Here:", "and"]
    assert list(code_blocks(f"```{language}\n{code}")) == [CodeBlock(language, code)]  # cut off after the code


@pytest.mark.parametrize("second", [CODE, DOCUMENTED])
def test_an_open_string_in_a_broken_block_does_not_swallow_the_next_block(second: str):
    text = f'```python\nx = """ (\n```\nand\n```python\n{second}```\nand\n```\n""" 1\n```'
    assert [block.body for block in code_blocks(text)] == ['x = """ (\n', second, '""" 1\n']


def test_blocks_without_lines():
    assert [block.body for block in code_blocks("```\n```\n```\n\n```")] == ["", "\n"]
    assert list(code_blocks("")) == []


def test_many_fences_are_read_in_linear_time():
    start = time.perf_counter()
    assert len(fenced_blocks('```python\n"""\n' * 20_000)) >= 1
    assert len(fenced_blocks("```\n" * 20_000)) == 10_000
    assert len(fenced_blocks("`" * 100_000)) == 1
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize(
    "text", ["I'm sorry, but no.", "Unfortunately, I cannot judge.", "As an AI, I ...", "I won’t."]
)
def test_refusals(text: str):
    assert is_refusal(text)


@pytest.mark.parametrize("text", ["Sorry states of affairs", "I can", "He said that I can't"])
def test_what_is_no_refusal(text: str):
    assert not is_refusal(text)
