"""Words and rolling hashes, checked against slow and obvious ones."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, strategies

from ultrafuser.data.tools import ngrams
from ultrafuser.data.tools.ngrams import WordCodes, signed_words, window_hashes, word_and_sign_tokens, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The QUICK, brown\n\tfox!", ["the", "quick", "brown", "fox"]),
        ("Don't; don’t — DONT", ["dont", "dont", "dont"]),
        ("1,000 or 1000, 12,345,678; [1,2,30]", ["1000", "or", "1000", "12345678", "1", "2", "30"]),
        ("f(x_1) = x**2", ["f", "x", "1", "x", "2"]),
        ("f( x_1 )=x ** 2", ["f", "x", "1", "x", "2"]),
        ("ﬁne Ｆｕｌｌ H₂O", ["fine", "full", "h2o"]),  # compatibility forms
        ("x² 10²³ 1½", ["x", "2", "10", "23", "1", "1", "2"]),  # but x² is not x2
        ("1.5 .5 1..5 1.2.3 v1.5, 3. And", ["1.5", ".5", "1", "5", "1.2.3", "v1.5", "3", "and"]),
        ("मैं खाता हूँ। क्‍या", ["मैं", "खाता", "हूँ", "क्या"]),
        ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
        ("বাংলা ভাষা", ["বাংলা", "ভাষা"]),
        ("שָׁלוֹם عُدْتُ", ["שָׁלוֹם", "عُدْتُ"]),
        ("cafe\u0301 e\u0301te\u0301", ["café", "été"]),
        ("q\u0307x", ["q\u0307x"]),  # without a composed form
        ("ป่า กา", ["ป่", "า", "ก", "า"]),
        ("می‌خواهم co\u00adop", ["میخواهم", "coop"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("数数 とabc", ["数", "数", "と", "abc"]),
        ("'quoted' rock'n'roll", ["quoted", "rocknroll"]),
        ("... !?", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is 5!", "What is 5?"), ("Expand n!.", "Expand n."), ("Find (n + 1)!", "Find (n + 1)"), ("a != b", "a = b"),
        ("Round 1.5", "Round 1,5"), ("Round 1.5", "Round 15"), ("Round .5", "Round 5"), ("x²", "x2"), ("10²", "102"),
        ("1½", "11/2"), ("5 + 3", "5 - 3"), ("5 × 3", "5 ÷ 3"), ("5 − 3", "5 3"), ("2^3", "2*3"), ("50%", "50"), ("-5", "5"),
        ("(2 + 3) * 4", "2 + 3 * 4"), ("[0, 1)", "[0, 1]"), ("f'(x)", "f(x)"), ("f''(x)", "f'(x)"), ("C++", "C"), ("C#", "C"),
        ("How does 😀 feel?", "How does 😡 feel?"), ("👍", "👎"), ("👍🏽", "👍🏿"), ("👨‍👩‍👧", "👨‍👧"), ("🇫🇷", "🇩🇪"), ("€5", "£5"),
        ("x ≤ 3", "x ≥ 3"), ("A ∪ B", "A ∩ B"), ("∀x", "∃x"), ("√2", "2"), ("20 °C", "20 C"), ("खाता", "खाती"), ("ป่า", "ป้า"), ("কি", "কী"),
        ("كَتَبَ", "كُتِبَ"), ("año", "ano"),
    ],
)  # fmt: skip
def test_signs_and_marks_that_carry_meaning(first, second):
    assert word_and_sign_tokens(first) != word_and_sign_tokens(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Hello!", "hello"), ("What?!", "What..."), ("5 − 3", "5-3"), ("x²", "x^2"), ("½", "1/2"), ("❤️", "❤"), ("don’t", "Don't"),
        ("**Note:** read *this* now", "Note: read this now"), ("- one\n- two", "* one\n* two"), ("## Title\ntext", "Title\ntext"),
        ("> quoted", "quoted"), ("`x` is $5", "x is 5"), ("a -- b", "a — b"), ("f( x )=2", "f(x) = 2"), ("in 1999. And", "in 1999, and"),
    ],
)  # fmt: skip
def test_differences_without_meaning(first, second):
    assert word_and_sign_tokens(first) == word_and_sign_tokens(second)


def test_a_sign_belongs_to_the_next_word():
    assert signed_words("5 + 3 = (8)!") == [("", "5"), ("+", "3"), ("=", "8")]
    assert signed_words("well-known and/or x-y -5 a|b") == [
        ("", "well"), ("", "known"), ("", "and"), ("", "or"), ("", "x"), ("-", "y"), ("-", "5"), ("", "a"), ("|", "b"),
    ]  # fmt: skip


@given(text=strategies.text(strategies.characters(max_codepoint=127)), other=strategies.sampled_from("é中ก"))
def test_the_patterns_agree_on_ascii(text, other):
    """The faster ones are only used for texts without the characters of the slower ones."""
    extended = [token for token in word_and_sign_tokens(f"{text}\n;{other}") if token not in ("é", "中", "ก")]
    assert extended == word_and_sign_tokens(f"{text}\n;")


@given(text=strategies.text())
def test_any_text_has_words(text):
    tokens = word_and_sign_tokens(text)
    assert [word for _, word in signed_words(text)] == words(text)
    assert [token for token in tokens if token in words(text)] == words(text)


def slow_hash(codes, size):
    return [
        sum(int(code) * pow(ngrams._BASE, j, 1 << 64) for j, code in enumerate(codes[i : i + size])) % (1 << 64)
        for i in range(len(codes) - size + 1)
    ]


@pytest.mark.parametrize("length", [0, 1, 5, 13, 14, 200])
@pytest.mark.parametrize("size", [1, 3, 13])
def test_the_rolling_hash_is_the_polynomial(length, size):
    codes = np.random.default_rng(length).integers(0, 1 << 63, length, np.uint64)
    assert window_hashes(codes, size).tolist() == slow_hash(codes.tolist(), size)


def test_the_hash_of_a_run_does_not_depend_on_its_position():
    generator = np.random.default_rng(0)
    run = generator.integers(0, 1 << 63, 13, np.uint64)
    long = generator.integers(0, 1 << 63, 20_000, np.uint64)
    for start in (0, 4090, 4096, 19_987):
        long[start : start + 13] = run
        assert window_hashes(long, 13)[start] == window_hashes(run, 13)[0]


def test_different_runs_have_different_hashes():
    rng = random.Random(0)
    text = [rng.choice("ab") for _ in range(5000)]
    hashes = window_hashes(WordCodes().array(text), 8)
    assert len(set(hashes.tolist())) == len({tuple(text[i : i + 8]) for i in range(len(hashes))})


def test_codes_are_the_same_in_every_process():
    code = (
        "from ultrafuser.data.tools.ngrams import WordCodes; import sys; sys.stdout.write(str(WordCodes()['fuse é']))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert WordCodes()["fuse é"] == int(process.stdout)
