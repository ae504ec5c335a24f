"""Text as normalised words, and rolling 64-bit hashes of every run of words, a whole array at a time."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from hashlib import blake2b

import numpy as np

# Han and kana are written without spaces: each character counts as a word.
_HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_HAN}]|[^\W_{_HAN}]+")
_WORD_OR_SIGN = re.compile(rf"{_WORD.pattern}|[-+*/^=<>%#&|√×÷−≤≥≠]")
# An apostrophe within a word and a comma within a number separate nothing: don't = dont, 1,000 = 1000.
_INSIDE = re.compile(r"['’](?<=\w.)(?=\w)|,(?<=\d.)(?=\d{3}(?!\d))")

_BASE = (
    0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64; 5 modulo 8, so that its powers are slow to repeat
)
_INVERSE = pow(_BASE, -1, 1 << 64)


def words(text: str) -> list[str]:
    """The words of a text without regard to case, punctuation, white space and compatibility forms.

    Runs of letters and digits are words; all other characters, `_` included, only separate them.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD.findall(_INSIDE.sub("", text.casefold()))


def word_and_sign_tokens(text: str) -> list[str]:
    """The words of a text, and between them the signs that change what it asks: `5 + 3` is not `5 - 3`, nor C `C++`."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _WORD_OR_SIGN.findall(_INSIDE.sub("", text.casefold()))


class WordCodes(dict[str, int]):
    """A 64-bit code for every word: the same in every process, computed once."""

    def __missing__(self, word: str) -> int:
        code = self[word] = int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little")
        return code

    def array(self, text: list[str]) -> np.ndarray:
        """The codes of some words, (T,) uint64."""
        return np.fromiter(map(self.__getitem__, text), np.uint64, len(text))


def window_hashes(codes: np.ndarray, size: int) -> np.ndarray:
    """A hash of every run of `size` codes: (T,) -> (T - size + 1,), or (0,) where T is less.

    The polynomial hash of a rolling window, H_i = sum_j c_(i+j) B^j modulo 2^64, as differences of one cumulative sum:
    the cost does not depend on `size`.
    """
    if len(codes) < size:
        return np.empty(0, np.uint64)
    power, inverse = _powers(max(1 << 12, 1 << len(codes).bit_length()))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(codes * power[: len(codes)], dtype=np.uint64)])
    return (sums[size:] - sums[:-size]) * inverse[: len(codes) - size + 1]


@lru_cache(maxsize=4)
def _powers(length: int) -> tuple[np.ndarray, np.ndarray]:
    """1, B, B^2, ... and 1, 1/B, 1/B^2, ... modulo 2^64."""

    def row(base: int) -> np.ndarray:
        factors = np.full(length, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return row(_BASE), row(_INVERSE)
