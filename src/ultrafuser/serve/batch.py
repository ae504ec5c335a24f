"""The running batch: rows join after their prompts are read, step together, and leave when their answers end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ultrafuser.data.collate import pad_prompts
from ultrafuser.model.cache import UltraFuserCache
from ultrafuser.model.loss import all_logits
from ultrafuser.model.mixing import restrict_weights
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.serve.detokenizer import Detokenizer
from ultrafuser.serve.engine import FinishReason, GenerationError, Request, Token, TokenLogprob
from ultrafuser.serve.prefix_cache import PrefixCache
from ultrafuser.serve.sampler import Draw, Sampler, Sequenced, most_likely

_MAX_COMMON_PADDING = (
    32  # columns of padding in all rows that are carried along, because dropping them copies all states
)


@dataclass(eq=False)
class Row:
    """One request while it runs.

    Attributes:
        active: (K), which specialists take part.
        cache: the states of its prompt until it joins the batch.
        inputs: its prompts, padded to one length, while they are read.
    """

    request: Request
    sequenced: Sequenced
    detokenizer: Detokenizer
    active: Sequence[bool]
    cache: UltraFuserCache | None = None
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Tokens of its longest prompt and of its answer so far."""
        return max(map(len, self.request.prompts)) + len(self.sequenced.answer)


class RunningBatch:
    """The rows that generate, and their states in one cache.

    Attributes:
        rows: those that have joined, in the order of the cache.
        reused_tokens: prompt columns that the prefix cache had.
    """

    def __init__(self, model: UltraFuserForCausalLM, pad_id: int, prefixes: PrefixCache) -> None:
        self.model, self.prefixes = model, prefixes
        self.rows: list[Row] = []
        self.reused_tokens = 0
        self._pad_id = pad_id
        self._cache: UltraFuserCache | None = None
        self._sampler: Sampler | None = None
        self._ends = model.end_token_ids
        self._end = model.config.end_token_id
        self.can_join = self._new_cache().can_join

    def _new_cache(self) -> UltraFuserCache:
        """Sliding windows keep what they have passed only where later turns may need it."""
        return self.model.new_cache(growing=True, record=self.prefixes.max_tokens > 0)

    # ---------------------------------------------------------------- prompts

    def _start(self, row: Row) -> UltraFuserCache:
        """Pad a row's prompts, and take what the prefix cache has of them.

        A row that has left before its answer was complete reads its tokens so far behind them.
        """
        prompts = [[*ids, *row.sequenced.answer] for ids in row.request.prompts]
        inputs = pad_prompts([prompts], self._pad_id, self.model.device)
        ids, mask = inputs["specialist_input_ids"], inputs["specialist_attention_mask"]
        row.inputs = {"ids": ids, "mask": mask}
        cache = self.prefixes.continued(ids, mask)
        row.cache = self._new_cache() if cache is None else cache
        self.reused_tokens += row.cache.get_seq_length()
        return row.cache

    def read(self, row: Row, max_columns: int) -> tuple[int, Token | GenerationError | None]:
        """Read at most `max_columns` more columns of a row's prompts.

        Returns:
            The columns read, and the next token of the answer if that was the rest of the prompts. The row then has to
            join, unless this token is the last one.
        """
        cache = self._start(row) if row.cache is None else row.cache
        ids, mask = row.inputs["ids"], row.inputs["mask"]
        start = cache.get_seq_length()
        # recurrent layers read prompts whole: no other row waits, and not all of them take up a state with more tokens
        end = min(start + max_columns, ids.shape[-1]) if self.can_join else ids.shape[-1]
        is_padded = bool((mask[..., :end] == 0).any())
        states = self.model.specialist_states(ids[..., start:end], mask[..., :end] if is_padded else None, cache)
        if end < ids.shape[-1]:
            return end - start, None
        self.prefixes.put(cache)
        row.inputs = {}
        [token] = self._draw([state[:, -1:] for state in states], [row], self._sampler_of([row]))
        return end - start, token

    def join(self, row: Row) -> None:
        """Take a row in, whose first token was drawn."""
        assert row.cache is not None
        if self._cache is None and self.can_join:
            self._cache = self._new_cache()
        if self._cache is None:  # recurrent states: a batch of one row
            self._cache = row.cache
        else:
            self._cache.join(row.cache)
        row.cache = None
        self.rows.append(row)
        self._sampler = None

    # ---------------------------------------------------------------- steps

    def step(self) -> list[Token | GenerationError]:
        """The next token of every row, or why it has none."""
        last = [row.sequenced.answer[-1] for row in self.rows]
        ids = torch.tensor(last, device=self.model.device)[:, None]  # (B, 1)
        states = self.model.specialist_states(ids, None, self._cache)
        if self._sampler is None:
            self._sampler = self._sampler_of(self.rows)
        return self._draw(states, self.rows, self._sampler)

    def leave(self, rows: Sequence[Row], is_finished: bool = True) -> None:
        """Take rows out.

        Args:
            is_finished: store their states for later turns of the same conversation.
        """
        if not rows:
            return
        assert self._cache is not None
        if is_finished and self.can_join and self.prefixes.max_tokens:
            for row in rows:
                self.prefixes.put(self._states_of(row))
        indices = [i for i, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[i] for i in indices]
        self._sampler = None
        if not indices:
            self._cache = None
            return
        self._cache.batch_select_indices(torch.tensor(indices, device=self.model.device))
        if self._cache.get_seq_length() - max(row.length for row in self.rows) > _MAX_COMMON_PADDING:
            self._cache.trim()

    def clear(self) -> None:
        """Drop all rows and states, after a step that failed."""
        self.rows, self._cache, self._sampler = [], None, None
        self.prefixes.clear()

    def _states_of(self, row: Row) -> UltraFuserCache:
        """A cache of one row alone."""
        assert self._cache is not None
        cache = self._cache.copied()
        cache.batch_select_indices(torch.tensor([self.rows.index(row)], device=self.model.device))
        cache.trim()
        return cache

    # ---------------------------------------------------------------- tokens

    def _sampler_of(self, rows: Sequence[Row]) -> Sampler:
        return Sampler([row.sequenced for row in rows], self.model.config.vocab_size, self.model.device)

    def _draw(
        self, states: Sequence[torch.Tensor], rows: Sequence[Row], sampler: Sampler
    ) -> list[Token | GenerationError]:
        """Weigh and mix the states of one position, and draw a token for each row: K x (B, 1, D_k)."""
        states = [state[:, 0] for state in states]  # K x (B, D_k)
        log_weights = self._log_weights(states, rows)  # (B, K)
        logits = self.model.mix(states, log_weights).to(self.model.device)  # (B, V)
        draws = sampler.draw(logits)
        weights = log_weights.exp().tolist()
        tops = self._specialist_tops(states, rows)
        return [
            self._token(row, draw, tuple(w), top) for row, draw, w, top in zip(rows, draws, weights, tops, strict=True)
        ]

    def _log_weights(self, states: Sequence[torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
        """The gate's log weights, renormalised over the specialists that take part: (B, K)."""
        log_weights = self.model.gate(states)
        if all(all(row.active) for row in rows):
            return log_weights
        active = torch.tensor([list(row.active) for row in rows], device=log_weights.device)
        return restrict_weights(log_weights, active)

    def _specialist_tops(
        self, states: Sequence[torch.Tensor], rows: Sequence[Row]
    ) -> list[tuple[tuple[TokenLogprob, ...], ...]]:
        """The most likely tokens of each specialist alone, for the rows that ask for them."""
        counts = [row.request.sampling.specialist_logprobs for row in rows]
        asking = [i for i, count in enumerate(counts) if count]
        tops: list[tuple[tuple[TokenLogprob, ...], ...]] = [()] * len(rows)
        if not asking:
            return tops
        columns = [
            most_likely(logits.log_softmax(-1), max(counts))
            for logits in all_logits([state[asking] for state in states], self.model.heads())
        ]
        for i, specialists in zip(asking, zip(*columns, strict=True), strict=True):
            tops[i] = tuple(top[: counts[i]] for top in specialists)
        return tops

    def _token(
        self, row: Row, draw: Draw, weights: tuple[float, ...], specialist_top: tuple[tuple[TokenLogprob, ...], ...]
    ) -> Token | GenerationError:
        if math.isnan(draw.logprob):
            return GenerationError(
                "the model predicts NaN for the next token. Its weights are damaged, or its dtype is too small. Try float32"
            )
        sampling, answer = row.request.sampling, row.sequenced.answer
        token_id, reason = draw.token_id, self._finish_reason(row, draw.token_id)
        if token_id in self._ends and not sampling.ignore_eos and self._end is not None:
            token_id = self._end
        answer.append(token_id)
        text = ""
        if token_id not in self._ends or sampling.ignore_eos:
            text = row.detokenizer.add(token_id)
            if row.detokenizer.is_stopped:
                reason = "stop"
        if reason is not None:
            text += row.detokenizer.finish()
        return Token(token_id, text, weights, draw.logprob, draw.top, specialist_top, reason)

    def _finish_reason(self, row: Row, token_id: int) -> FinishReason | None:
        sampling = row.request.sampling
        if token_id in self._ends and not sampling.ignore_eos:
            return "stop"
        return "length" if len(row.sequenced.answer) + 1 >= sampling.max_new_tokens else None
