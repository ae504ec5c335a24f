"""Bytes that a decoder layer with adapters keeps for the backward pass, counted, beside the estimate of `ultrafuser plan`.

    python benchmarks/activations.py

One and two layers of public shapes at their full width, weights of zero, adapters of rank 16 in float32. The difference is
what one layer keeps. Tensors are counted as autograd saves them, so nothing depends on the device.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.train.memory import layer_bytes

SHAPES = {  # hidden and intermediate size, heads, key-value heads
    "Qwen2.5-1.5B": (1536, 8960, 12, 2),
    "Qwen2.5-7B": (3584, 18944, 28, 4),
    "Llama-3-8B": (4096, 14336, 32, 8),
}
TOKENS = 16


def make_group(shape: tuple[int, int, int, int], layers: int, dtype: torch.dtype) -> SpecialistGroup:
    """A model of such a shape (see `SHAPES`), with an adapter of rank 16 in float32."""
    width, inner, heads, key_heads = shape
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    group = SpecialistGroup(model, ["text"], [None])
    group.new_adapters(16, 32.0, 0.0, "all-linear")
    group.requires_grad_(False)
    for parameter in group.adapter_parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return group


def count_saved(group: SpecialistGroup, tokens: int) -> int:
    """Bytes that a pass over so many tokens keeps for the backward pass, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in group.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        group(torch.zeros(1, 1, tokens, dtype=torch.long))
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)


def main() -> None:
    for label, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            one, two = (make_group(shape, layers, dtype) for layers in (1, 2))
            counted, estimate = count_saved(two, TOKENS) - count_saved(one, TOKENS), layer_bytes(one, TOKENS)
            print(
                f"{label}, {dtype}: counted {counted / TOKENS / 1000:.1f} KB per token and layer, estimated "
                f"{estimate / TOKENS / 1000:.1f} KB, ratio {estimate / counted:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
