"""Fit a softmax temperature to each specialist before its distribution is mixed with the others'.

A specialist that is too confident pulls a mixture too far. The temperature that minimises the specialist's own loss
corrects this without training (temperature scaling, Guo et al. 2017, arXiv 1706.04599).
docs/results/gate-ablation.md compares it with learned temperatures and with other gates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ultrafuser.data.collate import length_batches, token_budget
from ultrafuser.data.packed import domains_of
from ultrafuser.data.templates import Rendered
from ultrafuser.model.loss import Head, token_chunks
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.train.features import response_states

TEMPERATURES = tuple(2 ** (i / 4) for i in range(-4, 5))  # 0.5 to 2, and between them a parabola of the loss
MOST_TOKENS, FEWEST_TOKENS = 4096, 256  # response tokens per specialist


def calibrate(
    model: UltraFuserForCausalLM, rows: Sequence[Rendered], *, seed: int = 0, progress: Progress | None = None
) -> list[float]:
    """The temperature of each specialist that minimises its loss on the answers of its own domain.

    A specialist whose domain has fewer than FEWEST_TOKENS response tokens keeps 1, as does one that another process holds.

    Args:
        rows: rows that the specialists neither were trained on nor wrote. On those they are rightly more confident.

    Returns:
        K temperatures within the range of TEMPERATURES.
    """
    progress = progress or Progress()
    names = model.config.names
    samples = [_sample_rows(rows, domain, seed) for domain in model.config.domains]
    samples = [sample if sum(len(row.labels) for row in sample) >= FEWEST_TOKENS else [] for sample in samples]
    if skipped := [name for name, sample in zip(names, samples, strict=True) if not sample]:
        progress.log(
            f"temperature 1 for {', '.join(skipped)}: fewer than {FEWEST_TOKENS} response tokens of their domains"
        )
    temperatures = [1.0] * len(names)
    if not any(samples):
        return temperatures
    local = model.local_indices
    progress.start("specialists' temperatures", sum(row.num_tokens for k in local for row in samples[k]))
    was_training = model.training
    model.eval()
    heads = dict(zip(local, model.heads(), strict=True))
    for group in model.local_groups:
        for i, name in enumerate(group.names):
            k = names.index(name)
            if samples[k]:
                head = heads[k]._replace(temperature=1.0)
                temperatures[k] = _fit_temperature(group, head, samples[k], k, i, progress)
    model.train(was_training)
    progress.finish()
    return temperatures


def _sample_rows(rows: Sequence[Rendered], domain: str, seed: int) -> list[Rendered]:
    """Rows of a domain in random order, up to MOST_TOKENS response tokens."""
    candidates = [i for i, name in enumerate(domains_of(rows)) if name == domain]
    random.Random(seed).shuffle(candidates)
    sample, tokens = [], 0
    for i in candidates:
        if tokens >= MOST_TOKENS:
            break
        sample.append(rows[i])
        tokens += len(rows[i].labels)
    return sample


@torch.no_grad()
def _fit_temperature(
    group: SpecialistGroup, head: Head, rows: Sequence[Rendered], template: int, row: int, progress: Progress
) -> float:
    """The temperature of the specialist that is row `row` of the group."""
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for batch in length_batches([row.num_tokens for row in rows], token_budget(group.device)):
        states, labels = response_states(group, [rows[i] for i in batch], template, [row])
        for chunk in token_chunks(len(labels), head.weight):
            z = head.logits(states[chunk])  # (n, V)
            label_logits = z.gather(1, labels[chunk, None].to(z.device)).sum()
            for t, temperature in enumerate(TEMPERATURES):
                losses[t] += float((z / temperature).logsumexp(-1).sum() - label_logits / temperature)
        progress.advance(sum(rows[i].num_tokens for i in batch))
    return _parabola_minimum(losses.tolist())


def _parabola_minimum(losses: Sequence[float]) -> float:
    """The minimum of a parabola through the lowest loss and its neighbours, over the log temperature."""
    t = min(range(len(losses)), key=losses.__getitem__)
    if t in (0, len(losses) - 1):
        return TEMPERATURES[t]
    lower, lowest, upper = losses[t - 1 : t + 2]
    curvature = lower - 2 * lowest + upper
    shift = 0.0 if curvature <= 0 else 0.5 * (lower - upper) / curvature  # in steps, within half a step
    return round(TEMPERATURES[t] * 2 ** (shift / 4), 3)
