"""Whether two mathematical answers are the same, by math-verify in a separate process that can be stopped."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ultrafuser.errors import MissingExtraError, UltraFuserError
from ultrafuser.evaluate.tasks import read_answers as answers
from ultrafuser.evaluate.tasks.number_spellings import (
    are_different_units,
    join_digits,
    join_indian_digits,
    latex_powers,
    split_unit,
    without_currency,
)

TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
MAX_RESULT_CHARS = 2000  # longer results are the same only if their texts are
MAX_NUMBER_CHARS = 100  # a longer number is left to math-verify
COMMAND = ["-m", "ultrafuser.evaluate.tasks.math_worker"]  # of this Python
_THOUSANDS = re.compile(r"(?<![\w.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
# Spellings that math-verify cannot read, and the same in those that it can.
_SPELLINGS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:mbox|textbf|textit|mathbf|mathrm)(?=\{)", r"\\text"),
        (r"^\\text\{([^{}]*)\}$", r"\1"),
        (r"°", r"^\\circ"),
        (r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}"),
        (r"½", r"\\frac{1}{2}"),
        (r"¼", r"\\frac{1}{4}"),
        (r"¾", r"\\frac{3}{4}"),
        (r"\\emptyset|∅", r"\\varnothing"),
        (r"^[A-Za-z]\s*(?:\\in\b|∈)\s*", ""),
        (r"(?<![\d/])(\d+)\s+(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"×", r"\\times "),
        (r"^(.*\d)\s+((?!degrees|percent)[A-Za-z]{3,}(?:\s+[A-Za-z]{3,})*)$", r"\1\\text{ \2}"),
        (r"(?:\\[,!;: ]|[\s.])+$", ""),
    )
]
_PLAIN = re.compile(r"[-+]?(?:\d{1,40}(?:\.\d{0,40})?|\.\d{1,40})(?:[eE][-+]?\d{1,3})?")
_SCIENTIFIC = re.compile(r"(.*?)\s*\\(?:times|cdot)\s*10\^\{([-+]?\d{1,3})\}")
_WORDS = re.compile(r"[A-Za-z][A-Za-z ,.'-]{2,}")
_BASE = re.compile(r"(.*\w)_\{?(\d+)\}?")


def score_number(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the final number of the answer equals the reference."""
    return _score(answers.number(results[0]), doc["answer"])


def score_expression(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """1 if the final result of the answer equals the reference."""
    return _score(answers.expression(results[0]), doc["answer"])


def _score(result: str | None, reference: str) -> dict[str, float]:
    same = result is not None and equal(result, reference)
    return {"exact_match": float(same), "unparsed": float(result is None)}


@functools.lru_cache(maxsize=100_000)
def equal(answer: str, reference: str) -> bool:
    """Whether two answers (LaTeX or plain, as they stand in a box) have the same value.

    A percent sign is optional (12.5% is 12.5, and 0.125 too), and so are units, degrees, and the base of a number in the
    answer. Decimals are compared to six places. A comparison that takes more than `TIMEOUT_S` seconds counts as
    different.

    Raises:
        MissingExtraError: math-verify is not installed.
        UltraFuserError: it is installed, and does not start.
    """
    if max(len(answer), len(reference)) > MAX_RESULT_CHARS:
        return answer.strip() == reference.strip() != ""
    answer, reference = normalise(answer), normalise(reference)
    # 1. The same text, or the same words.
    if not answer or answer == reference:
        return answer != ""
    if _WORDS.fullmatch(answer) and answer.casefold() == reference.casefold():
        return True
    # 2. A base is optional in the answer, but must not be another one.
    (answer, base), (reference, reference_base) = _split_base(answer), _split_base(reference)
    if base and base != reference_base:
        return False
    # 3. Plain numbers. A unit is optional in both, but must not be another one.
    (value, unit), (reference_value, reference_unit) = _split_quantity(answer), _split_quantity(reference)
    numbers = _parse_number(value), _parse_number(reference_value)
    if are_different_units(unit, reference_unit):
        if None not in numbers:
            return False
        value, reference_value = answer, reference
    elif None not in numbers and numbers[0] == numbers[1]:
        return True
    # 4. Everything else, with and without percent signs and units.
    pairs = dict.fromkeys([(answer, reference), (_no_percent(value), _no_percent(reference_value))])
    return any(_CHECKER.ask(*pair) for pair in pairs)


def normalise(text: str) -> str:
    """An answer in the spelling that math-verify reads."""
    text = latex_powers(join_digits(text.strip()))
    if not re.search(r"[(\[]|\\\{", text):  # in (100,200) the comma separates two numbers
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    for pattern, replacement in _SPELLINGS:
        text = pattern.sub(replacement, text)
    return text.strip()


def _split_quantity(text: str) -> tuple[str, str]:
    """The number and the unit of an answer, also with commas as in India where they do not separate a pair."""
    value, unit = split_unit(text)
    return value if re.search(r"[(\[]|\\\{", value) else join_indian_digits(value), unit


def _split_base(text: str) -> tuple[str, str | None]:
    match = _BASE.fullmatch(text)
    return (match[1], match[2]) if match and match[1].isalnum() and match[1][0].isdigit() else (text, None)


def _no_percent(text: str) -> str:
    return re.sub(r"\s*(?:\\?%|percent)\s*$", "", text)


def _parse_number(text: str) -> Fraction | None:
    if len(text) > MAX_NUMBER_CHARS:
        return None
    bare = _SCIENTIFIC.sub(r"\1e\2", _no_percent(without_currency(text)).strip())
    return Fraction(bare) if _PLAIN.fullmatch(bare) else None


class _Checker:
    """One process with math-verify. It starts at the first comparison, and again after one that it did not survive.

    math-verify's own time limits are signals, which work in the main thread only and cannot interrupt one long operation
    on large numbers. A process can be killed from any thread at any time.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, answer: str, reference: str) -> bool:
        with self._lock:
            if self._process is not None and self._process.poll() is not None:  # it died since the last comparison
                self._stop()
            process, reply = self._process or self._start(), ""
            with contextlib.suppress(BrokenPipeError):
                assert process.stdin is not None
                process.stdin.write(json.dumps([answer, reference]) + "\n")
                process.stdin.flush()
                reply = _read_line(process, TIMEOUT_S)
            if not reply:
                self._stop()
            return reply != "" and json.loads(reply)

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _start(self) -> subprocess.Popen[str]:
        errors = tempfile.TemporaryFile(mode="w+")
        command = [sys.executable, *COMMAND]
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        if not _read_line(process, START_TIMEOUT_S):
            self._stop()
            errors.seek(0)
            message = (errors.read().strip().splitlines() or ["nothing"])[-1]
            if "No module named 'math_verify'" in message:
                raise MissingExtraError("math-verify", "eval", "comparing mathematical answers")
            raise UltraFuserError(f"math-verify did not start. {' '.join(command)} said: {message}")
        return process

    def _stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(BrokenPipeError), self._process:  # closes its pipes and waits for its end
                self._process.kill()
        self._process = None


def _read_line(process: subprocess.Popen[str], timeout_s: float) -> str:
    """The next line of a process. Empty if it ended, or had to be killed because the time was over."""
    assert process.stdout is not None
    timer = threading.Timer(timeout_s, process.kill)
    timer.start()
    try:
        return process.stdout.readline()
    finally:
        timer.cancel()


_CHECKER = _Checker()
atexit.register(_CHECKER.close)
