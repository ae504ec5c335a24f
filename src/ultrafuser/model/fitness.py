"""Check that loaded specialists can be mixed: sound weights, and logits that their output layers give."""

from __future__ import annotations

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, DynamicCache, PreTrainedConfig

from .errors import LOAD_ERRORS, CheckpointError, reason
from .quantized import is_plain
from .shared_base import GroupedLora, SpecialistGroup


def check_architecture(config: PreTrainedConfig, owner: str) -> None:
    """Check the kind of a model before its weights are loaded.

    Raises:
        CheckpointError: it is no causal language model, or one that reads more than text.
    """
    kind = config.model_type
    if kind == "ultrafuser":
        raise CheckpointError(
            f"{owner} is a fused model, which cannot be a specialist of another. Fuse its specialists"
        )
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return  # the code of its repository, which transformers does not know
    if config.is_encoder_decoder:
        raise CheckpointError(f"{owner} is an encoder-decoder model ({kind}). Only causal language models can be fused")
    if config.get_text_config() is not config:
        raise CheckpointError(
            f"{owner} is a {kind} model, which reads more than text, such as images. Only text models can be fused. Save its "
            "language model by itself with transformers, and fuse that"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(f"{owner} is a {kind} model. Only causal language models can be fused")


def check_output_layer(group: SpecialistGroup) -> None:
    """Check that a group's output layer can be read, because the mixture multiplies by its weights itself.

    Raises:
        CheckpointError: it is offloaded or quantised.
    """
    weight = group.model.get_output_embeddings().weight
    if weight.is_meta:
        raise CheckpointError(
            f"specialist {group.names[0]!r}: its output layer is offloaded to the CPU or the disk by device_map. The mixture "
            "reads it at every token. Put lm_head on a device in device_map, or use more or smaller devices"
        )
    if not is_plain(weight):
        raise CheckpointError(
            f"specialist {group.names[0]!r}: its output layer is quantised ({type(weight).__name__}, {weight.dtype}). The "
            "mixture needs its plain weights. Leave lm_head out of the quantisation"
        )


@torch.no_grad()
def check_weights(group: SpecialistGroup, vocab_size: int) -> None:
    """Look for NaN in the weights. Rows of embedding tables that no token uses may hold anything.

    Raises:
        CheckpointError: names the specialist and the first weight that holds NaN.
    """
    tables = {
        id(layer.weight) for layer in (group.model.get_input_embeddings(), group.model.get_output_embeddings()) if layer
    }
    for name, weight in group.model.named_parameters():
        if not is_plain(weight):
            continue  # quantised or offloaded: check_head sees its effect
        values = weight[:vocab_size] if id(weight) in tables else weight
        if values.numel() and values.aminmax().min.isnan():
            raise CheckpointError(
                f"specialist {_owner(group, name, values)!r}: its weight {name} holds NaN, so its predictions would be "
                "NaN. The checkpoint is damaged, or its training diverged. Download it again, or fuse an earlier one"
            )


def _owner(group: SpecialistGroup, name: str, weight: torch.Tensor) -> str:
    """The specialist that a weight belongs to. The first one of those that share a base stands for all."""
    layer, _, half = name.rpartition(".")
    is_adapter = half in ("lora_A", "lora_B") and isinstance(group.loras.get(layer), GroupedLora)
    return next(group.names[i] for i, own in enumerate(weight) if own.isnan().any()) if is_adapter else group.names[0]


@torch.no_grad()
def check_head(group: SpecialistGroup, vocab_size: int) -> None:
    """Compare our logits (last hidden state, output layer) with the model's own on a few tokens.

    Raises:
        CheckpointError: they differ, because the architecture changes the logits in another way, or they are not finite, or the
            model cannot run so, reads later tokens, or does not predict the same with a cache.
    """
    kind = type(group.model).__name__
    ids = _sample_tokens(vocab_size).to(group.device).expand(group.size, 1, -1)
    changed = torch.cat([ids[..., :4], ids[..., :4]], dim=-1)  # the same length, so that rounding is the same
    try:
        states, changed_states, cached_states = group(ids), group(changed), _cached_states(group, ids)
        output = group.model(ids.flatten(0, 1), use_cache=False).logits
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"specialist {group.names[0]!r}: {kind} cannot run as a specialist: {reason(error)}"
        ) from error
    logits = group.head(vocab_size).logits(states)
    expected = output[..., :vocab_size].reshape(logits.shape).to(logits)
    for name, values in zip(group.names, logits, strict=True):
        if not values.isfinite().all():
            dtype = str(group.model.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"specialist {name!r}: {kind} in {dtype} gives logits that are NaN or infinite. Load it with dtype: float32, "
                "or bfloat16 instead of float16. If that does not help, its checkpoint is damaged"
            )
    if not (logits - expected).abs().max() <= 2e-2 * expected.abs().max().clamp(min=1e-6):
        raise CheckpointError(
            f"specialist {group.names[0]!r}: {kind} changes its logits after the output layer in a way that ultrafuser does "
            "not know, so they cannot be mixed. Please report the architecture"
        )
    if _differ(states[..., :4, :], changed_states[..., :4, :]):
        raise CheckpointError(
            f"specialist {group.names[0]!r}: {kind} reads the tokens that come later, so it is no causal language model"
        )
    if _differ(states, cached_states):
        raise CheckpointError(
            f"specialist {group.names[0]!r}: {kind} predicts other tokens with its key-value cache than without, in this "
            "version of transformers, so it would generate wrong text. Try another version, or report the architecture"
        )


def _sample_tokens(vocab_size: int) -> torch.Tensor:
    """(8): tokens spread over the vocabulary.

    The first ids are often reserved tokens that no training has seen. Their states are so large in some models that
    rounding in bfloat16 changes everything behind them.
    """
    return torch.linspace(0, vocab_size - 1, 10).long()[1:-1]


def _differ(states: torch.Tensor, others: torch.Tensor) -> bool:
    """Whether states differ by more than rounding, which may also send a token to another of a layer's experts."""
    tolerance = 0.1 if states.dtype in (torch.bfloat16, torch.float16) else 0.01
    return not (states - others).abs().mean() <= tolerance * states.abs().mean().clamp(min=1e-6)


def _cached_states(group: SpecialistGroup, ids: torch.Tensor) -> torch.Tensor:
    """Last hidden states of a prompt, one more token, and several more, as generation and chat read them."""
    cache = DynamicCache(config=group.model.config.get_text_config(decoder=True))
    return torch.cat([group(part, cache=cache) for part in ids.split([4, 1, ids.shape[-1] - 5], dim=-1)], dim=2)
