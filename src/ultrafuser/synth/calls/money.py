"""What calls cost: prices, the most that a call may cost, and how long a prompt is likely to be."""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser.synth.calls.request import Request
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

    def ceiling_usd(self, request: Request) -> float:
        """What one try may cost at most: no tokenizer makes more than one token of a byte."""
        return self.cost_usd(most_prompt_tokens(request), request.max_tokens)


def prices_of(model: ModelRecipe) -> Prices:
    """The prices that a recipe states for a model."""
    return Prices(model.prompt_usd, model.completion_usd)


def most_prompt_tokens(request: Request) -> int:
    """Tokens of the prompt at most."""
    return _prompt_bytes(request) + MESSAGE_TOKENS * (len(request.messages) + 1)


def likely_prompt_tokens(request: Request) -> int:
    """Tokens of the prompt, roughly."""
    return round(_prompt_bytes(request) / BYTES_PER_TOKEN) + MESSAGE_TOKENS // 2 * (len(request.messages) + 1)


def _prompt_bytes(request: Request) -> int:
    schema = 0 if request.schema is None else len(repr(request.schema).encode("utf-8", "replace"))
    return schema + sum(len(content.encode("utf-8", "replace")) for _, content in request.messages)
