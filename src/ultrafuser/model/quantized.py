"""Quantised weights: the packages that read them, and their values as plain tensors."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .errors import CheckpointError

# Module and package by method, where transformers needs one. Its own message names the package of any other method.
_PACKAGES = {
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "awq": (("gptqmodel", "gptqmodel"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "torchao": (("torchao", "torchao"),),
    "hqq": (("hqq", "hqq"),),
    "quanto": (("optimum.quanto", "optimum-quanto"),),
    "auto-round": (("auto_round", "auto-round"),),
    "aqlm": (("aqlm", "aqlm[gpu,cpu]"),),
    "vptq": (("vptq", "vptq"),),
    "eetq": (("kernels", "kernels"),),
}
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_packages(quantization: Mapping[str, Any], owner: str) -> None:
    """Check that the packages that read quantised weights are installed.

    Args:
        quantization: transformers' `quantization_config` as a mapping.

    Raises:
        CheckpointError: names the packages, and the command that installs them.
    """
    method = str(quantization.get("quant_method") or "")
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        method = "bitsandbytes"
    missing = [package for module, package in _PACKAGES.get(method, ()) if not _is_installed(module)]
    if missing:
        packages = " ".join(f"'{package}'" if "[" in package else package for package in missing)
        raise CheckpointError(
            f"{owner}: its weights are quantised by {method}, which needs {', '.join(missing)}. Run: pip install {packages}"
        )


def _is_installed(module: str) -> bool:
    parent, _, _ = module.rpartition(".")
    return (not parent or _is_installed(parent)) and importlib.util.find_spec(module) is not None


def is_plain(weight: torch.Tensor) -> bool:
    """Whether a weight holds its values as they are, on a device of this machine."""
    return not is_traceable_wrapper_subclass(weight) and weight.dtype in _PLAIN and not weight.is_meta


def inner_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors that a weight consists of: the integers and scales of torchao's, or the weight itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from inner_tensors(getattr(tensor, name))


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether a model holds quantised weights."""
    return getattr(model, "hf_quantizer", None) is not None and hasattr(model.config, "quantization_config")


def linear_shape(layer: nn.Module | None) -> tuple[int, int] | None:
    """(in, out) of a linear layer: plain, quantised or GPT-2's transposed one. None for other modules."""
    if isinstance(layer, Conv1D):
        return tuple(layer.weight.shape)
    rows, columns = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
    return (rows, columns) if isinstance(rows, int) and isinstance(columns, int) else None


@torch.no_grad()
def finish_loading(model: PreTrainedModel) -> None:
    """Run a quantised model once: some readers unpack the weights when the whole model is first called.

    On CPUs with bfloat16 instructions bitsandbytes repacks 4-bit weights at that call, and then passes no gradient any
    more, so that nothing below them would learn. This is switched off.
    """
    if is_quantized(model):
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
        model(torch.zeros(1, 1, dtype=torch.long, device=model.get_input_embeddings().weight.device))


@torch.no_grad()
def dense_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The state of a quantised model as plain tensors.

    Raises:
        CheckpointError: a quantised weight that is not that of a linear layer.
    """
    state: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        tensors = {name: tensor for name, tensor in module._parameters.items() if tensor is not None}
        if linear_shape(module) and not any(module.children()):
            tensors = _dense_linear(module, model.dtype)
        for name, tensor in tensors.items():
            if not is_plain(tensor):
                raise CheckpointError(
                    f"{prefix}.{name} is quantised and not the weight of a linear layer, so {type(model).__name__} cannot be "
                    "turned into an ordinary model. Use the fused model, or fuse the checkpoint that is not quantised"
                )
            state[f"{prefix}.{name}"] = tensor
        for name, tensor in module._buffers.items():
            if tensor is not None and name not in module._non_persistent_buffers_set and not linear_shape(module):
                state[f"{prefix}.{name}"] = tensor
    return state


def _dense_linear(layer: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weight and bias of a linear layer. A quantised weight, whatever its packing, is read by multiplying the identity."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if not (torch.is_tensor(weight) and is_plain(weight)):
        shape = linear_shape(layer)
        assert shape is not None
        device = next(itertools.chain(layer.parameters(), layer.buffers())).device
        rows = layer(torch.eye(shape[0], dtype=dtype, device=device))  # (in, out), with the bias
        weight = (rows if bias is None else rows - bias).T.to(dtype).contiguous()
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
