"""The text exam: right answers pass, others do not, and its two splits share no structure."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import pytest

from ultrafuser.zoo.exams import SPLITS, check, families, questions
from ultrafuser.zoo.exams.text_words import NAMES, PLACES, THINGS, VERBS

QUESTIONS = {split: list(islice(questions("text", split, seed=1), 1400)) for split in SPLITS}
SAMPLES = [question for split in SPLITS for question in QUESTIONS[split][:140]]
FAMILIES = list(families("text"))


@pytest.mark.parametrize("split", SPLITS)
def test_the_reference_answers_are_right(split):
    assert [q.prompt for q in QUESTIONS[split] if not check("text", q, q.answer)] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_to_another_question_is_wrong(name):
    rows = [q for q in QUESTIONS["test"] if q.family == name]
    pairs = [(q, other) for q, other in zip(rows, rows[1:], strict=False) if q.key != other.key]
    assert len(pairs) > 50
    assert [q.prompt for q, other in pairs if check("text", q, other.answer)] == []


@pytest.mark.parametrize("response", ["", "Answer:", "Answer: I don't know", "Answer: X", "I don't know."])
def test_a_lazy_answer_is_wrong(response):
    assert [q.prompt for q in SAMPLES if check("text", q, response)] == []


def test_the_prompt_or_several_answers_are_wrong():
    for question, other in zip(SAMPLES, SAMPLES[len(FAMILIES) :], strict=False):
        assert not check("text", question, question.prompt)
        assert not check("text", question, f"{question.answer}, {other.key['answer']}")
        assert not check("text", question, question.answer.replace("Answer: ", ""))
        if question.key != other.key:
            assert not check("text", question, f"{question.answer}\n{other.answer}")
            assert not check("text", question, f"{other.answer}\n{question.answer}")


def test_the_form_makes_no_difference():
    for question in SAMPLES:
        value = question.key["answer"]
        for response in (f"answer:  {value.upper()}", f"**Answer:** {value}", f"Sure.\n\nAnswer: {value}.\n"):
            assert check("text", question, response), (question, response)


def test_no_structure_and_no_word_is_in_both_splits():
    train, test = ({q.structure for q in QUESTIONS[split]} for split in SPLITS)
    assert not train & test
    for words in (NAMES, THINGS, PLACES):
        assert not set(words["train"]) & set(words["test"])


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_questions(split):
    assert list(islice(questions("text", split, seed=1), 100)) == QUESTIONS[split][:100]
    assert list(islice(questions("text", split, seed=2), 100)) != QUESTIONS[split][:100]


def test_a_question_survives_json():
    for question in SAMPLES:
        assert check("text", replace(question, key=json.loads(json.dumps(question.key))), question.answer)


def test_names_fit_the_relations():
    """Women are mothers, sisters and daughters."""
    women = {name for names in NAMES.values() for name in names[::2]}
    for question in (q for q in SAMPLES if q.family == "family-tree"):
        for word in ("mother", "sister", "daughter"):
            for name in women ^ set(NAMES["train"] + NAMES["test"]):
                assert f"{name} is the {word} of" not in question.prompt


def test_questions_of_facts_are_answered_by_their_text():
    for question in (q for q in SAMPLES if q.family in ("find-fact", "extract-field")):
        assert question.prompt.count(question.key["answer"]) == 1, question.prompt


def test_verbs_have_four_forms():
    for base, third, past, rest in VERBS:
        assert third.startswith(base[:-1]) and third.endswith("s") and past != base or base == "read"
        assert rest
