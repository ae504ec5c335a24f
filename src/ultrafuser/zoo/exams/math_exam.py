"""Questions of small arithmetic. Answers write one step per line and end with `Answer: X`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import accumulate, pairwise
from math import gcd, lcm
from random import Random
from typing import Any

from ultrafuser.zoo.exams.question import Family, Question, Split, split_of
from ultrafuser.zoo.exams.wordings import answer_lines, parse_wordings

Tree = Any  # an integer, or [operation, left tree, right tree] with one of + - * /, which JSON keeps unchanged
_LIMIT = 99  # no result in a chain or a word problem is larger, for small models calculate digit by digit
# The wordings of the tasks, and of the request for steps and a last line.
_WORDINGS = """
# chain
Calculate {e}. | What is {e}? | Evaluate the expression {e}. | Find the value of {e}. | Compute: {e}.
# equation
Solve {e} for {v}. | Find {v} if {e}. | Solve the equation {e}. | Which {v} satisfies {e}?
For which number {v} is {e}? | What is {v} in {e}?
# fractions
Calculate {e} as a fraction in lowest terms, not as a mixed number.
What is {e}? Reduce the fraction fully and give no mixed number.
Find {e}. Give a fraction in lowest terms, no mixed number.
Work out {e} and write it as a reduced fraction, not a mixed number.
Compute {e}. The result must be a fraction in lowest terms without a mixed number.
# sequence
What comes next: {e}, ...? | Find the next number of the sequence {e}. | Continue the sequence {e} by one number.
Which number follows in {e}, ...? | Give the next number: {e}, ?
The sequence {e} follows a rule. What is its next number?
# average
What is the average of {e}? | Find the mean of the numbers {e}. | Calculate the average of {e}.
In some games a player scored {e} points. What was the mean score?
On some days it rained {e} mm. What was the average per day in mm?
# percentages of
What is {p}% of {n}? | Calculate {p} percent of {n}.
A school has {n} pupils, and {p}% of them walk to school. How many pupils walk?
A book has {n} pages. Ana has read {p}% of it. How many pages are that?
Of {n} seats, {p}% are taken. How many seats are taken?
# percentages +
Increase {n} by {p}%. | A price of ${n} rises by {p}%. What is the new price?
A club had {n} members and grew by {p}%. How many members has it now? | What do you get when you add {p}% to {n}?
A worker earned ${n} and gets {p}% more. What is the new pay?
# percentages -
Decrease {n} by {p}%. | A coat costs ${n} and is sold with {p}% off. What is the sale price?
A tank held {n} litres and lost {p}%. How many litres are left? | What do you get when you take {p}% off {n}?
A town had {n} shops, and {p}% closed. How many shops remain? | A bag of {n} nuts loses {p}%. How many nuts are left?
# last line
Write the steps, then a last line `Answer: X`. | Give the steps and end with a line `Answer: X`.
Show each step on a line of its own. The last line must be `Answer: X`.
Work step by step and finish with the line `Answer: X`.
Write one step per line, and the result in a last line `Answer: X`.
"""
_TASKS = parse_wordings(_WORDINGS)

_VALUE = re.compile(
    r"(?:[a-z] ?= ?)?"  # the unknown of an equation
    r"(?P<sign>-?) ?(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12})"
    r"(?:\.(?P<decimals>[0-9]{1,12})| ?/ ?(?P<denominator>[0-9]{1,12}))?"
    r"(?: ?[%°]| ?[a-z]+(?:[ /][a-z]+){0,3})? ?\.?",  # a unit
    re.IGNORECASE,
)
_NO_UNIT = re.compile(r"\b(or|and|to|not|but|plus|minus|times|over|by|half|hundred|thousand|million)\b", re.IGNORECASE)


def _read_value(line: str, quotients: bool) -> Fraction | None:
    """The single value on a line. None: no value, several, or a quotient that is not allowed or not in lowest terms."""
    line = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r"\1/\2", line).replace("\u2212", "-")
    line = re.sub(r"(\\boxed|\\?[()$]|[*_`{}€£]|\s)+", " ", line).strip()  # marks of Markdown, LaTeX and money
    match = _VALUE.fullmatch(line)
    if match is None or _NO_UNIT.search(line):
        return None
    whole, denominator = int(match["whole"].replace(",", "")), int(match["denominator"] or 1)
    if denominator == 0 or gcd(whole, denominator) > 1 or (match["denominator"] and not quotients):
        return None
    value = Fraction(f"{whole}.{match['decimals'] or 0}") / denominator
    return -value if match["sign"] else value


def _check(question: Question, response: str, expected: Callable[[Any], Fraction], quotients: bool) -> bool:
    """Whether there are lines `Answer: X` and all of them carry the right value. Some families allow quotients."""
    values = [_read_value(line, quotients) for line in answer_lines(response)]
    return bool(values) and all(value == expected(question.key) for value in values)


def _evaluate(tree: Tree) -> Fraction:
    """The exact value of a tree."""
    if isinstance(tree, int):
        return Fraction(tree)
    operation, left, right = tree[0], _evaluate(tree[1]), _evaluate(tree[2])
    if operation in "+-":
        return left + right if operation == "+" else left - right
    return left * right if operation == "*" else left / right


def _tree_value(key: Any) -> Fraction:
    return _evaluate(key["tree"])


def _equation_value(key: Any) -> Fraction:
    """The solution of a x + b = d x + c from [a, b] and [d, c]."""
    (a, b), (d, c) = key["left"], key["right"]
    return Fraction(c - b, a - d)


def _sequence_value(key: Any) -> Fraction:
    """The next term. The differences of an alternating sequence repeat after two, all others grow by a constant."""
    terms = key["terms"]
    before, last = terms[-2] - terms[-3], terms[-1] - terms[-2]
    return Fraction(terms[-1] + (before if key["alternating"] else 2 * last - before))


def _step(operation: str, left: int, right: int, label: str = "") -> tuple[str, int]:
    """One line `label left operation right = result`, and the result. ValueError: it is no integer."""
    result = _evaluate([operation, left, right])
    if result.denominator != 1:
        raise ValueError(f"step {left} {operation} {right}: got {result}, expected an integer; draw other operands")
    return f"{label}{left} {operation} {right} = {result}", int(result)


def _steps(tree: Tree) -> tuple[list[str], int]:
    """The lines that evaluate a tree, left before right, and the result."""
    if isinstance(tree, int):
        return [], tree
    (lines, left), (others, right) = _steps(tree[1]), _steps(tree[2])
    line, result = _step(tree[0], left, right)
    return [*lines, *others, line], result


def _question(
    family: str, structure: str, random: Random, task: str, steps: list[str], result: object, key: Any
) -> Question:
    """A question whose prompt asks for the steps and the last line in one of several wordings."""
    answer = "\n".join([*steps, f"Answer: {result}"])
    return Question(family, structure, f"{task} {random.choice(_TASKS['last line'])}", answer, key)


def _operand(random: Random, operation: str, left: int) -> int | None:
    """A right operand that keeps the result from 1 to the limit. None: there is none."""
    if operation == "/":
        candidates = [divisor for divisor in range(2, 10) if left % divisor == 0 and left > divisor]
    elif operation == "*":
        candidates = [factor for factor in range(2, 10) if left * factor <= _LIMIT]
    else:
        candidates = list(range(1, 1 + min(20, _LIMIT - left if operation == "+" else left - 1)))
    return random.choice(candidates) if candidates else None


def _render(tree: Tree) -> str:
    """The expression of a tree with the parentheses that it needs."""
    if isinstance(tree, int):
        return str(tree)
    operation, left, right = tree
    text = _render(left)
    if operation == "*" and not isinstance(left, int) and left[0] != "*":
        text = f"({text})"
    return f"{text} {operation} {_render(right)}"


_VERBS = {"+": "add", "-": "subtract", "*": "multiply by"}


def _chain(random: Random, split: Split) -> Question | None:
    length = 5 if split == "test" and random.random() < 0.25 else random.choice((3, 4))
    tree: Tree = random.randint(2, 20)
    count, spoken = 0, f"Start with {tree}"
    while count < length:
        operation = random.choice("+-*")
        right: Tree = _operand(random, operation, int(_evaluate(tree)))
        if operation != "*" and count + 2 <= length and random.random() < 0.25:  # a product on the right
            right, spoken = ["*", random.randint(2, 9), random.randint(2, 9)], ""
        elif spoken:
            spoken += f", {_VERBS[operation]} {right}"
        if right is None or not 0 < _evaluate([operation, tree, right]) <= _LIMIT:
            return None
        tree = [operation, tree, right]
        count += 1 if isinstance(right, int) else 2
    expression = _render(tree)
    numbers = re.findall("[0-9]+", expression)
    structure = f"{re.sub('[0-9]+', 'n', expression)} from {numbers[0]}, {numbers[1]}"
    if length < 5 and split_of(structure) != split:  # training stops at 4 steps
        return None
    task = random.choice(_TASKS["chain"]).format(e=expression)
    if spoken and random.random() < 0.4:
        task = f"{spoken}."
    return _question("chain", structure, random, task, *_steps(tree), {"tree": tree})


def _equation(random: Random, split: Split) -> Question | None:
    a, b = random.randint(2, 9), random.choice((-1, 1)) * random.randint(1, 20)
    d, solution = random.choice((0, random.randint(1, 8))), random.randint(1, 12)
    c = (a - d) * solution + b
    structure = f"{a} x + {b} = {d} x + c"
    if a - d < 2 or not 0 < c <= _LIMIT or split_of(structure) != split:
        return None
    first, factor = _step("-", a, d)
    second, product = _step("-" if b > 0 else "+", c, abs(b))
    third, result = _step("/", product, factor)
    letter = random.choice("xyznt")
    left = f"{a}{letter} {'+' if b > 0 else '-'} {abs(b)}"
    right = f"{'' if d == 1 else d}{letter} + {c}" if d else str(c)
    task = random.choice(_TASKS["equation"]).format(e=f"{left} = {right}", v=letter)
    key = {"left": [a, b], "right": [d, c]}
    return _question("equation", structure, random, task, [first, second, third][d == 0 :], result, key)


_FRACTIONS = [
    (numerator, denominator)
    for denominator in (2, 3, 4, 5, 6, 8, 9, 10, 12)
    for numerator in range(1, 2 * denominator if denominator <= 6 else denominator)
    if gcd(numerator, denominator) == 1
]


def _fractions(random: Random, split: Split) -> Question | None:
    operation, first, second = random.choice("+-*"), random.choice(_FRACTIONS), random.choice(_FRACTIONS)
    (a, b), (c, d) = first, second
    structure = f"{operation} of " + " and ".join(f"{n}/{m}" for n, m in sorted((first, second)))
    if lcm(b, d) > 24 or (operation == "-" and a * d <= c * b) or split_of(structure) != split:
        return None
    if operation == "*":
        (line, top), (other, bottom) = _step("*", a, c), _step("*", b, d)
        steps = [line, other]
    else:
        bottom = lcm(b, d)
        steps, tops = [f"Common: {bottom}"], list[int]()
        for numerator, denominator in (first, second):
            line, factor = _step("/", bottom, denominator)
            other, scaled = _step("*", numerator, factor)
            steps += [line, other]
            tops.append(scaled)
        line, top = _step(operation, tops[0], tops[1])
        steps.append(line)
    divisor = gcd(top, bottom)
    steps.append(f"Divisor: {divisor}")
    if divisor > 1:
        steps += [_step("/", top, divisor)[0], _step("/", bottom, divisor)[0]]
    task = random.choice(_TASKS["fractions"]).format(e=f"{a}/{b} {operation} {c}/{d}")
    key = {"tree": [operation, ["/", a, b], ["/", c, d]]}
    return _question("fractions", structure, random, task, steps, Fraction(top, bottom), key)


_PERCENTAGES = {5: 20, 10: 10, 15: 20, 20: 10, 25: 4, 30: 10, 40: 10, 50: 2, 75: 4}  # of multiples of these numbers


def _percent_steps(p: int, n: int) -> tuple[list[str], int]:
    """The steps to p% of n through 10%, 25% or 50%, and the result."""
    base = p if p == 50 else 25 if p in (25, 75) else 10
    line, share = _step("/", n, 100 // base, f"{base}%: ")
    if p == base:
        return [line], share
    if p > base and p != 15:
        other, result = _step("*", share, p // base, f"{p}%: ")
        return [line, other], result
    other, half = _step("/", share, 2, "5%: ")
    last, result = _step("+", share, half, "15%: ")
    return ([line, other], half) if p == 5 else ([line, other, last], result)


def _percentages(random: Random, split: Split) -> Question | None:
    p, kind = random.choice(list(_PERCENTAGES)), random.choice(("of", "+", "-"))
    n = _PERCENTAGES[p] * random.randint(2, {2: 100, 4: 30, 10: 40, 20: 20}[_PERCENTAGES[p]])
    structure = f"{p}% with {n}"
    if split_of(structure) != split:
        return None
    steps, result = _percent_steps(p, n)
    tree: Tree = ["/", ["*", n, p], 100]
    if kind != "of":
        line, result = _step(kind, n, result)
        steps, tree = [*steps, line], [kind, n, tree]
    task = random.choice(_TASKS[f"percentages {kind}"]).format(p=p, n=n)
    return _question("percentages", structure, random, task, steps, result, {"tree": tree})


# Each story has beginnings (1) and ends (2), with the operation that they need. Any beginning goes with any end of its
# story. The test split has pairs of operations that training lacks in that story.
_STORY_LINES = """
1+ {N} has {a} {o} and finds {b} more. | 1- {N} has {a} {o} and loses {b}. | 1* {N} buys {a} packs of {b} {o}.
2- Then {N} gives away {c}. How many {o} does {N} have now?
2+ Then {N} gets {c} from a friend. How many {o} does {N} have now?
2/ {N} puts them equally into {c} boxes. How many {o} are in each box?
1/ {N} and some friends, {b} children in all, share {a} {o} equally. | 1+ {N} wins {a} {o} on Monday and {b} on Tuesday.
1- {N} collects {a} {o} and throws {b} away. | 2+ Later {N} buys {c} more. How many {o} does {N} own?
2- Later {N} breaks {c}. How many whole {o} does {N} own?
2* {N} sells all of these for ${c} each. How many dollars does {N} get?
1* {N} buys {a} {o} at ${b} each. | 1+ {N} buys {o} for ${a} and a bag for ${b}.
1- {N} buys {o} for ${a} and uses a coupon of ${b}. | 2+ Delivery costs ${c}. What does {N} pay in all, in dollars?
2- A discount of ${c} is taken off. What does {N} pay, in dollars?
2/ {c} friends share the bill equally. What does each pay, in dollars?
1* A train travels {a} km an hour for {b} hours. | 1+ A train travels {a} km before noon and {b} km after noon.
1- A train should travel {a} km but stops {b} km early.
2+ A bus goes {c} km farther than the train. How many km does the bus go?
2- A bus goes {c} km less than the train. How many km does the bus go?
2* The train does this {c} times. How many km are that?
1+ {N} is {b} years older than Sam, who is {a}. | 1- {N} is {b} years younger than Sam, who is {a}.
1/ Sam is {a}, which is {b} times the age of {N}. | 2+ How old will {N} be in {c} years?
2- How old was {N} {c} years ago? | 2* The aunt of {N} is {c} times as old as {N}. How old is the aunt?
1* A hall has {a} rows of {b} seats. | 1+ A hall has {a} seats, and {b} are added.
1- A hall has {a} seats, and {b} are removed. | 2- Then {c} seats are taken. How many are free?
2+ The balcony has {c} seats more than the hall. How many has the balcony?
2/ The seats form {c} equal blocks. How many seats has a block?
1* {N} reads {a} pages a day for {b} days. | 1+ {N} reads {a} pages on Friday and {b} on Saturday.
1/ {N} splits a book of {a} pages into {b} equal readings and does the first.
2+ Then {N} reads {c} more. How many pages has {N} read?
2- Tom reads {c} pages fewer than {N}. How many does Tom read?
2* Eva reads {c} times as many pages as {N}. How many does Eva read?
1+ {N} picks {a} apples and {b} pears. | 1- {N} picks {a} fruits, and {b} are rotten.
1* {N} fills {a} baskets with {b} fruits each. | 2- {N} eats {c} of the good fruits. How many are left?
2/ {N} packs the good fruits into {c} equal bags. How many are in a bag?
2+ {N} buys {c} more good fruits. How many good fruits are there?
1+ A bus carries {a} people, and {b} get on. | 1- A bus carries {a} people, and {b} get off.
1* A bus has {a} benches with {b} people on each. | 2+ At the next stop {c} get on. How many people are on the bus?
2- At the next stop {c} get off. How many people are on the bus?
2* Each person on the bus pays ${c}. How many dollars are paid?
1* {N} works {a} hours for ${b} an hour. | 1+ {N} earns ${a} and gets a tip of ${b}.
1- {N} earns ${a} and pays ${b} for the bus. | 2- {N} spends ${c}. How many dollars are left?
2+ {N} already had ${c}. How many dollars has {N} now? | 2/ {N} saves it in {c} equal amounts. How many dollars is each?
1/ A baker puts {a} rolls equally on {b} trays and takes one tray. | 1* A baker bakes {a} trays of {b} rolls.
1- A baker bakes {a} rolls and burns {b}. | 2+ The baker adds {c} good rolls. How many good rolls does the baker have?
2- The baker sells {c} good rolls. How many good rolls does the baker have?
2* Each good roll is sold for ${c}. How many dollars does the baker get?
1+ A tank holds {a} litres, and {b} litres flow in. | 1- A tank holds {a} litres, and {b} litres leak out.
1* A pump fills a tank with {a} litres a minute for {b} minutes.
2- {N} takes {c} litres out. How many litres are in the tank?
2+ {N} pours {c} litres in. How many litres are in the tank?
2/ {N} pours it all into {c} equal cans. How many litres are in a can?
1+ A class has {a} girls and {b} boys. | 1- A class has {a} pupils, and {b} are ill.
1* A class sits in {a} rows of {b} pupils. | 2/ Those present form {c} equal teams. How many pupils are in a team?
2* Each pupil present brings {c} pens. How many pens are there?
2+ Then {c} guests join those present. How many people are there?
1/ A rope of {a} m is cut into {b} equal pieces, and {N} takes one. | 1- {N} has a rope of {a} m and cuts off {b} m.
1+ {N} ties a rope of {a} m to one of {b} m. | 2- It shrinks by {c} m. How long is the rope of {N} in m?
2+ {N} ties {c} m more to it. How long is the rope of {N} in m?
2/ {N} cuts it into {c} equal pieces. How long is a piece in m?
1* {N} plants {a} rows of {b} tulips. | 1+ {N} plants {a} red tulips and {b} white ones.
1- {N} plants {a} tulips, and {b} die. | 2- Deer eat {c} of the living ones. How many tulips are left?
2+ {N} plants {c} more. How many living tulips are there?
2/ {N} ties all living ones into {c} equal bunches. How many are in a bunch?
1* {N} scores {a} goals worth {b} points each. | 1+ {N} scores {a} points and then {b} points.
1- {N} scores {a} points and loses {b}. | 2+ A bonus of {c} points follows. How many points has {N}?
2- A fault costs {c} points. How many points has {N}?
2* The last round multiplies the score by {c}. How many points has {N}?
1* {N} runs {a} laps of {b} minutes each. | 1+ {N} runs for {a} minutes and walks for {b} minutes.
1- {N} plans {a} minutes of sport and stops {b} minutes early.
2+ Then {N} swims for {c} minutes. How many minutes of sport are that?
2- Kim does {c} minutes less. How many minutes of sport does Kim do?
2* {N} does this on {c} days. How many minutes of sport are that?
1* A library has {a} shelves of {b} {o}. | 1+ A library has {a} {o} and buys {b} more.
1- A library has {a} {o} and lends {b}. | 2/ The {o} there are put on {c} equal tables. How many are on a table?
2- Then {c} are stolen. How many {o} are there now? | 2+ Then {N} donates {c}. How many {o} are there now?
1/ {N} divides {a} sweets equally among {b} bags and opens one bag. | 1* {N} opens {a} bags of {b} sweets.
1+ {N} opens a bag of {a} sweets and a bag of {b}.
2- {N} eats {c} of the opened sweets. How many opened sweets are left?
2+ {N} adds {c} sweets to the opened ones. How many are that?
2/ {N} shares the opened sweets among {c} children. How many does each get?
1+ A farm has {a} brown hens and {b} white hens. | 1- A farm has {a} hens and sells {b}.
1/ A farm has {a} hens in {b} equal sheds, and {N} cares for one shed.
2* Each of these hens lays {c} eggs. How many eggs are there from these hens?
2+ Then {c} hens join them. How many hens are there with them?
2- Then {c} of these hens fly away. How many of these hens stay?
"""
_NAMES = "Anna Ben Clara David Ella Felix Grace Hugo Iris Jack Lena Mark Nora Oscar Paul Rosa".split()
_THINGS = "books stamps cards coins shells toys mugs plates puzzles cups discs maps".split()
_LEADS = ("", "Solve this problem. ", "Read and calculate. ", "Word problem: ", "Find the result. ")


def _parse_stories(text: str) -> list[dict[str, list[tuple[str, str]]]]:
    """For each story, the pairs (operation, sentence) of its beginnings "1" and of its ends "2"."""
    stories: list[dict[str, list[tuple[str, str]]]] = []
    for line in re.split(r" \| |\n", text.strip()):
        if line[0] == "1" and (not stories or stories[-1]["2"]):  # the first beginning after an end
            stories.append({"1": [], "2": []})
        stories[-1][line[0]].append((line[1], line[3:]))
    return stories


_STORIES = _parse_stories(_STORY_LINES)


def _word_problem(random: Random, split: Split) -> Question | None:
    index = random.randrange(len(_STORIES))
    (first, beginning), (second, end) = (random.choice(_STORIES[index][phase]) for phase in "12")
    structure = f"story {index}: {first} then {second}"
    a = random.randint(2, 30) if first == "*" else random.randint(8, 60)
    b = _operand(random, first, a)
    if b is None or split_of(structure) != split:
        return None
    c = _operand(random, second, int(_evaluate([first, a, b])))
    tree = [second, [first, a, b], c]
    if c is None or _evaluate(tree) == a:  # the second step would undo the first
        return None
    values = {"N": random.choice(_NAMES), "o": random.choice(_THINGS), "a": a, "b": b, "c": c}
    task = f"{random.choice(_LEADS)}{beginning} {end}".format(**values)
    return _question("word-problem", structure, random, task, *_steps(tree), {"tree": tree})


def _sequence(random: Random, split: Split) -> Question | None:
    kind, sign = random.choice(("constant", "alternating", "growing")), random.choice((-1, 1))
    if kind == "constant":
        first, growth = sign * random.randint(2, 15), 0
    elif kind == "alternating":  # up, then up or down
        first, growth = random.randint(1, 9), sign * random.randint(1, 9)
    else:
        first, growth = random.randint(1, 9), random.randint(1, 4)
    structure = f"{kind} {first}, {growth}"
    if split_of(structure) != split or (kind == "alternating" and first == growth):
        return None
    differences = [first, growth] * 2 + [first] if kind == "alternating" else [first + growth * i for i in range(5)]
    terms = list(accumulate(differences, initial=random.randint(1, 90)))
    if min(terms) < 0 or max(terms) > _LIMIT:
        return None
    steps = [_step("-", after, before)[0] for before, after in pairwise(terms[:-1])]
    if kind == "growing":
        steps.append(_step("+", differences[-2], growth)[0])
    steps.append(_step("+" if differences[-1] > 0 else "-", terms[-2], abs(differences[-1]))[0])
    task = random.choice(_TASKS["sequence"]).format(e=", ".join(map(str, terms[:-1])))
    key = {"terms": terms[:-1], "alternating": kind == "alternating"}
    return _question("sequence", structure, random, task, steps, terms[-1], key)


def _average(random: Random, split: Split) -> Question | None:
    count = random.choice((3, 4))
    numbers = [random.randint(2, 30) for _ in range(count)]
    structure = f"{count} numbers with {', '.join(map(str, sorted(numbers)[:2]))}"
    if sum(numbers) % count or sum(numbers) > _LIMIT or split_of(structure) != split:
        return None
    tree: Tree = numbers[0]
    for number in numbers[1:]:
        tree = ["+", tree, number]
    tree = ["/", tree, count]
    task = random.choice(_TASKS["average"]).format(e=f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}")
    return _question("average", structure, random, task, *_steps(tree), {"tree": tree})


FAMILIES: tuple[Family, ...] = tuple(
    Family(name, generate, partial(_check, expected=expected, quotients=name == "fractions"))
    for name, generate, expected in (
        ("chain", _chain, _tree_value),
        ("equation", _equation, _equation_value),
        ("fractions", _fractions, _tree_value),
        ("percentages", _percentages, _tree_value),
        ("word-problem", _word_problem, _tree_value),
        ("sequence", _sequence, _sequence_value),
        ("average", _average, _tree_value),
    )
)
