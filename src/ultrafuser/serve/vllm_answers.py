"""Add gate weights and the specialists' shares to the answers of vLLM's server, whole or streamed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ultrafuser.serve.vllm_request import AnswerPlan
from ultrafuser.serve.vllm_weights import GateWeightsClient, TokenWeights, WeightsUnavailable

logger = logging.getLogger(__name__)

_CONTEXT_TOKENS = (
    6  # of the prompt, before the first token of an answer: some tokenizers take a blank from the first one
)
_REPLACEMENT = "\ufffd"  # what a tokenizer gives for a part of a character


class TextDivider:
    """Divides the text of an answer among its tokens."""

    def __init__(self, tokenizer: Any, keeps_special_tokens: bool, context: Sequence[int] = ()) -> None:
        self._tokenizer, self._skip = tokenizer, not keeps_special_tokens
        self._ids = list(context[-_CONTEXT_TOKENS:])
        self._first, self._end = 0, len(self._ids)  # the ids from first to end are the context of the next ones
        self._num_ahead = 0  # characters of tokens whose text vLLM still holds, since a stop text may begin there

    def divide(self, ids: Sequence[int], text: str | None) -> list[str]:
        """The texts of the next tokens. Joined, they are `text`, the text that vLLM gave with them.

        Args:
            text: None if it is not the text of the tokens, such as for a call of a tool. Then tokens are decoded.
        """
        pieces = [self._piece(token) for token in ids]
        if text is None or not ids:
            return pieces
        ends, ahead = [], self._num_ahead
        for piece in pieces:
            ahead += len(piece)
            ends.append(ahead)
        self._num_ahead = max(0, ahead - len(text))
        ends[-1] = len(text)  # the last token takes what is left
        return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _piece(self, token: int) -> str:
        """The text that becomes certain with a token."""
        self._ids.append(token)
        known, text = self._decode(self._ids[self._first : self._end]), self._decode(self._ids[self._first :])
        if text.endswith(_REPLACEMENT):
            return ""
        self._first, self._end = self._end, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip))


@dataclass
class ChoiceState:
    """What is known of one choice so far."""

    texts: TextDivider
    num_tokens: int = 0


@dataclass
class AnswerExtension:
    """Adds what `plan` asks for to the answer of one request."""

    plan: AnswerPlan
    client: GateWeightsClient
    names: Sequence[str]
    tokenizer: Any
    _choices: dict[int, ChoiceState] = field(default_factory=dict)
    _prompt_ids: list[int] = field(default_factory=list)
    _sums: np.ndarray = field(init=False)  # (K) weights of the tokens so far
    _num_summed: int = 0

    def __post_init__(self) -> None:
        self._sums = np.zeros(len(self.names))

    async def extend_whole(self, answer: dict[str, Any]) -> None:
        """Add to an answer that is complete."""
        choices = answer.get("choices", [])
        self._take_prompt_ids(answer)
        try:
            if self.plan.num_choices == 1 and len(choices) == 1 and choices[0].get("token_ids") is None:
                await self._add_rows(0, answer["usage"]["completion_tokens"])
            await asyncio.gather(*(self._extend_choice(choice, choice.get("message")) for choice in choices))
        except WeightsUnavailable as error:
            logger.warning("an answer goes out without its gate weights: %s", error)
            return
        finally:
            self._remove_ids(answer, choices)
        self._add_shares(answer)

    async def extend_chunk(self, chunk: dict[str, Any]) -> None:
        """Add to one chunk of a stream."""
        choices = chunk.get("choices") or []
        self._take_prompt_ids(chunk)
        try:
            for choice in choices:
                await self._extend_choice(choice, choice.get("delta"))
            usage = chunk.get("usage")
            if usage and self.plan.num_choices == 1 and not self._choices:
                await self._add_rows(0, usage.get("completion_tokens", 0) - self._num_summed)
        except WeightsUnavailable as error:
            logger.warning("a part of a stream goes out without its gate weights: %s", error)
            return
        finally:
            self._remove_ids(chunk, choices)
        self._add_shares(chunk)

    # ---------------------------------------------------------------- one choice

    async def _extend_choice(self, choice: dict[str, Any], message: dict[str, Any] | None) -> None:
        """Read the weights of its new tokens.

        Args:
            message: of a chat. None in a completion.
        """
        ids = choice.get("token_ids")
        if ids is None:
            return
        index = choice["index"]
        if index not in self._choices:
            context = choice.get("prompt_token_ids") or self._prompt_ids
            self._choices[index] = ChoiceState(TextDivider(self.tokenizer, self.plan.keeps_special_tokens, context))
        state = self._choices[index]
        rows = await self._add_rows(index, len(ids), state.num_tokens)
        state.num_tokens += len(ids)
        if self.plan.gate_weights and rows is not None:
            choice["gate_weights"] = {
                "specialists": list(self.names),
                "tokens": state.texts.divide(ids, _text(choice, message)),
                "weights": [[round(float(weight), 4) for weight in row] for row in rows.weights],
            }
            if self.plan.num_top:
                choice["gate_weights"]["top"] = self._tops(rows)

    def _tops(self, rows: TokenWeights) -> list[list[list[dict[str, Any]]]]:
        """(tokens, K, N) most likely tokens of each specialist."""
        return [
            [
                [
                    {"token": self.tokenizer.decode([int(token)]), "logprob": round(float(logprob), 4)}
                    for token, logprob in zip(*specialist, strict=True)
                ]
                for specialist in zip(*token, strict=True)
            ]
            for token in zip(rows.top_ids, rows.top_logprobs, strict=True)
        ]

    async def _add_rows(self, index: int, count: int, first: int | None = None) -> TokenWeights | None:
        """What the gate gave for the next `count` tokens of a choice. Adds their weights to the sums."""
        first = self._num_summed if first is None else first
        if count <= 0 or self.plan.key is None:
            return None
        name = self.plan.choice(index)
        rows = (await self.client.take(self.plan.key, {name: (first, first + count)}))[name]
        self._sums += rows.weights.sum(0, dtype=np.float64)
        self._num_summed += count
        return rows

    # ---------------------------------------------------------------- the answer

    def _add_shares(self, answer: dict[str, Any]) -> None:
        if answer.get("usage") and self.plan.key is not None:
            shares = self._sums / max(1, self._num_summed)
            answer["usage"]["specialist_shares"] = {
                name: round(float(share), 4) for name, share in zip(self.names, shares, strict=True)
            }

    def _take_prompt_ids(self, answer: dict[str, Any]) -> None:
        self._prompt_ids = answer.get("prompt_token_ids") or self._prompt_ids

    def _remove_ids(self, answer: dict[str, Any], choices: Sequence[dict[str, Any]]) -> None:
        """Take out the ids that the client did not ask for. vLLM writes null where nobody asks."""
        if not self.plan.adds_token_ids:
            return
        for part in (answer, *choices):
            for name in ("token_ids", "prompt_token_ids"):
                if part.get(name) is not None:
                    part[name] = None


def _text(choice: dict[str, Any], message: dict[str, Any] | None) -> str | None:
    """The text of a choice's tokens. None if it is not in the answer as it was generated."""
    if message is None:
        return choice.get("text") or ""
    if message.get("tool_calls") or message.get("reasoning"):
        return None
    return message.get("content") or ""


def as_json(answer: Any) -> bytes:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":")).encode()
