"""Log-probability of the labels under the mixed model, without ever holding (tokens, V) for all tokens.

Logit mixing needs the fused logits z = sum_k w_k z_k; their gradients are closed-form:
    d log p(y) / d w_k = z_k[y] - E_p[z_k]                     (one number a token and specialist)
    d log p(y) / d h_k = w_k (W_k[y] - sum_v p_v W_k[v])
so the gate's gradient is computed in the forward pass, chunk by chunk, and while only the gate is trained nothing is
kept and nothing is back-propagated through the heads. When specialists are trained as well, the backward pass computes
each chunk's logits again.

Probability mixing splits further: log p(y) = logsumexp_k(log w_k + log p_k(y)). A token is K numbers log p_k(y), and
the gate's training needs no vocabulary-sized work at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

# Values of one array of chunk logits. On a CPU 28 MiB: the C library hands such arrays out again, while it maps larger
# ones anew each time, which doubled the time of a chunk (0.85 s against 1.5 s for 1,024 tokens at V = 49,152).
_CHUNK_VALUES = {"cpu": 7 * 2**20}
_CHUNK_VALUES_ACCELERATOR = 2**26


class Head(NamedTuple):
    """A specialist's output layer: z = softcap(scale * (W h + bias)); W is (V, D), padding rows already cut off."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V), in float32 at least."""
        z = torch.nn.functional.linear(state.to(self.weight.device, self.weight.dtype), self.weight, self.bias)
        z = z if z.dtype == torch.float64 else z.float()
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.softcap is None else torch.tanh(z / self.softcap) * self.softcap

    def pull_back(self, gradient: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Gradient for z -> gradient for W h + bias, both (n, V)."""
        if self.softcap is not None:
            gradient = gradient * (1 - (z / self.softcap) ** 2)
        return gradient * self.scale if self.scale != 1.0 else gradient


def mixed_log_prob(
    states: Sequence[torch.Tensor],
    heads: Sequence[Head],
    log_weights: torch.Tensor,
    targets: torch.Tensor,
    mixing: str,
    chunk_tokens: int | None = None,
) -> torch.Tensor:
    """Log-probability of each target under the mixture.

    Args:
        states: K last hidden states, each (N, D_k).
        heads: the K output layers.
        log_weights: (N, K), from the gate.
        targets: (N,) token ids.
        mixing: `logits` (Eq. 1) or `probabilities`.
        chunk_tokens: tokens whose logits are held at once; by default what fits a fixed memory.

    Returns:
        (N,), in nats; differentiable in the log weights, the states and the heads.

    Source: Eq. 1 and Eq. 2 of the paper.
    """
    if mixing == "probabilities":
        each = [label_log_prob(h, head, targets, chunk_tokens) for h, head in zip(states, heads, strict=True)]
        return torch.logsumexp(log_weights + torch.stack([ell.to(log_weights.device) for ell in each], -1), dim=-1)
    shapes = [(head.scale, head.softcap) for head in heads]
    tensors = [*states, *(head.weight for head in heads), *(head.bias for head in heads)]
    return _FusedLogitsLogProb.apply(log_weights.exp(), targets, shapes, chunk_tokens, *tensors)


def label_log_prob(
    state: torch.Tensor, head: Head, targets: torch.Tensor, chunk_tokens: int | None = None
) -> torch.Tensor:
    """Log-probability of each target under one specialist: (N, D), (N,) -> (N,), in nats."""
    return _LabelLogProb.apply(state, head.weight, head.bias, targets, (head.scale, head.softcap), chunk_tokens)


def _chunks(tokens: int, weight: torch.Tensor, chunk_tokens: int | None) -> list[slice]:
    """Slices of the tokens so that an array of (chunk, V) stays within the budget."""
    if chunk_tokens is None:
        values = _CHUNK_VALUES.get(weight.device.type, _CHUNK_VALUES_ACCELERATOR)
        chunk_tokens = max(1, values // weight.shape[0])
    return [slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens)]


def _accumulate(grads: dict[str, Any], head: Head, state: torch.Tensor, gradient: torch.Tensor, part: slice) -> None:
    """Add one chunk's gradient for W h + bias, (n, V), to those of the state, the weight and the bias."""
    gradient = gradient.to(head.weight.dtype)
    if grads["state"] is not None:
        grads["state"][part] = (gradient @ head.weight).to(grads["state"])
    if grads["weight"] is not None:
        grads["weight"].addmm_(gradient.T, state[part].to(head.weight.device, head.weight.dtype))
    if grads["bias"] is not None:
        grads["bias"] += gradient.sum(0)


def _empty_grads(needs: Sequence[bool], state: torch.Tensor, head: Head) -> dict[str, Any]:
    return {
        "state": torch.zeros_like(state) if needs[0] else None,
        "weight": torch.zeros_like(head.weight) if needs[1] else None,
        "bias": torch.zeros_like(head.bias) if needs[2] and head.bias is not None else None,
    }


class _LabelLogProb(torch.autograd.Function):
    """log softmax(head(h))[y], chunk by chunk; the backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, state, weight, bias, targets, shape, chunk_tokens):
        head = Head(weight, bias, *shape)
        ctx.save_for_backward(state, weight, bias, targets)
        ctx.shape, ctx.chunk_tokens = shape, chunk_tokens
        targets = targets.to(weight.device)
        out = []
        for part in _chunks(len(state), weight, chunk_tokens):
            z = head.logits(state[part])  # (n, V)
            out.append(z.gather(1, targets[part, None]).squeeze(1) - z.logsumexp(-1))
        return torch.cat(out) if out else state.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        state, weight, bias, targets = ctx.saved_tensors
        head = Head(weight, bias, *ctx.shape)
        grads = _empty_grads(ctx.needs_input_grad, state, head)
        if any(value is not None for value in grads.values()):
            targets = targets.to(weight.device)
            for part in _chunks(len(state), weight, ctx.chunk_tokens):
                z = head.logits(state[part])
                gradient = z.softmax(-1).mul_(-grad[part, None])
                gradient.scatter_add_(1, targets[part, None], grad[part, None].to(gradient))
                _accumulate(grads, head, state, head.pull_back(gradient, z), part)
        return grads["state"], grads["weight"], grads["bias"], None, None, None


class _FusedLogitsLogProb(torch.autograd.Function):
    """log softmax(sum_k w_k head_k(h_k))[y], chunk by chunk, with the gate's gradient computed in the forward pass."""

    @staticmethod
    def forward(ctx, weights, targets, shapes, chunk_tokens, *tensors):
        size = len(shapes)
        states, tables, biases = tensors[:size], tensors[size : 2 * size], tensors[2 * size :]
        heads = [Head(t, b, *shape) for t, b, shape in zip(tables, biases, shapes, strict=True)]
        out, closed_form = [], torch.zeros_like(weights)
        for part in _chunks(len(targets), tables[0], chunk_tokens):
            y = targets[part, None]
            zs = [head.logits(h[part]).to(weights.device) for head, h in zip(heads, states, strict=True)]
            z = sum(w[:, None] * own for w, own in zip(weights[part].T, zs, strict=True))  # Eq. 1, (n, V)
            out.append(z.gather(1, y).squeeze(1) - z.logsumexp(-1))
            if ctx.needs_input_grad[0]:
                p = z.softmax(-1)
                for k, own in enumerate(zs):  # z_k[y] - E_p[z_k]
                    closed_form[part, k] = own.gather(1, y).squeeze(1) - torch.linalg.vecdot(p, own)
        ctx.save_for_backward(weights, targets, closed_form, *tensors)
        ctx.shapes, ctx.chunk_tokens = shapes, chunk_tokens
        return torch.cat(out) if out else weights.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, targets, closed_form, *tensors = ctx.saved_tensors
        size = len(ctx.shapes)
        states, tables, biases = tensors[:size], tensors[size : 2 * size], tensors[2 * size :]
        heads = [Head(t, b, *shape) for t, b, shape in zip(tables, biases, ctx.shapes, strict=True)]
        needs = ctx.needs_input_grad[4:]
        grads = [_empty_grads(needs[k::size], states[k], heads[k]) for k in range(size)]
        if any(value is not None for own in grads for value in own.values()):
            for part in _chunks(len(targets), tables[0], ctx.chunk_tokens):
                zs = [head.logits(h[part]).to(weights.device) for head, h in zip(heads, states, strict=True)]
                z = sum(w[:, None] * own for w, own in zip(weights[part].T, zs, strict=True))
                gradient = z.softmax(-1).mul_(-grad[part, None])
                gradient.scatter_add_(1, targets[part, None], grad[part, None].to(gradient))
                for k, own in enumerate(zs):
                    mine = (gradient * weights[part, k, None]).to(tables[k].device)
                    _accumulate(grads[k], heads[k], states[k], heads[k].pull_back(mine, own.to(mine.device)), part)
        flat = [own[name] for name in ("state", "weight", "bias") for own in grads]
        return closed_form * grad[:, None], None, None, None, *flat
