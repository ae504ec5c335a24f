"""Linear layers of few rows on a CPU: the products of decoding, which read a large weight for a handful of tokens.

BLAS libraries are fast for one row, and for many. For two to sixteen rows some are slow: MKL takes 1.7 to 3.5 times as long
for three rows as for one, though reading the weight takes most of the time (docs/speed.md). The same product in the other
order, W x^T with the rows filled up to 4, 8 or 16, is often faster. Which one is depends on the processor and the library, so
both are timed once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional

_PLAIN = (torch.Tensor, nn.Parameter)  # quantised weights have types and products of their own
_FILLED = (4, 8, 16)  # rows that the kernels of the other order are made for
_MIN_WEIGHTS = 2**16  # of smaller layers the extra calls take longer than the product
_GAIN = 0.85  # take the other order where it needs this share of the time at most
_TRIAL_SHAPE = (1536, 1024)  # 6 MiB in float32, more than the cache next to a core holds
_TRIALS = 9


class FewRowsLinear(nn.Linear):
    """`nn.Linear`, in the faster order of the product."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return linear(input, self.weight, self.bias)


def use_few_rows(model: nn.Module) -> None:
    """Let the plain linear layers of a model take the faster order. Their weights and names stay as they are."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRowsLinear


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, in the order that is faster for as many rows. The results differ in rounding alone."""
    filled = _filled_rows(x, weight)
    if not filled or not _other_order_is_faster(filled, weight.dtype, torch.get_num_threads()):
        return functional.linear(x, weight, bias)
    return _other_order(x, weight, bias, filled)


def _filled_rows(x: torch.Tensor, weight: torch.Tensor) -> int:
    """The rows that a product is filled up to. 0 where the usual order is taken anyway."""
    rows = x.numel() // x.shape[-1]
    if rows < 2 or rows > _FILLED[-1] or x.device.type != "cpu" or weight.numel() < _MIN_WEIGHTS:
        return 0
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 0
    if x.dtype != weight.dtype or torch.is_autocast_enabled("cpu") or type(weight) not in _PLAIN:
        return 0
    return next(filled for filled in _FILLED if rows <= filled)


def _other_order(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, filled: int) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])  # (rows, in)
    rows = len(flat)
    if rows < filled:
        flat = functional.pad(flat, (0, 0, 0, filled - rows))
    y = torch.mm(weight, flat.T)[:, :rows].T.contiguous()  # (rows, out)
    if bias is not None:
        y += bias
    return y.view(*x.shape[:-1], -1)


@cache
def _other_order_is_faster(filled: int, dtype: torch.dtype, threads: int) -> bool:
    """Compare both orders on this machine. It takes a few milliseconds, once for each key."""
    with torch.inference_mode():
        weights = [
            torch.zeros(_TRIAL_SHAPE, dtype=dtype, device="cpu") for _ in range(4)
        ]  # the next one is not in the cache
        x = torch.zeros(filled - 1, _TRIAL_SHAPE[1], dtype=dtype, device="cpu")
        usual = _shortest(lambda weight: functional.linear(x, weight), weights)
        other = _shortest(lambda weight: _other_order(x, weight, None, filled), weights)
    return other < _GAIN * usual


def _shortest(product: Callable[[torch.Tensor], torch.Tensor], weights: list[torch.Tensor]) -> float:
    """The shortest of several times: other work on the machine makes times longer, never shorter."""
    times = []
    for i in range(_TRIALS):
        began = time.perf_counter()
        product(weights[i % len(weights)])
        times.append(time.perf_counter() - began)
    return min(times)
