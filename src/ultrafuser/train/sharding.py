"""Sharded weights (FSDP2): processes that read different rows divide the weights of each specialist among them.

Every decoder layer is gathered for its forward and its backward pass, and freed after each. The other weights of a
specialist, which are its embeddings, its last norm and its output layer, are gathered when it runs, because the loss reads
the output layer. They are freed after the backward pass. The gate is whole in every process.

Source: torch's `fully_shard` (arXiv 2304.11277 describes its predecessor).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ultrafuser.errors import TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.parallel import SpecialistMesh
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.recipe import Recipe
from ultrafuser.specialists import outline

# The variables with which `accelerate launch` asks for a wrapper of its own.
_WRAPPERS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
}


def refuse_wrappers() -> None:
    """Refuse the wrappers that accelerate would put around the model, which do not know its parts.

    Raises:
        TrainingError: `accelerate launch` was configured for FSDP, DeepSpeed or another of them.
    """
    for variable, name in _WRAPPERS.items():
        if parse_flag_from_env(variable):
            raise TrainingError(
                f"accelerate is configured for {name}, which ultrafuser does not support. Start the processes with torchrun, or "
                "with another configuration, and set parallel.shard=true to divide the weights among them"
            )


def check_sharding(recipe: Recipe) -> None:
    """Refuse specialists whose weights cannot be divided. Only configurations and adapters are read.

    Raises:
        TrainingError: weights are quantised or placed by `device_map`, or the decoder layers are not known.
    """
    model = outline(recipe)
    for spec in model.config.specialists:
        name = spec["name"]
        if spec.get("quantization") or spec["config"].get("quantization_config"):
            raise TrainingError(
                f"parallel.shard: the weights of specialist {name!r} are quantised and cannot be divided among processes. Leave "
                "parallel.shard out, or load the specialist without quantization"
            )
        if spec.get("device_map"):
            raise TrainingError(
                f"parallel.shard: specialist {name!r} has a device_map, but the weights are divided among all processes. "
                "Remove one of them"
            )
    for group in model.local_groups:
        if not decoder_layers(group):
            raise TrainingError(
                f"parallel.shard: {type(group.model).__name__} of specialist {group.names[0]!r} does not name its decoder layers "
                "(_no_split_modules). Leave parallel.shard out"
            )


def decoder_layers(group: SpecialistGroup) -> list[nn.Module]:
    """The layers of a specialist that are gathered one at a time."""
    kinds = set(group.model._no_split_modules or ())
    return [module for module in group.model.modules() if type(module).__name__ in kinds]


def shard_weights(
    model: UltraFuserForCausalLM, mesh: SpecialistMesh, compute_dtypes: Sequence[torch.dtype | None]
) -> None:
    """Divide the weights of the local specialists among the processes that read other rows, and move them to the device.

    Adapters must be there already, and trained weights must have the type in which they are trained.

    Args:
        compute_dtypes: for each local group, the type of its gathered layers. None: that of their weights.
    """
    # the output of a group is a view, which nothing writes to
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for group, dtype in zip(model.local_groups, compute_dtypes, strict=True):
        policy = MixedPrecisionPolicy()
        if dtype is not None:  # hidden states between the layers stay in float32, as under autocast
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        for layer in decoder_layers(group):
            fully_shard(layer, mesh=mesh.mesh["data"], reshard_after_forward=True, mp_policy=policy)
        fully_shard(group, mesh=mesh.mesh["data"], reshard_after_forward=False)
    model.gate.to(model.device)


def is_sharded(model: UltraFuserForCausalLM) -> bool:
    """Whether the weights of the specialists are divided among processes."""
    return any(isinstance(group, FSDPModule) for group in model.groups)


def free_gathered(model: UltraFuserForCausalLM) -> None:
    """Free the gathered weights. The parameters of the model are then those that the optimizer updates."""
    for group in model.groups:
        if isinstance(group, FSDPModule):
            group.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without division. All processes that share it must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_state(state: Any, keep: bool) -> Any:
    """Optimizer states, or anything else of mappings and lists, with whole tensors on the CPU.

    Args:
        keep: keep the tensors. Otherwise this process only takes part in gathering them, and gets None in their places.
    """
    if isinstance(state, torch.Tensor):
        tensor = whole(state)
        return tensor.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gather_state(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gather_state(value, keep) for value in state)
    return state


def divide_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, divided as `parameter` is. Each process has the whole one."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
