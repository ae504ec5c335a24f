"""What a recipe is going to ask, without asking it: calls, tokens and dollars of every stage and domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ultrafuser.errors import RecipeError
from ultrafuser.synth.calls.money import likely_prompt_tokens, prices_of
from ultrafuser.synth.calls.request import STAGES, STOPS, Request
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import DomainRecipe, SynthRecipe
from ultrafuser.synth.stages.items import portions, shares

# Typical lengths, for the estimate alone. UltraChat 2 has 399 to 558 tokens a conversation (the paper, table 15).
TOKENS = {"name": 6, "concept": 5, "instruction": 50, "complex": 110, "answer": 430, "turn": 45, "rating": 70}
_NAME, _INSTRUCTION, _ANSWER = "x" * 24, "x" * 200, "x" * 1720  # four characters a token


@dataclass(frozen=True)
class PlannedStage:
    """What a stage of a domain is going to take, if every reply can be used.

    Attributes:
        part: of a stage that asks in two ways: `strong` or `weak`, `user` or `answer`.
    """

    stage: str
    part: str
    domain: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


def stages_until(until: str | None) -> Sequence[str]:
    """The stages that ask a model before a run stops there.

    Raises:
        RecipeError: no such stage.
    """
    if until is not None and until not in STOPS:
        raise RecipeError(f"--until {until}: no such stage, expected one of {', '.join(STOPS)}")
    return STAGES if until is None else STAGES[: STOPS.index(until) + 1]


def plan(recipe: SynthRecipe, prompts: Prompts, until: str | None = None) -> list[PlannedStage]:
    """Every stage and domain that asks for something, up to the stage to stop after.

    Raises:
        RecipeError: as of `stages_until`.
    """
    stages, out = stages_until(until), []
    for domain in recipe.domains:
        for stage, prompt, calls, values, tokens in _calls(recipe, domain):
            if not calls or stage not in stages:
                continue
            asked_as = recipe.asked_as(stage, prompt)
            call, role = recipe.call(asked_as), recipe.role(asked_as, domain)
            request = Request(stage, domain.name, "", role, prompts.messages(prompt, domain=domain, **values))
            read, written = calls * likely_prompt_tokens(request), calls * min(tokens, call.max_tokens)
            usd = prices_of(recipe.model(role)).cost_usd(read, written)
            part = values.get("relation", "") if stage != "turns" else "user" if prompt == stage else "answer"
            out.append(PlannedStage(stage, part, domain.name, role, calls, read, written, usd))
    return out


def _calls(recipe: SynthRecipe, domain: DomainRecipe) -> Iterator[tuple[str, str, int, dict[str, Any], int]]:
    """(stage, prompt, calls, what the prompt gets, tokens of a reply)."""
    counts, calls = domain.counts, recipe.calls
    topics = max(counts.meta_topics, len(domain.topics))
    names: dict[str, Any] = {"topic": _NAME, "subtopic": _NAME}
    asked = portions(counts.meta_topics - len(domain.topics), calls.meta_topics.per_call)
    yield "meta_topics", "meta_topics", len(asked), _list(asked), _most(asked) * TOKENS["name"]
    asked = [n for share in shares(counts.sub_topics, topics) for n in portions(share, calls.sub_topics.per_call)]
    per_name = TOKENS["name"] + counts.concepts * TOKENS["concept"]
    yield (
        "sub_topics",
        "sub_topics",
        len(asked),
        _list(asked) | {"topic": _NAME, "num_concepts": counts.concepts},
        _most(asked) * per_name,
    )
    firsts = shares(counts.instructions, counts.sub_topics)
    asked = [n for share in firsts for n in portions(share, calls.instructions.per_call)]
    values = _list(asked) | names | {"concepts": [_NAME] * 3}
    yield "instructions", "instructions", len(asked), values, _most(asked) * TOKENS["instruction"]
    total, size = counts.instructions, calls.expand.examples
    for relation, ratio in (("strong", counts.strong), ("weak", counts.weak)):
        asked = [n for share in firsts if share for n in shares(round(share * ratio), -(-share // size)) if n]
        total += sum(asked)
        values = names | {"number": _most(asked), "relation": relation, "examples": [_INSTRUCTION] * size}
        yield "expand", "expand", len(asked), values, _most(asked) * TOKENS["instruction"]
    yield "complex", "complex", round(total * recipe.complex_share), {"instruction": _INSTRUCTION}, TOKENS["complex"]
    answer: dict[str, Any] = {"instruction": _INSTRUCTION, "history": []}
    yield "responses", "responses", total, answer, TOKENS["answer"]
    yield "samples", "responses", total * domain.samples, answer, TOKENS["answer"]
    if recipe.filters.min_score is not None:
        yield "judge", "judge", total, {"instruction": _INSTRUCTION, "answer": _ANSWER}, TOKENS["rating"]
    for turn in range(1, recipe.turns):
        talks, before = round(total * recipe.multi_turn_share), [{"user": _INSTRUCTION, "assistant": _ANSWER}] * turn
        yield "turns", "turns", talks, {"history": before}, TOKENS["turn"]
        yield "turns", "responses", talks, answer | {"history": before}, TOKENS["answer"]


def _list(asked: list[int]) -> dict[str, Any]:
    return {"number": _most(asked), "known": []}


def _most(asked: list[int]) -> int:
    return max(asked, default=0)
