"""Memory of a device: what is free, what weights and activations take, whether to compute these again, and what to do if it runs out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ultrafuser.errors import TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.recipe import GateStage, JointStage, LoraRecipe

# Numbers that a decoder layer with adapters keeps for the backward pass, per token, in units of the hidden and of the
# intermediate size, by the bytes of the layer's type. In 2 bytes, norms and adapters keep copies in float32.
# Source: benchmarks/activations.py, three public shapes.
_KEPT = {2: (19.0, 4.9), 4: (7.2, 4.0)}
SHARE = 0.5  # of the free memory


def activation_bytes(group: SpecialistGroup, tokens: int, *, checkpointing: bool = False, offload: bool = False) -> int:
    """Estimated bytes that one pass over `tokens` keeps for the backward pass, for all specialists of the group.

    With checkpointing these are the inputs of all layers, and one layer's tensors while it is computed again. With offload
    the inputs are in the host's memory.
    """
    layers, of_layer = group.model.config.get_text_config().num_hidden_layers, layer_bytes(group, tokens)
    inputs = tokens * group.size * layers * group.width * group.model.dtype.itemsize
    if offload:
        return of_layer
    return inputs + of_layer if checkpointing else layers * of_layer


def layer_bytes(group: SpecialistGroup, tokens: int, *, kept: bool = True) -> int:
    """Estimated bytes of one decoder layer's tensors in a pass over `tokens`, for all specialists of the group.

    Args:
        kept: all tensors are kept for the backward pass. Otherwise those that a pass without gradients holds at once.
    """
    config = group.model.config.get_text_config()
    inner = getattr(config, "intermediate_size", None) or 4 * group.width
    inner = max(inner) if isinstance(inner, Sequence) else inner
    size = group.model.dtype.itemsize
    per_hidden, per_intermediate = _KEPT.get(size, _KEPT[4]) if kept else (8, 3)
    return tokens * group.size * round(per_hidden * group.width + per_intermediate * inner) * size


def parameter_size(parameters: Sequence[nn.Parameter]) -> tuple[int, int]:
    """Numbers, and their bytes."""
    return sum(p.numel() for p in parameters), sum(p.numel() * p.dtype.itemsize for p in parameters)


def base_size(group: SpecialistGroup) -> tuple[int, int]:
    """Parameters of the base without adapters, and their bytes."""
    adapters = {id(parameter) for parameter in group.adapter_parameters()}
    return parameter_size([parameter for parameter in group.model.parameters() if id(parameter) not in adapters])


def adapter_size(group: SpecialistGroup) -> tuple[int, int]:
    """Parameters of the adapters, and their bytes."""
    return parameter_size(group.adapter_parameters())


def new_adapter_parameters(group: SpecialistGroup, lora: LoraRecipe) -> int:
    """Parameters of the adapters that the joint stage would add."""
    return lora.r * sum(map(sum, group.linear_layers(lora.target_modules).values()))


def forward_parameters(model: UltraFuserForCausalLM) -> int:
    """Parameters that multiply each token in one pass of all specialists. A table that is only looked up does not."""
    total = 0
    for group in model.local_groups:
        table, head = group.model.get_input_embeddings().weight, group.model.get_output_embeddings().weight
        total += group.size * (base_size(group)[0] - (0 if table is head else table.numel())) + adapter_size(group)[0]
    return total


def cache_bytes(group: SpecialistGroup, tokens: int) -> int:
    """Keys and values of `tokens` for all specialists of the group."""
    config = group.model.config.get_text_config()
    heads = config.num_attention_heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * (
        getattr(config, "num_key_value_heads", None) or heads
    )
    return 2 * config.num_hidden_layers * width * tokens * group.size * group.model.dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free now. Processes of one machine on the CPU have equal shares of it."""
    if device.type == "cuda":  # torch keeps what it has freed
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    available = psutil.virtual_memory().available  # with the pages of files that the system would give back
    return available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def device_bytes(model: UltraFuserForCausalLM, device: torch.device | None = None) -> int:
    """Memory of a device that is free or holds the model's weights. Default: the model's first device."""
    device = device or model.device
    loaded = [parameter for parameter in model.parameters() if parameter.device == device]
    local = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in loaded]
    return free_bytes(device) + sum(parameter.numel() * parameter.dtype.itemsize for parameter in local)


def checkpointing_pays(model: UltraFuserForCausalLM, tokens: int) -> bool:
    """Whether the activations of a pass over `tokens` would take more than half of the free memory of a device."""
    needs: dict[torch.device, int] = {}
    for group in model.local_groups:
        needs[group.device] = needs.get(group.device, 0) + activation_bytes(group, tokens)
    return any(need > SHARE * free_bytes(device) for device, need in needs.items())


@contextmanager
def memory_errors(stage: GateStage | JointStage) -> Iterator[None]:
    """Turn a lack of memory on a GPU in the block into an error that says what to do.

    Raises:
        TrainingError: memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        rows, tokens = stage.rows_per_device, stage.tokens_per_device
        size = f"{tokens} tokens" if tokens else f"{rows or 'all'} row{'s' * (rows != 1)}"
        if rows == 1:
            advice = "`ultrafuser plan RECIPE` names overrides that need less"
        else:
            field = "tokens_per_device" if tokens else "rows_per_device"
            advice = f"Lower stages.{stage.name}.{field}, which changes no result, and continue with --resume"
        raise TrainingError(
            f"stage {stage.name}: the device has too little memory for {size} in a forward pass. "
            f"{advice} ({str(error).splitlines()[0].rstrip('.')})"
        ) from error
