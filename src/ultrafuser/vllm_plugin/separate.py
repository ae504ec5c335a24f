"""One specialist with weights of its own: a vLLM model as it is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import init_vllm_registered_model


class SeparateSpecialist(nn.Module):
    """A vLLM model with the interface of `SharedBase`, for k = 1."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", names: Sequence[str] = ()) -> None:
        super().__init__()
        self.names = list(names)
        self.model = init_vllm_registered_model(vllm_config, prefix=prefix)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens (T), positions (T) -> last hidden states (1, T, D)."""
        return self.model(input_ids, positions)[None]
