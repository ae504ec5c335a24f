"""The cost of calls: prices, the maximum cost of a call, and estimated prompt lengths."""

from __future__ import annotations

from dataclasses import dataclass

from ultrafuser.synth.calls.request import Request
from ultrafuser.synth.recipe import ModelRecipe

BYTES_PER_TOKEN = 4.0  # of English text with most tokenizers, for estimates only
MESSAGE_TOKENS = 16  # at most, that a chat template adds to a message


@dataclass(frozen=True)
class Prices:
    """Dollars per million tokens."""

    prompt_usd: float = 0.0
    completion_usd: float = 0.0

    def cost_usd(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt_usd + completion_tokens * self.completion_usd) / 1e6

    def ceiling_usd(self, request: Request) -> float:
        """The maximum cost of one attempt: no tokenizer makes more than one token of a byte."""
        return self.cost_usd(most_prompt_tokens(request), request.max_tokens)


def prices_of(model: ModelRecipe) -> Prices:
    """The prices of a model in a recipe."""
    return Prices(model.prompt_usd, model.completion_usd)


def most_prompt_tokens(request: Request) -> int:
    """Maximum number of tokens in the prompt."""
    return _prompt_bytes(request) + MESSAGE_TOKENS * (len(request.messages) + 1)


def likely_prompt_tokens(request: Request) -> int:
    """Estimated number of tokens in the prompt."""
    return round(_prompt_bytes(request) / BYTES_PER_TOKEN) + MESSAGE_TOKENS // 2 * (len(request.messages) + 1)


def _prompt_bytes(request: Request) -> int:
    schema = 0 if request.schema is None else len(repr(request.schema).encode("utf-8", "replace"))
    return schema + sum(len(content.encode("utf-8", "replace")) for _, content in request.messages)
