"""Draw the next token of many requests at once, each in its own way.

The order is vLLM's: logit bias, penalties, temperature, min_p, top_k, top_p. Log-probabilities are those of the mixed
distribution before all of them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.engine import Sampling, TokenLogprob

_CANDIDATES = 256  # the most likely tokens, which almost always hold the top_p. Sorting all of them takes far longer
_MIN_TEMPERATURE = 1e-5  # below it the most likely token is taken, as in vLLM


@dataclass
class Sequenced:
    """A request as the sampler sees it.

    Attributes:
        prompt_tokens: the tokens of the prompts of all specialists. The repetition penalty counts them as used.
        answer: the tokens drawn so far.
        source: of random numbers, one for each token.
    """

    sampling: Sampling
    prompt_tokens: Sequence[int] = ()
    answer: list[int] = field(default_factory=list)
    source: random.Random = field(default_factory=random.Random)


@dataclass(frozen=True)
class Draw:
    """A drawn token, and the most likely ones if they are asked for."""

    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Draws for a fixed set of requests. Make a new one when a request joins or leaves."""

    def __init__(self, rows: Sequence[Sequenced], vocab_size: int, device: torch.device | str = "cpu") -> None:
        self._rows = list(rows)
        self._device = torch.device(device)
        options = [row.sampling for row in self._rows]
        self._penalties = _Penalties(self._rows, vocab_size, self._device)
        self._bias = _bias(options, self._device)
        self._sampled = [i for i, option in enumerate(options) if option.temperature >= _MIN_TEMPERATURE]
        sampled = [options[i] for i in self._sampled]
        self._temperature = self._column([option.temperature for option in sampled])
        self._log_min_p = self._column([math.log(option.min_p) if option.min_p else -math.inf for option in sampled])
        self._has_min_p = any(option.min_p for option in sampled)
        self._filtered = [i for i, option in enumerate(sampled) if option.top_p < 1 or 0 < option.top_k < vocab_size]
        filtered = [sampled[i] for i in self._filtered]
        self._top_k = self._column([option.top_k or vocab_size for option in filtered])
        self._top_p = self._column([option.top_p for option in filtered])
        largest = max((option.top_k for option in filtered), default=0)
        self._candidates = min(vocab_size, max(_CANDIDATES, largest))
        self._num_top = max((option.logprobs or 0 for option in options), default=0)

    def _column(self, values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)[:, None]  # (rows, 1)

    def draw(self, logits: torch.Tensor) -> list[Draw]:
        """The next token of every request.

        Args:
            logits: (B, V), of the mixture, in float32. They stay as they are.
        """
        scores = self._penalties.apply(logits, self._bias)
        tokens = scores.argmax(-1)
        if self._sampled:
            drawn = self._sample(scores if len(self._sampled) == len(self._rows) else scores[self._sampled])
            tokens[self._sampled] = drawn
        log_total = logits.logsumexp(-1, keepdim=True)  # (B, 1)
        logprobs = (logits.gather(-1, tokens[:, None]) - log_total)[:, 0]
        tops = self._top(logits, log_total)
        ids = tokens.tolist()
        self._penalties.count(tokens)
        return [Draw(*draw) for draw in zip(ids, logprobs.tolist(), tops, strict=True)]

    def _top(self, logits: torch.Tensor, log_total: torch.Tensor) -> list[tuple[TokenLogprob, ...]]:
        if not self._num_top:
            return [()] * len(self._rows)
        tops = most_likely(logits - log_total, self._num_top)
        return [top[: row.sampling.logprobs or 0] for top, row in zip(tops, self._rows, strict=True)]

    # ---------------------------------------------------------------- random draws

    def _sample(self, scores: torch.Tensor) -> torch.Tensor:
        """(rows with a temperature, V) -> their tokens."""
        scores = scores / self._temperature
        if self._has_min_p:
            limit = scores.amax(-1, keepdim=True) + self._log_min_p
            scores = scores.masked_fill(scores < limit, -math.inf)
        numbers = [self._rows[i].source.random() for i in self._sampled]
        points = torch.tensor(numbers, dtype=torch.float64, device=self._device)[:, None]  # (rows, 1) in [0, 1)
        if not self._filtered:
            return _inverse(scores.softmax(-1), points)
        tokens = scores.new_empty(len(scores), dtype=torch.long)
        plain = sorted(set(range(len(scores))) - set(self._filtered))
        if plain:
            tokens[plain] = _inverse(scores[plain].softmax(-1), points[plain])
        tokens[self._filtered] = self._sample_filtered(scores[self._filtered], points[self._filtered])
        return tokens

    def _sample_filtered(self, scores: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Tokens among the top_k and top_p: sort the most likely ones, and all where these are not enough."""
        tokens, is_complete = _nucleus(scores, points, self._top_k, self._top_p, self._candidates)
        if not bool(is_complete.all()):
            rest = (~is_complete).nonzero()[:, 0]
            arguments = (scores[rest], points[rest], self._top_k[rest], self._top_p[rest])
            tokens[rest], _ = _nucleus(*arguments, scores.shape[-1])
        return tokens


def most_likely(log_probs: torch.Tensor, count: int) -> list[tuple[TokenLogprob, ...]]:
    """The `count` most likely tokens of each row of (B, V), best first."""
    values, ids = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return [
        tuple(TokenLogprob(token, logprob) for token, logprob in zip(*row, strict=True))
        for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]


def _nucleus(
    scores: torch.Tensor, points: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw among the `count` most likely tokens. The second result is False where more are needed: (n,), (n,)."""
    values, ids = scores.topk(count, dim=-1)  # (n, count), sorted
    outside = torch.arange(count, device=scores.device) >= top_k
    values = values.masked_fill(outside, -math.inf)
    of_all = scores.logsumexp(-1, keepdim=True)
    total = torch.where(top_k <= count, values.logsumexp(-1, keepdim=True), of_all)
    probs = (values - total).exp()
    before = probs.cumsum(-1) - probs  # the probability of the more likely tokens
    is_complete = (top_k <= count) | (before[:, -1:] + probs[:, -1:] >= top_p) | (count == scores.shape[-1])
    kept = probs.masked_fill((before >= top_p) & (before > 0), 0.0)  # the first token always stays
    return ids.gather(-1, _inverse(kept, points)[:, None])[:, 0], is_complete[:, 0]


def _inverse(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """The index at which the running sum of weights passes a point of its total: (n, m), (n, 1) in [0, 1) -> (n,).

    In double precision, because a running sum over a large vocabulary loses the small weights.
    """
    sums = weights.double().cumsum(-1)
    index = torch.searchsorted(sums, points * sums[:, -1:], right=True)
    last = (weights > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # rounding must not choose a weight of 0
    return torch.minimum(index, last)[:, 0]


# ---------------------------------------------------------------- bias and penalties


def _bias(options: Sequence[Sampling], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """Rows, tokens and values of the logit biases."""
    triples = [(i, token, value) for i, option in enumerate(options) for token, value in option.logit_bias.items()]
    if not triples:
        return None
    rows, ids, values = zip(*triples, strict=True)
    return (
        torch.tensor(rows, device=device),
        torch.tensor(ids, device=device),
        torch.tensor(values, dtype=torch.float32, device=device),
    )


class _Penalties:
    """The repetition, presence and frequency penalties, for the rows that have any."""

    def __init__(self, rows: Sequence[Sequenced], vocab_size: int, device: torch.device) -> None:
        def is_penalised(option: Sampling) -> bool:
            return option.repetition_penalty != 1 or option.presence_penalty != 0 or option.frequency_penalty != 0

        self._indices = [i for i, row in enumerate(rows) if is_penalised(row.sampling)]
        penalised = [rows[i] for i in self._indices]
        self._counts = torch.zeros(len(penalised), vocab_size, device=device)  # of the tokens of the answers
        self._in_prompt = torch.zeros(len(penalised), vocab_size, dtype=torch.bool, device=device)
        for i, row in enumerate(penalised):
            answer = torch.tensor(row.answer, dtype=torch.long, device=device)
            self._counts[i] = torch.bincount(answer, minlength=vocab_size).float()
            prompt = torch.tensor(sorted({t for t in row.prompt_tokens if t < vocab_size}), dtype=torch.long)
            self._in_prompt[i, prompt.to(device)] = True
        columns = [
            torch.tensor([value(row.sampling) for row in penalised], device=device)[:, None]
            for value in (
                lambda option: float(option.repetition_penalty),
                lambda option: float(option.presence_penalty),
                lambda option: float(option.frequency_penalty),
            )
        ]
        self._repetition, self._presence, self._frequency = columns  # (n, 1)

    def apply(self, logits: torch.Tensor, bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """Logits with the biases and the penalties: (B, V) -> (B, V). The given ones stay as they are."""
        if bias is None and not self._indices:
            return logits
        scores = logits.clone()
        if bias is not None:
            scores.index_put_(bias[:2], bias[2].to(scores.dtype), accumulate=True)
        if self._indices:
            z, used = scores[self._indices], self._counts > 0
            scaled = torch.where(z > 0, z / self._repetition, z * self._repetition)
            z = torch.where(used | self._in_prompt, scaled, z)
            scores[self._indices] = z - self._frequency * self._counts - self._presence * used
        return scores

    def count(self, tokens: torch.Tensor) -> None:
        """Count the drawn tokens, (B,)."""
        if self._indices:
            rows = torch.arange(len(self._indices), device=tokens.device)
            self._counts[rows, tokens[self._indices]] += 1


def check_sampling(sampling: Sampling, vocab_size: int) -> None:
    """Raises UltraFuserError: a value outside its range, which would give no distribution."""
    ranges = {
        "max_new_tokens": (sampling.max_new_tokens, 1, math.inf),
        "temperature": (sampling.temperature, 0, 1e4),
        "top_k": (sampling.top_k, 0, math.inf),
        "min_p": (sampling.min_p, 0, 1),
        "presence_penalty": (sampling.presence_penalty, -2, 2),
        "frequency_penalty": (sampling.frequency_penalty, -2, 2),
    }
    for key, (value, low, high) in ranges.items():
        if not low <= value <= high:
            limit = f"from {low} to {high:g}" if high < math.inf else f"of at least {low}"
            raise UltraFuserError(f"{key} is {value}, expected a value {limit}")
    for key, value in (("top_p", sampling.top_p), ("repetition_penalty", sampling.repetition_penalty)):
        if not 0 < value <= (1 if key == "top_p" else 1e4):
            raise UltraFuserError(f"{key} is {value}, expected a value above 0" + " up to 1" * (key == "top_p"))
    for token, value in sampling.logit_bias.items():
        if not (0 <= token < vocab_size and math.isfinite(value)):
            raise UltraFuserError(
                f"logit_bias has the token {token} with {value}, expected tokens from 0 to {vocab_size - 1} and finite values"
            )
