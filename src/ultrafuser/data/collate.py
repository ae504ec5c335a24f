"""Group rows of similar length, and pad lists of token sequences to the tensors that the model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import DataError

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 32768}


def collate_rows(rows: Sequence[Rendered], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Training rows as one batch, padded on the right, so that a causal model needs no mask.

    Returns:
        specialist_input_ids (B, K, T), response_index (B, K, R), labels (B, R) with -100 as padding.
    """
    size, num_specialists = len(rows), len(rows[0].input_ids)
    longest, responses = max(row.num_tokens for row in rows), max(len(row.labels) for row in rows)
    ids = torch.full((size, num_specialists, longest), pad_id, dtype=torch.long)
    index = torch.zeros(size, num_specialists, responses, dtype=torch.long)
    for b, row in enumerate(rows):
        for k, (tokens, positions) in enumerate(zip(row.input_ids, row.response_index, strict=True)):
            ids[b, k, : len(tokens)] = torch.tensor(tokens)
            index[b, k, : len(positions)] = torch.tensor(positions)
    return {"specialist_input_ids": ids, "response_index": index, "labels": pad_labels(rows)}


def pad_labels(rows: Sequence[Rendered]) -> torch.Tensor:
    """Response tokens (B, R), padded with -100."""
    labels = torch.full((len(rows), max(len(row.labels) for row in rows)), -100, dtype=torch.long)
    for b, row in enumerate(rows):
        labels[b, : len(row.labels)] = torch.tensor(row.labels)
    return labels


def prompt_inputs(
    renderer: Renderer, conversations: Sequence[Sequence[Mapping[str, str]]], device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """Prompts for `generate`, padded on the left to one length over conversations and specialists.

    The new tokens then have the same index for every specialist, whatever its template.

    Returns:
        input_ids, attention_mask (B, T) of the first specialist, and specialist_input_ids, specialist_attention_mask
        (B, K, T).

    Raises:
        DataError: there is no conversation.
    """
    if not conversations:
        raise DataError("there is no conversation to answer, expected at least one")
    return pad_prompts([renderer.prompt(messages) for messages in conversations], renderer.pad_id, device)


def pad_prompts(
    prompts: Sequence[Sequence[Sequence[int]]], pad_id: int, device: Any = "cpu"
) -> dict[str, torch.Tensor]:
    """B x K prompts as the tensors that `prompt_inputs` returns."""
    longest = max(len(ids) for row_prompts in prompts for ids in row_prompts)
    ids = torch.full((len(prompts), len(prompts[0]), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for b, row_prompts in enumerate(prompts):
        for k, tokens in enumerate(row_prompts):
            ids[b, k, longest - len(tokens) :] = torch.tensor(tokens)
            mask[b, k, longest - len(tokens) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    return {
        "input_ids": ids[:, 0],
        "attention_mask": mask[:, 0],
        "specialist_input_ids": ids,
        "specialist_attention_mask": mask,
    }


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
