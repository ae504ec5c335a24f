"""Questions about short texts: find, relate, order, infer, rewrite, extract and sort."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from ultrafuser.zoo.exams.question import Family, Question, Split, split_of
from ultrafuser.zoo.exams.text_words import (
    CITIES,
    COLOURS,
    COMPOSED,
    NAMES,
    PLACES,
    RELATIONS,
    SORTED_WORDS,
    THINGS,
    VERBS,
)

_ENDINGS = (
    "Reply with one line `Answer: X`.",
    "Give one line of the form `Answer: X`.",
    "Answer in one line: `Answer: X`.",
    "Write `Answer: X` and nothing else.",
    "Your reply must be a single line `Answer: X`.",
)
_ENDINGS_WITH_STEPS = (
    "Show the steps, then give one line `Answer: X`.",
    "Think in short lines and end with `Answer: X`.",
    "First the steps, then a last line `Answer: X`.",
    "Write each step on a line. The last line is `Answer: X`.",
    "Go step by step and finish with the line `Answer: X`.",
)


def _question(
    random: Random,
    family: str,
    structure: str,
    tasks: Sequence[str],
    answer: str,
    *,
    text: str = "",
    ask: str = "",
    steps: Sequence[str] = (),
) -> Question:
    task = random.choice(tasks).format(text=text, ask=ask)
    ending = random.choice(_ENDINGS_WITH_STEPS if steps else _ENDINGS)
    return Question(family, structure, f"{task} {ending}", "\n".join([*steps, f"Answer: {answer}"]), {"answer": answer})


# ---------------------------------------------------------------- find a fact

_FACTS = (
    "{n} keeps a {c} {t} in the {p}.",
    "In the {p}, {n} has a {c} {t}.",
    "The {c} {t} in the {p} belongs to {n}.",
    "{n} left a {c} {t} at the {p}.",
    "A {c} {t} of {n} stands in the {p}.",
    "{n} went to the {p} for a {c} {t}.",
)
_ASKED = {
    "person by thing": ("Whose is the {t}?", "n"),
    "person by place": ("Who has something in the {p}?", "n"),
    "thing by person": ("Which thing goes with {n}?", "t"),
    "thing by place": ("Which thing is in the {p}?", "t"),
    "place by person": ("Which place goes with {n}?", "p"),
    "place by thing": ("Where is the {t}?", "p"),
    "colour by person": ("Which colour is the thing of {n}?", "c"),
    "colour by thing": ("Which colour is the {t}?", "c"),
}


def _find_fact(random: Random, split: Split) -> Question | None:
    pattern, (kind, (ask, slot)) = random.choice(_FACTS), random.choice(list(_ASKED.items()))
    structure = f"{pattern} {kind}"
    if split_of(structure) != split:
        return None
    columns = zip(
        random.sample(NAMES[split], 3),
        random.sample(THINGS[split], 3),
        random.sample(PLACES[split], 3),
        random.sample(COLOURS, 3),
        strict=True,
    )
    facts = [dict(zip("ntpc", column, strict=True)) for column in columns]
    fact = random.choice(facts)
    patterns = [pattern if values is fact else random.choice(_FACTS) for values in facts]
    text = " ".join(sentence.format(**values) for sentence, values in zip(patterns, facts, strict=True))
    tasks = (
        "{text} {ask}",
        "Read the text. {text} {ask}",
        "Text: {text} Question: {ask}",
        "{ask} The text says: {text}",
        "Use this text only: {text} {ask}",
    )
    return _question(random, "find-fact", structure, tasks, fact[slot], text=text, ask=ask.format(**fact))


# ---------------------------------------------------------------- relate two people


def _family_tree(random: Random, split: Split) -> Question | None:
    (first, second), relations = random.choice(list(COMPOSED.items()))
    sexes = random.randrange(2), random.randrange(2)  # 0: a woman
    structure = f"{RELATIONS[first][sexes[0]]} of the {RELATIONS[second][sexes[1]]}"
    if split_of(structure) != split:
        return None
    c, d, e = random.sample(NAMES[split], 3)
    a, b = (random.choice([name for name in NAMES[split][sex::2] if name not in (c, d, e)]) for sex in sexes)
    if a == b:
        return None
    facts = [f"{a} is the {RELATIONS[first][sexes[0]]} of {b}.", f"{b} is the {RELATIONS[second][sexes[1]]} of {c}."]
    facts.append(f"{d} is the {random.choice(('boss', 'friend', 'teacher', 'neighbour'))} of {e}.")
    random.shuffle(facts)
    tasks = (
        "{text} What is {ask}? One word for the family relation.",
        "Read: {text} Name in one word the family relation: what is {ask}?",
        "Family facts: {text} What is {ask}? Use one word.",
        "Which relative is {ask}? {text} One word.",
        "{text} Say in one word what {ask} is in the family.",
    )
    ask, step = f"{a} to {c}", f"{a} is the {structure} of {c}."
    answer = relations[sexes[0]]
    return _question(random, "family-tree", structure, tasks, answer, text=" ".join(facts), ask=ask, steps=[step])


# ---------------------------------------------------------------- order words


def _word_order(random: Random, split: Split) -> Question | None:
    (_, _, past, rest), time = random.choice(VERBS), random.choice(_TIMES)
    structure = f"{past} {rest} {time}"
    if split_of(structure) != split:
        return None
    words = f"{random.choice(NAMES[split])} {past} {rest} {time}".split()
    shuffled = random.sample(words, len(words))
    if shuffled == words:
        return None
    tasks = (
        "Put these words into the right order, so that they are a sentence: {text}.",
        "Make a sentence of exactly these words: {text}.",
        "The words of a sentence are mixed up: {text}. Restore the sentence.",
        "Restore the order of the words: {text}.",
        "These words were a sentence once: {text}. Which one?",
    )
    return _question(random, "word-order", structure, tasks, f"{' '.join(words)}.", text=" / ".join(shuffled))


_TIMES = ("yesterday", "today", "in the morning", "at noon", "last week", "on Sunday", "after lunch", "in May")


# ---------------------------------------------------------------- follows or contradicts

# a statement, what follows from it, what contradicts it, and what is open
_LOGIC = (
    ("Every {t} in the {p} is {c}.", "No {t} in the {p} is {d}.", "One {t} in the {p} is {d}.", "The {p} is {c}."),
    ("No {t} in the {p} is {c}.", "A {c} {t} is not in the {p}.", "There is a {c} {t} in the {p}.", "The {p} is old."),
    ("{n} has only one {t}, a {c} one.", "{n} has no {d} {t}.", "{n} has two of the kind {t}.", "{m} has a {t} too."),
    ("{n} is older than {m}.", "{m} is younger than {n}.", "{m} is older than {n}.", "{n} is taller than {m}."),
    ("Only {n} was in the {p}.", "{m} was not in the {p}.", "{m} was in the {p}.", "{n} liked the {p}."),
    ("{n} sold the {t} to {m}.", "{m} bought the {t} from {n}.", "{n} never sold the {t}.", "The {t} was {c}."),
    ("{n} and {m} are in the {p}.", "{m} is in the {p}.", "{m} is not in the {p}.", "{m} has a {t}."),
    (
        "Either {n} or {m} has the {t}, but not {m}.",
        "{n} has the {t}.",
        "{n} does not have the {t}.",
        "The {t} is {c}.",
    ),
)


_FOLLOWS, _CONTRADICTS = ("follows from", "is proved by"), ("contradicts", "is ruled out by")


def _inference(random: Random, split: Split) -> Question | None:
    index, follows, position = random.randrange(len(_LOGIC)), random.random() < 0.5, random.randrange(3)
    verb = random.choice(_FOLLOWS if follows else _CONTRADICTS)
    n, m = random.sample(NAMES[split], 2)
    c, d = random.sample(COLOURS, 2)
    values = {"n": n, "m": m, "c": c, "d": d, "t": random.choice(THINGS[split]), "p": random.choice(PLACES[split])}
    statement, following, contradiction, unknown = (sentence.format(**values) for sentence in _LOGIC[index])
    rest = [unknown, contradiction if follows else following]
    random.shuffle(rest)
    rest.insert(position, following if follows else contradiction)
    structure = f"{statement} {verb}"  # its names, things and places are those of the split
    text = f"{statement} " + " ".join(f"({i}) {sentence}" for i, sentence in enumerate(rest, 1))
    tasks = (
        "Statement: {text} Which numbered sentence {ask} the statement? Give its number.",
        "{text} Which of the three numbered sentences {ask} the first sentence? Give the number.",
        "Take this as true: {text} Name the number of the sentence that {ask} it.",
        "Which sentence, by number, {ask} the statement? The statement and the sentences: {text}",
        "Think about this: {text} One numbered sentence {ask} the statement. Which number?",
    )
    steps = [rest[position]]
    return _question(random, "inference", structure, tasks, str(position + 1), text=text, ask=verb, steps=steps)


# ---------------------------------------------------------------- past tense

_TENSES = (
    ("{n} {s} {o}.", "{n} {p} {o}."),
    ("{n} does not {b} {o}.", "{n} did not {b} {o}."),
    ("Today {n} {s} {o}.", "Today {n} {p} {o}."),
    ("{n} and {m} {b} {o}.", "{n} and {m} {p} {o}."),
    ("Does {n} {b} {o}?", "Did {n} {b} {o}?"),
    ("{n} {s} {o} while {m} waits.", "{n} {p} {o} while {m} waited."),
)


def _past_tense(random: Random, split: Split) -> Question | None:
    (base, third, past, rest), (present, sentence) = random.choice(VERBS), random.choice(_TENSES)
    structure = f"{base} in {present}"
    if split_of(structure) != split:
        return None
    n, m = random.sample(NAMES[split], 2)
    values = {"n": n, "m": m, "b": base, "s": third, "p": past, "o": rest}
    tasks = (
        "Rewrite in the past tense: {text}",
        "Put this sentence into the past tense. {text}",
        "Change the tense from present to simple past: {text}",
        "How does this sentence read in the past tense? {text}",
        "Give the simple past of the sentence: {text}",
    )
    return _question(random, "past-tense", structure, tasks, sentence.format(**values), text=present.format(**values))


# ---------------------------------------------------------------- extract a field

_FIELDS = ("name", "city", "email", "order number", "date", "phone number", "amount")
_RECORDS = (
    "Hi, this is {name} from {city}. My order {order number} of {date} is late. Write to {email} or call {phone number}. "
    "I paid {amount}.",
    "{date} | {name} | {email} | {phone number} | {city} | no. {order number} | {amount}",
    "Dear shop, on {date} I ordered {order number} for {amount}. Please send it to {city}. {name}, {phone number}, {email}",
    "from={email}; tel={phone number}; who={name}; where={city}; ref={order number}; sum={amount}; when={date}",
    "Note: {name} called ({phone number}). Lives in {city}, mail {email}. Paid {amount} on {date}, see {order number}.",
    "Invoice {order number}, {date}. Total {amount}. Customer {name}, {city}. Contact: {phone number}, {email}.",
)


def _extract_field(random: Random, split: Split) -> Question | None:
    record, field = random.choice(_RECORDS), random.choice(_FIELDS)
    structure = f"{record[:12]}: {field}"
    if split_of(structure) != split:
        return None
    name = random.choice(NAMES[split])
    values = {
        "name": name,
        "city": random.choice(CITIES),
        "email": f"{name.lower()}{random.randint(2, 99)}@{random.choice(('mail', 'post', 'web'))}.{random.choice(('com', 'org'))}",
        "order number": f"{random.choice('ABKRTX')}{random.randint(100, 999)}",
        "date": f"{random.randint(1, 28)}.{random.randint(1, 12)}.20{random.randint(10, 29)}",
        "phone number": f"555-{random.randint(1000, 9999)}",
        "amount": f"${random.randint(5, 99)}",
    }
    tasks = (
        "{text} What is the {ask} in this message?",
        "Copy the {ask} from this record: {text}",
        "Find the {ask}. {text}",
        "Record: {text} Field wanted: {ask}.",
        "Extract the {ask} from the following. {text}",
    )
    return _question(random, "extract-field", structure, tasks, values[field], text=record.format(**values), ask=field)


# ---------------------------------------------------------------- sort


def _sort_words(random: Random, split: Split) -> Question | None:
    words = random.sample(SORTED_WORDS, random.choice((3, 4)))
    structure = " ".join(sorted(words))
    if split_of(structure) != split:
        return None
    tasks = (
        "Sort these words by the alphabet, with commas: {text}.",
        "Put the words in alphabetical order, parted by commas: {text}.",
        "Alphabetical order, please, with commas: {text}.",
        "List these words from A to Z with commas: {text}.",
        "Order the words {text} as in a dictionary, with commas.",
    )
    return _question(random, "sort-words", structure, tasks, ", ".join(sorted(words)), text=", ".join(words))


# ---------------------------------------------------------------- check

_LINE = re.compile(r"^[*_ ]*answer[*_ ]*:[*_ ]*(.*)$", re.IGNORECASE | re.MULTILINE)


def _plain(text: str) -> str:
    """Without what makes no difference: case, blanks, quotation marks, an article, a full stop at the end."""
    text = re.sub(r"\s+", " ", re.sub(r"[*_`\"“”]", "", text)).strip().lower()
    return re.sub(r"^(?:the|a|an) ", "", text).rstrip(".").strip()


def _check(question: Question, response: str) -> bool:
    """Whether all lines `Answer: X` of the response, at least one, give the answer."""
    answers = {_plain(line) for line in _LINE.findall(response)}
    return answers == {_plain(question.key["answer"])}


FAMILIES: tuple[Family, ...] = (
    Family("find-fact", _find_fact, _check),
    Family("family-tree", _family_tree, _check),
    Family("word-order", _word_order, _check),
    Family("inference", _inference, _check),
    Family("past-tense", _past_tense, _check),
    Family("extract-field", _extract_field, _check),
    Family("sort-words", _sort_words, _check),
)
