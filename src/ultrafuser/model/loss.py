"""The log-probability of the labels under the mixed model, without the logits (tokens, V) of all tokens at once.

Logit mixing needs the fused logits z = sum_k w_k z_k. Their gradients are closed-form:
    d log p(y) / d w_k = z_k[y] - E_p[z_k]                     (one number per token and specialist)
    d log p(y) / d h_k = w_k (W_k[y] - sum_v p_v W_k[v])
The forward pass computes the gate's gradient chunk by chunk. While the gate is trained alone, nothing is kept and nothing
is back-propagated through the heads. When specialists are trained as well, the backward pass computes each chunk's logits
again.

Probability mixing splits further: log p(y) = logsumexp_k(log w_k + log p_k(y)). A token is K numbers log p_k(y), and
the gate's training needs no vocabulary-sized work at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .few_rows import linear
from .parallel import Share

# Values of one array of chunk logits. On a CPU 28 MiB: the C library reuses such arrays, but maps larger ones anew each
# time. That doubled the time of a chunk (0.85 s against 1.5 s for 1,024 tokens at V = 49,152).
_CHUNK_VALUES = {"cpu": 7 * 2**20}
_CHUNK_VALUES_ACCELERATOR = 2**26
# States whose logits are computed together: for a vocabulary of 49,152 they stay below the 28 MiB, too.
_FEW_STATES = 128


# The logit of a token that not all specialists have. Its square is finite in float32, which soft-capped gradients need.
_MASKED_LOGIT = -1e15


class Head(NamedTuple):
    """A specialist's output layer: z = softcap(scale * (W h + bias)) / temperature, over the common vocabulary.

    Attributes:
        weight: W, (rows, D), with at least V rows. Padding rows are left out.
        vocab_size: V, the size of the common vocabulary. None: the number of rows.
        end: ids of the end of an answer, (for all specialists, for this one). They are swapped in the logits.
        masked: ids below V of tokens that not all specialists have. Their probability is 0.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    vocab_size: int | None = None
    end: tuple[int, int] | None = None
    masked: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """V."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    def _to_common(self, z: torch.Tensor) -> torch.Tensor:
        """Logits of the rows -> logits of the common vocabulary, (n, rows) -> (n, V). Overwrites z."""
        return to_common(z, self.size, self.end, self.masked)

    def _to_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient for the logits of the common vocabulary -> that of the rows, (n, V) -> (n, rows)."""
        extra = self.weight.shape[0] - self.size
        if self.end is None and not extra:
            return gradient
        gradient = torch.nn.functional.pad(gradient, (0, extra)) if extra else gradient.clone()
        return gradient if self.end is None else swap_columns(gradient, *self.end)

    def logits(self, state: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(..., D) -> (..., V), in float32 at least. The result goes into `out` (rows, V) if one is given."""
        state = state.to(self.weight.device, self.weight.dtype)
        if out is None:
            return self.from_product(linear(state, self.weight, self.bias))
        z = out[: len(state)]
        if z.dtype == self.weight.dtype:
            torch.mm(state, self.weight.T, out=z)
        else:
            z.copy_(state @ self.weight.T)
        if self.bias is not None:
            z += self.bias
        if self.scale != 1.0:
            z *= self.scale
        if self.softcap is not None:
            z.div_(self.softcap).tanh_().mul_(self.softcap)
        return self._to_common(z if self.temperature == 1.0 else z.div_(self.temperature))

    def from_product(self, z: torch.Tensor) -> torch.Tensor:
        """W h + bias -> logits of the common vocabulary: (..., rows) -> (..., V). May overwrite z."""
        z = z if z.dtype == torch.float64 else z.float()
        if self.scale != 1.0:
            z = z * self.scale
        if self.softcap is not None:
            z = torch.tanh(z / self.softcap) * self.softcap
        z = z if self.temperature == 1.0 else z / self.temperature
        changes = self.end is not None or self.masked
        return self._to_common(z.clone() if changes and z.requires_grad else z)


def all_logits(states: Sequence[torch.Tensor], heads: Sequence[Head]) -> Iterator[torch.Tensor]:
    """The logits of each head in turn: K x (..., D_k) -> K x (..., V), in float32 at least.

    Heads with the same weights share one product where the states are few. Reading a large output layer then takes longer
    than multiplying by it, and is done once instead of K times.
    """
    first = heads[0]
    is_same = all(
        (head.weight.data_ptr(), head.weight.shape) == (first.weight.data_ptr(), first.weight.shape) for head in heads
    )
    count = sum(state[..., 0].numel() for state in states)
    if not is_same or count > _FEW_STATES or torch.is_grad_enabled():
        yield from (head.logits(state) for state, head in zip(states, heads, strict=True))
        return
    stacked = torch.stack([state.to(first.weight.device, first.weight.dtype) for state in states])  # (K, ..., D)
    products = linear(stacked, first.weight, first.bias)  # (K, ..., rows)
    yield from (head.from_product(z) for z, head in zip(products, heads, strict=True))


def to_common(z: torch.Tensor, vocab_size: int, end: tuple[int, int] | None, masked: Sequence[int]) -> torch.Tensor:
    """Logits of a specialist's rows -> logits of the common vocabulary, (..., rows) -> (..., V). Overwrites z.

    Args:
        vocab_size, end, masked: see `Head`.
    """
    if end is not None:
        swap_columns(z, *end)
    z = z[..., :vocab_size]
    return z.index_fill_(-1, torch.tensor(masked, device=z.device), _MASKED_LOGIT) if masked else z


def swap_columns(z: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """Swap two columns of (..., V) in place."""
    column = z[..., a].clone()
    z[..., a] = z[..., b]
    z[..., b] = column
    return z


def mixed_log_prob(
    states: Sequence[torch.Tensor],
    heads: Sequence[Head],
    log_weights: torch.Tensor,
    targets: torch.Tensor,
    mixing: str,
    chunk_tokens: int | None = None,
    share: Share | None = None,
) -> torch.Tensor:
    """Log-probability of each target under the mixture.

    Args:
        states: K last hidden states, each (N, D_k).
        heads: the K output layers.
        log_weights: (N, K), from the gate.
        targets: (N,) token ids.
        mixing: `logits` (Eq. 1) or `probabilities`.
        chunk_tokens: tokens whose logits are held at once. The default fits a fixed memory.
        share: if several processes share the specialists. States and heads are then those of this process alone.

    Returns:
        (N,), in nats, differentiable in the log weights, the states and the heads.

    Source: Eq. 1 and Eq. 2 of the paper.
    """
    if mixing == "probabilities":
        log_probs = [label_log_prob(h, head, targets, chunk_tokens) for h, head in zip(states, heads, strict=True)]
        columns = torch.stack([log_p.to(log_weights.device) for log_p in log_probs], -1)  # (N, K), or (N, k)
        return torch.logsumexp(log_weights + (columns if share is None else share.gather(columns)), dim=-1)
    if share is not None and chunk_tokens is None:  # tables may differ in height, but chunks must not
        chunk_tokens = max(1, chunk_values(log_weights.device.type) // heads[0].size)
    tensors = [*states, *(head.weight for head in heads), *(head.bias for head in heads)]
    settings = [head[2:] for head in heads]
    return _FusedLogitsLogProb.apply(log_weights.exp(), targets, settings, chunk_tokens, share, *tensors)


def label_log_prob(
    state: torch.Tensor, head: Head, targets: torch.Tensor, chunk_tokens: int | None = None
) -> torch.Tensor:
    """Log-probability of each target under one specialist: (N, D), (N,) -> (N,), in nats."""
    return _LabelLogProb.apply(state, head.weight, head.bias, targets, head[2:], chunk_tokens)


def select_responses(
    states: Sequence[torch.Tensor], response_index: torch.Tensor, labelled: torch.Tensor
) -> list[torch.Tensor]:
    """The states that predict the response tokens of a batch.

    Args:
        states: K last hidden states, each (B, T, D_k).
        response_index: (B, K, R), where each specialist's state predicts the r-th response token.
        labelled: (B, R), True at the N response tokens, False at the padding.

    Returns:
        K tensors (N, D_k).
    """
    selected = []
    for state, index in zip(states, response_index.unbind(1), strict=True):
        positions = index.to(state.device)[..., None].expand(-1, -1, state.shape[-1])  # (B, R, D_k)
        selected.append(state.gather(1, positions)[labelled.to(state.device)])  # (N, D_k)
    return selected


def chunk_values(device_type: str) -> int:
    """Values of one array of chunk logits on a device."""
    return _CHUNK_VALUES.get(device_type, _CHUNK_VALUES_ACCELERATOR)


def token_chunks(tokens: int, weight: torch.Tensor, chunk_tokens: int | None = None) -> list[slice]:
    """Slices of the tokens so that an array of (chunk, V) stays within the budget."""
    if chunk_tokens is None:
        chunk_tokens = max(1, chunk_values(weight.device.type) // weight.shape[0])
    return [slice(start, start + chunk_tokens) for start in range(0, tokens, chunk_tokens)]


def _buffers(heads: Sequence[Head], chunks: Sequence[slice], tokens: int) -> list[torch.Tensor]:
    """An empty array for the logits of a chunk under each head."""
    rows = min(tokens, chunks[0].stop) if chunks else 0
    dtypes = [torch.float64 if head.weight.dtype == torch.float64 else torch.float32 for head in heads]
    return [head.weight.new_empty(rows, len(head.weight), dtype=d) for head, d in zip(heads, dtypes, strict=True)]


def _mixed_buffer(head: Head, buffer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """An empty array for the mixed logits of a chunk."""
    return buffer.new_empty(len(buffer), head.size, device=device)


def _normalise(z: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log softmax(z)[y], (n,), and the sums (n, 1) of exp(z - max), which overwrites z."""
    top = z.amax(-1, keepdim=True)
    log_p = z.gather(1, y) - top
    total = z.sub_(top).exp_().sum(-1, keepdim=True)
    return (log_p - total.log()).squeeze(1), total


def _gradient(z: torch.Tensor, y: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """d (grad * log softmax(z)[y]) / dz, written over z: grad * (one-hot - softmax)."""
    grad = grad[:, None].to(z)
    _, total = _normalise(z, y)
    return z.mul_(-grad / total).scatter_add_(1, y, grad)


def _accumulate(
    grads: Sequence[torch.Tensor | None],
    head: Head,
    state: torch.Tensor,
    gradient: torch.Tensor,
    logits: torch.Tensor | None,
    weight: torch.Tensor | None,
    chunk: slice,
) -> None:
    """Add one chunk's gradient for the mixed logits, (n, V), to those of one specialist's state, table and bias.

    Args:
        grads: the gradients of its state, table and bias, None where none is needed.
        logits: its logits z, which are overwritten. They are needed where they are capped:
            dz / d(W h + bias) = scale / temperature * (1 - (temperature * z / cap)^2).
        weight: its weights in the mixture, (n,), or None for a specialist alone.
    """
    if head.softcap is not None and logits is not None:
        gradient = (
            logits.mul_(head.temperature / head.softcap).square_().neg_().add_(1).mul_(gradient.to(logits.device))
        )
    gradient = head._to_rows(gradient).to(head.weight.device, head.weight.dtype)
    factor = gradient.new_full((len(gradient), 1), head.scale / head.temperature)
    if weight is not None:
        factor *= weight[:, None].to(factor)
    d_state, d_weight, d_bias = grads
    if d_state is not None:
        d_state[chunk] = (gradient @ head.weight * factor).to(d_state)
    if d_weight is not None:
        d_weight.addmm_(gradient.T, state[chunk].to(head.weight.device, head.weight.dtype) * factor)
    if d_bias is not None:
        d_bias += gradient.T @ factor[:, 0]


def _mix(zs: Sequence[torch.Tensor], weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Eq. 1 for one chunk: K x (n, V), (n, K) -> (n, V)."""
    z = torch.mul(zs[0].to(out.device), weights[:, :1].to(out), out=out[: len(weights)])
    for k, logits in enumerate(zs[1:], 1):
        z.addcmul_(logits.to(out.device), weights[:, k, None].to(out))
    return z


def _empty_grads(needs: Sequence[bool], state: torch.Tensor, head: Head) -> list[torch.Tensor | None]:
    pairs = zip((state, head.weight, head.bias), needs, strict=True)
    return [torch.zeros_like(tensor) if tensor is not None and needed else None for tensor, needed in pairs]


def _split(tensors: Sequence[torch.Tensor], settings: Sequence[tuple]) -> tuple[Sequence[torch.Tensor], list[Head]]:
    """K states and K heads from K states, K tables and K biases."""
    size = len(settings)
    tables, biases = tensors[size : 2 * size], tensors[2 * size :]
    return tensors[:size], [Head(t, b, *rest) for t, b, rest in zip(tables, biases, settings, strict=True)]


class _LabelLogProb(torch.autograd.Function):
    """log softmax(head(h))[y], chunk by chunk. The backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(ctx, state, weight, bias, targets, settings, chunk_tokens):
        head = Head(weight, bias, *settings)
        ctx.save_for_backward(state, weight, bias, targets)
        ctx.settings, ctx.chunk_tokens = settings, chunk_tokens
        targets = targets.to(weight.device)
        chunks = token_chunks(len(state), weight, chunk_tokens)
        (buffer,) = _buffers([head], chunks, len(state))
        out = buffer.new_empty(len(state))
        for chunk in chunks:
            out[chunk] = _normalise(head.logits(state[chunk], buffer), targets[chunk, None])[0]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        state, weight, bias, targets = ctx.saved_tensors
        head = Head(weight, bias, *ctx.settings)
        grads = _empty_grads(ctx.needs_input_grad[:3], state, head)
        if any(value is not None for value in grads):
            targets = targets.to(weight.device)
            chunks = token_chunks(len(state), weight, ctx.chunk_tokens)
            (buffer,) = _buffers([head], chunks, len(state))
            spare = buffer.new_empty(len(buffer), head.size) if head.softcap is not None else None
            for chunk in chunks:
                z = head.logits(state[chunk], buffer)
                logits = None if spare is None else spare[: len(z)].copy_(z)
                _accumulate(grads, head, state, _gradient(z, targets[chunk, None], grad[chunk]), logits, None, chunk)
        return *grads, None, None, None


class _FusedLogitsLogProb(torch.autograd.Function):
    """log softmax(sum_k w_k head_k(h_k))[y], chunk by chunk, with the gate's gradient computed in the forward pass."""

    @staticmethod
    def forward(ctx, weights, targets, settings, chunk_tokens, share, *tensors):
        states, heads = _split(tensors, settings)
        columns = list(range(len(heads))) if share is None else share.indices
        chunks = token_chunks(len(targets), heads[0].weight, chunk_tokens)
        buffers = _buffers(heads, chunks, len(targets))
        mixed = _mixed_buffer(heads[0], buffers[0], weights.device)
        out, closed_form = mixed.new_empty(len(targets)), torch.zeros_like(weights)
        for chunk in chunks:
            y = targets[chunk, None]
            zs = [
                head.logits(h[chunk], buffer).to(mixed.device)
                for head, h, buffer in zip(heads, states, buffers, strict=True)
            ]
            z = _mix(zs, weights[chunk][:, columns], mixed)
            if share is not None:
                share.mesh.sum_(z)
            out[chunk], total = _normalise(z, y)
            if ctx.needs_input_grad[0]:
                for k, logits in zip(columns, zs, strict=True):  # z_k[y] - E_p[z_k]
                    mean = torch.bmm(z[:, None], logits[:, :, None])[:, 0] / total
                    closed_form[chunk, k] = (logits.gather(1, y) - mean).squeeze(1).to(closed_form)
        if share is not None:
            share.mesh.sum_(closed_form)
        ctx.save_for_backward(weights, targets, closed_form, *tensors)
        ctx.settings, ctx.chunk_tokens, ctx.share, ctx.columns = settings, chunk_tokens, share, columns
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weights, targets, closed_form, *tensors = ctx.saved_tensors
        states, heads = _split(tensors, ctx.settings)
        needs, size = ctx.needs_input_grad[5:], len(heads)
        grads = [_empty_grads(needs[k::size], states[k], heads[k]) for k in range(size)]
        if any(value is not None for specialist in grads for value in specialist):
            chunks = token_chunks(len(targets), heads[0].weight, ctx.chunk_tokens)
            buffers = _buffers(heads, chunks, len(targets))
            mixed = _mixed_buffer(heads[0], buffers[0], weights.device)
            for chunk in chunks:
                zs = [head.logits(h[chunk], buffer) for head, h, buffer in zip(heads, states, buffers, strict=True)]
                z = _mix(zs, weights[chunk][:, ctx.columns], mixed)
                if ctx.share is not None:
                    ctx.share.mesh.sum_(z)
                gradient = _gradient(z, targets[chunk, None], grad[chunk])
                for k, logits in enumerate(zs):
                    _accumulate(grads[k], heads[k], states[k], gradient, logits, weights[chunk, ctx.columns[k]], chunk)
        flat = [value for values in zip(*grads, strict=True) for value in values]  # states, tables, biases
        return closed_form * grad[:, None], None, None, None, None, *flat
