"""One base that runs once for k adapters: k row blocks, and one key-value cache per adapter and layer."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import init_vllm_registered_model

from ultrafuser.errors import UltraFuserError


class BlockAttention(nn.Module):
    """Attention of k row blocks, each over its own key-value cache. All caches have the same metadata."""

    def __init__(self, attention: Attention, names: Sequence[str], layers: dict[str, nn.Module]) -> None:
        """
        Args:
            attention: the layer of the base, which is copied k times and then not used any more.
            names: the k specialists.
            layers: vLLM's layers by their names. The copies replace the original.
        """
        super().__init__()
        copies = []
        for name in names:
            clone = copy.deepcopy(attention)
            clone.layer_name = f"{attention.layer_name}_{name}"
            if (target := attention.kv_sharing_target_layer_name) is not None:
                clone.kv_sharing_target_layer_name = f"{target}_{name}"
                clone.impl.kv_sharing_target_layer_name = f"{target}_{name}"
            layers[clone.layer_name] = clone
            copies.append(clone)
        del layers[attention.layer_name]
        self.copies = nn.ModuleList(copies)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(k * tokens, ...) -> (k * tokens, heads * head size)."""
        size = len(self.copies)
        blocks = [None if rows is None else rows.unflatten(0, (size, -1)) for rows in (query, key, value)]
        outputs = [
            attention(*(None if rows is None else rows[i] for rows in blocks))
            for i, attention in enumerate(self.copies)
        ]
        return torch.cat(outputs)


@support_torch_compile(dynamic_arg_dims={"input_ids": {0: "b"}, "positions": {0: "b"}})
class SharedBase(nn.Module):
    """A vLLM model that serves k specialists in one pass. vLLM compiles it as a whole, the repeated rows included.

    Its tokens are what vLLM counts, so the sizes for which vLLM compiles and captures graphs hold for it as they are.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", names: Sequence[str] = ()) -> None:
        """
        Raises:
            UltraFuserError: layers that keep a state but are not vLLM's plain attention.
        """
        super().__init__()
        self.names = list(names)
        self.model = init_vllm_registered_model(vllm_config, prefix=prefix)
        layers = vllm_config.compilation_config.static_forward_context
        for path, module in list(self.model.named_modules()):
            if not isinstance(module, AttentionLayerBase):
                continue
            if not isinstance(module, Attention):
                raise UltraFuserError(
                    f"specialists {', '.join(names)} share a {type(self.model).__name__}, whose layer {path} is a "
                    f"{type(module).__name__}. In vLLM adapters can share a base whose layers with a state are its plain "
                    "Attention. Fuse with share_base: false"
                )
            parent, _, leaf = path.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, BlockAttention(module, names, layers))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Tokens (T), positions (T) -> last hidden states (k, T, D)."""
        size = len(self.names)
        states = self.model(input_ids.repeat(size), positions.repeat(size))  # (k * T, D)
        return states.unflatten(0, (size, -1))
