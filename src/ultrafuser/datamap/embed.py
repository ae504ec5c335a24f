"""Texts as vectors: the mean last hidden state of a causal model, fused or not, or of a sentence embedding model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ultrafuser.errors import CheckpointError
from ultrafuser.model.errors import LOAD_ERRORS, reason
from ultrafuser.model.files import refuse_pickles
from ultrafuser.progress import Progress
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse, is_fused, load, parse_model_reference, pick_device


@dataclass(frozen=True)
class Reader:
    """A model that turns token ids into states.

    Attributes:
        states: input_ids (B, T), attention_mask (B, T) -> last hidden states (B, T, D).
        context: maximum number of tokens.
    """

    tokenizer: Any
    states: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    context: int


def load_reader(source: str, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False) -> Reader:
    """Load a model that turns texts into states.

    Args:
        source: a fused folder (the states of all specialists side by side), a GGUF file, `BASE+ADAPTER`, `package:...`, or
            a folder or hub id of any model that transformers' AutoModel loads, sentence embedding models included.

    Raises:
        CheckpointError: the model is missing or cannot be loaded.
        RecipeError: a device that cannot be used.
    """
    reference = parse_model_reference(source)
    if is_fused(source):
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        model, renderer = load(source, device_map=pick_device(device), **options)
        return _ours(model, renderer.tokenizer)
    if not reference.is_plain:
        spec = {"name": "model", **asdict(reference), "chat_template": "plain"}
        recipe = {"specialists": [spec], "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        return _ours(*fuse(load_recipe(recipe)))
    return _plain(source, dtype, pick_device(device), trust_remote_code)


def _ours(model: Any, tokenizer: Any) -> Reader:
    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states = model.specialist_states(ids.to(model.device), mask.to(model.device))
        return torch.cat([state.float().cpu() for state in states], dim=-1)  # K x (B, T, D_k) -> (B, T, sum D_k)

    return Reader(tokenizer, states, model.config.max_position_embeddings)


def _plain(source: str, dtype: str, device: str, trust_remote_code: bool) -> Reader:
    from transformers import AutoModel, AutoTokenizer

    if Path(source).is_dir():
        refuse_pickles(Path(source), "the model that reads the texts")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        model = AutoModel.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code
        )
        model = model.to(device).eval()
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{source}: no model that can read text: {reason(error)}") from error
    reads = model.get_encoder() if model.config.is_encoder_decoder else model

    def states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return reads(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()

    return Reader(tokenizer, states, getattr(model.config, "max_position_embeddings", None) or 512)


@torch.no_grad()
def embed(
    reader: Reader,
    texts: Sequence[str],
    *,
    max_tokens: int = 256,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> np.ndarray:
    """The mean of the last hidden states over the tokens of each text, (N, D) float32.

    Texts are cut to `max_tokens`. BERT's kind of model gets its special tokens, causal models read the bare text.
    """
    progress = progress or Progress()
    tokenizer = reader.tokenizer
    limit = min(max_tokens, reader.context, getattr(tokenizer, "model_max_length", max_tokens))
    special = getattr(tokenizer, "cls_token_id", None) is not None
    options = {"truncation": True, "max_length": limit, "add_special_tokens": special, "verbose": False}
    fill = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    encoded = [ids or [fill] for ids in tokenizer(list(texts), **options)["input_ids"]]
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))  # equal lengths need no padding
    vectors: list[np.ndarray] = [np.empty(0)] * len(encoded)
    progress.start("texts read by the model", len(encoded))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = len(encoded[batch[-1]])
        ids = torch.tensor([encoded[i] + [fill] * (longest - len(encoded[i])) for i in batch])
        mask = torch.tensor([[1] * len(encoded[i]) + [0] * (longest - len(encoded[i])) for i in batch])
        weights = mask[..., None].float()  # (B, T, 1)
        means = (reader.states(ids, mask) * weights).sum(1) / weights.sum(1)  # (B, D)
        if not means.isfinite().all():
            raise CheckpointError(
                f"the model gives states that are not finite for the text {texts[batch[0]][:60]!r} or one near it. It is damaged, or "
                "needs another dtype, e.g. float32"
            )
        for index, vector in zip(batch, means.numpy(), strict=True):
            vectors[index] = vector
        progress.advance(len(batch))
    progress.finish()
    return np.stack(vectors).astype(np.float32)
