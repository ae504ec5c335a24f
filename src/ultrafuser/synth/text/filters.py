"""What a text must be like to stay: long enough, in the language, no refusal, no boilerplate, no loop; None, or a reason.

Every filter is a function of one text, so that a row's fate does not depend on the others'.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from ultrafuser.data.answer_text import is_refusal, without_code
from ultrafuser.errors import MissingExtraError, RecipeError
from ultrafuser.synth.recipe import FiltersRecipe

MIN_LETTERS = 24  # fewer tell no language
RUN = 5  # words
CHAR_RUN = 32  # of one and the same short unit without spaces
MIN_WORDS = 20  # fewer words cannot be a loop
_UNIT = re.compile(rf"(\S{{1,8}}?)\1{{{CHAR_RUN},}}")
_RULE = re.compile(rf"([-=*_#.~ ])\1{{{CHAR_RUN},}}")  # a line drawn across the page
_PIPELINE = re.compile(
    r"\b(?:ignore|disregard|forget)\b[^.\n]{0,30}\b(?:previous|prior|above|earlier|preceding|all|these|your|the)\b"
    r"[^.\n]{0,20}\b(?:instruction|prompt|rule|direction|guideline|above)s?\b"
    r"|\b(?:ignore|disregard|forget|override|skip)\b[^.\n]{0,30}\b(?:previous|prior|above|earlier|preceding)\b"
    r"[^.\n]{0,20}\b(?:message|text|context)s?\b"
    r"|\b(?:ignore|disregard|forget)\b (?:all |everything |anything )?(?:of )?(?:the )?(?:above|previous)\b"
    r"|\b(?:new|updated|real|actual) (?:system )?(?:instructions?|prompt)\s*:"
    r"|\b(?:reveal|print|repeat|output|show)\b[^.\n]{0,20}\b(?:system|hidden|initial) (?:prompt|instructions?)\b"
    r"|<\|(?:im_start|im_end|system|endoftext|begin_of_text|start_header_id|eot_id)\|>|\[/?INST\]|<</?SYS>>"
    r"|^\s*(?:system|### ?system|### ?instruction)\s*:"
    r"|^=== (?:end of )?.{0,60}\b[0-9a-f]{8}\s*$"
    r"|\b(?:reply|respond|answer) with nothing but (?:a )?json\b",
    re.I | re.M,
)
_BOILERPLATE = re.compile(
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model|virtual assistant)\b"
    r"|\bi(?:['’]m| am) (?:just |only )?an? (?:ai|(?:large )?language model|artificial intelligence)\b"
    r"|\bmy (?:knowledge cut-?off|training data (?:ends|only))\b|\bopenai\b[^.\n]{0,40}\b(?:trained|developed|created)\b"
    r"|\b(?:trained|developed|created) by (?:openai|anthropic|google|meta ai|mistral|alibaba)\b"
    r"|\[(?:your|insert|enter|add)\b[^\]\n]{0,60}\]|\blorem ipsum\b",
    re.I,
)
_ABOUT_THE_TASK = re.compile(
    r"\W*(?:(?:sure|certainly|of course|absolutely|okay|ok)\b[,!. ]{1,3})?(?:here (?:is|are|['’]s)|below (?:is|are)|this is) "
    r"(?:the|a|an|your|my|one|some|\d+) (?:\w+ ){0,3}(?:rewritten|more complex|new|revised) (?:\w+ )?(?:instructions?|versions?|prompts?)\b"
    r"|\W*(?:rewritten|new|original) (?:instruction|prompt)\s*:",
    re.I,
)
_NEEDS_MORE = re.compile(
    r"\b(?:(?:the |this )?(?:attached|uploaded) (?:file|image|picture|document|photo)|in the (?:image|picture|figure) (?:below|above|shown))\b",
    re.I,
)
_FORMULA = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<!\\)\$[^$\n]+\$|`[^`\n]+`|https?://\S+", re.S)


def check_name(text: str) -> str | None:
    """Why a topic or concept is left out."""
    return "instructs the pipeline" if instructs_pipeline(text) else None


def check_instruction(text: str, filters: FiltersRecipe) -> str | None:
    """Why an instruction is left out; None: it stays."""
    limits = filters.min_instruction_chars, filters.max_instruction_chars
    if reason := _misplaced("instruction", text, *limits):
        return reason
    if _ABOUT_THE_TASK.match(text):
        return "speaks about the task"
    if filters.refusals and (is_refusal(text) or _BOILERPLATE.search(text)):
        return "refusal or boilerplate"
    if _NEEDS_MORE.search(text):
        return "needs what is not there"
    return _badly_written(text, filters)


def check_answer(text: str, filters: FiltersRecipe) -> str | None:
    """Why an answer is left out; None: it stays."""
    if reason := _misplaced("answer", text, filters.min_answer_chars, filters.max_answer_chars):
        return reason
    if filters.refusals and is_refusal(text):
        return "refusal"
    if filters.refusals and _BOILERPLATE.search(text):
        return "boilerplate"
    if _LEFT_OVER.search(text):
        return "speaks about the task"
    return _badly_written(text, filters)


def _misplaced(what: str, text: str, min_chars: int, max_chars: int) -> str | None:
    """Why a text is none of what was asked for, whatever it says."""
    if len(text) < min_chars:
        return f"{what} too short"
    if len(text) > max_chars:
        return f"{what} too long"
    return "instructs the pipeline" if instructs_pipeline(text) else None


def _badly_written(text: str, filters: FiltersRecipe) -> str | None:
    if repetition(text) > filters.max_repetition:
        return "repetition"
    return "another language" if speaks_otherwise(text, filters) else None


_LEFT_OVER = re.compile(
    r"\blines that carry a mark\b|\bfirst-class assistant\b",
    re.M,
)


def instructs_pipeline(text: str) -> bool:
    """Whether a text speaks to whoever reads it next, not to the person's assistant."""
    return _PIPELINE.search(text) is not None


def repetition(text: str) -> float:
    """The share of words that end a run of `RUN` words which came before; 1 for a short unit repeated without spaces."""
    if _UNIT.search(text) and not _RULE.search(text):
        return 1.0
    words = text.casefold().split()
    if len(words) < MIN_WORDS:
        return 0.0
    seen: set[tuple[str, ...]] = set()
    again = 0
    for end in range(RUN, len(words) + 1):
        run = tuple(words[end - RUN : end])
        again += run in seen
        seen.add(run)
    return again / (len(words) - RUN + 1)


def speaks_otherwise(text: str, filters: FiltersRecipe) -> bool:
    """Whether the prose of a text is in another language; code and formulas say nothing."""
    if filters.language is None:
        return False
    prose = _FORMULA.sub(" ", without_code(text))[:4000]
    letters = sum(character.isalpha() for character in prose)
    if letters < MIN_LETTERS and prose.isascii():
        return False
    language, confidence = _identifier().classify(prose)
    return language not in (filters.language, "zxx", "und") and confidence >= filters.language_confidence


def check_language(filters: FiltersRecipe) -> None:
    """Find out before anything is asked whether languages can be told.

    Raises:
        MissingExtraError: py3langid is not installed.
        RecipeError: it knows no such language.
    """
    if filters.language is None:
        return
    known = sorted(str(name) for name in _identifier().labels)
    if filters.language not in known:
        raise RecipeError(f"filters.language: got {filters.language!r}, expected one of {', '.join(known)}, or null")


@cache
def _identifier() -> Any:
    """py3langid: BSD-3-Clause, numpy alone, 140 languages, about a tenth of a millisecond for a text."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingExtraError("py3langid", "synth", "filtering by language (`filters.language`)") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
