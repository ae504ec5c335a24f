"""The gate: hidden states of K specialists -> token weights (Eq. 1). Or constant weights, the baseline of a gate."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn


class Gate(nn.Module):
    """A two-layer perceptron shared by all specialists: `w = softmax([g(h_1), ..., g(h_K)])`.

    `g` is Linear(D, hidden_size), ReLU, Linear(hidden_size, 1). Where the specialists' widths differ, each state
    first goes through its own linear projection to the largest width.

    Source: section 3.1 and appendix B. Appendix E writes `g: R^D -> R^3`, but Eq. 1 needs one number per
    specialist, and this code follows Eq. 1.
    """

    def __init__(self, widths: Sequence[int], hidden_size: int = 512) -> None:
        super().__init__()
        width = max(widths)
        self.projections = (
            nn.ModuleList(nn.Linear(d, width, bias=False) for d in widths) if len(set(widths)) > 1 else None
        )
        self.hidden = nn.Linear(width, hidden_size)
        self.score = nn.Linear(hidden_size, 1)

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Log weights of the specialists.

        Args:
            states: K last hidden states, each (..., D_k).

        Returns:
            (..., K), in the gate's own precision. `exp` of it sums to one over K.
        """
        return self.score_states(states, range(len(states))).log_softmax(dim=-1)

    def score_states(self, states: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """g of the states of some specialists: k x (..., D_k) -> (..., k)."""
        weight = self.hidden.weight
        moved = [state.to(weight.device, weight.dtype) for state in states]
        if self.projections is not None:
            moved = [self.projections[k](state) for k, state in zip(indices, moved, strict=True)]
        scores = [self.score(torch.relu(self.hidden(state))) for state in moved]  # k x (..., 1)
        return torch.cat(scores, dim=-1)


class StaticGate(nn.Module):
    """The same weights at every token: equal before training, the best static mixture after it.

    The weights are the softmax of K trained scores.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(size))

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """K states (..., D_k) -> log weights (..., K)."""
        return self.scores.log_softmax(dim=-1).expand(*states[0].shape[:-1], -1)

    def score_states(self, states: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        """The scores of some specialists: k x (..., D_k) -> (..., k)."""
        return self.scores[list(indices)].expand(*states[0].shape[:-1], -1)
