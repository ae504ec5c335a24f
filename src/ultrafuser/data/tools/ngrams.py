"""Split text into normalised words, and hash every run of n words by a rolling 64-bit hash over whole arrays."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
import regex  # unlike `re`, it has classes of characters and sets

# Han, kana, Thai, Lao, Burmese and Khmer are written without spaces: each character with its marks is a word.
_UNSPACED = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]"
_ANY_UNSPACED = regex.compile(_UNSPACED)
_LETTER = regex.compile(r"[\p{L}\p{N}]")


def _patterns(letter: str, mark: str, symbol: str, unspaced: str = "") -> tuple[Any, Any]:
    """The patterns of words, and of words and signs, with these characters."""
    # a letter or digit, or the point of .5, then letters, digits, marks and decimal points
    word = rf"(?:[{letter}]|(?<![{letter}.])\.\d)[{letter}{mark}]*+(?:(?<=\d)\.(?=\d)[{letter}{mark}]++)*+{unspaced}"
    number, letter_alone = rf"(?<![{letter}{mark}.])[\d.]+", rf"(?<![{letter}{mark}])[{letter}]"
    sign = (
        rf"[{symbol}]|[*/%#&′()\[\]]|(?<!-)-(?!-)"  # operators, currencies, emoji, brackets; a double hyphen is a dash
        rf"|!(?==)|(?<={number}|{letter_alone}|[)\]])!"  # !=, 5!, n!, (n + 1)!
        rf"|(?<={letter_alone}'{{0,3}})'(?='{{0,3}}\()"  # f'(x)
    )
    return regex.compile(word, regex.V1), regex.compile(f"{word}|{sign}", regex.V1)


# The first that fits is used: sets of all scripts are slow.
_ASCII = _patterns(r"a-z0-9", "", r"+<=>|^")
_SPACED = _patterns(r"\p{L}\p{N}", r"\p{M}", r"\p{S}--$`~´¨")
_MIXED = _patterns(
    rf"\p{{L}}\p{{N}}--{_UNSPACED}",
    rf"\p{{M}}--{_UNSPACED}",
    r"\p{S}--$`~´¨",
    rf"|[\p{{L}}\p{{N}}&&{_UNSPACED}]\p{{M}}*+",
)
_BRACKETS = frozenset("()[]")
_JOINERS = str.maketrans("", "", "-/|")  # between words they are punctuation: well-known, and/or

_SUPERSCRIPTS = regex.compile("[⁰¹²³⁴-⁹⁺⁻ⁿⁱ]+")
_FRACTIONS = regex.compile("[¼-¾⅐-⅞]")
_SAME_SIGNS = str.maketrans({"⁄": "/", "∕": "/", "−": "-", "∗": "*"})
# Joiners, soft hyphens and variation selectors. They change how a word is drawn, not the word.
_INVISIBLE = regex.compile("[\u00ad\u200c\u200d\u2060\ufeff\ufe00-\ufe0f\U000e0100-\U000e01ef]+")
# Removed: an apostrophe within a word (don't = dont) and a comma within a number (1,000 = 1000).
_INSIDE = regex.compile(r"['’](?<=\w.)(?=\w)|,(?<=\d.)(?=\d{3}(?!\d))")
# Signs of Markdown: bullets, headings and quotes, and emphasis.
_MARKUP = regex.compile(r"^[ \t]*+(?:(?:[-*+>•●▪■◦]|#{1,6})[ \t]++)+", regex.M)
_EMPHASIS = regex.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*+)(?<=\S)\1(?![\w*])")

# Odd, so that it has an inverse modulo 2^64. It is 5 modulo 8, so that its powers are slow to repeat.
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 1 << 64)


def words(text: str) -> list[str]:
    """The words of a text without regard to case, punctuation, white space and compatibility forms.

    Runs of letters, digits and their marks are words, with the decimal points between digits. All other characters, `_`
    included, separate words.
    """
    normalised = _normalised(text)
    return _patterns_of(normalised)[0].findall(normalised)


def word_and_sign_tokens(text: str) -> list[str]:
    """The words of a text and the signs that change its meaning: `5 + 3` is not `5 - 3`, and C is not `C++`."""
    normalised = _normalised(text)
    return _patterns_of(normalised)[1].findall(normalised)


def signed_words(text: str) -> list[tuple[str, str]]:
    """The words of a text, each with the signs before it: `5 + 3` is [("", "5"), ("+", "3")].

    Brackets are no signs here, and `-`, `/` and `|` only before numbers and single letters: a text that is formatted in
    another way is the same text.
    """
    pairs, signs = [], ""
    for token in word_and_sign_tokens(text):
        if len(token) > 1 or token.isalnum() or _LETTER.match(token):  # a sign is one character
            is_operand = len(token) == 1 or not token[0].isalpha()
            pairs.append((signs if is_operand else signs.translate(_JOINERS), token))
            signs = ""
        elif token not in _BRACKETS:
            signs += token
    return pairs


def _patterns_of(text: str) -> tuple[Any, Any]:
    if text.isascii():
        return _ASCII
    return _MIXED if _ANY_UNSPACED.search(text) else _SPACED


def _normalised(text: str) -> str:
    if not text.isascii():
        text = _SUPERSCRIPTS.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
        text = _FRACTIONS.sub(r" \g<0>", text)
        text = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).translate(_SAME_SIGNS)
    text = _MARKUP.sub("", text)
    if "*" in text:
        text = _EMPHASIS.sub(r"\2", text)
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
