"""The inputs of a forward pass: their shapes, and the keywords that a fused model refuses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .errors import UltraFuserError

_SPECIALIST = "Each specialist has its own. Read them from model.specialist(NAME)"
_INSTEAD = {
    "output_hidden_states": f"{_SPECIALIST}, or the last ones from model.specialist_states",
    "output_attentions": _SPECIALIST,
    "output_router_logits": _SPECIALIST,
    "inputs_embeds": "Each specialist has its own embeddings. Pass input_ids",
    "token_type_ids": "Leave them out, e.g. with return_token_type_ids=False of the tokenizer",
    "output_gate_weights": "Read the weights of an answer from ultrafuser.inspect.run.trace_tokens",
    "response_index": "It goes with the labels of forward",
    "specialist_hidden_states": "They go with the labels of forward",
    "specialist_log_probs": "They go with specialist_hidden_states and the labels of forward",
    "speculation": "Speculative decoding has no beams. Leave out num_beams or speculative",
    "cache_position": "Leave it out, because the cache knows its length",
    "ignore_mismatched_sizes": "Weights of another shape would be left random. Leave it out",
}
OUTPUTS = ("output_hidden_states", "output_attentions")  # also settings of a configuration


def refuse_keywords(keywords: Mapping[str, Any], function: str = "forward") -> None:
    """Raises UltraFuserError: a keyword with a value that would have no effect."""
    for key, value in keywords.items():
        if value is not None and value is not False:
            raise UltraFuserError(
                f"{function} got {key}, which a fused model does not take. {_INSTEAD.get(key, 'Leave it out')}"
            )


def select_inputs(
    size: int,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    specialist_input_ids: torch.Tensor | None,
    specialist_attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The ids, the mask and the positions that the specialists read.

    Args:
        size: the number of specialists, K.

    Returns:
        ids (B, T), or (B, K, T) of `specialist_input_ids`, their mask, and positions like the ids.

    Raises:
        UltraFuserError: no ids, a tensor of another shape, or one that nothing would read.
    """
    if specialist_input_ids is None:
        if input_ids is None:
            raise UltraFuserError("forward needs input_ids (B, T) or specialist_input_ids (B, K, T), got neither")
        if specialist_attention_mask is not None:
            raise UltraFuserError("specialist_attention_mask needs specialist_input_ids, got input_ids alone")
        _check_shape("input_ids", input_ids, "(B, T)", input_ids.dim() == 2)
        if attention_mask is not None:
            same = attention_mask.dim() == 2 and len(attention_mask) == len(input_ids)
            _check_shape("attention_mask", attention_mask, f"({len(input_ids)}, T)", same)
        if position_ids is not None:
            rows, length = input_ids.shape
            same = position_ids.dim() == 2 and position_ids.shape[0] in (1, rows) and position_ids.shape[1] == length
            _check_shape("position_ids", position_ids, f"({rows}, {length})", same)
            position_ids = position_ids.expand(rows, -1)
        return input_ids, attention_mask, position_ids
    if position_ids is not None:
        raise UltraFuserError(
            "position_ids go with input_ids, got specialist_input_ids. Leave them out: each specialist's positions count "
            "the tokens of its specialist_attention_mask"
        )
    ids = specialist_input_ids
    _check_shape(
        "specialist_input_ids", ids, f"(B, {size}, T) for {size} specialists", ids.dim() == 3 and ids.shape[1] == size
    )
    if specialist_attention_mask is not None:
        same = specialist_attention_mask.dim() == 3 and specialist_attention_mask.shape[:2] == ids.shape[:2]
        _check_shape("specialist_attention_mask", specialist_attention_mask, f"({len(ids)}, {size}, T)", same)
    elif attention_mask is not None and bool((attention_mask == 0).any()):
        raise UltraFuserError("attention_mask has padding, but specialist_attention_mask is missing. Pass both")
    return ids, specialist_attention_mask, None


def check_mask_length(mask: torch.Tensor, new: int, cached: int) -> None:
    """Raises UltraFuserError: the mask covers neither the new tokens nor the cached and the new ones."""
    if mask.shape[-1] not in (new, cached + new):
        expected = f"{new}" if not cached else f"{cached + new} ({cached} cached and {new} new ones), or {new}"
        raise UltraFuserError(f"the attention mask covers {mask.shape[-1]} tokens, expected {expected}")


def _check_shape(name: str, tensor: torch.Tensor, expected: str, fits: bool) -> None:
    if not fits:
        raise UltraFuserError(f"{name} has the shape {tuple(tensor.shape)}, expected {expected}")
