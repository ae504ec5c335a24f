"""A temperature for each specialist: how sharp its distribution should be before it is mixed with the others'.

A specialist that was trained until it is too sure of itself takes a mixture further than it should. One number mends that,
without training: the one that makes the specialist's own loss least (temperature scaling, Guo et al. 2017,
arXiv 1706.04599). docs/results/gate-ablation.md has what it is worth beside learning it, and beside other gates.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from ultrafuser.data.responses import length_batches, token_budget
from ultrafuser.data.templates import Rendered
from ultrafuser.model.loss import Head, token_chunks
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.train.features import response_states

TEMPERATURES = tuple(2 ** (i / 4) for i in range(-4, 5))  # tried: 0.5 to 2; between them the loss is a parabola
MOST_TOKENS, FEWEST_TOKENS = 4096, 256  # response tokens that a specialist is measured on


def calibrate(
    model: UltraFuserForCausalLM, rows: Sequence[Rendered], *, seed: int = 0, progress: Progress | None = None
) -> list[float]:
    """The temperature of each specialist at which it says the answers of its own domain best.

    Where no row is of its domain, all rows count. A specialist with fewer than FEWEST_TOKENS response tokens keeps 1.

    Args:
        rows: ones that the specialists neither were trained on nor wrote; of what they know by heart they are rightly surer.

    Returns:
        K temperatures, within those of TEMPERATURES.
    """
    progress = progress or Progress()
    names = model.config.names
    chosen = [_chosen(rows, domain, seed) for domain in model.config.domains]
    chosen = [own if sum(len(row.labels) for row in own) >= FEWEST_TOKENS else [] for own in chosen]
    out = [1.0] * len(names)
    if not any(chosen):
        return out
    progress.start("specialists' temperatures", sum(row.num_tokens for own in chosen for row in own))
    was_training = model.training
    model.eval()
    for group in model.groups:
        for i, name in enumerate(group.names):
            k = names.index(name)
            if chosen[k]:
                active = [i] if group.loras else [0]
                out[k] = _best(group, group.head(model.config.vocab_size), chosen[k], k, active, progress)
    model.train(was_training)
    progress.finish()
    return out


def _chosen(rows: Sequence[Rendered], domain: str, seed: int) -> list[Rendered]:
    """Rows of a domain in random order, until there are tokens enough."""
    own = [row for row in rows if row.domain == domain] or list(rows)
    random.Random(seed).shuffle(own)
    out, tokens = [], 0
    for row in own:
        if tokens >= MOST_TOKENS:
            break
        out.append(row)
        tokens += len(row.labels)
    return out


@torch.no_grad()
def _best(
    group: SpecialistGroup,
    head: Head,
    rows: Sequence[Rendered],
    template: int,
    active: Sequence[int],
    progress: Progress,
) -> float:
    losses = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    for batch in length_batches([row.num_tokens for row in rows], token_budget(group.device)):
        states, labels = response_states(group, [rows[i] for i in batch], template, active)
        for part in token_chunks(len(labels), head.weight):
            z = head.logits(states[part])  # (n, V)
            said = z.gather(1, labels[part, None].to(z.device)).sum()
            for t, temperature in enumerate(TEMPERATURES):
                losses[t] += float((z / temperature).logsumexp(-1).sum() - said / temperature)
        progress.advance(sum(rows[i].num_tokens for i in batch))
    return _lowest(losses.tolist())


def _lowest(losses: Sequence[float]) -> float:
    """Where a parabola through the lowest loss and its neighbours, over log temperature, is lowest."""
    t = min(range(len(losses)), key=losses.__getitem__)
    if t in (0, len(losses) - 1):
        return TEMPERATURES[t]
    left, here, right = losses[t - 1 : t + 2]
    bend = left - 2 * here + right
    shift = 0.0 if bend <= 0 else 0.5 * (left - right) / bend  # in steps, within half a step
    return round(TEMPERATURES[t] * 2 ** (shift / 4), 3)
