"""Split text into normalised words, and hash every run of n words by a rolling 64-bit hash over whole arrays."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b

import numpy as np

# Han and kana are written without spaces: each character is a word.
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[-+*/^=<>%#&|√×÷−≤≥≠]")
# Removed: an apostrophe within a word (don't = dont) and a comma within a number (1,000 = 1000).
_INSIDE = re.compile(r"['’](?<=\w.)(?=\w)|,(?<=\d.)(?=\d{3}(?!\d))")

# Odd, so that it has an inverse modulo 2^64. It is 5 modulo 8, so that its powers are slow to repeat.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def words(text: str) -> list[str]:
    """The words of a text without regard to case, punctuation, white space and compatibility forms.

    Runs of letters and digits are words. All other characters, `_` included, separate words.
    """
    return _WORD.findall(_normalised(text))


def word_and_sign_tokens(text: str) -> list[str]:
    """The words of a text and the signs that change its meaning: `5 + 3` is not `5 - 3`, and C is not `C++`."""
    return _WORD_OR_SIGN.findall(_normalised(text))


def _normalised(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _INSIDE.sub("", text.casefold())


class WordCodes(dict[str, int]):
    """A 64-bit code for every word. It is computed once, and is the same in every process."""

    def __missing__(self, word: str) -> int:
        code = self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return code

    def array(self, words: list[str]) -> np.ndarray:
        """The codes of a list of words, (T,) uint64."""
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def window_hashes(codes: np.ndarray, size: int) -> np.ndarray:
    """A hash of every run of `size` codes: (T,) -> (T - size + 1,), or (0,) for a shorter text.

    The polynomial hash of a rolling window, H_i = sum_j c_(i+j) B^j modulo 2^64, as differences of one cumulative sum.
    So the cost does not depend on `size`.
    """
    if len(codes) < size:
        return np.empty(0, np.uint64)
    power, inverse = _powers(max(1 << 12, 1 << len(codes).bit_length()))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * power[: len(codes)], dtype=np.uint64)])
    return (sums[size:] - sums[:-size]) * inverse[: len(codes) - size + 1]


@lru_cache(maxsize=4)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """1, B, B^2, ... and 1, 1/B, 1/B^2, ... modulo 2^64."""

    def powers_of(base: int) -> np.ndarray:
        factors = np.full(length, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return powers_of(_BASE), powers_of(_INVERSE)
