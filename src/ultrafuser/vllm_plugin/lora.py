"""k LoRA adapters beside vLLM's linear layers: the rows of the batch are k blocks, and block i goes through adapter i."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from ultrafuser.errors import CheckpointError
from ultrafuser.model.shared_base import AdapterWeights

_LAYERS = (ReplicatedLinear, ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)
_Pairs = Sequence[tuple[torch.Tensor, torch.Tensor] | None]


class GroupedLoraMethod(LinearMethodBase):
    """y_i = base(x_i) + B_i A_i x_i, in place of the method by which a linear layer multiplies.

    So the layer keeps its weights, their names, its bias, and what tensor parallelism does before and after the product:
    where it splits the output, B is split with it. Where it splits the input and sums the outputs, A is split.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """

    def __init__(self, base: LinearMethodBase, size: int) -> None:
        """
        Args:
            base: the layer's method, quantised or not.
            size: the number of adapters, k.
        """
        super().__init__()
        self.base = base
        self.size = size

    def create_weights(self, layer: nn.Module, *args, **kwargs) -> None:
        """The layer has its weights already."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """What the base method does to its weights."""
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """(k * tokens, in) -> (k * tokens, out)."""
        y = self.base.apply(layer, x, bias)
        blocks = x.unflatten(0, (self.size, -1))  # (k, tokens, in)
        low = torch.bmm(blocks, layer.lora_A)  # (k, tokens, r)
        return torch.baddbmm(y.unflatten(0, (self.size, -1)), low, layer.lora_B).flatten(0, 1)


def add_adapters(model: nn.Module, names: Sequence[str], adapters: Sequence[AdapterWeights | None]) -> list[str]:
    """Put k adapters beside the linear layers of a model. None leaves a specialist as the bare base.

    Args:
        names: the k specialists.
        adapters: by the names of the checkpoint's layers, of which vLLM joins some (q, k and v, gate and up).

    Returns:
        The names of the new parameters.

    Raises:
        CheckpointError: a layer that is not there, is of another kind, or has another shape.
    """
    modules = dict(model.named_modules())
    parts: dict[str, dict[int | None, list]] = {}  # by vLLM's layer and the part of it
    for i, adapter in enumerate(adapters):
        if adapter is None:
            continue
        for name, pair in adapter.layers.items():
            target, index = _target(model, modules, name)
            layer = modules.get(target)
            if not isinstance(layer, _LAYERS):
                kind = "no such layer" if layer is None else f"a {type(layer).__name__}"
                raise CheckpointError(
                    f"specialist {names[i]!r}: its adapter changes {name!r}, where vLLM's {type(model).__name__} has {kind}. "
                    "Fuse with share_base: false and a merged specialist, or serve with `ultrafuser serve --engine embedded`"
                )
            scaled = pair[0], pair[1] * adapter.scaling
            parts.setdefault(target, {}).setdefault(index, [None] * len(adapters))[i] = scaled
    created = []
    for target, pairs in parts.items():
        layer = modules[target]
        a, b = _joined(layer, pairs, target, names)
        weight = next(layer.parameters())
        for key, tensor in (("lora_A", a), ("lora_B", b)):
            parameter = nn.Parameter(tensor.to(weight.device, layer.params_dtype).contiguous(), requires_grad=False)
            layer.register_parameter(key, parameter)
            created.append(f"{target}.{key}")
        layer.quant_method = GroupedLoraMethod(layer.quant_method, len(names))
    return created


def _target(model: nn.Module, modules: dict[str, nn.Module], name: str) -> tuple[str, int | None]:
    """The layer of vLLM's model that holds a checkpoint's layer, and its index among those joined there."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is not None:
        name = mapper.get_rename_mapper().map_name(name) or name
    if name in modules:
        return name, None
    parent, _, leaf = name.rpartition(".")
    for joined, leaves in getattr(model, "packed_modules_mapping", {}).items():
        if leaf in leaves and f"{parent}.{joined}" in modules:
            return f"{parent}.{joined}", leaves.index(leaf)
    return name, None


def _joined(
    layer: LinearBase, parts: Mapping[int | None, _Pairs], target: str, names: Sequence[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (k, in, r) and B (k, r, out) of a layer on this device, with a block of r for each joined part.

    Adapters of smaller rank are padded with zeros.
    """
    sizes = _output_sizes(layer)
    width = layer.input_size
    blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
    for index, pairs in sorted(parts.items(), key=lambda part: -1 if part[0] is None else part[0]):
        rows = sum(sizes) if index is None else sizes[index]
        for name, pair in zip(names, pairs, strict=True):
            if pair is not None and (pair[0].shape[1], pair[1].shape[0]) != (width, rows):
                raise CheckpointError(
                    f"specialist {name!r}: its adapter changes {target!r} from {pair[0].shape[1]} to {pair[1].shape[0]} "
                    f"features, but its base has a layer of ({width}, {rows}). Is it the right base?"
                )
        rank = max(pair[0].shape[0] for pair in pairs if pair is not None)
        a, b = torch.zeros(len(pairs), width, rank), torch.zeros(len(pairs), rank, sum(sizes))
        start = 0 if index is None else sum(sizes[:index])
        for i, pair in enumerate(pairs):
            if pair is not None:
                r = pair[0].shape[0]
                a[i, :, :r], b[i, :r, start : start + rows] = pair[0].T, pair[1].T
        blocks.append((a, b))
    a, b = torch.cat([a for a, _ in blocks], dim=2), torch.cat([b for _, b in blocks], dim=1)
    return _shard(layer, a, b, sizes)


def _output_sizes(layer: LinearBase) -> list[int]:
    """Rows of each joined part in the checkpoint."""
    if isinstance(layer, QKVParallelLinear):
        heads, kv_heads = layer.total_num_heads, layer.total_num_kv_heads
        return [heads * layer.head_size, kv_heads * layer.head_size, kv_heads * layer.v_head_size]
    return list(getattr(layer, "output_sizes", None) or [layer.output_size])


def _shard(
    layer: LinearBase, a: torch.Tensor, b: torch.Tensor, sizes: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The part of A and B that belongs to this device under tensor parallelism."""
    if isinstance(layer, RowParallelLinear):
        width = layer.input_size_per_partition
        return a[:, layer.tp_rank * width : (layer.tp_rank + 1) * width], b
    if not isinstance(layer, ColumnParallelLinear):
        return a, b
    columns = []
    for index, (block, width) in enumerate(zip(b.split(list(sizes), dim=2), layer.output_partition_sizes, strict=True)):
        # key and value heads are repeated where there are more devices than heads
        replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index > 0 else 1
        rank = layer.tp_rank // replicas
        columns.append(block[:, :, rank * width : (rank + 1) * width])
    return a, torch.cat(columns, dim=2)
