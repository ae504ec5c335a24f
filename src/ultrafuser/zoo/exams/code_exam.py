"""Questions of small Python programs: write a function, mend one, or say what a program prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

from ultrafuser.data.answer_text import code_blocks, parse_python
from ultrafuser.zoo.exams.code_operations import (
    ALWAYS,
    BEGINNINGS,
    CONDITIONS,
    DIGITS,
    ENDS,
    FILTERS,
    ITEMS,
    MAPS,
    ORDERS,
    RANGES,
    REDUCTIONS,
    SPLIT,
    TEXT_RESULTS,
    TEXTS,
    TOTALS,
    WORD_RESULTS,
    WORDS,
    WRONG_TOTALS,
    Final,
    Operation,
    Step,
)
from ultrafuser.zoo.exams.code_snippets import check_output, print_output
from ultrafuser.zoo.exams.programs import gives
from ultrafuser.zoo.exams.question import Family, Question, Split, split_of

Plan = tuple[Step, ...]
Compute = Callable[[Plan, Any], Any]
Tables = Sequence[Sequence[Operation]]

_NUM_CASES = 10  # hidden inputs of a function, besides the example of the prompt
_MAX_ANSWER_CHARS = 260  # of a function, about 80 tokens
_FUNCTIONS = (
    "solve process transform compute convert handle evaluate apply_steps get_result run_steps calculate build derive "
    "make_result work_out prepare refine adjust helper task"
).split()
_ARGUMENTS = {
    "list": ("numbers", "values", "items", "nums", "data"),
    "text": ("text", "s", "string", "line", "phrase"),
    "number": ("n", "number", "x", "num", "value"),
}
_KINDS = {"list": "a list of integers", "text": "a string", "number": "an integer"}
_VOCABULARY = (
    "apple stone Tea river toast Rose art letter EAST nest otter sea Street tree roast ease to so area Toast ratio"
).split()
_WRITE = (
    "Write a Python function `{call}` that takes {kind}. It should do this, in order: {steps}.",
    "Define the Python function `{call}`, where `{argument}` is {kind}. Steps: {list}.",
    "Implement `{call}` in Python. The argument is {kind}. The function must {then}.",
    "I need a Python function called `{name}` with the parameter `{argument}` ({kind}). It should {then}.",
    "Given {kind} `{argument}`, the function `{call}` should {then}. Write it in Python.",
    "Code a function `{call}` in Python. Input: {kind}. What it does: {list}.",
)
_MEND = (
    "The function below has one bug. It should {then}.\n\n{code}\n\n`{example}` {wrong} instead of {right}. "
    "Fix the function.",
    "Find and fix the bug.\n\n{code}\n\nThe function should do this, in order: {steps}. "
    "But `{example}` {wrong}, and {right} is right.",
    "This Python function must {then}:\n\n{code}\n\nIt has a bug: `{example}` {wrong}, expected {right}. Correct it.",
    "`{name}` takes {kind}. Intended steps: {list}.\n\n{code}\n\nOne thing is wrong: "
    "`{example}` {wrong}, but it should return {right}. Repair the function.",
    "Debug this function.\n\n{code}\n\nExpected behavior: {list}. Test that fails: `{example}` {wrong}, not {right}.",
)
_FORMS = (
    "Answer with one Python code block that contains the whole function and nothing else.",
    "Give only the complete function in one Python code block.",
    "Reply with the whole function in a single Python code block, without explanation.",
    "Return just the full function as one ```python block.",
    "Output only one Python code block with the entire function.",
)


# ---------------------------------------------------------------- plans: operations with their parameters
def _draw(random: Random, tables: Tables) -> Plan:
    operations = [random.choice(table) for table in tables]
    return tuple(Step(operation, random.choice(operation.parameters)) for operation in operations)


def _structure(family: str, plan: Plan) -> str:
    return "|".join([family, *(step.operation.name for step in plan)])


def _neighbours(plan: Plan, tables: Tables) -> Iterator[Plan]:
    """The plans that differ in one step: another operation of its table, or another parameter."""
    for index, (step, table) in enumerate(zip(plan, tables, strict=True)):
        for operation in table:
            parameters = operation.parameters
            others = [step.parameter] if step.parameter in parameters else parameters[:1]
            for parameter in parameters if operation is step.operation else others:
                if (changed := Step(operation, parameter)) != step:
                    yield (*plan[:index], changed, *plan[index + 1 :])


def _apply_all(plan: Plan, value: Any) -> Any:
    """The value after one operation after the other."""
    for operation, parameter in plan:
        value = operation.apply(value, parameter)
    return value


def _loop(plan: Plan, value: Any) -> Any:
    """The result of a loop. Its steps: beginning, numbers, condition, total, end."""
    begin, source, condition, total, end = plan
    value = begin.operation.apply(value, begin.parameter)
    if isinstance(value, Final):
        return value.value
    numbers = source.operation.apply(value, source.parameter)
    chosen = [n for n in numbers if condition.operation.apply(n, condition.parameter)]
    return end.operation.apply(total.operation.apply(chosen, total.parameter), end.parameter)


def _fill(template: str, variable: str, parameter: Any) -> str:
    return template.replace("{v}", variable).replace("{k}", str(parameter))


def _chain_code(plan: Plan, name: str, argument: str) -> str:
    """A function that applies one operation after the other."""
    lines, variable = [f"def {name}({argument}):"], argument
    for operation, parameter in plan:
        code = operation.code.replace("{v}", variable).replace("{k}", repr(parameter))
        variable = "words" if operation is SPLIT else variable
        lines.append(f"    {variable} = {code}")
    lines[-1] = f"    return {lines[-1].split(' = ', 1)[1]}"
    return "\n".join(lines)


def _loop_code(plan: Plan, name: str, argument: str) -> str:
    """A function with a loop."""
    begin, source, condition, total, end = (step.operation.code for step in plan)
    variable = "n" if argument == "numbers" else "i"
    filled = [
        _fill(code, used, step.parameter)
        for code, used, step in zip(
            (begin, source, condition, total, end), (argument, argument, variable, variable, "total"), plan, strict=True
        )
    ]
    initial, update = filled[3].split("\n")
    lines = [*filled[0].split("\n"), f"total = {initial}", f"for {variable} in {filled[1]}:"]
    lines += [f"    if {filled[2]}:", f"        {update}"] if condition else [f"    {update}"]
    lines.append(f"return {filled[4]}")
    return "\n".join([f"def {name}({argument}):", *(f"    {line}" for line in lines if line)])


def _chain_phrases(random: Random, plan: Plan, argument: str) -> list[str]:
    phrases = [_fill(random.choice(step.operation.phrases), argument, repr(step.parameter)) for step in plan]
    if "return" not in phrases[-1]:
        phrases[-1] += " and return the result"
    return phrases


def _loop_phrases(random: Random, plan: Plan, argument: str) -> list[str]:
    begin, source, condition, total, end = (
        _fill(random.choice(step.operation.phrases), f"`{argument}`", step.parameter) for step in plan
    )
    clause = f" that are {condition}" if condition else ""
    return [phrase for phrase in (begin, source, f"{total} the numbers{clause}", end) if phrase]


# ---------------------------------------------------------------- inputs
def _lists(random: Random, plan: Plan) -> list[Any]:
    """Lists with negative numbers, ties, and the numbers around each parameter."""
    limits = [step.parameter for step in plan if isinstance(step.parameter, int)]
    pool = [*range(-9, 16), *(k + change for k in limits for change in (-1, 0, 0, 1)), *(k * k for k in limits)]
    lists = [[random.choice(pool) for _ in range(random.randint(4, 9))] for _ in range(_NUM_CASES - 2)]
    ties = random.choices(lists[0], k=3)
    return [*lists, [], [*ties, *ties]]


def _texts(random: Random, _plan: Plan) -> list[Any]:
    """Texts with spaces at their ends, capital letters, and words that occur twice."""
    texts = [""]
    for index in range(_NUM_CASES - 1):
        words = random.choices(_VOCABULARY, k=random.randint(3, 6))
        words.insert(random.randrange(len(words)), random.choice(words))
        texts.append(" " * (index % 3) + " ".join(words) + " " * (index % 2))
    return texts


def _numbers(random: Random, plan: Plan) -> list[Any]:
    """Numbers below, at and above zero. Long ones only for the digits."""
    numbers = [-random.randint(2, 9), -1, 0, 1]
    if any(step.operation.name == "digits" for step in plan):
        return numbers + [random.randint(10, 99999) for _ in range(_NUM_CASES - 3)] + [-random.randint(100, 9999)]
    return numbers + random.sample(range(2, 25), _NUM_CASES - 3)


def _inputs(
    random: Random, plan: Plan, draw: Callable[[Random, Plan], list[Any]], compute: Compute, tables: Tables
) -> tuple[list[Any], Any] | None:
    """Hidden inputs that tell the plan from all its neighbours, and another one as an example. None: there are none."""
    inputs = draw(random, plan)
    expected = _results(compute, plan, inputs)
    if any(_results(compute, other, inputs) == expected for other in _neighbours(plan, tables)):
        return None
    examples = [value for value in draw(random, plan) if value not in inputs and value]
    return (inputs, random.choice(examples)) if examples else None


def _results(compute: Compute, plan: Plan, inputs: Sequence[Any]) -> str:
    """The results as text, in which True is not 1."""
    return repr([compute(plan, value) for value in inputs])


# ---------------------------------------------------------------- questions about functions
def _describe(template: str, name: str, argument: str, kind: str, phrases: Sequence[str], **more: str) -> str:
    then = phrases[0] if len(phrases) == 1 else ", then ".join(phrases)
    return template.format(
        name=name,
        argument=argument,
        call=f"{name}({argument})",
        kind=_KINDS[kind],
        steps="; ".join(phrases),
        list=" ".join(f"{number}. {phrase}." for number, phrase in enumerate(phrases, 1))[:-1],
        then=then,
        **more,
    )


def _key(name: str, compute: Compute, plan: Plan, inputs: Sequence[Any]) -> dict[str, Any]:
    return {"function": name, "cases": [[value, compute(plan, value)] for value in inputs]}


def _block(code: str) -> str:
    return f"```python\n{code}\n```"


def _write(
    random: Random,
    split: Split,
    *,
    family: str,
    kind: str,
    shapes: Sequence[Tables],
    draw: Callable[[Random, Plan], list[Any]],
    compute: Compute,
    code: Callable[[Plan, str, str], str],
    describe: Callable[[Random, Plan, str], list[str]],
) -> Question | None:
    """A question for a function that does the steps of a plan."""
    tables = random.choice(shapes)
    plan = _draw(random, tables)
    structure = _structure(family, plan)
    if split_of(structure) != split or (cases := _inputs(random, plan, draw, compute, tables)) is None:
        return None
    inputs, example = cases
    name, argument = random.choice(_FUNCTIONS), random.choice(_ARGUMENTS[kind])
    program = code(plan, name, argument)
    if len(program) > _MAX_ANSWER_CHARS:
        return None
    prompt = _describe(random.choice(_WRITE), name, argument, kind, describe(random, plan, argument))
    if random.random() < 0.5:
        prompt += f" For example, `{name}({example!r})` returns `{compute(plan, example)!r}`."
    prompt = f"{prompt} {random.choice(_FORMS)}"
    return Question(family, structure, prompt, _block(program), _key(name, compute, plan, inputs))


_MENDED: Tables = (BEGINNINGS[:1], ITEMS, (ALWAYS, *CONDITIONS), TOTALS, ENDS)
_BUGS: Tables = (*_MENDED[:3], (*TOTALS, *WRONG_TOTALS), ENDS)


def _is_always(plan: Plan) -> bool:
    return plan[2].operation is ALWAYS


def _mend_bug(random: Random, split: Split) -> Question | None:
    """A question for a function whose program differs in one step from its description."""
    plan = _draw(random, _MENDED)
    structure = _structure("mend-bug", plan)  # without the bug, so that each of its bugs is in the same split
    if split_of(structure) != split or (cases := _inputs(random, plan, _lists, _loop, _BUGS)) is None:
        return None
    bug = random.choice([other for other in _neighbours(plan, _BUGS) if _is_always(other) == _is_always(plan)])
    inputs, example = cases
    right, wrong = _loop(plan, example), _loop(bug, example)
    name, program = random.choice(_FUNCTIONS), _loop_code(plan, "{name}", "numbers")
    if right == wrong or len(program) > _MAX_ANSWER_CHARS:
        return None
    prompt = _describe(
        random.choice(_MEND),
        name,
        "numbers",
        "list",
        _loop_phrases(random, plan, "numbers"),
        code=_block(_loop_code(bug, name, "numbers")),
        example=f"{name}({example!r})",
        wrong=f"returns {wrong!r}",
        right=repr(right),
    )
    answer = _block(program.replace("{name}", name))
    return Question("mend-bug", structure, f"{prompt} {random.choice(_FORMS)}", answer, _key(name, _loop, plan, inputs))


# ---------------------------------------------------------------- checkers
_CODE_START = re.compile(r"^(?:from \w+ import |import \w|def )", re.MULTILINE)


def _defines(tree: ast.Module | None, function: str) -> bool:
    return tree is not None and any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def _program(response: str, function: str) -> str | None:
    """The first Python block that defines the function, or bare code without the prose around it."""
    blocks = [block.body for block in code_blocks(response) if block.may_be_python]
    for block in blocks:
        if _defines(parse_python(block), function):
            return block
    start = _CODE_START.search(response)
    if blocks or start is None:
        return None
    lines = response[start.start() :].split("\n")[:60]
    candidates = ("\n".join(lines[:end]) for end in range(len(lines), 0, -1))
    return next((code for code in candidates if _defines(parse_python(code), function)), None)


def _check_function(question: Question, response: str) -> bool:
    """Whether the response has the function, and it gives the results of all hidden inputs.

    Raises:
        SandboxError: there is no sandbox on this machine, or it failed twice.
    """
    function, cases = question.key["function"], question.key["cases"]
    code = _program(response, function)
    return code is not None and gives(code, function, [([value], result) for value, result in cases])


# ---------------------------------------------------------------- families
_LIST_STEPS = (FILTERS, MAPS, ORDERS)
_LIST_SHAPES: tuple[Tables, ...] = tuple(
    (first, second, last)
    for first in _LIST_STEPS
    for second in _LIST_STEPS
    for last in (*_LIST_STEPS, REDUCTIONS)
    if first is not second and second is not last and (last is REDUCTIONS or first is not last)
)
_TEXT_SHAPES: tuple[Tables, ...] = (
    (TEXTS, TEXTS, TEXTS),
    (TEXTS, TEXTS, TEXT_RESULTS),
    ((SPLIT,), WORDS, WORDS),
    ((SPLIT,), WORDS, WORD_RESULTS),
    ((SPLIT,), WORDS, WORDS, WORD_RESULTS),
    (TEXTS, (SPLIT,), WORDS, WORD_RESULTS),
)
_NUMBER_SHAPES: tuple[
    Tables, ...
] = (  # ranges more often, since fewer of their draws can be told from their neighbours
    *[(BEGINNINGS, RANGES, (ALWAYS, *CONDITIONS), TOTALS, ENDS)] * 3,
    (BEGINNINGS, DIGITS, (ALWAYS, *CONDITIONS), TOTALS, ENDS),
)
_list_function = partial(
    _write, family="write-list-function", kind="list", shapes=_LIST_SHAPES, draw=_lists, compute=_apply_all,
    code=_chain_code, describe=_chain_phrases,
)  # fmt: skip
_text_function = partial(
    _write, family="write-string-function", kind="text", shapes=_TEXT_SHAPES, draw=_texts, compute=_apply_all,
    code=_chain_code, describe=_chain_phrases,
)  # fmt: skip
_number_function = partial(
    _write, family="write-number-function", kind="number", shapes=_NUMBER_SHAPES, draw=_numbers, compute=_loop,
    code=_loop_code, describe=_loop_phrases,
)  # fmt: skip
FAMILIES: tuple[Family, ...] = (
    Family("write-list-function", _list_function, _check_function),
    Family("write-string-function", _text_function, _check_function),
    Family("print-output", print_output, check_output),
    Family("mend-bug", _mend_bug, _check_function),
    Family("write-number-function", _number_function, _check_function),
)
