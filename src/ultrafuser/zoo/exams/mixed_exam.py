"""Questions whose answers need a sentence, a program and a calculation at once."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

from ultrafuser.data.answer_text import code_blocks, without_code
from ultrafuser.zoo.exams.mixed_tables import (
    DEEDS,
    DISTRACTIONS,
    FIRST,
    NAMES,
    ROLES,
    STORIES,
    TASKS,
    THEN,
    WORDS,
    Story,
)
from ultrafuser.zoo.exams.programs import gives
from ultrafuser.zoo.exams.question import Family, Question, Split, split_of
from ultrafuser.zoo.exams.wordings import answer_lines

_LIMIT = 99  # no number of a question or a step is larger
_NUM_CASES = 8  # hidden inputs of a function
_COPIED_WORDS = 14  # a sentence with so many consecutive words of the prompt is copied
_MIN_WORDS = 3  # of a sentence

_COMPUTE: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


# ---------------------------------------------------------------- questions


def _step(left: int, operation: str, right: int) -> tuple[str, int]:
    result = _COMPUTE[operation](left, right)
    return f"{left} {operation} {right} = {result}", result


def _prompt(random: Random, family: str, **values: object) -> str:
    order = random.choice(TASKS[f"{family} order"])
    return f"{random.choice(TASKS[family])} {order}".format(**values)


def _fenced(function: str, arguments: str, *lines: str) -> str:
    body = "\n".join(f"    {line}" for line in lines)
    return f"```python\ndef {function}({arguments}):\n{body}\n```"


def _evaluate(expression: str, values: Mapping[str, object]) -> int:
    """The value of an expression from our tables, or of a step that has digits and operators alone."""
    return int(eval(expression, dict(values)))


def _story(random: Random, split: Split) -> tuple[Story, str, str, str, str] | None:
    """A story, the operations and sentences of its beginning and its end, and what no training row has."""
    story = random.choice(STORIES)
    (first, beginning), (second, end) = random.choice(story.beginnings), random.choice(story.ends)
    structure = f"{story.function}: {first} then {second}"  # the same in both families, so that neither helps the other
    return (story, first, second, f"{beginning} {end}", structure) if split_of(structure) == split else None


def _expression(first: str, second: str, a: object, b: object, c: object) -> str:
    inner = f"{a} {first} {b}"
    return f"({inner}) * {c}" if second == "*" and first != "*" else f"{inner} {second} {c}"


def _function_value_sentence(random: Random, split: Split) -> Question | None:
    drawn = _story(random, split)
    a, b, c = (random.randint(2, 40) if random.random() < 0.5 else random.randint(2, 9) for _ in range(3))
    if drawn is None:
        return None
    story, first, second, text, structure = drawn
    line, middle = _step(a, first, b)
    last, value = _step(middle, second, c)
    if not (0 < middle <= _LIMIT and 0 < value <= _LIMIT):
        return None
    name = random.choice(NAMES[split])
    expression = _expression(first, second, *"abc")
    cases = [
        [list(case), _evaluate(expression, dict(zip("abc", case, strict=True)))]
        for case in ([random.randint(2, _LIMIT) for _ in range(3)] for _ in range(_NUM_CASES))
    ]
    quantity = story.quantity.format(N=name)
    prompt = _prompt(
        random,
        "function-value-sentence",
        story=text.format(N=name, a="`a`", b="`b`", c="`c`"),
        f=story.function,
        args="a, b, c",
        q=quantity,
        values=f"a = {a}, b = {b}, c = {c}",
    )
    code = _fenced(story.function, "a, b, c", f"return {expression}")
    answer = f"The function gives the {quantity}.\n{code}\n{line}\n{last}\nAnswer: {value}"
    key = {"function": story.function, "cases": cases, "value": value, "words": [name, story.nouns], "others": []}
    return Question("function-value-sentence", structure, prompt, answer, key)


def _passage_code(random: Random, split: Split) -> Question | None:
    drawn = _story(random, split)
    if drawn is None:
        return None
    story, first, second, text, structure = drawn
    b, c = random.randint(2, 20), random.randint(2, 20)
    name, other = random.sample(NAMES[split], 2)
    expression = _expression(first, second, "n", b, c)
    inputs = random.sample(range(b + c, _LIMIT), _NUM_CASES)  # so large that no difference is negative
    distraction = random.choice(DISTRACTIONS).format(M=other, x=random.randint(2, 60))
    sentences = [distraction, text.format(N=name, a="`n`", b=b, c=c)]
    random.shuffle(sentences)
    quantity = story.quantity.format(N="this person")  # the passage says who it is
    prompt = _prompt(random, "passage-code", story=" ".join(sentences), f=story.function, q=quantity)
    answer = f"The rule is for {name}.\n{_fenced(story.function, 'n', f'return {expression}')}"
    key = {
        "function": story.function,
        "cases": [[[n], _evaluate(expression, {"n": n})] for n in inputs],
        "words": [name],
        "others": [other],
    }
    return Question("passage-code", structure, prompt, answer, key)


def _passage_numbers(random: Random, split: Split) -> Question | None:
    verb, plural, things = random.choice(DEEDS)
    operation, (left, right) = random.choice("+-*"), random.sample(range(3), 2)
    persons = [left] if operation == "*" else sorted((left, right))
    structure = f"{things}: {operation} of {persons}"
    if split_of(structure) != split:
        return None
    names, roles = random.sample(NAMES[split], 3), random.sample(ROLES, 3)
    numbers, price = random.sample(range(3, 60), 3), random.randint(2, 9)
    facts = [f"{n}, the {r}, {verb} {x} {things}." for n, r, x in zip(names, roles, numbers, strict=True)]
    if operation == "*" or random.random() < 0.3:
        facts.append(f"Each of them gets {price} dollars for each of the {things}.")
    if random.random() < 0.5:
        facts.append(f"They need {random.randint(2, 60)} minutes.")
    role, other = roles[left], roles[right]
    ask = {
        "+": f"How many {things} do the {role} and the {other} {plural} together?",
        "-": f"How many more {things} does the {role} {plural} than the {other}?",
        "*": f"How many dollars does the {role} get for the {things}?",
    }[operation]
    line, value = _step(numbers[left], operation, price if operation == "*" else numbers[right])
    if not 0 < value <= _LIMIT:
        return None
    prompt = _prompt(random, "passage-numbers", story=" ".join(facts), ask=ask, role=role)
    answer = f"The {role} is {names[left]}.\n{line}\nAnswer: {value}"
    others = [name for name in names if name != names[left]]
    key = {"value": value, "words": [names[left]], "others": others}
    return Question("passage-numbers", structure, prompt, answer, key)


def _draw_input(random: Random, subject: str) -> dict[str, Any]:
    if subject == "word":
        return {"word": random.choice(WORDS), "k": random.randint(2, 12)}
    limit = random.choice((6, 15, 30))  # low limits give equal numbers
    return {"numbers": [random.randint(1, limit) for _ in range(random.randint(3, 5))], "k": random.randint(2, 12)}


def _code_and_value(random: Random, split: Split) -> Question | None:
    (words, code), (then, operation, last) = random.choice(FIRST), random.choice(THEN)
    structure = f"{code} and then {last}"
    if split_of(structure) != split:
        return None
    subject = "word" if "word" in code else "numbers"
    *inputs, values = (_draw_input(random, subject) for _ in range(_NUM_CASES + 1))
    firsts = [_evaluate(code, case) for case in inputs]
    for _, rival in FIRST:  # every other function must fail in some case
        if rival != code and subject in rival and [_evaluate(rival, case) for case in inputs] == firsts:
            return None
    first, k = _evaluate(code, values), values["k"]
    line, value = _step(k, "-", first) if operation == "from" else _step(first, operation, k)
    if not (0 < first and 0 < value <= _LIMIT):
        return None
    function = random.choice(("measure", "solve", "result", "compute", "score"))
    shown = ", ".join(f"{name} = {repr(x).replace(chr(39), chr(34))}" for name, x in values.items())
    prompt = _prompt(
        random, "code-and-value", f=function, args=f"{subject}, k", first=words, then=then, values=f"`{shown}`"
    )
    answer = f"{_fenced(function, f'{subject}, k', f'first = {code}', f'return {last}')}\n{line}\nAnswer: {value}"
    cases = [
        [list(case.values()), _evaluate(last, {"first": x, **case})] for case, x in zip(inputs, firsts, strict=True)
    ]
    return Question("code-and-value", structure, prompt, answer, {"function": function, "cases": cases, "value": value})


# ---------------------------------------------------------------- checks

_VALUE = re.compile(r"([0-9]{1,9})(?:\.0{1,9})?(?: (?!or\b|and\b|to\b|not\b)[a-z]+){0,3} ?\.?", re.IGNORECASE)
_STEP = re.compile(  # `7 * 3 = 21`, or several operations in a row
    r"(?<![-+*/x×.0-9])(?<![-+*/x×] )\b"
    r"([1-9][0-9]{0,3}(?: ?(?:[-+*x×]|\\times) ?[1-9][0-9]{0,3}){1,3}) ?= ?([0-9]{1,8})\b"
)
_NEGATION = re.compile(r"\b(?:not|never|no|nobody|none)\b|n['’]t\b", re.IGNORECASE)


def _has_value(text: str, value: int) -> bool:
    """Whether there are lines `Answer: X` and all of them carry the value."""
    lines = [re.sub(r"(\\boxed|\\?[()$]|[*_`{}]|\s)+", " ", line).strip() for line in answer_lines(text)]
    matches = [_VALUE.fullmatch(line) for line in lines]
    return bool(matches) and all(match is not None and int(match[1]) == value for match in matches)


def _has_step(text: str, value: int) -> bool:
    """Whether all steps are right and one of them gives the value."""
    steps = [(_evaluate(re.sub(r"x|×|\\times", "*", left), {}), int(right)) for left, right in _STEP.findall(text)]
    return all(left == right for left, right in steps) and value in [right for _, right in steps]


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _is_copied(sentence: str, prompt: str) -> bool:
    """Whether the sentence, or a long run of its words, is in the prompt."""
    words, source = _words(sentence), f" {' '.join(_words(prompt))} "
    length = min(len(words), _COPIED_WORDS)
    runs = (words[start : start + length] for start in range(len(words) - length + 1))
    return any(f" {' '.join(run)} " in source for run in runs)


def _has_sentence(text: str, prompt: str, words: Sequence[str], others: Sequence[str]) -> bool:
    """Whether a sentence that is not copied holds the words, and the text names none of the other persons.

    A word may have alternatives with bars between them.
    """
    if any(re.search(rf"\b{other}\b", text) for other in others):
        return False
    return any(
        len(_words(sentence)) >= _MIN_WORDS
        and all(re.search(rf"\b(?:{word})(?:e?s)?\b", sentence, re.IGNORECASE) for word in words)
        and not _NEGATION.search(sentence)
        and not _is_copied(sentence, prompt)
        for sentence in re.split(r"(?<=[.!?])\s+|\n+", text)
    )


def _function_passes(response: str, function: str, cases: Sequence[Any]) -> bool:
    """Whether one Python block defines the function, and the function gives the results of all cases.

    Raises:
        SandboxError: there is no sandbox on this machine, or it failed twice.
    """
    blocks = [block.body for block in code_blocks(response) if block.may_be_python]
    return len(blocks) == 1 and gives(blocks[0], function, cases, imports={})


def _check(question: Question, response: str) -> bool:
    """Whether every element that the key names is there and right: value, step, sentence, and function."""
    key, text = question.key, without_code(response)
    if "value" in key and not (_has_value(text, key["value"]) and _has_step(text, key["value"])):
        return False
    if "words" in key and not _has_sentence(text, question.prompt, key["words"], key["others"]):
        return False
    return "cases" not in key or _function_passes(response, key["function"], key["cases"])


FAMILIES: tuple[Family, ...] = (
    Family("function-value-sentence", _function_value_sentence, _check),
    Family("passage-numbers", _passage_numbers, _check),
    Family("code-and-value", _code_and_value, _check),
    Family("passage-code", _passage_code, _check),
)
