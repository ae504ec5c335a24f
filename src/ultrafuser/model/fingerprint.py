"""Fingerprints of weights, from a sample of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

_HASHED_VALUES = 64  # of each tensor. Caches on disk hold hashes of these
_MARKED_VALUES = 1024


def hash_weights(weights: Iterable[tuple[str, torch.Tensor]], start: bytes = b"") -> str:
    """SHA-256 of `start` and of each tensor's name, shape, type and sampled values."""
    digest = hashlib.sha256(start)
    for name, tensor in weights:
        values = _sample(tensor, _HASHED_VALUES).float().cpu().tolist()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}{values}".encode())
    return digest.hexdigest()


class WeightMarks:
    """Weights at one moment, to see later which of them were written.

    A mark is the tensor's version counter and a sample of its values. Moving devices or casting changes neither. The
    counter alone misses writes through `.data` and by fused optimizers, transformers' default. The sample sees them.
    """

    def __init__(self, weights: Iterable[torch.Tensor] = ()) -> None:
        self._marks = {
            id(tensor): (tensor._version, _sample(tensor, _MARKED_VALUES).cpu().clone()) for tensor in weights
        }

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was written since, or is new."""
        if id(tensor) not in self._marks:
            return True
        version, values = self._marks[id(tensor)]
        return version != tensor._version or not _equal(values.to(tensor.dtype), _sample(tensor, _MARKED_VALUES).cpu())

    def differ(self, weights: Iterable[torch.Tensor]) -> bool:
        """Whether these are other tensors than those marked, or one of them was written."""
        tensors = list(weights)
        return set(self._marks) != {id(tensor) for tensor in tensors} or any(map(self.is_written, tensors))


def _sample(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` values, evenly spaced."""
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // count))]  # rounded up, so that the last values are sampled too


def _equal(values: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether values are the same, NaN included: published models have NaN in rows that no token uses."""
    if values.is_floating_point():  # float8 can be compared in another type only
        values, others = values.double(), others.double()
    return values.shape == others.shape and bool(((values == others) | (values.isnan() & others.isnan())).all())
