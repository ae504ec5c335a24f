"""Batches of rows of similar length, within one budget of tokens for each kind of device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}


def token_budget(device: torch.device) -> int:
    """Padded tokens that one batch without gradients may hold on a device."""
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH["cuda"])


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices in batches of similar length, each of at most `tokens_per_batch` padded tokens."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(i)
    return batches
