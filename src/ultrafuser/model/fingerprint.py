"""Fingerprints of weights, from a sample of each tensor."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch

from .quantized import inner_tensors

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
            id(tensor): (_version(tensor), _sample(tensor, _MARKED_VALUES).cpu().clone()) for tensor in weights
        }

    def is_written(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was written since, or is new."""
        if id(tensor) not in self._marks:
            return True
        version, values = self._marks[id(tensor)]
        sample = _sample(tensor, _MARKED_VALUES).cpu()
        return version != _version(tensor) or not _equal(values.to(sample.dtype), sample)

    def differ(self, weights: Iterable[torch.Tensor]) -> bool:
        """Whether these are other tensors than those marked, or one of them was written."""
        tensors = list(weights)
        return set(self._marks) != {id(tensor) for tensor in tensors} or any(map(self.is_written, tensors))


def _version(tensor: torch.Tensor) -> int | None:
    """None for tensors made under `torch.inference_mode()`, which count no writes."""
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """At most `count` values of each plain tensor in it, evenly spaced from the first to the last."""
    samples = []
    for inner in inner_tensors(tensor.detach()):
        flat = inner.new_empty(0, device="cpu") if inner.is_meta else inner.reshape(-1)  # meta: offloaded to disk
        samples.append(
            flat[:: max(1, -(-flat.numel() // count))]
        )  # rounded up, so that the last values are sampled too
    return samples[0] if len(samples) == 1 else torch.cat([sample.double() for sample in samples])


def _equal(values: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether values are the same, NaN included: published models have NaN in rows that no token uses."""
    if values.is_floating_point():  # float8 can be compared in another type only
        values, others = values.double(), others.double()
    return values.shape == others.shape and bool(((values == others) | (values.isnan() & others.isnan())).all())
