"""Operations on lists, texts and numbers: their code, their wordings, and functions that compute the same."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

_FEW = (2, 3, 4)
_SMALL = (2, 3, 4, 5)
_LIMITS = (3, 4, 5, 6, 7, 8)
_LETTERS = ("a", "e", "o", "r", "s", "t")


@dataclass(frozen=True)
class Operation:
    """One step of a program.

    Attributes:
        name: its kind and name, such as `filter:even`.
        code: an expression, or another piece of code, of the variable `{v}` and the parameter `{k}`.
        phrases: wordings of the step.
        apply: the value that the code gives, from the value of the variable and the parameter.
        parameters: values of the parameter. None: it has no parameter.
    """

    name: str
    code: str
    phrases: tuple[str, ...]
    apply: Callable[[Any, Any], Any]
    parameters: Sequence[Any] = (None,)


class Step(NamedTuple):
    """An operation with its parameter."""

    operation: Operation
    parameter: Any


def _make(
    name: str, code: str, phrases: str, apply: Callable[[Any, Any], Any], parameters: Sequence[Any] = (None,)
) -> Operation:
    return Operation(name, code, tuple(phrases.split(" | ")), apply, parameters)


# ---------------------------------------------------------------- conditions on an integer, and changes of it
# Each has a clause for loops ("that are even") as its only wording.
CONDITIONS = (
    _make("even", "{v} % 2 == 0", "even", lambda n, _: n % 2 == 0),
    _make("odd", "{v} % 2 != 0", "odd", lambda n, _: n % 2 != 0),
    _make("greater", "{v} > {k}", "greater than {k}", operator.gt, _LIMITS),
    _make("less", "{v} < {k}", "less than {k}", operator.lt, _LIMITS),
    _make("least", "{v} >= {k}", "at least {k}", operator.ge, _LIMITS),
    _make("most", "{v} <= {k}", "at most {k}", operator.le, _LIMITS),
    _make("multiple", "{v} % {k} == 0", "multiples of {k}", lambda n, k: n % k == 0, (3, 4, 5)),
    _make("indivisible", "{v} % {k} != 0", "not multiples of {k}", lambda n, k: n % k != 0, (3, 4, 5)),
    _make("different", "{v} != {k}", "not equal to {k}", operator.ne, _LIMITS),
)
_CHANGES = (
    _make("add", "{v} + {k}", "add {k} to each number | increase each number by {k}", operator.add, _SMALL),
    _make("subtract", "{v} - {k}", "subtract {k} from each number | decrease each number by {k}", operator.sub, _SMALL),
    _make("multiply", "{v} * {k}", "multiply each number by {k}", operator.mul, _SMALL),
    _make("square", "{v} * {v}", "square each number | multiply each number by itself", lambda n, _: n * n),
    _make("negate", "-{v}", "negate each number | flip the sign of each number", lambda n, _: -n),
    _make("absolute", "abs({v})", "take the absolute value of each number", lambda n, _: abs(n)),
    _make("remainder", "{v} % {k}", "replace each number by its remainder modulo {k}", operator.mod, (3, 4, 5)),
    _make("quotient", "{v} // {k}", "divide each number by {k}, rounding down", operator.floordiv, _FEW),
    _make("cap", "min({v}, {k})", "replace each number above {k} by {k}", min, _LIMITS),
)


# ---------------------------------------------------------------- lists of integers
def _filter(condition: Operation) -> Operation:
    (clause,) = condition.phrases
    return Operation(
        f"filter:{condition.name}",
        f"[n for n in {{v}} if {condition.code.replace('{v}', 'n')}]",
        (f"keep only the numbers that are {clause}", f"select the numbers that are {clause}"),
        lambda numbers, k: [n for n in numbers if condition.apply(n, k)],
        condition.parameters,
    )


def _map(change: Operation) -> Operation:
    return Operation(
        f"map:{change.name}",
        f"[{change.code.replace('{v}', 'n')} for n in {{v}}]",
        change.phrases,
        lambda numbers, k: [change.apply(n, k) for n in numbers],
        change.parameters,
    )


FILTERS = tuple(map(_filter, CONDITIONS))
MAPS = tuple(map(_map, _CHANGES))
ORDERS = (
    _make(
        "order:ascending",
        "sorted({v})",
        "sort the numbers in ascending order | sort from smallest to largest",
        lambda v, _: sorted(v),
    ),
    _make(
        "order:descending",
        "sorted({v}, reverse=True)",
        "sort the numbers in descending order | sort from largest to smallest",
        lambda v, _: sorted(v, reverse=True),
    ),
    _make("order:reverse", "{v}[::-1]", "reverse the order | put the numbers in reverse order", lambda v, _: v[::-1]),
    _make("slice:first", "{v}[:{k}]", "keep only the first {k} numbers | take the first {k}", lambda v, k: v[:k], _FEW),
    _make("slice:last", "{v}[-{k}:]", "keep only the last {k} numbers | take the last {k}", lambda v, k: v[-k:], _FEW),
    _make("slice:after", "{v}[{k}:]", "drop the first {k} numbers | remove the first {k}", lambda v, k: v[k:], _FEW),
    _make("slice:before", "{v}[:-{k}]", "drop the last {k} numbers | remove the last {k}", lambda v, k: v[:-k], _FEW),
    _make(
        "slice:second",
        "{v}[::2]",
        "keep every second number, starting with the first | take every other number from the first on",
        lambda v, _: v[::2],
    ),
    _make(
        "order:distinct",
        "list(dict.fromkeys({v}))",
        "remove duplicates, keeping the first of each | drop repeated numbers, keeping first occurrences",
        lambda v, _: list(dict.fromkeys(v)),
    ),
)
REDUCTIONS = (
    _make("reduce:sum", "sum({v})", "return the sum | return the total of the numbers", lambda v, _: sum(v)),
    _make("reduce:count", "len({v})", "return how many numbers there are | return the count", lambda v, _: len(v)),
    _make(
        "reduce:largest",
        "max({v}, default=0)",
        "return the largest number, or 0 if there is none | return the maximum (0 for an empty list)",
        lambda v, _: max(v, default=0),
    ),
    _make(
        "reduce:smallest",
        "min({v}, default=0)",
        "return the smallest number, or 0 if there is none | return the minimum (0 for an empty list)",
        lambda v, _: min(v, default=0),
    ),
    _make(
        "reduce:kinds", "len(set({v}))", "return the number of distinct values | count distinct values and return that",
        lambda v, _: len(set(v)),
    ),
    _make(
        "reduce:start", "{v}[0] if {v} else {k}", "return the first number, or {k} if there is none",
        lambda v, k: v[0] if v else k, (0, -1),
    ),
    _make(
        "reduce:end", "{v}[-1] if {v} else {k}", "return the last number, or {k} if there is none",
        lambda v, k: v[-1] if v else k, (0, -1),
    ),
)  # fmt: skip

# ---------------------------------------------------------------- texts
TEXTS = (
    _make("text:upper", "{v}.upper()", "convert it to upper case | make all letters upper case", lambda v, _: v.upper()),
    _make("text:lower", "{v}.lower()", "convert it to lower case | make all letters lower case", lambda v, _: v.lower()),
    _make("text:swap", "{v}.swapcase()", "swap upper and lower case | swap the case of each letter",
          lambda v, _: v.swapcase()),
    _make("text:strip", "{v}.strip()", "strip the spaces from both ends | remove leading and trailing spaces",
          lambda v, _: v.strip()),
    _make("text:reverse", "{v}[::-1]", "reverse the characters | put the characters in reverse order",
          lambda v, _: v[::-1]),
    _make("text:replace", "{v}.replace({k}, '*')", "replace every {k} by '*' | put '*' in place of each {k}",
          lambda v, k: v.replace(k, "*"), _LETTERS),
    _make("text:remove", "{v}.replace({k}, '')", "remove every {k} | delete each {k}",
          lambda v, k: v.replace(k, ""), _LETTERS),
    _make("text:first", "{v}[:{k}]", "keep only the first {k} characters | take the first {k} characters",
          lambda v, k: v[:k], (5, 6, 7, 8)),
    _make("text:after", "{v}[{k}:]", "drop the first {k} characters | remove the first {k} characters",
          lambda v, k: v[k:], _FEW),
    _make("text:last", "{v}[-{k}:]", "keep only the last {k} characters | take the last {k} characters",
          lambda v, k: v[-k:], (5, 6, 7, 8)),
    _make("text:append", "{v} + {k}", "append {k} at the end | add {k} at the end", operator.add, ("!", "?", "x", "ed")),
    _make("text:repeat", "{v} * {k}", "repeat it {k} times", operator.mul, (2, 3)),
)  # fmt: skip
TEXT_RESULTS = (
    _make("text:count", "{v}.count({k})", "return how often {k} occurs | return the number of {k} in it",
          lambda v, k: v.count(k), _LETTERS),
    _make("text:length", "len({v})", "return its length | return the number of characters", lambda v, _: len(v)),
    _make("text:find", "{v}.find({k})", "return the index of the first {k}, or -1 if there is none",
          lambda v, k: v.find(k), _LETTERS),
    _make("text:contains", "{k} in {v}", "return whether it contains {k}", lambda v, k: k in v, _LETTERS),
)  # fmt: skip
SPLIT = _make("split", "{v}.split()", "split it into words | split it at whitespace", lambda v, _: v.split())
WORDS = (
    _make("words:reverse", "{v}[::-1]", "reverse the order of the words", lambda v, _: v[::-1]),
    _make("words:sort", "sorted({v})", "sort the words in Python's default order", lambda v, _: sorted(v)),
    _make("words:lengths", "sorted({v}, key=len)", "sort the words by length, short to long, without reordering words of equal length",
          lambda v, _: sorted(v, key=len)),
    _make("words:longer", "[w for w in {v} if len(w) > {k}]", "keep only the words longer than {k} characters",
          lambda v, k: [w for w in v if len(w) > k], _FEW),
    _make("words:shorter", "[w for w in {v} if len(w) < {k}]", "keep only the words shorter than {k} characters",
          lambda v, k: [w for w in v if len(w) < k], (4, 5, 6)),
    _make("words:with", "[w for w in {v} if {k} in w]", "keep only the words that contain {k}",
          lambda v, k: [w for w in v if k in w], _LETTERS),
    _make("words:without", "[w for w in {v} if {k} not in w]", "keep only the words that do not contain {k}",
          lambda v, k: [w for w in v if k not in w], _LETTERS),
    _make("words:upper", "[w.upper() for w in {v}]", "convert each word to upper case",
          lambda v, _: [w.upper() for w in v]),
    _make("words:mirror", "[w[::-1] for w in {v}]", "reverse each word | reverse the letters of each word",
          lambda v, _: [w[::-1] for w in v]),
    _make("words:initials", "[w[0] for w in {v}]", "take the first letter of each word",
          lambda v, _: [w[0] for w in v]),
    _make("words:first", "{v}[:{k}]", "keep only the first {k} words | take the first {k} words",
          lambda v, k: v[:k], (2, 3)),
    _make("words:after", "{v}[{k}:]", "drop the first {k} words | remove the first {k} words",
          lambda v, k: v[k:], (2, 3)),
)  # fmt: skip
WORD_RESULTS = (
    _make("words:join", "{k}.join({v})", "return the words joined with {k}", lambda v, k: k.join(v), ("-", "+", "/", ", ")),
    _make("words:count", "len({v})", "return the number of words", lambda v, _: len(v)),
    _make("words:longest", "max({v}, key=len, default='')",
          "return the first longest word, or '' if there is none", lambda v, _: max(v, key=len, default="")),
    _make("words:letters", "sum(len(w) for w in {v})", "return the total length of the words",
          lambda v, _: sum(map(len, v))),
)  # fmt: skip

# ---------------------------------------------------------------- loops: the value before, the numbers, the total, the end
# `apply` of a beginning gives the changed argument, or a Final that is returned at once.


class Final(NamedTuple):
    """A result that a function returns before its loop."""

    value: Any


ALWAYS = _make("all", "", "", lambda _n, _k: True)
BEGINNINGS = (
    _make("begin:none", "", "", lambda n, _: n),
    _make("begin:negative", "if {v} < 0:\n    return {k}", "return {k} at once if {v} is negative",
          lambda n, k: Final(k) if n < 0 else n, (-1, -2, 100)),
    _make("begin:large", "if {v} > {k}:\n    return {k}", "return {k} at once if {v} is greater than {k}",
          lambda n, k: Final(k) if n > k else n, (9, 10, 12)),
    _make("begin:absolute", "{v} = abs({v})", "replace {v} by its absolute value", lambda n, _: abs(n)),
    _make("begin:add", "{v} += {k}", "add {k} to {v} | increase {v} by {k}", operator.add, _SMALL),
    _make("begin:double", "{v} *= 2", "double {v} | multiply {v} by 2", lambda n, _: n * 2),
)  # fmt: skip
RANGES = (
    _make(
        "range:1",
        "range(1, {v} + 1)",
        "take the integers from 1 to {v} | go through the integers from 1 to {v}",
        lambda n, _: range(1, n + 1),
    ),
    _make(
        "range:0",
        "range({v})",
        "take the integers from 0 to {v} - 1 | go through the integers from 0 to {v} - 1",
        lambda n, _: range(n),
    ),
    _make(
        "range:k",
        "range({k}, {v} + 1)",
        "take the integers from {k} to {v} | go through the integers from {k} to {v}",
        lambda n, k: range(k, n + 1),
        _SMALL,
    ),
    _make(
        "range:before",
        "range(1, {v})",
        "take the integers from 1 to {v} - 1 | go through the integers from 1 to {v} - 1",
        lambda n, _: range(1, n),
    ),
)
DIGITS = (
    _make("digits", "map(int, str(abs({v})))", "take the digits of {v}, ignoring its sign",
          lambda n, _: list(map(int, str(abs(n))))),
)  # fmt: skip
ITEMS = (
    _make("items:all", "{v}", "", lambda v, _: v),
    _make(
        "items:after",
        "{v}[{k}:]",
        "leave out the first {k} numbers | skip the first {k} numbers",
        lambda v, k: v[k:],
        (2, 3),
    ),
    _make(
        "items:before",
        "{v}[:-{k}]",
        "leave out the last {k} numbers | ignore the last {k} numbers",
        lambda v, k: v[:-k],
        (2, 3),
    ),
    _make(
        "items:first",
        "{v}[:{k}]",
        "take only the first {k} numbers | use only the first {k} numbers",
        lambda v, k: v[:k],
        (3, 4),
    ),
    _make("items:second", "{v}[::2]", "take every second number, starting with the first", lambda v, _: v[::2]),
)


def _accumulation(initial: int | None, update: Callable[[int, int, Any], int]) -> Callable[[Any, Any], Any]:
    """The total of a loop that updates it with each number. Without an initial value, it starts from the parameter."""

    def total(numbers: Any, k: Any) -> int:
        result: int = k if initial is None else initial
        for n in numbers:
            result = update(result, n, k)
        return result

    return total


# Code: the initial value, then the update.
TOTALS = (
    _make("total:sum", "0\ntotal += {v}", "add up", _accumulation(0, lambda t, n, _: t + n)),
    _make("total:count", "0\ntotal += 1", "count", _accumulation(0, lambda t, n, _: t + 1)),
    _make("total:product", "1\ntotal *= {v}", "multiply together (starting from 1)",
          _accumulation(1, lambda t, n, _: t * n)),
    _make("total:squares", "0\ntotal += {v} * {v}", "add up the squares of", _accumulation(0, lambda t, n, _: t + n * n)),
    _make("total:scaled", "0\ntotal += {k} * {v}", "add up {k} times each of",
          _accumulation(0, lambda t, n, k: t + k * n), _SMALL),
    _make("total:shifted", "0\ntotal += {v} + {k}", "add up, with {k} added to each,",
          _accumulation(0, lambda t, n, k: t + n + k), _SMALL),
    _make("total:rest", "{k}\ntotal -= {v}", "start from {k} and subtract", _accumulation(None, lambda t, n, _: t - n), (20, 50, 100)),
)  # fmt: skip
WRONG_TOTALS = (  # bugs only
    _make("total:difference", "0\ntotal -= {v}", "", _accumulation(0, lambda t, n, _: t - n)),
    _make("total:from-one", "1\ntotal += {v}", "", _accumulation(1, lambda t, n, _: t + n)),
    _make("total:from-zero", "0\ntotal *= {v}", "", _accumulation(0, lambda t, n, _: t * n)),
    _make("total:last", "0\ntotal = {v}", "", _accumulation(0, lambda t, n, _: n)),
)
ENDS = (
    _make("end:none", "{v}", "return the result", lambda t, _: t),
    _make("end:remainder", "{v} % {k}", "return the remainder of the result modulo {k}", operator.mod, (5, 7, 10)),
    _make("end:most", "min({v}, {k})", "return the result, but at most {k}", min, (12, 15, 20)),
    _make("end:least", "max({v}, {k})", "return the result, but at least {k}", max, (5, 6, 8)),
    _make("end:add", "{v} + {k}", "return the result plus {k}", operator.add, _SMALL),
    _make("end:subtract", "{v} - {k}", "return the result minus {k}", operator.sub, _SMALL),
    _make("end:whether", "{v} > {k}", "return whether the result is greater than {k}", operator.gt, (9, 12, 15)),
)
