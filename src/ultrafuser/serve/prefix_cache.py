"""The states of finished prompts and conversations, which later requests with the same beginning continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ultrafuser.model.cache import UltraFuserCache

_MIN_COLUMNS = 8  # shared columns below which copying the states is not worth it


@dataclass
class _Entry:
    """One row of states and the K sequences of tokens that it holds."""

    cache: UltraFuserCache
    sequences: list[np.ndarray]

    @property
    def size(self) -> int:
        """Cached columns."""
        return self.cache.get_seq_length()


class PrefixCache:
    """Caches of one row each. The least recently used ones are dropped when all together exceed `max_tokens` columns.

    A column is one token of each of the K specialists.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._entries: list[_Entry] = []  # the most recently used one is the last

    @property
    def tokens(self) -> int:
        """Cached columns of all entries."""
        return sum(entry.size for entry in self._entries)

    def put(self, cache: UltraFuserCache) -> None:
        """Store a cache of one row. It must not be written to any more. Entries that are its prefixes are dropped."""
        if not cache.can_join or cache.get_seq_length() > self.max_tokens:
            return
        sequences = _sequences(cache)
        self._entries = [entry for entry in self._entries if not _is_prefix(entry.sequences, sequences)]
        self._entries.append(_Entry(cache, sequences))
        while self.tokens > self.max_tokens:
            self._entries.pop(0)

    def continued(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> UltraFuserCache | None:
        """A new cache with the longest stored prefix of the prompts, in their columns. None if nothing is worth copying.

        Args:
            input_ids, attention_mask: (1, K, T), padded on the left.
        """
        width = input_ids.shape[-1]
        prompts = [
            ids[mask != 0]
            for ids, mask in zip(input_ids[0].cpu().numpy(), attention_mask[0].cpu().numpy(), strict=True)
        ]
        best, longest = None, 0
        for entry in self._entries:
            shared = [_common_length(a, b) for a, b in zip(prompts, entry.sequences, strict=True)]
            columns = min(width - len(ids) + count for ids, count in zip(prompts, shared, strict=True))
            if columns > longest:
                best, longest = entry, columns
        if best is None or longest < _MIN_COLUMNS:
            return None
        self._entries.remove(best)
        self._entries.append(best)
        cache = best.cache.copied()
        cache.keep_prefix(input_ids, attention_mask)
        return None if cache.input_ids is None else cache

    def clear(self) -> None:
        """Drop all entries."""
        self._entries.clear()


def _sequences(cache: UltraFuserCache) -> list[np.ndarray]:
    """The K sequences of a cache of one row, without padding."""
    assert cache.input_ids is not None
    ids = cache.input_ids[0].cpu().numpy()
    if cache.attention_mask is None:
        return list(ids)
    return [row[mask != 0] for row, mask in zip(ids, cache.attention_mask[0].cpu().numpy(), strict=True)]


def _common_length(a: np.ndarray, b: np.ndarray) -> int:
    size = min(len(a), len(b))
    different = (a[:size] != b[:size]).nonzero()[0]
    return int(different[0]) if len(different) else size


def _is_prefix(shorter: Sequence[np.ndarray], longer: Sequence[np.ndarray]) -> bool:
    """Whether each sequence begins the other one of the same specialist."""
    return all(len(a) <= len(b) and np.array_equal(a, b[: len(a)]) for a, b in zip(shorter, longer, strict=True))
