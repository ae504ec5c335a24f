"""A layer of keys and values with free columns, so that a step writes one column and copies nothing."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

_FREE_COLUMNS = 128  # of a new buffer. More of them are copied less often, and hold more unused memory


class GrowingLayer(DynamicLayer):
    """A `DynamicLayer` that writes into buffers.

    transformers' own layer concatenates at each step, which copies the states of all rows: for many rows that takes about
    as long as the forward pass of a small model.

    An assigned tensor has no free columns. So layers that share tensors, such as shallow copies, never write over each
    other after one of them was assigned its own states.
    """

    def __init__(self, **kwargs: Any) -> None:
        self._keys, self._values = _Buffer(None), _Buffer(None)
        super().__init__(**kwargs)

    @property
    def keys(self) -> Any:
        """(rows, heads, C, D), without the free columns. None before the first update."""
        return self._keys.states()

    @keys.setter
    def keys(self, states: torch.Tensor | None) -> None:
        self._keys = _Buffer(states)

    @property
    def values(self) -> Any:
        """(rows, heads, C, D), without the free columns. None before the first update."""
        return self._values.states()

    @values.setter
    def values(self, states: torch.Tensor | None) -> None:
        self._values = _Buffer(states)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states behind the cached ones. Returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._keys.write(key_states)
        self._values.write(value_states)
        return self.keys, self.values


class _Buffer:
    """A tensor (rows, heads, columns, D), of which the first `length` columns are in use."""

    def __init__(self, tensor: torch.Tensor | None) -> None:
        self.tensor = tensor
        self.length = 0 if tensor is None or tensor.dim() < 4 else tensor.shape[2]

    def states(self) -> torch.Tensor | None:
        """The columns in use. The empty tensor of a layer that is only initialised is given as it is."""
        return self.tensor if self.tensor is None or self.tensor.dim() < 4 else self.tensor[:, :, : self.length]

    def write(self, states: torch.Tensor) -> None:
        """Add columns behind those in use, in a larger tensor if no free ones are left."""
        end = self.length + states.shape[2]
        if self.tensor is None or self.tensor.dim() < 4 or end > self.tensor.shape[2]:
            shape = [*states.shape[:2], end + _FREE_COLUMNS, states.shape[3]]
            tensor = states.new_empty(shape)
            if self.length and self.tensor is not None:
                tensor[:, :, : self.length] = self.tensor[:, :, : self.length]
            self.tensor = tensor
        self.tensor[:, :, self.length : end] = states
        self.length = end
