"""The stories, words and wordings of the mixed exam."""

from __future__ import annotations

import re
from typing import NamedTuple

from ultrafuser.zoo.exams.wordings import parse_wordings

# A story has a heading, `# function nouns: quantity`, beginnings (1) and ends (2), each with its operation.
# Any beginning goes with any end. The test split has pairs of operations that training lacks in that story, in either family.
_STORY_LINES = """
# cost ticket|dollar: number of dollars that {N} pays for tickets
1* {N} buys {a} tickets for {b} dollars each. | 1+ {N} buys tickets for {a} dollars and for {b} dollars.
1- {N} buys tickets for {a} dollars in all and gets {b} dollars off. | 2+ A fee of {c} dollars is added.
2- Then a voucher of {c} dollars is used. | 2* {N} does the same in each of {c} weeks.
# pages page: number of pages that {N} reads
1* {N} reads {a} pages on each of {b} days. | 1+ {N} reads {a} pages on Friday and {b} pages on Saturday.
1- {N} wants to read {a} pages but leaves out {b} pages. | 2+ Later come {c} more pages.
2- Of these, {c} pages are blank and do not count. | 2* The same happens in each of {c} weeks.
# apples apple: number of apples that {N} has in the end
1* {N} fills {a} baskets with {b} apples each. | 1+ {N} picks {a} red apples and {b} green apples.
1- {N} picks {a} apples and eats {b} apples. | 2+ A friend brings {c} more apples. | 2- Then {c} apples go to a friend.
2* In a better year {N} has {c} times as many apples.
# points goal|point: number of points that {N} gets for goals
1* {N} scores {a} goals worth {b} points each. | 1+ {N} gets {a} points for early goals and {b} points for late goals.
1- {N} gets {a} points for goals but loses {b} points for fouls. | 2+ A bonus of {c} points is added.
2- A penalty of {c} points is taken away. | 2* The last round multiplies the points by {c}.
# wage shop|dollar: number of dollars that {N} earns in the shop
1* {N} works {a} hours in a shop for {b} dollars an hour. | 1+ {N} earns {a} dollars in a shop and a tip of {b} dollars.
1- {N} earns {a} dollars in a shop and pays {b} dollars of tax. | 2+ The owner adds {c} dollars.
2- The bus takes {c} dollars of it. | 2* {N} does the same in each of {c} weeks.
# seats hall|seat: number of seats in the hall of {N}
1* The hall of {N} has {a} rows of {b} seats. | 1+ The hall of {N} has {a} old seats and {b} new seats.
1- The hall of {N} had {a} seats, and {b} seats broke. | 2+ Then {c} seats are brought in.
2- Then {c} seats are carried out. | 2* Then a builder multiplies the number of seats by {c}.
# water tank|litre: number of litres in the tank of {N}
1* A pump fills the tank of {N} for {a} minutes with {b} litres a minute.
1+ The tank of {N} holds {a} litres, and {b} litres flow in.
1- The tank of {N} holds {a} litres, and {b} litres leak out. | 2+ Rain adds {c} litres.
2- The garden needs {c} litres of it. | 2* A flood then multiplies the litres by {c}.
# rolls bakery|roll: number of rolls in the bakery of {N}
1* In the bakery of {N}, {a} trays with {b} rolls each are baked.
1+ The bakery of {N} bakes {a} white rolls and {b} dark rolls.
1- The bakery of {N} bakes {a} rolls and burns {b} rolls. | 2+ A second oven adds {c} rolls. | 2- Guests eat {c} rolls.
2* The same is done on each of {c} days.
# eggs farm|egg: number of eggs on the farm of {N}
1* On the farm of {N}, {a} hens lay {b} eggs each. | 1+ The farm of {N} has {a} brown eggs and {b} white eggs.
1- The farm of {N} has {a} eggs, and a fox takes {b} eggs. | 2+ A neighbour brings {c} eggs.
2- Of these, {c} eggs are cooked. | 2* The same happens in each of {c} weeks.
# minutes sport|minute: number of minutes of sport that {N} does
1* For sport, {N} runs {a} laps of {b} minutes each. | 1+ For sport, {N} runs {a} minutes and swims {b} minutes.
1- {N} plans {a} minutes of sport and stops {b} minutes early. | 2+ A walk adds {c} minutes.
2- A break takes {c} minutes of it. | 2* {N} does the same on each of {c} days.
# beads chain|bead: number of beads on the chain of {N}
1* The chain of {N} has {a} parts with {b} beads each. | 1+ The chain of {N} has {a} blue beads and {b} red beads.
1- The chain of {N} had {a} beads and lost {b} beads. | 2+ Then {c} beads are put on. | 2- Then {c} beads fall off.
2* Then {N} multiplies the number of beads by {c}.
# books library|book: number of books in the library of {N}
1* The library of {N} has {a} shelves with {b} books each. | 1+ The library of {N} has {a} old books and buys {b} books.
1- The library of {N} has {a} books and lends {b} books. | 2+ A gift adds {c} books. | 2- Of these, {c} books are sold.
2* Then the library grows to {c} times as many books.
# tulips garden|tulip: number of tulips in the garden of {N}
1* The garden of {N} has {a} rows of {b} tulips. | 1+ The garden of {N} has {a} red tulips and {b} white tulips.
1- The garden of {N} had {a} tulips, and {b} tulips died. | 2+ Then {c} tulips are planted. | 2- Deer eat {c} tulips.
2* A year later there are {c} times as many tulips.
# people bus|people: number of people on the bus of {N}
1* The bus of {N} has {a} benches with {b} people on each.
1+ The bus of {N} carries {a} people, and {b} people get on.
1- The bus of {N} carries {a} people, and {b} people get off. | 2+ At the next stop {c} people get on.
2- At the next stop {c} people get off. | 2* Later the bus carries {c} times as many people.
"""
NAMES = {
    "train": "Anna Ben Clara David Ella Felix Grace Hugo Iris Jack Lena Mark Nora Oscar Paul Rosa".split(),
    "test": "Adam Beth Carl Diana Emil Fiona Greg Helen Ivan Julia Kevin Laura".split(),
}
ROLES = "baker teacher nurse driver farmer painter singer doctor tailor pilot".split()
# What people of a passage do: the verb for one person, for several, and the things.
DEEDS = [
    tuple(line.split())
    for line in (
        "bakes bake rolls|picks pick apples|sells sell lamps|reads read pages|plants plant trees|paints paint fences|"
        "carries carry boxes|repairs repair bikes|folds fold shirts|washes wash plates|sorts sort letters|"
        "catches catch fish|counts count birds|builds build tables|draws draw maps|finds find coins"
    ).split("|")
]
# What a described function does first with its list or word: the words, and the Python.
_FIRST_LINES = """
adds up the `numbers`: sum(numbers) | takes the largest of the `numbers`: max(numbers)
takes the smallest of the `numbers`: min(numbers) | counts the `numbers`: len(numbers)
takes the first of the `numbers`: numbers[0] | takes the last of the `numbers`: numbers[-1]
adds the first and the last of the `numbers`: numbers[0] + numbers[-1]
adds the largest and the smallest of the `numbers`: max(numbers) + min(numbers)
adds up the even ones of the `numbers`: sum(n for n in numbers if n % 2 == 0)
adds up the odd ones of the `numbers`: sum(n for n in numbers if n % 2 == 1)
counts the even ones of the `numbers`: len([n for n in numbers if n % 2 == 0])
counts those of the `numbers` that are greater than 9: len([n for n in numbers if n > 9])
counts the different ones of the `numbers`: len(set(numbers)) | counts the letters of the `word`: len(word)
counts how often the letter e is in the `word`: word.count("e")
counts how often the letter a is in the `word`: word.count("a")
"""
FIRST = [(words, code) for words, code in (row.split(": ") for row in re.split(r" \| |\n", _FIRST_LINES.strip()))]
THEN = [
    ("adds `k` to the result", "+", "first + k"),
    ("subtracts `k` from the result", "-", "first - k"),
    ("multiplies the result by `k`", "*", "first * k"),
    ("subtracts the result from `k`", "from", "k - first"),
]
WORDS = (
    "apple banana letter window garden orange teacher pepper camera market tree salad planet carpet velvet river "
    "basket meadow elephant seven"
).split()
_WORDINGS = """
# function-value-sentence
{story} Write a function `{f}({args})` for the {q}, and find its value for {values}.
{story} What is the {q}? Give a function `{f}({args})` and the value for {values}.
Problem: {story} The function `{f}({args})` shall return the {q}. Write it and compute it for {values}.
Read this. {story} Code a function `{f}({args})` that returns the {q}. Then take {values}.
{story} I need a function `{f}({args})` that returns the {q}, and the result for {values}.
# function-value-sentence order
Begin with one sentence that says what the function gives and for whom. Then comes one ```python block, then the \
steps as in `2 + 3 = 5`, then a last line `Answer: X`.
Order: one sentence that explains the function and names the person, one ```python block, the steps as in `2 + 3 = 5`, \
a last line `Answer: X`.
First explain the function in one sentence with the name of the person. Next write one ```python block, then one \
step such as `2 + 3 = 5` per line, and last `Answer: X`.
# passage-numbers
{story} {ask} Who is the {role}? | Passage: {story} Questions: {ask} Who is the {role}?
Read the passage. {story} Who is the {role}? {ask} | {ask} Also name the {role}. The passage: {story}
Here are some facts. {story} Tell me who the {role} is, and calculate: {ask}
# passage-numbers order
Begin with one sentence that names the {role} and nobody else. Then write the step as in `2 + 3 = 5`, then a last \
line `Answer: X`.
Order: one sentence that names the {role} and nobody else, the step as in `2 + 3 = 5`, a last line `Answer: X`.
First name the {role}, and nobody else, in one sentence. Next write the calculation as a step such as `2 + 3 = 5`, \
and last `Answer: X`.
# code-and-value
A function `{f}({args})` {first} and then {then}. What does it return for {values}?
`{f}({args})` {first}. Then it {then} and returns that. Which value does it return for {values}?
Write the function `{f}({args})`. It {first}, then {then}. Give its value for {values}.
What is the value of `{f}({args})` for {values}? The function {first} and {then}.
I need a function `{f}({args})`. It {first} and then {then}. Tell me also what it returns for {values}.
# code-and-value order
Begin with the function in one ```python block. Then write the last step of the calculation \
as in `2 + 3 = 5`, then a last line `Answer: X`.
Order: one ```python block with the function, the last step of the calculation as in `2 + 3 = 5`, a last line \
`Answer: X`.
First write the function in one ```python block. Next write the last calculation as a step such as \
`2 + 3 = 5`, and last `Answer: X`.
# passage-code
{story} Write the rule for the {q} as a function `{f}(n)`.
Passage: {story} Task: code `{f}(n)`, which returns the {q}.
Read the passage. {story} Turn its rule into a function `{f}(n)` that returns the {q}.
{story} Give me a function `{f}(n)` for the {q}.
Here is a rule. {story} The function `{f}(n)` returns the {q}. Write it.
# passage-code order
Begin with one sentence that names the person whom the rule is for, and nobody else. Then comes one ```python block.
Order: one sentence that names the person of the rule and nobody else, then one ```python block.
First say in one sentence whom the rule is for, and name nobody else. Next write one ```python block.
"""
TASKS = parse_wordings(_WORDINGS)
DISTRACTIONS = (
    "{M} lives next door and has {x} cats.",
    "{M} is {x} years old and only looks on.",
    "Meanwhile {M} sleeps for {x} minutes.",
    "{M} has {x} cousins.",
    "{M} walks {x} miles on that day.",
)


class Story(NamedTuple):
    function: str
    nouns: str  # one of which a sentence must hold, with bars between them
    quantity: str  # with a slot for the name
    beginnings: list[tuple[str, str]]  # operations and sentences
    ends: list[tuple[str, str]]


def _parse_stories(text: str) -> list[Story]:
    stories: list[Story] = []
    for line in re.split(r" \| |\n", text.strip()):
        if line.startswith("#"):
            heading, quantity = line[2:].split(": ")
            function, nouns = heading.split()
            stories.append(Story(function, nouns, quantity, [], []))
        else:
            sentences = stories[-1].beginnings if line[0] == "1" else stories[-1].ends
            sentences.append((line[1], line[3:]))
    return stories


STORIES = _parse_stories(_STORY_LINES)
