"""Texts that are streamed, joined, are the answer, and no piece of them is ever taken back."""

from __future__ import annotations

import random

import pytest

from embedded_fixtures import renderer_of
from ultrafuser.data.templates import Renderer
from ultrafuser.serve.detokenizer import Detokenizer

TEXTS = [
    "Plain words, then a number: 12345.\n\n    indented",
    "Emoji 👩‍👩‍👧‍👦 and 你好, नमस्ते café — naïve",
    "   leading blanks and trailing ones   ",
    "a" * 300,
    "",
]


def streamed(detokenizer, ids):
    pieces = []
    for token in ids:
        pieces.append(detokenizer.add(token))
        if detokenizer.is_stopped:
            break
    return [*pieces, detokenizer.finish()]


@pytest.fixture
def renderer(tokenizer):
    return renderer_of(tokenizer)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_answer(tokenizer, renderer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = streamed(Detokenizer(renderer), ids)
    assert "".join(pieces) == renderer.answer_text(ids)
    assert not any("\ufffd" in piece for piece in pieces)


def test_random_tokens_are_the_answer(tokenizer, renderer):
    """Also bytes that are no characters, and special tokens."""
    for seed in range(200):
        ids = random.Random(seed).choices(range(len(tokenizer)), k=seed % 90)
        assert "".join(streamed(Detokenizer(renderer), ids)) == renderer.answer_text(ids)


def test_a_character_comes_with_its_last_token(tokenizer, renderer):
    ids = tokenizer.encode("你", add_special_tokens=False)
    assert len(ids) == 3
    detokenizer = Detokenizer(renderer)
    assert [detokenizer.add(token) for token in ids] == ["", "", "你"]


def test_half_a_character_at_the_end_is_given_as_the_answer_has_it(tokenizer, renderer):
    ids = tokenizer.encode("a你", add_special_tokens=False)[:-1]
    assert "".join(streamed(Detokenizer(renderer), ids)) == renderer.answer_text(ids) == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", " two"], "one"),
        ("aab", ["ab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("stop", ["stop"], ""),
        ("a stoppage", ["stopped"], "a stoppage"),
        ("ends with the beginnin", ["beginning"], "ends with the beginnin"),
        ("x你y", ["你"], "x"),
        ("nothing", ["", "zzz"], "nothing"),
    ],
)
def test_stop_texts(tokenizer, renderer, text, stop, expected):
    detokenizer = Detokenizer(renderer, stop)
    assert "".join(streamed(detokenizer, tokenizer.encode(text, add_special_tokens=False))) == expected
    assert detokenizer.is_stopped == any(word and word in text for word in stop)


def test_what_may_become_a_stop_text_is_held_back(tokenizer, renderer):
    detokenizer = Detokenizer(renderer, ["<end>"])
    pieces = [detokenizer.add(token) for token in tokenizer.encode("a<enz", add_special_tokens=False)]
    assert pieces[-1].endswith("<enz") and all("<" not in piece for piece in pieces[:-1])


def test_blanks_of_the_template_are_no_text(tokenizer):
    """Templates with a blank before the answer and a line break behind it."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + ('\\n' if m.role == 'assistant' else '') + '<|im_end|>' }}{% endfor %}"
        "{{ 'assistant: ' if add_generation_prompt else '' }}"
    )
    renderer = Renderer(tokenizer, [template] * 2, vocab_size=len(tokenizer))
    ids = tokenizer.encode("one\ntwo\n", add_special_tokens=False)
    assert renderer.answer_blanks[1] == "\n"
    assert "".join(streamed(Detokenizer(renderer), ids)) == renderer.answer_text(ids) == "one\ntwo"
    assert "".join(streamed(Detokenizer(renderer, keep_blanks=True), ids)) == "one\ntwo\n"
