"""Mix the logits of K specialists by the gate's weights (Eq. 1, or a mixture of their distributions)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch


def mix_logits(
    logits: Iterable[torch.Tensor], log_weights: torch.Tensor, mixing: str, masked_token_ids: Sequence[int] = ()
) -> torch.Tensor:
    """Mixed logits: Eq. 1, or with probability mixing log(sum_k w_k softmax(z_k)) + sum_k w_k logsumexp(z_k).

    The second term is the same for all tokens of the vocabulary, so the distribution is the mixture's. It puts the
    logits on the scale of the specialists' logits, where processors that scale logits expect them. A specialist of
    weight 1 gives its own logits.

    Args:
        logits: K tensors (..., V), in float32 at least. They may be overwritten.
        log_weights: (..., K).
        mixing: `logits` or `probabilities`.
        masked_token_ids: tokens that not all specialists have. Their probability is 0.

    Returns:
        (..., V), in float32 at least.
    """
    mixed: Any = None
    normaliser: Any = 0.0  # sum_k w_k logsumexp(z_k), (..., 1)
    for log_w, z in zip(log_weights.split(1, dim=-1), logits, strict=True):  # (..., 1), (..., V)
        z = z.to(log_w.device)
        if mixing == "logits":
            weighted = log_w.exp() * z
            if mixed is None:
                mixed = weighted
            else:
                mixed = mixed + weighted if weighted.requires_grad else mixed.add_(weighted)
        else:
            log_total = z.logsumexp(-1, keepdim=True)  # (..., 1)
            normaliser = normaliser + log_w.exp() * log_total
            weighted = log_w - log_total + z
            mixed = weighted if mixed is None else torch.logaddexp(mixed, weighted)
    if mixing == "probabilities":
        mixed = mixed + normaliser
    if masked_token_ids:
        mixed[..., list(masked_token_ids)] = -torch.inf
    return mixed


def restrict_weights(log_weights: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Log weights renormalised over the specialists that take part.

    Args:
        log_weights: (..., K).
        active: (..., K) booleans, with one True in each row at least.
    """
    floor = torch.finfo(log_weights.dtype).min  # not -inf: a gate may give all that remain no weight at all
    return log_weights.clamp(min=floor).masked_fill(~active, -torch.inf).log_softmax(-1)
