"""Estimate of a recipe without any request: calls, tokens and dollars of every stage and domain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ultrafuser.errors import RecipeError
from ultrafuser.synth.calls.money import likely_prompt_tokens, prices_of
from ultrafuser.synth.calls.request import STAGES, STOPS, Request
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import DomainRecipe, SynthRecipe
from ultrafuser.synth.stages.items import portions, shares

# Typical lengths in tokens, for the estimate alone. UltraChat 2 has 399 to 558 tokens per conversation (the paper, table 15).
TOKENS = {"name": 6, "concept": 5, "instruction": 50, "complex": 110, "answer": 430, "turn": 45, "rating": 70}
_NAME, _INSTRUCTION, _ANSWER = "x" * 24, "x" * 200, "x" * 1720  # four characters per token


@dataclass(frozen=True)
class PlannedStage:
    """What a stage of a domain takes if every reply is usable.

    Attributes:
        part: for a stage with two kinds of requests: `strong` or `weak`, `user` or `answer`.
    """

    stage: str
    part: str
    domain: str
    model: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float


class _Calls(NamedTuple):
    """Requests of one kind, with the values of their prompt and the tokens of a reply."""

    stage: str
    prompt: str
    num_calls: int
    values: dict[str, Any]
    reply_tokens: int


def stages_until(until: str | None) -> Sequence[str]:
    """The stages that make requests before a run stops after `until`.

    Raises:
        RecipeError: no such stage.
    """
    if until is not None and until not in STOPS:
        raise RecipeError(f"--until {until}: no such stage, expected one of {', '.join(STOPS)}")
    return STAGES if until is None else STAGES[: STOPS.index(until) + 1]


def plan(recipe: SynthRecipe, prompts: Prompts, until: str | None = None) -> list[PlannedStage]:
    """Every stage and domain that makes requests, up to the stage to stop after.

    Raises:
        RecipeError: as for `stages_until`.
    """
    stages, planned = stages_until(until), []
    for domain in recipe.domains:
        for calls in _calls(recipe, domain):
            if not calls.num_calls or calls.stage not in stages:
                continue
            call, role = recipe.settings(calls.stage, calls.prompt, domain)
            messages = prompts.messages(calls.prompt, domain=domain, **calls.values)
            request = Request(calls.stage, domain.name, "", role, messages)
            prompt_tokens = calls.num_calls * likely_prompt_tokens(request)
            reply_tokens = calls.num_calls * min(calls.reply_tokens, call.max_tokens)
            usd = prices_of(recipe.model(role)).cost_usd(prompt_tokens, reply_tokens)
            part = calls.values.get("relation", "")
            if calls.stage == "turns":
                part = "user" if calls.prompt == calls.stage else "answer"
            planned.append(
                PlannedStage(calls.stage, part, domain.name, role, calls.num_calls, prompt_tokens, reply_tokens, usd)
            )
    return planned


def _calls(recipe: SynthRecipe, domain: DomainRecipe) -> Iterator[_Calls]:
    """The requests of a domain, stage by stage."""
    counts, calls = domain.counts, recipe.calls
    names: dict[str, Any] = {"topic": _NAME, "subtopic": _NAME}
    # Topics and sub-topics, in lists.
    sizes = portions(counts.meta_topics - len(domain.topics), calls.meta_topics.per_call)
    yield _Calls("meta_topics", "meta_topics", len(sizes), _list_values(sizes), _largest(sizes) * TOKENS["name"])
    topics = max(counts.meta_topics, len(domain.topics))
    sizes = [n for share in shares(counts.sub_topics, topics) for n in portions(share, calls.sub_topics.per_call)]
    per_name = TOKENS["name"] + counts.concepts * TOKENS["concept"]
    values = _list_values(sizes) | {"topic": _NAME, "num_concepts": counts.concepts}
    yield _Calls("sub_topics", "sub_topics", len(sizes), values, _largest(sizes) * per_name)
    # First instructions, in lists.
    first_counts = shares(counts.instructions, counts.sub_topics)
    sizes = [n for share in first_counts for n in portions(share, calls.instructions.per_call)]
    values = _list_values(sizes) | names | {"concepts": [_NAME] * 3}
    yield _Calls("instructions", "instructions", len(sizes), values, _largest(sizes) * TOKENS["instruction"])
    # Related instructions, one request per group of examples.
    total, group = counts.instructions, calls.expand.examples
    for relation, ratio in (("strong", counts.strong), ("weak", counts.weak)):
        sizes = [n for share in first_counts if share for n in shares(round(share * ratio), -(-share // group)) if n]
        total += sum(sizes)
        values = names | {"number": _largest(sizes), "relation": relation, "examples": [_INSTRUCTION] * group}
        yield _Calls("expand", "expand", len(sizes), values, _largest(sizes) * TOKENS["instruction"])
    # One request per instruction.
    num_complex = round(total * recipe.complex_share)
    yield _Calls("complex", "complex", num_complex, {"instruction": _INSTRUCTION}, TOKENS["complex"])
    answer: dict[str, Any] = {"instruction": _INSTRUCTION, "history": []}
    yield _Calls("responses", "responses", total, answer, TOKENS["answer"])
    yield _Calls("samples", "responses", total * domain.samples, answer, TOKENS["answer"])
    if recipe.filters.min_score is not None:
        values = {"instruction": _INSTRUCTION, "answer": _ANSWER}
        yield _Calls("judge", "judge", total, values, TOKENS["rating"])
    # Further turns: a question and its answer.
    conversations = round(total * recipe.multi_turn_share)
    for turn in range(1, recipe.turns):
        history = [{"user": _INSTRUCTION, "assistant": _ANSWER}] * turn
        yield _Calls("turns", "turns", conversations, {"history": history}, TOKENS["turn"])
        yield _Calls("turns", "responses", conversations, answer | {"history": history}, TOKENS["answer"])


def _list_values(sizes: list[int]) -> dict[str, Any]:
    return {"number": _largest(sizes), "known": []}


def _largest(sizes: list[int]) -> int:
    return max(sizes, default=0)
