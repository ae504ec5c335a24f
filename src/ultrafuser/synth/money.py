"""What calls cost: prices, the most that a call may cost, and estimates before anything is asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ultrafuser.synth.asks import Ask
from ultrafuser.synth.recipe import ModelRecipe

BYTES_PER_TOKEN = 4.0  # of English text and most tokenizers: for estimates alone
MESSAGE_TOKENS = 16  # that a chat template puts around a message, at most


@dataclass(frozen=True)
class Prices:
    """Dollars for a million tokens."""

    prompt_usd: float = 0.0
    completion_usd: float = 0.0

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd) / 1e6

    def ceiling_usd(self, ask: Ask) -> float:
        """What one try may cost at most: no tokenizer makes more than one token of a byte."""
        return self.cost_usd(most_prompt_tokens(ask), ask.max_tokens)


def prices_of(model: ModelRecipe) -> Prices:
    """The prices that a recipe states for a model."""
    return Prices(model.prompt_usd, model.completion_usd)


def most_prompt_tokens(ask: Ask) -> int:
    """Tokens of the prompt at most."""
    return _prompt_bytes(ask) + MESSAGE_TOKENS * (len(ask.messages) + 1)


def likely_prompt_tokens(ask: Ask) -> int:
    """Tokens of the prompt, roughly."""
    return round(_prompt_bytes(ask) / BYTES_PER_TOKEN) + MESSAGE_TOKENS // 2 * (len(ask.messages) + 1)


def _prompt_bytes(ask: Ask) -> int:
    schema = 0 if ask.schema is None else len(repr(ask.schema).encode("utf-8", "replace"))
    return schema + sum(len(content.encode("utf-8", "replace")) for _, content in ask.messages)


# ---------------------------------------------------------------- estimates


@dataclass(frozen=True)
class Planned:
    """Calls that a stage is going to make.

    Attributes:
        prompt_tokens, completion_tokens: of one call on average.
    """

    stage: str
    role: str
    calls: int
    prompt_tokens: float
    completion_tokens: float


@dataclass(frozen=True)
class Estimate:
    """What planned calls take.

    Attributes:
        minutes: at least, by the limits a minute; 0.0 where there are none.
    """

    stage: str
    role: str
    calls: int
    prompt_tokens: int
    completion_tokens: int
    usd: float
    minutes: float


def planned(asks: Iterable[Ask], completion_tokens: float | None = None) -> list[Planned]:
    """Asks as planned calls, by stage and role; `completion_tokens`: of a reply, None: as many as each may have."""
    sums: dict[tuple[str, str], list[float]] = {}
    for ask in asks:
        own = sums.setdefault((ask.stage, ask.role), [0, 0.0, 0.0])
        own[0] += 1
        own[1] += likely_prompt_tokens(ask)
        own[2] += ask.max_tokens if completion_tokens is None else completion_tokens
    return [Planned(*key, int(n), prompt / n, completion / n) for key, (n, prompt, completion) in sums.items()]


def estimate(calls: Iterable[Planned], model: Callable[[str], ModelRecipe]) -> list[Estimate]:
    """What calls will take: tokens, dollars, minutes.

    Args:
        model: role -> its model of the recipe, such as `SynthRecipe.model`.
    """
    out = []
    for each in calls:
        own = model(each.role)
        prompt, completion = each.calls * each.prompt_tokens, each.calls * each.completion_tokens
        by_requests = each.calls / own.requests_per_minute if own.requests_per_minute else 0.0
        by_tokens = (prompt + completion) / own.tokens_per_minute if own.tokens_per_minute else 0.0
        usd = prices_of(own).cost_usd(prompt, completion)
        out.append(Estimate(each.stage, each.role, each.calls, round(prompt), round(completion), usd,
                            max(by_requests, by_tokens)))  # fmt: skip
    return out
