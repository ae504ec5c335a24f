"""What every engine is asked for and what it gives: a request with its sampling, and the tokens of the answer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from ultrafuser.errors import UltraFuserError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are drawn. The names and meanings are those of the OpenAI API and vLLM.

    Attributes:
        max_new_tokens: the largest number of tokens of the answer.
        temperature: 0 takes the most likely token.
        top_k: 0 keeps all tokens.
        seed: two requests with one seed draw the same tokens, whatever runs beside them. None: a random seed.
        stop: texts that end the answer. They are not part of it.
        ignore_eos: continue after an end token, for benchmarks.
        logprobs: how many of the most likely tokens come with their log-probabilities. 0: the drawn token alone. None: none.
        specialist_logprobs: as `logprobs`, for each specialist alone. 0: none.
        specialists: the specialists that take part. The gate's weights are renormalised over them. None: all.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    specialist_logprobs: int = 0
    specialists: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Request:
    """One answer to generate.

    Attributes:
        prompts: the prompt of each specialist in its own template, K sequences of token ids.
        keep_blanks: leave the blanks around the answer that chat templates write. For prompts of plain text.
    """

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    keep_blanks: bool = False


@dataclass(frozen=True)
class TokenLogprob:
    """One candidate for the next token and its log-probability in nats."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Attributes:
        token_id: an end token is given as the shared end of the fused model. Its text is what was held back before it.
        text: the text that becomes certain with this token. Empty inside a character of several tokens, or while the
            text may be the beginning of a stop text. The texts of an answer, joined, are the answer.
        weights: (K) the gate's weights that this token was drawn with. They sum to 1.
        logprob: log-probability of the token in the mixed distribution, before temperature and filters.
        top: the most likely tokens of the mixture, if asked for.
        specialist_top: (K) the most likely tokens of each specialist, if asked for.
        finish_reason: why the answer ends with this token, on the last one alone.
    """

    token_id: int
    text: str
    weights: tuple[float, ...]
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    specialist_top: tuple[tuple[TokenLogprob, ...], ...] = ()
    finish_reason: FinishReason | None = None


class EngineBusyError(UltraFuserError):
    """As many requests wait as the engine accepts. The same request may succeed later."""


class EngineClosedError(UltraFuserError):
    """The engine takes no more requests, or was closed before the answer was complete."""


class GenerationError(UltraFuserError):
    """A forward pass failed, e.g. for lack of memory. The request may be right."""


class TokenStream(Protocol):
    """The tokens of one answer, to iterate over once."""

    def __aiter__(self) -> AsyncIterator[Token]: ...

    async def aclose(self) -> None:
        """Cancel the request, unless its answer is complete."""


class Engine(Protocol):
    """Generates the answers of many requests at once."""

    @property
    def names(self) -> Sequence[str]:
        """The K specialists."""

    @property
    def context_length(self) -> int:
        """The largest number of tokens of a prompt and its answer together."""

    @property
    def running(self) -> int:
        """Requests that are being answered."""

    @property
    def waiting(self) -> int:
        """Requests in the queue."""

    def stream(self, request: Request) -> TokenStream:
        """The tokens of one answer. Closing the iterator cancels the request and frees its states at the next step.

        Raises:
            UltraFuserError: the request cannot be run (a prompt that does not fit, no specialist left).
            EngineBusyError, EngineClosedError: at the call.
            GenerationError, EngineClosedError: while the tokens are read.
        """

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, finish the running ones within `grace_s` seconds, cancel the rest."""
