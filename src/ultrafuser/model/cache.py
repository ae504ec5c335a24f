"""One key-value cache for each group of specialists, behind one transformers `Cache`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedConfig, cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from .growing import GrowingLayer

# Layers that hold nothing. transformers 5.19 has none.
_EMPTY = (cache_utils.DummyLayer,) if hasattr(cache_utils, "DummyLayer") else ()
_ATTENTION = (DynamicLayer, GrowingLayer, DynamicSlidingWindowLayer)  # whose columns can be moved


class UltraFuserCache(Cache):
    """The caches of all groups. Whatever `generate` does to a cache happens to every layer of all of them.

    A group of k specialists keeps k * B rows, specialist by specialist, so row `i` of the batch is the rows
    `i, B + i, 2B + i, ...` of its layers.

    The cache also keeps the tokens and the padding that it was filled with, C columns for every specialist. So the prompts
    of the next turn can continue it, although their left padding differs (`keep_prefix`).

    Attributes:
        input_ids: (B, K, C), the cached tokens. None while the cache is empty.
        attention_mask: (B, K, C), zero at padding. None while nothing is padded.
    """

    def __init__(
        self,
        configs: Sequence[PreTrainedConfig],
        members: Sequence[Sequence[int]],
        offloading: bool = False,
        growing: bool = False,
    ) -> None:
        """
        Args:
            configs: the model configuration of each group.
            members: the specialists that each group runs, by their index.
            growing: write into buffers (see `GrowingLayer`).
        """
        self.groups = [DynamicCache(config=config, offloading=offloading) for config in configs]
        if growing:
            for group in self.groups:
                group.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in group.layers]
        self.members = [list(indices) for indices in members]
        self.input_ids: torch.Tensor | None = None
        self.attention_mask: torch.Tensor | None = None
        super().__init__(layers=[])

    @property
    def layers(self) -> list:
        """The layers of every group. Groups may have added some lazily."""
        return [layer for group in self.groups for layer in group.layers]

    @layers.setter
    def layers(self, value: list) -> None:
        """Ignore the list that the base class assigns once, because the groups own the layers."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of cached columns, the same in every group."""
        return self.groups[0].get_seq_length(layer_idx)

    # ---------------------------------------------------------------- tokens and padding

    def full_mask(self, mask: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor | None:
        """The attention mask of the cached columns and of new tokens.

        Args:
            mask: of the new tokens alone, or of all columns. (B, T) or (B, K, T).
            ids: (B, K, T), the new tokens.

        Returns:
            (B, K, C + T), or None if nothing is padded.
        """
        new = ids.shape[-1]
        if mask is not None:
            mask = (mask if mask.dim() == 3 else mask[:, None]).expand(*ids.shape[:2], -1).to(ids.device)
            if mask.shape[-1] > new or self.input_ids is None:
                return mask
        elif self.attention_mask is None:
            return None
        cached = self.attention_mask
        if cached is None:
            cached = ids.new_ones(*ids.shape[:2], self.get_seq_length())
        return torch.cat([cached.to(ids.device), ids.new_ones(ids.shape) if mask is None else mask.to(cached)], dim=-1)

    def record(self, ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Remember the tokens whose states were just added: (B, K, T), and the mask of all columns, (B, K, C + T)."""
        self.input_ids = ids if self.input_ids is None else torch.cat([self.input_ids.to(ids.device), ids], dim=-1)
        self.attention_mask = mask

    def keep_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Keep the states that prompts share with the cached tokens, in the columns of these prompts. Drop the others.

        Each specialist's padding is then that of the new prompts, and so are the positions, because they count real
        tokens. All rows continue at the same column, so a row with a longer shared prefix reads some tokens again. At
        least the last column is left to read.

        Args:
            input_ids, attention_mask: (B, K, T), the whole prompts of the next turn.
        """
        if self.input_ids is None or not self._is_complete(self.input_ids.shape[-1]):
            return self.reset()
        input_ids, attention_mask = input_ids.to(self.input_ids.device), attention_mask.to(self.input_ids.device)
        cached_mask = self._mask()
        rows, shared = _shared_prefixes(input_ids, attention_mask, self.input_ids, cached_mask)
        rank = (attention_mask != 0).cumsum(-1)  # (B, K, T): a real token's place among the real tokens, from 1
        width = int((rank <= shared[..., None]).sum(-1).min().clamp(max=input_ids.shape[-1] - 1))
        rank, real = rank[..., :width], attention_mask[..., :width] != 0
        # the cached column of each token that is kept
        columns = _real_tokens_first(cached_mask)[rows].gather(-1, (rank - 1).clamp(min=0))
        columns = columns.masked_fill(~real, 0)
        if self._moves(rows, columns, real) and not self._select(rows, columns, real):
            return self.reset()
        self.input_ids, self.attention_mask = input_ids[..., :width], attention_mask[..., :width]

    def _is_complete(self, length: int) -> bool:
        """Whether every layer has seen as many columns. False after a pass that failed half-way."""
        return all(layer.get_seq_length() == length for layer in _filled(self.layers))

    def _moves(self, rows: torch.Tensor, columns: torch.Tensor, real: torch.Tensor) -> bool:
        """Whether any state changes its row or column, or is dropped."""
        assert self.input_ids is not None
        batch, _, width = columns.shape
        if (len(self.input_ids), self.input_ids.shape[-1]) != (batch, width):
            return True
        return bool((rows != torch.arange(batch, device=rows.device)).any()) or bool(
            ((columns != torch.arange(width, device=columns.device)) & real).any()
        )

    def _select(self, rows: torch.Tensor, columns: torch.Tensor, real: torch.Tensor) -> bool:
        """Move the states of every layer to the new rows and columns. False if a layer no longer has them."""
        assert self.input_ids is not None
        batch, length = len(self.input_ids), self.input_ids.shape[-1]
        if not columns.shape[-1]:
            return False
        for group, members in zip(self.groups, self.members, strict=True):
            group_rows = _rows(rows, len(members), batch)  # (k * B,)
            group_columns = columns[:, members].transpose(0, 1).flatten(0, 1)  # (k * B, width)
            group_real = real[:, members].transpose(0, 1).flatten(0, 1)
            if not all(isinstance(layer, (CacheLayerMixin, *_EMPTY)) for layer in group.layers):
                return False  # recurrent states cannot go back to a prefix
            for layer in _filled(group.layers):
                if not _select_states(layer, group_rows, group_columns, group_real, length):
                    return False
        return True

    # ---------------------------------------------------------------- rows that join and leave

    @property
    def can_join(self) -> bool:
        """Whether rows of other caches can join. False with recurrent layers, whose states have no columns to align."""
        return all(type(layer) in (*_ATTENTION, *_EMPTY) for layer in self.layers)

    def join(self, other: UltraFuserCache) -> None:
        """Put the rows of another cache of the same model behind these. The other cache stays as it is.

        The last columns meet: the rows with fewer columns get padding on the left. Positions do not change, because they
        count real tokens.

        Args:
            other: with at least one cached column.
        """
        assert other.input_ids is not None
        pair = [other] if self.input_ids is None else [self, other]
        width = max(cache.get_seq_length() for cache in pair)
        for group, other_group, members in zip(self.groups, other.groups, self.members, strict=True):
            for layer, other_layer in zip(group.layers, other_group.layers, strict=True):
                if isinstance(other_layer, CacheLayerMixin) and other_layer.is_initialized:
                    _join_states(layer, other_layer, len(members), width)
        masks = torch.cat([_left_padded(cache._mask(), width) for cache in pair])
        ids = [cache.input_ids for cache in pair if cache.input_ids is not None]
        self.input_ids = torch.cat([_left_padded(tensor, width) for tensor in ids])
        self.attention_mask = _unless_all_real(masks)

    def trim(self) -> None:
        """Drop the first columns that are padding in every row."""
        if self.attention_mask is None or self.input_ids is None:
            return
        used = (self.attention_mask != 0).flatten(0, 1).any(0)
        count = int(used.to(torch.int8).argmax())
        if not count:
            return
        width = len(used) - count
        for layer in _filled(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = width
            # a copy, because a view would hold the memory of the dropped columns
            layer.keys, layer.values = (t[:, :, -width:].clone() for t in (layer.keys, layer.values))
        self.input_ids = self.input_ids[..., count:].clone()
        self.attention_mask = _unless_all_real(self.attention_mask[..., count:].clone())

    def copied(self) -> UltraFuserCache:
        """A cache with the same states. What happens to one of them does not change the other."""
        out = copy.copy(self)
        out.groups = [copy.copy(group) for group in self.groups]
        for group in out.groups:
            group.layers = [copy.copy(layer) for layer in group.layers]
            for layer in _filled(group.layers):  # growing layers then share no free columns
                layer.keys, layer.values = layer.keys, layer.values
        return out

    def _mask(self) -> torch.Tensor:
        """(B, K, C), also where nothing is padded."""
        assert self.input_ids is not None
        return torch.ones_like(self.input_ids) if self.attention_mask is None else self.attention_mask

    # ---------------------------------------------------------------- what generate does to a cache

    def reset(self) -> None:
        """Drop everything."""
        super().reset()
        self.input_ids = self.attention_mask = None

    @contextmanager
    def recording_past(self) -> Iterator[None]:
        """In the block, `crop` can take back more tokens than a sliding window holds. Call it after every pass."""
        recording = [getattr(layer, "record_past", None) for layer in self.layers]
        self.activate_past_recording()
        try:
            yield
        finally:
            for layer, was_recording in zip(self.layers, recording, strict=True):
                if was_recording is False:  # without `crop` it would grow without end
                    layer.record_past = False

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as many as the negative number says."""
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            self._map(lambda tensor: tensor[..., : -abs(tokens_to_remove)])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the rows alike for every specialist."""
        for group, members in zip(self.groups, self.members, strict=True):
            group.reorder_cache(_rows(beam_idx, len(members), len(beam_idx)))
        self._map(lambda tensor: tensor[beam_idx.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        super().batch_repeat_interleave(repeats)
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows of the batch."""
        for group, members in zip(self.groups, self.members, strict=True):
            held = next((layer.keys.shape[0] for layer in _filled(group.layers)), 0)
            group.batch_select_indices(_rows(indices, len(members), held // len(members)))
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def _map(self, change: Any) -> None:
        """Do to the tokens and the mask what was done to the states."""
        self.input_ids = None if self.input_ids is None else change(self.input_ids)
        self.attention_mask = None if self.attention_mask is None else change(self.attention_mask)


def _filled(layers: Sequence[Any]) -> list[Any]:
    """The layers that hold keys and values."""
    return [layer for layer in layers if isinstance(layer, CacheLayerMixin) and layer.is_initialized]


def _rows(indices: torch.Tensor, size: int, batch: int) -> torch.Tensor:
    """Rows of the batch -> rows of a group: (n,) -> (size * n,)."""
    offsets = torch.arange(size, device=indices.device) * batch
    return (offsets[:, None] + indices).flatten()


def _left_padded(tensor: torch.Tensor, width: int) -> torch.Tensor:
    """(B, K, C) -> (B, K, width), with zeros."""
    return nn.functional.pad(tensor, (width - tensor.shape[-1], 0))


def _unless_all_real(mask: torch.Tensor) -> torch.Tensor | None:
    """None for a mask without padding, so that attention may take its faster way."""
    return None if bool((mask != 0).all()) else mask


def _join_states(layer: Any, other: Any, size: int, width: int) -> None:
    """Put the rows of one layer behind those of another, specialist by specialist.

    Args:
        layer: may be empty.
        size: the specialists of the group, k.
        width: the columns that the joined layer has seen.
    """
    held = width
    if isinstance(layer, DynamicSlidingWindowLayer) and not layer.record_past:
        held = min(width, layer.sliding_window - 1)

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        padded = [nn.functional.pad(t, (0, 0, held - t.shape[2], 0)).unflatten(0, (size, -1)) for t in tensors]
        return torch.cat(padded, dim=1).flatten(0, 1)  # (k, B, heads, C, D) -> (k * B, heads, C, D)

    if not layer.is_initialized:
        layer.lazy_initialization(other.keys, other.values)
    sources = [source for source in (layer, other) if source.get_seq_length()]
    keys, values = joined([source.keys for source in sources]), joined([source.values for source in sources])
    layer.keys, layer.values = keys, values
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length = width


def _real_tokens_first(mask: torch.Tensor) -> torch.Tensor:
    """The columns of the real tokens in order, then those of the padding: (..., T) -> (..., T)."""
    return (mask == 0).to(torch.int8).argsort(dim=-1, stable=True)


def _shared_prefixes(
    ids: torch.Tensor, mask: torch.Tensor, cached_ids: torch.Tensor, cached_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each new row, the cached row that it continues, (B,), and how many real tokens they share, (B, K).

    Args:
        ids, mask: (B, K, T).
        cached_ids, cached_mask: (B', K, C).
    """
    n = min(ids.shape[-1], cached_ids.shape[-1])
    new = ids.gather(-1, _real_tokens_first(mask))[:, None, :, :n]  # (B, 1, K, n)
    old = cached_ids.gather(-1, _real_tokens_first(cached_mask))[None, :, :, :n]  # (1, B', K, n)
    counts = torch.minimum((mask != 0).sum(-1)[:, None], (cached_mask != 0).sum(-1)[None])  # (B, B', K)
    same = (new == old) & (torch.arange(n, device=ids.device) < counts[..., None])
    shared = same.long().cumprod(-1).sum(-1)  # (B, B', K)
    score = 2 * shared.sum(-1)
    if score.shape[0] == score.shape[1]:  # a tie goes to the row itself
        score = score + torch.eye(len(score), dtype=score.dtype, device=score.device)
    rows = score.argmax(1)
    return rows, shared[torch.arange(len(rows), device=rows.device), rows]


def _select_states(layer: Any, rows: torch.Tensor, columns: torch.Tensor, real: torch.Tensor, length: int) -> bool:
    """Move the keys and values of one layer. False if the layer no longer has them, or is of another kind.

    Args:
        rows: (n,), the row that each new row continues.
        columns, real: (n, width), the column of each state that is kept, and False at padding.
        length: the number of columns that the layer has seen.
    """
    if type(layer) not in _ATTENTION or layer.get_seq_length() != length:
        return False
    width = columns.shape[1]
    gone = length - layer.keys.shape[-2]  # the first columns, which a sliding window has dropped
    if isinstance(layer, DynamicSlidingWindowLayer):
        missing = ((columns < gone) & real).any(0).nonzero()
        held = width - (int(missing.max()) + 1 if len(missing) else 0)
        if held < min(width, layer.sliding_window - 1):
            return False
        if not layer.record_past:
            held = min(held, layer.sliding_window - 1)
        columns = columns[:, width - held :]
        layer.cumulative_length = width
    index = (columns - gone).clamp(min=0)[:, None, :, None]
    layer.keys, layer.values = (_gather(states, rows, index) for states in (layer.keys, layer.values))
    return True


def _gather(states: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(rows, heads, C, D) -> (n, heads, width, D), with index (n, 1, width, 1)."""
    states, index = states.index_select(0, rows.to(states.device)), index.to(states.device)
    return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
