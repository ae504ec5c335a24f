"""One key-value cache for each group of specialists, behind one transformers `Cache`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig


class UltraFuserCache(Cache):
    """The caches of all groups. Whatever `generate` does to a cache happens to every layer of all of them.

    A group of k specialists keeps k * B rows, specialist by specialist, so row `i` of the batch is the rows
    `i, B + i, 2B + i, ...` of its layers.
    """

    def __init__(self, configs: Sequence[PreTrainedConfig], sizes: Sequence[int], offloading: bool = False) -> None:
        """
        Args:
            configs: the model configuration of each group.
            sizes: how many specialists each group runs.
        """
        self.groups = [DynamicCache(config=config, offloading=offloading) for config in configs]
        self.sizes = list(sizes)
        super().__init__(layers=[])

    @property
    def layers(self) -> list:
        """The layers of every group. Groups may have added some lazily."""
        return [layer for group in self.groups for layer in group.layers]

    @layers.setter
    def layers(self, value: list) -> None:
        """Ignore the list that the base class assigns once, because the groups own the layers."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of cached tokens, the same in every group."""
        return self.groups[0].get_seq_length(layer_idx)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows alike for every specialist."""
        for group, size in zip(self.groups, self.sizes, strict=True):
            group.reorder_cache(_rows(beam_idx, size, len(beam_idx)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        for group, size in zip(self.groups, self.sizes, strict=True):
            held = next((layer.keys.shape[0] for layer in group.layers if layer.is_initialized), 0)
            group.batch_select_indices(_rows(indices, size, held // size))


def _rows(indices: torch.Tensor, size: int, batch: int) -> torch.Tensor:
    """Rows of the batch -> rows of a group: (n,) -> (size * n,)."""
    offsets = torch.arange(size, device=indices.device) * batch
    return (offsets[:, None] + indices).flatten()
