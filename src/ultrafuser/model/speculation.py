"""Lossless speculative decoding: tokens that are cheap to guess are checked by all specialists in one pass.

The answers are those of the fused model: token for token with greedy decoding, and draws from the same distribution with
sampling (algorithm 1 of arXiv 2211.17192). Drafts come from

- the text itself: what followed its last tokens where they stood before. This costs nothing.
- one group of specialists, which runs ahead of the others. The gate needs the same states of it later, so nothing is
  computed twice. Specialists on one base are one group, because one of them alone is hardly faster than all.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .cache import UltraFuserCache
from .errors import UltraFuserError

MODES = ("auto", "ngram", "specialist")
_NGRAM = (2, 8)  # tokens that must stand in the text before, and that are compared at most
_SEARCHED = 4096  # last tokens of the text that are searched
# The time of one more position in a pass, as a share of a pass of one position (docs/speed.md).
_POSITION_COST = {"cpu": 0.15}
_POSITION_COST_ACCELERATOR = 0.03
_PRIOR = (1.5, 0.5)  # accepted and rejected drafts that an estimate begins with
_FORGET = 0.9  # what the counts of a round weigh in the next one


@dataclass
class Speculation:
    """How to draft, and what came of it. `speculative` of `generate` takes one, or the mode alone.

    Attributes:
        mode: `ngram`: draft from the text itself. `specialist`: let a group of specialists draft. `auto`: the text, and a
            group where the text has nothing.
        max_draft: tokens that are drafted for one pass, at most.
        passes: of all specialists, after the prompt.
        tokens: in each row of the answers.
        drafted, accepted: tokens of each row that passes checked, and that the answers keep.
    """

    mode: str = "auto"
    max_draft: int = 16
    passes: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)

    @property
    def acceptance(self) -> float:
        """The share of the drafted tokens that the answers keep. NaN if none was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")


def read_speculation(model: Any, value: Any) -> Speculation:
    """The `speculative` argument of `generate` of a fused model.

    Raises:
        UltraFuserError: an unknown mode, a negative length, or no group that could draft for others.
    """
    speculation = value if isinstance(value, Speculation) else Speculation("auto" if value is True else value)
    if speculation.mode not in MODES:
        raise UltraFuserError(f"speculative={speculation.mode!r} is not known. Use {', '.join(MODES)}, or leave it out")
    if type(speculation.max_draft) is not int or speculation.max_draft < 0:
        raise UltraFuserError(f"max_draft={speculation.max_draft!r} is no number of tokens. Give 0 or more")
    if speculation.mode == "specialist" and len(model.groups) < 2:
        raise UltraFuserError(
            "speculative='specialist' needs specialists that run apart, but those of this model run together on one base, so "
            "that one alone is hardly faster. Use speculative='ngram'"
        )
    return speculation


def decode_speculatively(
    model: Any,
    input_ids: Any,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    speculation: Speculation,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Generate with a fused model, in place of transformers' `_sample`, from the arguments that `generate` prepares.

    The rows of a batch advance together: a pass adds the tokens up to the first one that differs from a row's draft. The
    tokens behind it are drawn again, which changes no distribution, because no choice depended on them.

    Raises:
        UltraFuserError: an option that this loop lacks, or a cache that cannot take back tokens.
    """
    _check_options(generation_config, model_kwargs, synced_gpus)
    outputs = model._prefill(input_ids, generation_config, model_kwargs)
    cache, logits = outputs.past_key_values, outputs.logits[:, -1:]  # (B, 1, V)
    if not isinstance(cache, UltraFuserCache) or not cache.can_join:
        raise UltraFuserError(
            "speculative decoding takes tokens back, which the cache of a recurrent specialist cannot. Leave out speculative"
        )
    chooser = _Chooser(logits_processor, generation_config.do_sample)
    answers = _Answers(input_ids, chooser, stopping_criteria, generation_config._pad_token_tensor, streamer)
    drafting = _Drafting(model, speculation)
    longest = min([stopping_criteria.max_length or 2**31, *model.config.contexts.values()])
    drafts = _Drafts(input_ids[:, :0])
    with cache.recording_past():
        while True:
            kept = answers.add(logits, drafts)
            speculation.tokens += kept + 1
            cache.crop(kept - drafts.size)
            drafting.learn(drafts, kept)
            if not answers.unfinished.any():
                break
            ids = answers.input_ids
            model.check_length(ids[:, -1:], cache)
            drafts = drafting.draft(ids, cache, longest - ids.shape[1] - 1, chooser, answers.going_on)
            logits = drafting.verify(torch.cat([ids[:, -1:], drafts.tokens], dim=-1), cache, drafts)
    if streamer is not None:
        streamer.end()
    if generation_config.return_dict_in_generate:
        return GenerateDecoderOnlyOutput(sequences=answers.input_ids, past_key_values=cache)
    return answers.input_ids


def _check_options(generation_config: Any, model_kwargs: dict[str, Any], synced_gpus: bool) -> None:
    if synced_gpus:
        raise UltraFuserError("speculative decoding runs in one process. Leave out synced_gpus or speculative")
    for name in ("output_scores", "output_logits"):
        if getattr(generation_config, name, None):
            raise UltraFuserError(f"speculative decoding keeps no scores. Leave out {name} or speculative")
    if generation_config.guidance_scale not in (None, 1):
        raise UltraFuserError("speculative decoding has no guidance. Leave out guidance_scale or speculative")
    if not model_kwargs.get("use_cache"):
        raise UltraFuserError("speculative decoding needs use_cache=True. Leave out use_cache or speculative")
    if model_kwargs.get("position_ids") is not None:
        raise UltraFuserError("speculative decoding takes no position_ids. Leave out one of them")


class _Drafts(NamedTuple):
    """Drafted tokens.

    Attributes:
        tokens: (B, n).
        probs: of the draws, (B, n, V). None: the tokens were not drawn.
        states: of the group that drafted, by location, at the token before the drafts and at the drafts: (B, n + 1, D).
        source: the estimate that learns from them.
    """

    tokens: torch.Tensor
    probs: torch.Tensor | None = None
    states: dict[tuple[int, int], torch.Tensor] = {}
    source: _Acceptance | None = None

    @property
    def size(self) -> int:
        """n."""
        return self.tokens.shape[1]


class _Chooser:
    """Draws tokens from logits, and compares drafts with them."""

    def __init__(self, logits_processor: Any, do_sample: bool) -> None:
        self.logits_processor, self.do_sample = logits_processor, do_sample

    def draw(self, input_ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The next token of each row, (B), and the probabilities that it was drawn from, (B, V). None: it has the most."""
        scores = self._scores(input_ids, logits)
        if not self.do_sample:
            return scores.argmax(-1), None
        probs = scores.softmax(-1)
        return torch.multinomial(probs, 1)[:, 0], probs

    def check(
        self, input_ids: torch.Tensor, logits: torch.Tensor, drafts: _Drafts, i: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The next token of each row, and whether it is the i-th draft, so that the logits behind that one are valid."""
        draft = drafts.tokens[:, i] if i < drafts.size else None
        if draft is None or not self.do_sample:
            token, _ = self.draw(input_ids, logits)
            return token, torch.zeros_like(token, dtype=torch.bool) if draft is None else token == draft
        target = self._scores(input_ids, logits).softmax(-1)  # (B, V)
        certain = torch.nn.functional.one_hot(draft, target.shape[-1]).to(target)
        proposal = certain if drafts.probs is None else drafts.probs[:, i]
        ratio = target.gather(1, draft[:, None]) / proposal.gather(1, draft[:, None])
        accepted = torch.rand_like(ratio)[:, 0] < ratio[:, 0]
        rest = (target - proposal).clamp(min=0)
        rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)  # equal distributions, which reject nothing
        other = torch.multinomial(rest, 1)[:, 0]
        return torch.where(accepted, draft, other), accepted

    def _scores(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return self.logits_processor(input_ids, logits.to(input_ids.device, torch.float32, copy=True))


class _Answers:
    """The rows as far as they are written.

    Attributes:
        input_ids: (B, T).
        unfinished: (B), the rows that no criterion has ended.
    """

    def __init__(
        self, input_ids: torch.Tensor, chooser: _Chooser, stopping_criteria: Any, pad_id: Any, streamer: Any
    ) -> None:
        self.input_ids, self._chooser, self._pad_id, self._streamer = input_ids, chooser, pad_id, streamer
        self._criteria = stopping_criteria
        self._pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @property
    def going_on(self) -> torch.Tensor:
        """(B), the rows that get more than padding. Without an end token these are all, as in `_sample`."""
        return self.unfinished if self._pads else torch.ones_like(self.unfinished)

    def add(self, logits: torch.Tensor, drafts: _Drafts) -> int:
        """Add tokens up to the first that is no draft, and return how many drafts all rows have kept.

        Args:
            logits: of the fused model before each draft and behind the last, (B, n + 1, V).
        """
        for kept in range(drafts.size + 1):
            token, same = self._chooser.check(self.input_ids, logits[:, kept], drafts, kept)
            going_on = self.going_on
            if self._pads:
                token = torch.where(going_on, token, self._pad_id.to(token.device))
            self.input_ids = torch.cat([self.input_ids, token[:, None]], dim=-1)
            if self._streamer is not None:
                self._streamer.put(token.cpu())
            self.unfinished = self.unfinished & ~self._criteria(self.input_ids, None)
            if not self.unfinished.any() or not (same | ~going_on).all():
                break
        return kept


class _Acceptance:
    """An estimate of how likely a draft is kept, and the length of drafts that it makes worth while."""

    def __init__(self, cost: float) -> None:
        """
        Args:
            cost: time that one more draft takes, as a share of a pass without drafts.
        """
        self.cost = cost
        self._accepted, self._rejected = _PRIOR

    def learn(self, accepted: int, drafted: int) -> None:
        """Count the drafts up to the first that was not kept. Nothing is known of those behind it."""
        self._accepted = _FORGET * self._accepted + (1 - _FORGET) * _PRIOR[0] + accepted
        self._rejected = _FORGET * self._rejected + (1 - _FORGET) * _PRIOR[1] + (accepted < drafted)

    def next_length(self, limit: int) -> int:
        """The best length. Where that is 0, the estimate drifts back to where it began, so that drafts get another chance."""
        if not (length := self.best_length(limit)):
            self.learn(0, 0)
        return length

    def best_length(self, limit: int) -> int:
        """The length from 0 to `limit` that gives the most tokens in the time it takes."""
        rate = self._accepted / (self._accepted + self._rejected)
        best, best_speed, tokens, chance = 0, 1.0, 1.0, 1.0
        for length in range(1, limit + 1):
            chance *= rate  # that all of them are kept
            tokens += chance
            if (speed := tokens / (1 + length * self.cost)) > best_speed:
                best, best_speed = length, speed
        return best


class _Drafting:
    """Where drafts come from, and the pass that checks them."""

    def __init__(self, model: Any, speculation: Speculation) -> None:
        self.model, self.speculation = model, speculation
        size = len(model.groups)
        position = _POSITION_COST.get(model.device.type, _POSITION_COST_ACCELERATOR)
        self._text = _Acceptance(position) if speculation.mode != "specialist" else None
        # a group that runs ahead takes a pass of its own for each draft, and spares it later
        self._groups = [_Acceptance(1 / size + (1 - 1 / size) * position) for _ in range(size)]
        self._members = [[model.config.names.index(name) for name in group.names] for group in model.groups]
        self._mass = torch.zeros(size)  # recent gate weight of each group
        self._last_weights: torch.Tensor | None = None  # (B, n + 1, K)

    def draft(
        self, input_ids: torch.Tensor, cache: UltraFuserCache, limit: int, chooser: _Chooser, unfinished: torch.Tensor
    ) -> _Drafts:
        """Up to `limit` tokens behind the text (B, T), the last of which the cache does not hold yet."""
        limit = max(0, min(limit, self.speculation.max_draft))
        if self._text is not None and (length := self._text.next_length(limit)):
            tokens = _continuations(input_ids, length, unfinished)
            # a prompt may hold tokens of one specialist
            unknown = (tokens >= self.model.config.vocab_size).any(0).nonzero()
            tokens = tokens[:, : int(unknown[0])] if len(unknown) else tokens
            if tokens.shape[1]:
                return _Drafts(tokens, source=self._text)
        if len(self._groups) > 1 and self.speculation.mode != "ngram":
            leader = int(self._mass.argmax())
            if length := self._groups[leader].next_length(limit):
                return self._run_ahead(leader, input_ids, cache, length, chooser)
        return _Drafts(input_ids[:, :0])

    def _run_ahead(
        self, leader: int, input_ids: torch.Tensor, cache: UltraFuserCache, length: int, chooser: _Chooser
    ) -> _Drafts:
        """Let a group draft, and read its last draft, so that its states are complete."""
        model, members = self.model, self._members[leader]
        chooser = copy.deepcopy(chooser)  # processors may count tokens, and the check will show them these again
        probs: list[Any] = []
        text, steps = input_ids, []
        for step in range(length + 1):
            new = text[:, input_ids.shape[1] - 1 :]  # (B, step + 1), which the cache has not recorded
            mask = cache.full_mask(None, new[:, None].expand(-1, len(model.config.specialists), -1))
            states = model.run_groups([leader], new[:, -1:], mask, cache)
            steps.append(states)
            if step == length:
                break
            member_states = list(states.values())
            log_weights = model.gate.score_states(member_states, members).log_softmax(-1)
            logits = model.mix(member_states, log_weights, members)
            token, token_probs = chooser.draw(text, logits[:, -1])
            text = torch.cat([text, token[:, None]], dim=-1)
            probs.append(token_probs)
        joined = {location: torch.cat([states[location] for states in steps], dim=1) for location in steps[0]}
        drawn = torch.stack(probs, dim=1) if chooser.do_sample else None
        return _Drafts(text[:, input_ids.shape[1] :], drawn, joined, self._groups[leader])

    def verify(self, ids: torch.Tensor, cache: UltraFuserCache, drafts: _Drafts) -> torch.Tensor:
        """Logits (B, n + 1, V) of the fused model at the tokens (B, n + 1) that the cache does not hold yet."""
        model = self.model
        states = model.specialist_states(ids, cache=cache, known=drafts.states)
        log_weights = model.gate(states)
        self._last_weights = log_weights.exp()
        self.speculation.passes += 1
        self.speculation.drafted += drafts.size
        return model.mix(states, log_weights)

    def learn(self, drafts: _Drafts, kept: int) -> None:
        """Remember how many drafts were kept, and which group the gate has favoured since."""
        self.speculation.accepted += kept
        if drafts.source is not None:
            drafts.source.learn(kept, drafts.size)
        if self._last_weights is not None and len(self._groups) > 1:
            weights = self._last_weights[:, : kept + 1].mean((0, 1)).cpu()  # (K,)
            mass = torch.stack([weights[members].sum() for members in self._members])
            self._mass = 0.5 * self._mass + 0.5 * mass.to(self._mass)


def _continuations(input_ids: torch.Tensor, length: int, unfinished: torch.Tensor) -> torch.Tensor:
    """What followed the last tokens of each row where they stood before: (B, length), or (B, 0) if a row has nothing."""
    rows: list[torch.Tensor] = []
    for text, goes_on in zip(input_ids, unfinished.tolist(), strict=True):
        row = _continuation(text, length) if goes_on else text[-1:].expand(length)
        if row is None:
            return input_ids[:, :0]
        rows.append(row)
    return torch.stack(rows)


def _continuation(text: torch.Tensor, length: int) -> torch.Tensor | None:
    """The tokens behind the longest match of the end of a text (T,), the latest one of equal length."""
    text = text[-_SEARCHED:]
    starts = torch.arange(1, len(text), device=text.device)  # a match ends before such a column
    matched = torch.zeros_like(starts)
    alive = torch.ones_like(starts, dtype=torch.bool)
    for distance in range(1, min(_NGRAM[1], len(text)) + 1):
        alive &= (starts >= distance) & (text[(starts - distance).clamp(min=0)] == text[-distance])
        matched += alive
    if not len(starts) or int(matched.max()) < _NGRAM[0]:
        return None
    start = int(starts[(matched * len(text) + starts).argmax()])
    return text[start + torch.arange(length, device=text.device) % (len(text) - start)]  # a loop goes on as a loop
