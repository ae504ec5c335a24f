"""Questions of what a short program prints. The printed text is computed without running the program, the trace by it."""

from __future__ import annotations

import json
import operator
import re
import sys
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

from ultrafuser.zoo.exams.code_operations import ALWAYS, CONDITIONS
from ultrafuser.zoo.exams.question import Question, Split, split_of


class _Snippet(NamedTuple):
    """A program.

    Attributes:
        structure: its shape, without names and numbers.
        printed: what it prints, with spaces for line breaks.
    """

    structure: str
    code: str
    printed: str


class _Part(NamedTuple):
    """A piece of code of the parameter `{k}`, and a function that computes the same from a value and the parameter."""

    name: str
    code: str
    apply: Callable[[Any, Any], Any]


_MAX_PRINTED = 9  # digits, words and spaces, so that the answer has at most 12 tokens
_SLICES = (
    _Part("all", "", lambda v, _: v),
    _Part("from", "[1:]", lambda v, _: v[1:]),
    _Part("to", "[:-1]", lambda v, _: v[:-1]),
    _Part("start", "[:2]", lambda v, _: v[:2]),
    _Part("end", "[-2:]", lambda v, _: v[-2:]),
    _Part("back", "[::-1]", lambda v, _: v[::-1]),
)
# Printed in the loop, for each number.
_VALUES = (
    _Part("same", "n", lambda n, _: n),
    _Part("add", "n + {k}", operator.add),
    _Part("times", "n * {k}", operator.mul),
    _Part("from", "10 - n", lambda n, _: 10 - n),
    _Part("twice", "n + n", lambda n, _: n + n),
    _Part("greater", "n > {k}", operator.gt),
)
_TEXT_CHANGES = (
    _Part("from", "{v}[{k}:]", lambda v, k: v[k:]),
    _Part("to", "{v}[:-{k}]", lambda v, k: v[:-k]),
    _Part("start", "{v}[:{k}]", lambda v, k: v[:k]),
    _Part("end", "{v}[-{k}:]", lambda v, k: v[-k:]),
    _Part("back", "{v}[::-1]", lambda v, _: v[::-1]),
    _Part("upper", "{v}.upper()", lambda v, _: v.upper()),
    _Part("append", '{v} + "x"', lambda v, _: v + "x"),
    _Part("prepend", '"z" + {v}', lambda v, _: "z" + v),
)
_TEXT_ENDS = (*_TEXT_CHANGES, _Part("length", "len({v})", lambda v, _: len(v)))
_KEYS = ("pen", "cup", "hat", "bag", "key", "map", "box", "fan")
_ASSIGNMENTS = (
    _Part("set", "= {k}", lambda _, k: k),
    _Part("add", "+= {k}", operator.add),
    _Part("subtract", "-= {k}", operator.sub),
    _Part("double", "*= 2", lambda v, _: v * 2),
)
_ENDS = (
    _Part("value", "{v}", lambda v, _: v),
    _Part("add", "{v} + {k}", operator.add),
    _Part("size", '"big" if {v} > {k} else "small"', lambda v, k: "big" if v > k else "small"),
    _Part("parity", '"even" if {v} % 2 == 0 else "odd"', lambda v, _: "odd" if v % 2 else "even"),
    _Part("pair", "{v}, {k}", lambda v, k: f"{v} {k}"),
    _Part("equal", "{v} == {k}", operator.eq),
)


_PRINT = (
    "What does this Python program print?\n\n{code}\n\n{{form}}",
    "{code}\n\nSay what this program prints. {{form}}",
    "Read this Python code.\n\n{code}\n\nWhat is its output? {{form}}",
    "Trace the program and give its output.\n\n{code}\n\n{{form}}",
    "{{form}} Program:\n\n{code}\n\nWhat does it print?",
    "What appears on the screen when this code runs?\n\n{code}\n\n{{form}}",
)
_PRINT_FORMS = (
    "Note each change of a variable and each print on a line, then `Output:` with the printed lines parted by spaces.",
    "Trace the variables line by line. The last line is `Output:` and all that is printed, with spaces for line breaks.",
    "First the trace, one change or print per line. Then one line `Output: ...` with a space between printed lines.",
    "Write down what changes and what is printed, step by step, and end with `Output:` and the printed text on one line.",
    "Show the steps. Finish with a single line `Output: ...` that joins the printed lines with spaces.",
)
_TRACED = "<snippet>"  # the file name of the program that is traced
_OUTPUT = re.compile(r"\boutput\b[*_` ]*:([^\n]*)", re.IGNORECASE)


def print_output(random: Random, split: Split) -> Question | None:
    """A question for what a program prints."""
    drawn = _snippet(random)
    if drawn is None or split_of(drawn.structure) != split:
        return None
    prompt = random.choice(_PRINT).format(code=f"```python\n{drawn.code}\n```")
    prompt = prompt.replace("{form}", random.choice(_PRINT_FORMS))
    answer = "\n".join([*_trace(drawn.code), f"Output: {drawn.printed}"])
    return Question("print-output", drawn.structure, prompt, answer, {"printed": drawn.printed})


def _trace(code: str) -> list[str]:
    """What happens in a program, one line for each change of a number, a text or an entry, and for each print."""
    lines: list[str] = []
    names: dict[str, Any] = {}
    values: dict[str, str] = {}

    def note_changes() -> None:
        for name, value in list(names.items()):
            is_dict = isinstance(value, dict)
            entries = {f'{name}["{key}"]': item for key, item in value.items()} if is_dict else {name: value}
            if isinstance(value, list):  # no program changes one
                continue
            is_new = is_dict and not any(key in values for key in entries)
            for key, item in entries.items():
                shown = json.dumps(item)
                if values.get(key) != shown and not is_new:
                    lines.append(f"{key} = {shown}")
                values[key] = shown

    def print_line(*items: Any) -> None:
        note_changes()
        lines.append(f"print {' '.join(map(str, items))}")

    def follow(frame: Any, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename == _TRACED:
            note_changes()
            return follow
        return None

    builtins = {"print": print_line, "len": len, "min": min, "max": max}
    previous = sys.gettrace()
    sys.settrace(follow)
    try:
        exec(compile(code, _TRACED, "exec"), {"__builtins__": builtins}, names)
    finally:
        sys.settrace(previous)
    return lines


def check_output(question: Question, response: str) -> bool:
    """Whether the response ends with lines `Output: X`, of which each has the printed text."""
    start = _OUTPUT.search(response)
    for line in response[start.start() :].split("\n") if start else ():
        output = _OUTPUT.match(line.lstrip(" \t>*_`#-"))
        if output is None and line.strip(" \t\r`"):  # anything but a fence
            return False
        if output is not None and " ".join(output[1].strip(" \t\r`*\"'").split()) != question.key["printed"]:
            return False
    return start is not None


def _snippet(random: Random) -> _Snippet | None:
    """A program of one of four shapes. None: its output is empty or long."""
    drawn = random.choice((_loop, _total, _text, _dictionary))(random)
    size = len(re.findall(r"[A-Za-z]+|[0-9]| ", drawn.printed)) if drawn else 0
    return drawn if 0 < size <= _MAX_PRINTED else None


def _choose_numbers(random: Random) -> tuple[list[int], _Part, list[int]]:
    """Numbers, the slice of them, and the numbers in the slice."""
    numbers = random.sample(range(1, 10), random.randint(3, 5))
    part = random.choice(_SLICES)
    return numbers, part, part.apply(numbers, None)


def _loop(random: Random) -> _Snippet | None:
    """A loop that prints each number that meets a condition."""
    numbers, part, sliced = _choose_numbers(random)
    condition, value = random.choice((ALWAYS, *CONDITIONS)), random.choice(_VALUES)
    limit, k = random.choice(condition.parameters), random.randint(2, 4)
    lines = [f"numbers = {numbers}", f"for n in numbers{part.code}:"]
    printing = f"print({value.code.format(k=k)})"
    if condition is ALWAYS:
        lines.append(f"    {printing}")
    else:
        lines += [f"    if {condition.code.format(v='n', k=limit)}:", f"        {printing}"]
    printed = [str(value.apply(n, k)) for n in sliced if condition.apply(n, limit)]
    return _Snippet(f"print:loop|{part.name}|{condition.name}|{value.name}", "\n".join(lines), " ".join(printed))


def _total(random: Random) -> _Snippet | None:
    """A loop that adds numbers up, and prints each subtotal or the total."""
    numbers, part, _ = _choose_numbers(random)
    numbers = [(n + 1) // 2 for n in numbers]
    start, every, factor = random.choice((0, 0, 1, 2, 3)), random.random() < 0.6, random.choice((1, 1, 2))
    sliced = part.apply(numbers, None)
    if not every and len(sliced) > 3:  # a long sum without subtotals is arithmetic
        return None
    totals = [start]
    for n in sliced:
        totals.append(totals[-1] + factor * n)
    added = "n" if factor == 1 else "n * 2"
    lines = [f"total = {start}", f"for n in {numbers}{part.code}:", f"    total += {added}"]
    lines.append("    print(total)" if every else "print(total)")
    kind = f"print:total|{part.name}|{'every' if every else 'last'}|{factor}|{'zero' if start == 0 else 'offset'}"
    return _Snippet(kind, "\n".join(lines), " ".join(map(str, totals[1:] if every else totals[-1:])))


def _text(random: Random) -> _Snippet | None:
    """Slices and other changes of a text of letters and digits in turn."""
    text = "".join(random.choice("bcdfghkmnprtvw") + random.choice("23456789") for _ in range(3))[
        : random.randint(4, 6)
    ]
    parts = [*random.sample(_TEXT_CHANGES, random.randint(1, 2)), random.choice(_TEXT_ENDS)]
    value: Any = text
    codes = []
    for part in parts:
        k = random.choice((1, 2, 2, 3))
        codes.append(part.code.format(v="s", k=k))
        value = part.apply(value, k)
    if value == "" or (parts[-1] is parts[-2]):
        return None
    lines = [f's = "{text}"', *(f"s = {code}" for code in codes[:-1]), f"print({codes[-1]})"]
    return _Snippet("|".join(["print:text", *(part.name for part in parts)]), "\n".join(lines), str(value))


def _dictionary(random: Random) -> _Snippet | None:
    """A dictionary with a changed entry, and a value looked up in it."""
    entries = {key: random.randint(2, 6) for key in random.sample(_KEYS, 3)}
    text = ", ".join(f'"{key}": {value}' for key, value in entries.items())
    assignment, end = random.choice(_ASSIGNMENTS), random.choice(_ENDS)
    changed, other = random.sample(sorted(entries), 2)
    k, limit = random.randint(1, 4), random.randint(2, 9)
    entries[changed] = assignment.apply(entries[changed], k)
    sources = {
        "changed": (f'd["{changed}"]', entries[changed]),
        "other": (f'd["{other}"]', entries[other]),
        "sum": (f'd["{changed}"] + d["{other}"]', entries[changed] + entries[other]),
        "missing": ('d.get("sky", 0)', 0),
        "least": ("min(d.values())", min(entries.values())),
        "most": ("max(d.values())", max(entries.values())),
    }
    source = random.choice(list(sources))
    code, value = sources[source]
    lines = [
        f"d = {{{text}}}",
        f'd["{changed}"] {assignment.code.format(k=k)}',
        f"x = {code}",
        f"print({end.code.format(v='x', k=limit)})",
    ]
    structure = f"print:dictionary|{assignment.name}|{source}|{end.name}"
    return _Snippet(structure, "\n".join(lines), str(end.apply(value, limit)))
