"""What is read out of an answer: numbers, formulas and letters, right, wrong and unreadable."""

from __future__ import annotations

import time

import pytest

from ultrafuser.evaluate.tasks import choices
from ultrafuser.evaluate.tasks import read_answers as answers


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("18", "18"),
        ("She makes 9 * 2 = $18 every day.", "18"),
        ("So she has 1,319 eggs.", "1319"),
        (r"It costs \$1{,}200.50 in all.", "1200.50"),
        ("There were 3. Now there are -2.", "-2"),
        ("It is 9-4", "4"),  # an operator, not a sign
        ("It is −4", "-4"),
        ("half of it, .5", ".5"),
        ("3/4 of the cake", "3/4"),
        ("Step 1: 16 - 3 = 13\n#### 13\nThank you for 5 stars", "13"),
        ("The answer is 18. She sold them in 4 days.", "18"),
        ("The answer is 9 * 2 = 18 dollars for 4 days", "18"),
        ("**Answer:** 42 (from 6 boxes of 7)", "42"),
        ("Final answer:\n\n42\n", "42"),
        ("Answer: 5\nNo, that is wrong.\nAnswer: 6", "6"),
        ("I get \\boxed{18}. In 4 days it would be 72.", "18"),
        (r"I get $\boxed{\frac{36}{2}}$", r"\frac{36}{2}"),
        ("\\boxed{none} but 7", "7"),
        ("The answer is 18, for 4 days.\nI hope that my answer is of help.", "18"),
        ("<think>maybe 4 or 5</think>It is 6.", "6"),
        ("<think>maybe 4 or 5", None),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_number(answer, expected):
    assert answers.number(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        # separators of thousands: blanks of all kinds, apostrophes, LaTeX, groups of two as in India
        ("The total is 1 200.", "1200"),
        ("12\u00a0345\u00a0678 people", "12345678"),
        ("1\u2009200\u2009000.5 m", "1200000.5"),
        ("-45\u202f000", "-45000"),
        ("It is 1'200, or 1’200", "1200"),
        (r"10~000 and $9\;500$", "9500"),
        ("1,00,000 rupees", "100000"),
        ("₹12,34,567.50 in all", "1234567.50"),
        ("in 2023 100 people", "100"),  # a year and a number
        ("It took 3.5 100", "100"),
        # powers and fractions
        ("so 10^3", "10^{3}"),
        ("so 10**3", "10^{3}"),
        ("so 2 ** 10", "2^{10}"),
        ("so 10⁶", "10^{6}"),
        ("so 10^(-3)", "10^{-3}"),
        ("so 1e3 of them", "1e3"),
        ("so 2.5E-4", "2.5E-4"),
        (r"$1.5 \times 10^{3}$", r"1.5 \times 10^{3}"),
        ("about 2 x 10^4", r"2 \times 10^{4}"),
        ("about 6.02·10²³", r"6.02 \times 10^{23}"),
        (r"The answer is \frac{10}{2}, for 4 days", r"\frac{10}{2}"),
        (r"The answer is 1\dfrac{1}{2}", r"1\dfrac{1}{2}"),
        (r"The answer is $-\tfrac34$", r"-\tfrac34"),
        ("The answer is 2 1/2 hours", "2 1/2"),
        ("2^{10} = 1024", "1024"),
        ("**Answer** **42**", "42"),  # bold, no power
        ("so x^2 + y^{2} = z**2 with 5", "5"),
        # units
        ("The area is 16 cm^2", "16"),
        ("The area is 16 cm² and no more", "16"),
        ("The volume is 3 m^{3}.", "3"),
        ("Her speed is 60 km/h", "60"),
        ("It costs €1 200", "1200"),
        ("It costs -£5", "-5"),
        # the first "####" before a number
        ("#### 13\nQuestion: How many?\n#### 7", "13"),
        ("#### 13 eggs in 4 days\nThe answer is 5", "13"),
        ("####\n13", "13"),
        ("#### $1,200", "1200"),
        ("#### **-3**", "-3"),
        ("#### 9 * 2 = 18", "18"),
        (r"#### \frac{10}{2}", r"\frac{10}{2}"),
        ("#### Step 1: add 5\nIt is 18.\n#### 18\nI had 3 steps", "18"),
        ("#### 1. Add the 5 boxes\n#### 18", "18"),
        ("#### 1) Add the 5 boxes\nThe answer is 18, not 4", "18"),
        ("It is 5.\n#### She has 13 eggs after 4 days", "13"),
        ("##### 5\nthen 7", "7"),
    ],
)
def test_numbers_as_people_write_them(answer, expected):
    assert answers.number(answer) == expected


@pytest.mark.parametrize(
    "blanks", [" " * 50_000, "\u2009" * 50_000, "1 " * 50_000, "####" * 20_000, "^" * 50_000, "1," * 50_000]
)
def test_long_answers_are_read_in_linear_time(blanks):
    start = time.perf_counter()
    assert answers.number(f"{blanks} and 7") == "7"
    assert time.perf_counter() - start < 2.0


@pytest.mark.parametrize(
    ("answer", "expression"),
    [
        (r"so $x = \boxed{\frac{3}{4}}$.", r"\frac{3}{4}"),
        (r"first \boxed{1}, then \boxed{\sqrt{\frac{1}{2}}}", r"\sqrt{\frac{1}{2}}"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\fbox{7} of 8", "7"),
        ("The answer is 3/4\nI hope that my answer is right.", "3/4"),
        (r"\boxed 5", "5"),
        (r"\boxed{} and \boxed{3", "{3"[1:]),  # neither is a box; the last number is 3
        (r"The answer is $x^2 + 1$, since $x > 0$.", r"x^2 + 1, x > 0"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 3.5. I hope it is right.", "3.5"),
        ("**Answer:** Evelyn", "Evelyn"),
        ("Final answer:\n\\(\\pi\\)", r"\pi"),
        ("We have $a = 1$ and then \\[ b = 2 \\] and so on.", "b = 2"),
        ("It costs 5 and 6", "6"),
        ("No idea", None),
    ],
)
def test_expression(answer, expression):
    assert answers.expression(answer) == expression


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("**B**", "B"),
        ("B) 21", "B"),
        ("(B) 21 is what remains", "B"),
        ("Step 1: ...\n\nAnswer: (C)", "C"),
        ("The answer is C.", "C"),
        ("The correct answer is option D", "D"),
        ("The answer is: **(A)**", "A"),
        ("The answer is A because it is 2.", "A"),
        ("the answer is $\\boxed{\\text{(B)}}$", "B"),
        (r"\boxed{B}", "B"),
        (r"Therefore \boxed{\textbf{(E)} 5}", "E"),
        ("Option B is correct, as (A) is too small and (C) too large.", "B"),
        ("Answer: (A)\nWait.\nAnswer: (D)", "D"),
        ("I would take (D), then.", "D"),
        ("The correct choice is (B). Option (A) is wrong.", "B"),
        ("The answer is A car of 2 tons", None),  # an article
        ("(A) is wrong. (B) is wrong too.", None),
        ("The answer is 21.", None),
        ("Because of Bob", None),
        ("", None),
    ],
)
def test_stated_letter(answer, letter):
    assert choices.stated_letter(answer, 5) == letter


def test_a_letter_past_the_options_is_none():
    assert choices.stated_letter("Answer: E", 4) is None
    assert choices.stated_letter("Answer: E", 5) == "E"


@pytest.mark.parametrize(
    ("option", "split"),
    [
        ("(A)2", ("A", "2")),
        ("A)21", ("A", "21")),
        ("(B) $\\quad 5.7$", ("B", "$\\quad 5.7$")),
        ("E)None of these", ("E", "None of these")),
        ("A)A)59", ("A", "59")),
        ("None", (None, "None")),
        ("A car", (None, "A car")),
    ],
)
def test_the_label_of_an_option_is_split_off(option, split):
    assert choices.split_label(option) == split


def test_scores_of_letters():
    doc = {"options": ["1", "2"], "target": 1}
    assert choices.score_stated_letter(doc, ["Answer: (B)"]) == {"acc": 1.0, "unparsed": 0.0}
    assert choices.score_stated_letter(doc, ["Answer: (A)"]) == {"acc": 0.0, "unparsed": 0.0}
    assert choices.score_stated_letter(doc, ["Hm."]) == {"acc": 0.0, "unparsed": 1.0}
