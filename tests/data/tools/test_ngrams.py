"""Words and rolling hashes, checked against slow and obvious ones."""

from __future__ import annotations

import os
import random
import subprocess
import sys

import numpy as np
import pytest

from ultrafuser.data.tools import ngrams
from ultrafuser.data.tools.ngrams import WordCodes, window_hashes, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The QUICK, brown\n\tfox!", ["the", "quick", "brown", "fox"]),
        ("Don't; don’t — DONT", ["dont", "dont", "dont"]),
        ("1,000 or 1000, 12,345,678; [1,2,30]", ["1000", "or", "1000", "12345678", "1", "2", "30"]),
        ("f(x_1) = x**2", ["f", "x", "1", "x", "2"]),
        ("f( x_1 )=x ** 2", ["f", "x", "1", "x", "2"]),
        ("ﬁne Ｆｕｌｌ x²", ["fine", "full", "x2"]),  # compatibility forms
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("数数 とabc", ["数", "数", "と", "abc"]),
        ("'quoted' rock'n'roll", ["quoted", "rocknroll"]),
        ("... !?", []),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


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
