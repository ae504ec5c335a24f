"""Losses of each row, in nats over its response tokens, and their sums by domain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ultrafuser.data.collate import length_batches, token_budget
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import CheckpointError
from ultrafuser.evaluate.intervals import Stratum
from ultrafuser.model.loss import Head, label_log_prob, mixed_log_prob
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.train.features import FeatureStore, response_states


@dataclass(frozen=True)
class RowLoss:
    """The loss of one row under one system, in nats summed over its response tokens."""

    domain: str
    nats: float
    tokens: int


@torch.no_grad()
def specialist_losses(store: FeatureStore, names: Sequence[str]) -> dict[str, list[RowLoss]]:
    """Every specialist alone, at its temperature if it has one. The feature cache has all that is needed."""
    totals = [store[i].log_probs.double().sum(0).tolist() for i in range(len(store))]
    rows = list(zip(store.rows, totals, strict=True))
    return {
        name: [RowLoss(row.domain, -total[k], len(row.labels)) for row, total in rows] for k, name in enumerate(names)
    }


@torch.no_grad()
def fused_losses(
    model: UltraFuserForCausalLM, store: FeatureStore, *, uniform: bool = False
) -> tuple[list[RowLoss], list[list[float]]]:
    """The fused model, or the same specialists with equal weights, on cached features.

    Returns:
        The rows' losses, and each row's mean weight of every specialist.
    """
    losses, weights = [], []
    for i in range(len(store)):
        item = store[i]
        states = [state.to(model.device) for state in item.states]
        log_probs = item.log_probs.to(model.device)
        size = log_probs.shape[1]
        log_w = log_probs.new_full(log_probs.shape, -float(np.log(size))) if uniform else model.gate(states)  # (R, K)
        if model.config.mixing == "probabilities":
            log_p = torch.logsumexp(log_w + log_probs, dim=-1)
        else:
            labels = torch.tensor(item.row.labels, device=model.device)
            log_p = mixed_log_prob(states, model.heads(), log_w, labels, "logits")
        losses.append(RowLoss(item.row.domain, -log_p.double().sum().item(), len(item.row.labels)))
        weights.append(log_w.exp().mean(0).tolist())
    return losses, weights


@torch.no_grad()
def group_losses(
    group: SpecialistGroup,
    rows: Sequence[Rendered],
    head: Head,
    *,
    template: int = 0,
    adapter: int | None = None,
    label: str = "model",
    progress: Progress | None = None,
) -> list[RowLoss]:
    """One plain model, or the base of a group.

    Args:
        head: the output layer over the common vocabulary.
        template: index of the specialist whose chat template the rows are read in.
        adapter: index of the group's adapter that runs. None: the bare base.
        label: name of the model, for the progress bar.
    """
    progress = progress or Progress()
    progress.start(f"{label} reads the test rows", sum(row.num_tokens for row in rows))
    losses: list[RowLoss | None] = [None] * len(rows)
    active = [0] if not group.loras else [] if adapter is None else [adapter]
    for batch in length_batches([row.num_tokens for row in rows], token_budget(group.device)):
        flat, labels = response_states(group, [rows[i] for i in batch], template, active)
        log_p = label_log_prob(flat, head, labels).double()
        for i, row_log_p in zip(batch, log_p.split([len(rows[i].labels) for i in batch]), strict=True):
            losses[i] = RowLoss(rows[i].domain, -row_log_p.sum().item(), len(row_log_p))
        progress.advance(sum(rows[i].num_tokens for i in batch))
    progress.finish()
    return [loss for loss in losses if loss is not None]


def by_stratum(rows: Sequence[Rendered], losses: Sequence[RowLoss]) -> dict[str, Stratum]:
    """The rows' nats and tokens by domain and id. The second row with one id is `ID#2`, so that none is lost.

    Raises:
        CheckpointError: a loss is NaN.
    """
    by_domain: dict[str, tuple[dict[str, float], dict[str, float]]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for row, loss in zip(rows, losses, strict=True):
        totals, weights = by_domain.setdefault(row.domain, ({}, {}))
        counts[row.domain, row.row_id] += 1
        count = counts[row.domain, row.row_id]
        key = f"{row.row_id}#{count}" if count > 1 else row.row_id
        if math.isnan(loss.nats):
            raise CheckpointError(
                f"the loss of row {key} ({row.domain}) is NaN: the model computes NaN there. Load it with dtype float32. "
                "If that does not help, its weights are damaged"
            )
        totals[key], weights[key] = loss.nats, loss.tokens
    return {domain: Stratum(totals, weights) for domain, (totals, weights) in by_domain.items()}


def by_domain(rows: Sequence[Rendered], weights: Sequence[Sequence[float]]) -> dict[str, list[Sequence[float]]]:
    """The rows' weights of the specialists, by domain."""
    grouped: dict[str, list[Sequence[float]]] = {}
    for row, row_weights in zip(rows, weights, strict=True):
        grouped.setdefault(row.domain, []).append(row_weights)
    return grouped


def mean_weights(
    weights: Mapping[str, Sequence[Sequence[float]]], tokens: Mapping[str, Sequence[float]], names: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Mean weight of each specialist over the response tokens of each domain (table 6).

    Args:
        weights: by domain, for each row the mean weight of each of the K specialists.
        tokens: by domain, the response tokens of each row.
    """
    return {
        domain: {
            name: sum(row[k] * n for row, n in zip(rows, tokens[domain], strict=True)) / sum(tokens[domain])
            for k, name in enumerate(names)
        }
        for domain, rows in weights.items()
    }
