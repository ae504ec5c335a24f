"""Tokens of an engine -> objects of the OpenAI API, whole or as chunks of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

from ultrafuser.serve.engine import Token, TokenLogprob
from ultrafuser.serve.protocol import AnswerRequest
from ultrafuser.serve.responses import (
    Answer,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    CompletionAnswer,
    CompletionChoice,
    CompletionLogprobs,
    GateWeights,
    Logprob,
    TokenLogprobs,
    TokenTop,
    Usage,
)
from ultrafuser.serve.token_text import TokenTexts

_DECIMALS = 4  # of gate weights
_MIN_LOGPROB = -9999.0  # of tokens with probability 0, as in vLLM


@dataclass
class TokenCounts:
    """Counts the tokens of all choices, and adds up their gate weights.

    Attributes:
        prompt_tokens: of the longest of the specialists' prompts, summed over the prompts of the request.
    """

    names: Sequence[str]
    prompt_tokens: int
    completion_tokens: int = 0
    weight_sums: list[float] = field(default_factory=list)  # (K)

    def __post_init__(self) -> None:
        self.weight_sums = [0.0] * len(self.names)

    def add(self, token: Token) -> None:
        self.completion_tokens += 1
        self.weight_sums = [total + weight for total, weight in zip(self.weight_sums, token.weights, strict=True)]

    def usage(self) -> Usage:
        count = max(1, self.completion_tokens)
        shares = [round(total / count, _DECIMALS) for total in self.weight_sums]
        return Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            specialist_shares=dict(zip(self.names, shares, strict=True)),
        )


class AnswerWriter(Protocol):
    """Writes the answers to one request. Each is JSON."""

    def opening(self, num_choices: int) -> list[str]:
        """The chunks before the first token."""

    def chunk(self, index: int, token: Token) -> str | None:
        """The chunk of a token. None: it adds nothing that the client wants."""

    def usage_chunk(self, usage: Usage) -> str:
        """The chunk that ends a stream."""

    def whole(self, choices: Sequence[Sequence[Token]], usage: Usage) -> str:
        """All answers in one object."""


class _Writer:
    """What the writers share: the fields around the choices, and gate weights."""

    prefix = ""

    def __init__(self, request: AnswerRequest, model: str, names: Sequence[str], texts: TokenTexts) -> None:
        self._names, self._texts = list(names), texts
        self._head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self._num_logprobs = request.num_logprobs
        self._has_weights = bool(request.gate_weights)
        self._has_top = self._has_weights and bool(request.specialist_logprobs)
        self._streams_usage = bool(request.stream_options and request.stream_options.include_usage)
        # fields of a choice that the client did not ask for, in the form that pydantic excludes
        self._unwanted: dict[str, Any] = {}
        if not self._has_top:
            self._unwanted["gate_weights"] = {"top"} if self._has_weights else True

    def _json(self, answer: Answer, unwanted: Mapping[str, Any], usage: bool = True) -> str:
        exclude: dict[str, Any] = {"choices": {"__all__": dict(unwanted)}} if unwanted else {}
        return answer.model_dump_json(exclude=exclude if usage else {**exclude, "usage": True})

    def _is_visible(self, token: Token) -> bool:
        """Whether a token changes what the client sees."""
        return bool(token.text or token.finish_reason or self._has_weights) or self._num_logprobs is not None

    def _gate_weights(self, tokens: Sequence[Token]) -> GateWeights | None:
        if not self._has_weights:
            return None
        return GateWeights(
            specialists=self._names,
            tokens=[token.text for token in tokens],
            weights=[[round(weight, _DECIMALS) for weight in token.weights] for token in tokens],
            top=[[self._tops(top) for top in token.specialist_top] for token in tokens] if self._has_top else None,
        )

    def _tops(self, top: Sequence[TokenLogprob]) -> list[TokenTop]:
        return [TokenTop(token=self._texts.text(t.token_id), logprob=_finite(t.logprob)) for t in top]


class ChatWriter(_Writer):
    """Writes the answers to a conversation."""

    prefix = "chatcmpl"

    def opening(self, num_choices: int) -> list[str]:
        delta = ChatDelta(role="assistant", content="")
        choices = [
            ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None) for index in range(num_choices)
        ]
        return [self._chunk(choice, {"gate_weights": True}) for choice in choices]

    def chunk(self, index: int, token: Token) -> str | None:
        if not self._is_visible(token):
            return None
        choice = ChatChunkChoice(
            index=index,
            delta=ChatDelta(content=token.text),
            logprobs=self._logprobs([token]),
            finish_reason=token.finish_reason,
            gate_weights=self._gate_weights([token]),
        )
        return self._chunk(choice, {**self._unwanted, "delta": {"role"}})

    def _chunk(self, choice: ChatChunkChoice, unwanted: Mapping[str, Any]) -> str:
        return self._json(ChatChunk(**self._head, choices=[choice]), unwanted, self._streams_usage)

    def usage_chunk(self, usage: Usage) -> str:
        return self._json(ChatChunk(**self._head, choices=[], usage=usage), {})

    def whole(self, choices: Sequence[Sequence[Token]], usage: Usage) -> str:
        written = [
            ChatChoice(
                index=index,
                message=ChatMessage(content="".join(token.text for token in tokens)),
                logprobs=self._logprobs(tokens),
                finish_reason=tokens[-1].finish_reason or "length",
                gate_weights=self._gate_weights(tokens),
            )
            for index, tokens in enumerate(choices)
        ]
        return self._json(ChatAnswer(**self._head, choices=written, usage=usage), self._unwanted)

    def _logprobs(self, tokens: Sequence[Token]) -> ChatLogprobs | None:
        if self._num_logprobs is None:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprobs(
                    token=self._texts.text(token.token_id),
                    logprob=_finite(token.logprob),
                    bytes=self._texts.utf8(token.token_id),
                    top_logprobs=[self._logprob(top) for top in token.top],
                )
                for token in tokens
            ]
        )

    def _logprob(self, top: TokenLogprob) -> Logprob:
        texts = self._texts
        return Logprob(token=texts.text(top.token_id), logprob=_finite(top.logprob), bytes=texts.utf8(top.token_id))


class CompletionWriter(_Writer):
    """Writes the answers to plain prompts."""

    prefix = "cmpl"

    def __init__(self, request: AnswerRequest, model: str, names: Sequence[str], texts: TokenTexts) -> None:
        super().__init__(request, model, names, texts)
        self._offsets: dict[int, int] = {}  # characters of each choice's tokens so far

    def opening(self, num_choices: int) -> list[str]:
        return []

    def chunk(self, index: int, token: Token) -> str | None:
        if not self._is_visible(token):
            return None
        answer = CompletionAnswer(**self._head, choices=[self._choice(index, [token])])
        return self._json(answer, self._unwanted, self._streams_usage)

    def usage_chunk(self, usage: Usage) -> str:
        return self._json(CompletionAnswer(**self._head, choices=[], usage=usage), {})

    def whole(self, choices: Sequence[Sequence[Token]], usage: Usage) -> str:
        written = [self._choice(index, tokens) for index, tokens in enumerate(choices)]
        return self._json(CompletionAnswer(**self._head, choices=written, usage=usage), self._unwanted)

    def _choice(self, index: int, tokens: Sequence[Token]) -> CompletionChoice:
        return CompletionChoice(
            index=index,
            text="".join(token.text for token in tokens),
            logprobs=self._logprobs(index, tokens),
            finish_reason=tokens[-1].finish_reason,
            gate_weights=self._gate_weights(tokens),
        )

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        texts = [self._texts.text(token.token_id) for token in tokens]
        start = self._offsets.get(index, 0)
        *offsets, self._offsets[index] = accumulate(map(len, texts), initial=start)
        return CompletionLogprobs(
            text_offset=offsets,
            token_logprobs=[_finite(token.logprob) for token in tokens],
            tokens=texts,
            top_logprobs=[self._top_logprobs(token) for token in tokens],
        )

    def _top_logprobs(self, token: Token) -> dict[str, float]:
        """By text. Of tokens with the same text, such as parts of characters, the most likely one is shown."""
        drawn = TokenLogprob(token.token_id, token.logprob)
        best: dict[str, float] = {}
        for top in (*token.top, drawn):
            best.setdefault(self._texts.text(top.token_id), _finite(top.logprob))
        return best


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, _MIN_LOGPROB)
