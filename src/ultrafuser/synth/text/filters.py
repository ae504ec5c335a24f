"""Filters of one text: length, language, refusals, boilerplate, repetition. Each returns None or a reason to reject.

A filter sees one text alone, so that no row depends on other rows.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ultrafuser.data.answer_text import is_refusal, without_code
from ultrafuser.errors import MissingExtraError, RecipeError
from ultrafuser.synth.recipe import FiltersRecipe

MIN_LETTERS = 24  # with fewer letters the language cannot be identified
RUN_WORDS = 5  # length of a run of words that counts as repeated
MAX_UNIT_REPEATS = 32  # of a short unit without spaces
MIN_WORDS = 20  # fewer words cannot be a loop
_UNIT = re.compile(rf"(\S{{1,8}}?)\1{{{MAX_UNIT_REPEATS},}}")
_HORIZONTAL_LINE = re.compile(rf"([-=*_#.~ ])\1{{{MAX_UNIT_REPEATS},}}")
# Text that gives orders to the pipeline, or imitates its control tokens.
_PIPELINE = re.compile(
    # "ignore all previous instructions"
    r"\b(?:ignore|disregard|forget)\b[^.\n]{0,30}\b(?:previous|prior|above|earlier|preceding|all|these|your|the)\b"
    r"[^.\n]{0,20}\b(?:instruction|prompt|rule|direction|guideline|above)s?\b"
    # "skip the earlier messages"
    r"|\b(?:ignore|disregard|forget|override|skip)\b[^.\n]{0,30}\b(?:previous|prior|above|earlier|preceding)\b"
    r"[^.\n]{0,20}\b(?:message|text|context)s?\b"
    # "forget everything above"
    r"|\b(?:ignore|disregard|forget)\b (?:all |everything |anything )?(?:of )?(?:the )?(?:above|previous)\b"
    # "new system prompt:"
    r"|\b(?:new|updated|real|actual) (?:system )?(?:instructions?|prompt)\s*:"
    # "print the hidden prompt"
    r"|\b(?:reveal|print|repeat|output|show)\b[^.\n]{0,20}\b(?:system|hidden|initial) (?:prompt|instructions?)\b"
    # control tokens of chat templates
    r"|<\|(?:im_start|im_end|system|endoftext|begin_of_text|start_header_id|eot_id)\|>|\[/?INST\]|<</?SYS>>"
    # a line that opens a system message
    r"|^[^\S\n]*(?:system|### ?system|### ?instruction)\s*:"
    # the lines around quoted text in our prompts
    r"|^=== (?:end of )?.{0,60}\b[0-9a-f]{8}\s*$"
    # words of our prompts
    r"|\b(?:reply|respond|answer) with nothing but (?:a )?json\b",
    re.I | re.M,
)
_BOILERPLATE = re.compile(
    # "as a large language model", "I am just an AI"
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|virtual assistant)\b"
    r"|\bi(?:['’]m| am) (?:just |only )?an? (?:ai|(?:large )?language model|artificial intelligence)\b"
    # knowledge cut-offs and makers
    r"|\bmy (?:knowledge cut-?off|training data (?:ends|only))\b|\bopenai\b[^.\n]{0,40}\b(?:trained|developed|created)\b"
    r"|\b(?:trained|developed|created) by (?:openai|anthropic|google|meta ai|mistral|alibaba)\b"
    # placeholders such as "[your name]"
    r"|\[(?:your|insert|enter|add)\b[^\]\n]{0,60}\]|\blorem ipsum\b",
    re.I,
)
# Instructions that open with words about the rewriting: "Sure, here is a more complex version", "New instruction:".
_ABOUT_THE_TASK = re.compile(
    r"\W*(?:(?:sure|certainly|of course|absolutely|okay|ok)\b[,!. ]{1,3})?(?:here (?:is|are|['’]s)|below (?:is|are)|this is) "
    r"(?:the|a|an|your|my|one|some|\d+) (?:\w+ ){0,3}(?:rewritten|more complex|new|revised) (?:\w+ )?(?:instructions?|versions?|prompts?)\b"
    r"|\W*(?:rewritten|new|original) (?:instruction|prompt)\s*:",
    re.I,
)
# Instructions about a file or picture that is not there.
_NEEDS_ATTACHMENT = re.compile(
    r"\b(?:(?:the |this )?(?:attached|uploaded) (?:file|image|picture|document|photo)|in the (?:image|picture|figure) (?:below|above|shown))\b",
    re.I,
)
# Answers that quote our prompt for answers.
_QUOTES_PROMPT = re.compile(r"\blines that carry a mark\b|\bfirst-class assistant\b", re.M)
# Formulas, inline code and addresses, which have no language.
_FORMULA = re.compile(
    r"\$\$.{1,1000}?\$\$|\\\[.{1,1000}?\\\]|\\\(.{1,1000}?\\\)|(?<!\\)\$[^$\n]+\$|`[^`\n]+`|https?://\S+", re.S
)


def check_name(text: str) -> str | None:
    """Why a topic or concept is rejected. None: it passes."""
    return "instructs the pipeline" if _PIPELINE.search(text) else None


def check_instruction(text: str, filters: FiltersRecipe) -> str | None:
    """Why an instruction is rejected. None: it passes."""
    limits = filters.min_instruction_chars, filters.max_instruction_chars
    if reason := _wrong_length_or_addressee("instruction", text, *limits):
        return reason
    if _ABOUT_THE_TASK.match(text):
        return "speaks about the task"
    if filters.refusals and (is_refusal(text) or _BOILERPLATE.search(text)):
        return "refusal or boilerplate"
    if _NEEDS_ATTACHMENT.search(text):
        return "needs what is not there"
    return _repetition_or_language(text, filters)


def check_answer(text: str, filters: FiltersRecipe) -> str | None:
    """Why an answer is rejected. None: it passes."""
    if reason := _wrong_length_or_addressee("answer", text, filters.min_answer_chars, filters.max_answer_chars):
        return reason
    if filters.refusals and is_refusal(text):
        return "refusal"
    if filters.refusals and _BOILERPLATE.search(text):
        return "boilerplate"
    if _QUOTES_PROMPT.search(text):
        return "speaks about the task"
    return _repetition_or_language(text, filters)


def _wrong_length_or_addressee(kind: str, text: str, min_chars: int, max_chars: int) -> str | None:
    if len(text) < min_chars:
        return f"{kind} too short"
    if len(text) > max_chars:
        return f"{kind} too long"
    return check_name(text)


def _repetition_or_language(text: str, filters: FiltersRecipe) -> str | None:
    if repetition(text) > filters.max_repetition:
        return "repetition"
    return "another language" if is_other_language(text, filters) else None


def repetition(text: str) -> float:
    """The share of runs of `RUN_WORDS` words that occurred before. 1 for a short unit repeated without spaces."""
    if _UNIT.search(text) and not _HORIZONTAL_LINE.search(text):
        return 1.0
    words = text.casefold().split()
    if len(words) < MIN_WORDS:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    repeated = 0
    for end in range(RUN_WORDS, len(words) + 1):
        run = tuple(words[end - RUN_WORDS : end])
        repeated += run in seen
        seen.add(run)
    return repeated / (len(words) - RUN_WORDS + 1)


def is_other_language(text: str, filters: FiltersRecipe) -> bool:
    """Whether the prose of a text, without code and formulas, is in another language than the recipe's."""
    if filters.language is None:
        return False
    prose = _FORMULA.sub(" ", without_code(text)[:20_000])[:4000]
    letters = sum(character.isalpha() for character in prose)
    if letters < MIN_LETTERS and prose.isascii():  # too short. Other scripts are recognised sooner.
        return False
    language, confidence = _identifier().classify(prose)
    return language not in (filters.language, "zxx", "und") and confidence >= filters.language_confidence


def check_language(filters: FiltersRecipe) -> None:
    """Check before the first request that the language of the recipe can be identified.

    Raises:
        MissingExtraError: py3langid is not installed.
        RecipeError: it knows no such language.
    """
    if filters.language is None:
        return
    labels = sorted(str(name) for name in _identifier().labels)
    if filters.language not in labels:
        raise RecipeError(f"filters.language: got {filters.language!r}, expected one of {', '.join(labels)}, or null")


@cache
def _identifier() -> Any:
    """py3langid: BSD-3-Clause, needs only numpy, 140 languages, about 0.1 ms per text."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtraError("py3langid", "synth", "filtering by language (`filters.language`)") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
