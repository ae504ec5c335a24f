"""Hold the specialists to what they predicted right before the joint stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import kl_div

from ultrafuser.data.templates import Rendered
from ultrafuser.model.loss import Head, token_chunks
from ultrafuser.model.modeling_ultrafuser import UltraFuserOutput
from ultrafuser.train.features import RowFeatures
from ultrafuser.train.trainer import FusionTrainer

_MIN_PROBABILITY = 0.01  # labels below it before the stage are left out: they hardly count, but cost as much


class ReferenceTrainer(FusionTrainer):
    """Add `kl_coef` * mean over tokens of sum_k q_k(y) KL(q_k || p_k) to the loss. Metrics show the mean as `kl`.

    q_k is the distribution of specialist k before the stage, p_k the present one, both at its temperature, and y the
    label, if q_k(y) is .01 at least. So a specialist is held where it was right, and free where it was wrong. q_k comes from cached states.

    Args:
        train_rows: features from before the stage.
        kl_coef: of the recipe's joint stage.
    """

    def __init__(self, *args: Any, kl_coef: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kl_coef = kl_coef
        self._heads = [_frozen(head) for head in self.model.heads()]
        self._reference: list[torch.Tensor] = []  # of the micro-batch
        self._sums = torch.zeros(2)  # since the last logged step: nats, tokens

    def _collate(self, items: Sequence[Rendered] | Sequence[RowFeatures]) -> dict[str, Any]:
        features = [item for item in items if isinstance(item, RowFeatures)]
        batch = super()._collate([item.row for item in features] or items)
        if features:
            states = [torch.cat(rows) for rows in zip(*(item.states for item in features), strict=True)]  # K x (N, D_k)
            batch["reference"] = [*states, torch.cat([item.log_probs for item in features])]  # and (N, K)
        return batch

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._reference = inputs["reference"]
        inputs = {key: value for key, value in inputs.items() if key != "reference"}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def extra_loss(self, inputs: dict[str, Any], out: UltraFuserOutput) -> torch.Tensor:
        *references, log_probs = self._reference
        heads, states = self.model.heads(), out.response_states
        assert states is not None
        divergences = [
            weighted_kl(state, head, reference, reference_head, column.exp())
            for state, head, reference, reference_head, column in zip(
                states, heads, references, self._heads, log_probs.unbind(-1), strict=True
            )
        ]
        total = torch.stack([divergence.to(log_probs.device) for divergence in divergences]).sum()
        self._sums += torch.tensor([float(total.detach()), len(log_probs)])
        return self.kl_coef * total / self._mean_labels

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            nats, tokens = self.accelerator.reduce(self._sums.to(self.args.device), "sum").tolist()
            copies = 1 if self.mesh is None else self.mesh.size  # processes that have counted the same tokens
            logs["kl"] = nats * copies / max(1.0, tokens)
            self._sums.zero_()
        super().log(logs, start_time)


def weighted_kl(
    state: torch.Tensor, head: Head, reference: torch.Tensor, reference_head: Head, weights: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of weight * KL(reference || present), in nats, without the logits of all tokens at once.

    Args:
        state, reference: the last hidden states of one specialist, (N, D).
        head, reference_head: its output layers.
        weights: (N,). Tokens with a weight below .01 are left out.
    """
    mask = weights >= _MIN_PROBABILITY
    present, weights = state[mask.to(state.device)], weights[mask]
    reference = reference[mask.to(reference.device)].to(state.device)
    # The gradients are computed chunk by chunk with the values, so that no logits are kept for the backward pass.
    leaf = present.detach().requires_grad_()
    sources = [(leaf, present)] + [(t, t) for t in (head.weight, head.bias) if t is not None and t.requires_grad]
    gradients = [torch.zeros_like(source) for source, _ in sources]
    total = weights.new_zeros((), dtype=torch.float32)
    for chunk in token_chunks(len(leaf), head.weight):
        with torch.no_grad():
            log_q = reference_head.logits(reference[chunk]).log_softmax(-1)  # (n, V)
        with torch.enable_grad():
            log_p = head.logits(leaf[chunk]).log_softmax(-1)
            by_token = kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)  # (n,)
            divergence = (weights[chunk].to(by_token) * by_token).sum()
            for total_gradient, gradient in zip(
                gradients, torch.autograd.grad(divergence, [source for source, _ in sources]), strict=True
            ):
                total_gradient += gradient
        total += divergence.detach().to(total)
    for gradient, (_, tensor) in zip(gradients, sources, strict=True):
        term = (tensor * gradient).sum()
        total = total + (term - term.detach()).to(total)  # the value of the sum, and these gradients
    return total


def _frozen(head: Head) -> Head:
    """A head whose tables training does not change."""
    weight, bias = (
        tensor.detach().clone() if tensor is not None and tensor.requires_grad else tensor
        for tensor in (head.weight, head.bias)
    )
    assert weight is not None
    return head._replace(weight=weight, bias=bias)
