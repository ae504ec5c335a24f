"""Tiny real specialists in memory and on disk, and slow obvious oracles, for every test.

Weights are drawn large (standard deviation 0.3), so that different specialists predict clearly different tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ultrafuser.model.checkpoint import load_groups
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.gate import Gate
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import record_files
from ultrafuser.model.saving import mark_unchanged
from ultrafuser.model.shared_base import SpecialistGroup

VOCAB = 72

# ---------------------------------------------------------------- tiny models

# Widths chosen so that architectures may be mixed. Every entry is a complete model of two layers.
_LLAMA_LIKE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
               "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE},
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE, "sliding_window": None},
    "gemma": {"model_type": "gemma", **_LLAMA_LIKE},
    "gemma2": {
        "model_type": "gemma2", "hidden_size": 32, "intermediate_size": 48, "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8, "sliding_window": 8, **_LLAMA_LIKE,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64},
}  # fmt: skip
_COMMON = {"vocab_size": VOCAB, "max_position_embeddings": 64, "initializer_range": 0.3,
           "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip


def tiny(kind: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of two layers, in eval mode. The same seed gives the same weights."""
    fields = {**_COMMON, **ARCHITECTURES.get(kind, {"model_type": kind}), **changes}
    if kind == "gpt2":
        fields.pop("max_position_embeddings", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields))
        for name, parameter in model.named_parameters():
            if "bias" in name:  # biases start at zero, which would hide those that are forgotten
                nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = 2
    return model.eval()


def shake_gate(model: UltraFuserForCausalLM, seed: int = 0, scale: float = 1.0) -> UltraFuserForCausalLM:
    """Give the gate clear opinions that differ from token to token."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.gate.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[-1] ** 0.5)
    return model


def fuse(
    models: Sequence[PreTrainedModel], names: Sequence[str] = (), gate_scale: float = 1.0, **options: Any
) -> UltraFuserForCausalLM:
    """Fuse models that are in memory, with a gate that has opinions."""
    names = list(names) or [f"s{k}" for k in range(len(models))]
    entries = [
        {"name": name, "domain": name, "source": {"model": f"/nowhere/{name}"}, "config": model.config.to_dict()}
        for name, model in zip(names, models, strict=True)
    ]
    config = UltraFuserConfig(entries, **{"gate_hidden_size": 16, **options})
    groups = [SpecialistGroup(model, [name]) for name, model in zip(names, models, strict=True)]
    return shake_gate(UltraFuserForCausalLM(config, groups), scale=gate_scale).eval()


class ScriptedGate(Gate):
    """A gate that gives the scores that it was told."""

    def __init__(self, scores: torch.Tensor, like: Gate) -> None:
        super().__init__([1])
        self.scores = scores  # (K,), broadcast over everything before
        self.score = like.score

    def forward(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        return self.scores.log_softmax(-1).expand(*states[0].shape[:-1], len(states))

    def score_states(self, states: Sequence[torch.Tensor], indices: Sequence[int]) -> torch.Tensor:
        return self.scores[list(indices)].expand(*states[0].shape[:-1], -1)


def force_gate(model: UltraFuserForCausalLM, scores: Sequence[float]) -> UltraFuserForCausalLM:
    """Replace the gate by given scores. Infinite ones make it choose."""
    model.gate = ScriptedGate(torch.tensor(scores, dtype=torch.float32), model.gate)
    return model


def one_hot(k: int, size: int) -> list[float]:
    """Scores that choose specialist k."""
    return [0.0 if i == k else -float("inf") for i in range(size)]


def tokens(batch: int, length: int, seed: int = 0, low: int = 3, high: int = VOCAB) -> torch.Tensor:
    """Random tokens (batch, length), none of them special."""
    return torch.randint(low, high, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_pad(rows: Sequence[torch.Tensor], pad: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of any lengths -> (n, T) padded on the left, and the attention mask."""
    width = max(map(len, rows))
    ids = torch.stack([nn.functional.pad(row, (width - len(row), 0), value=pad) for row in rows])
    mask = torch.stack([nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return ids, mask


def naive_mix(logits: Sequence[torch.Tensor], weights: torch.Tensor, mixing: str) -> torch.Tensor:
    """The oracle: explicit mixing in double precision, on the scale of logits. K x (..., V), (..., K) -> (..., V)."""
    stacked = torch.stack([specialist_logits.double() for specialist_logits in logits], dim=-2)  # (..., K, V)
    w = weights.double()[..., None]
    if mixing == "logits":
        return (w * stacked).sum(-2)
    return (w * stacked.softmax(-1)).sum(-2).log() + (w[..., 0] * stacked.logsumexp(-1)).sum(-1, keepdim=True)


# ---------------------------------------------------------------- checkpoints on disk


def save_adapter(
    base: PreTrainedModel,
    folder: Path,
    seed: int = 0,
    r: int = 4,
    targets: Sequence[str] | str = ("q_proj", "v_proj"),
    **options: Any,
) -> Path:
    """Write an ordinary PEFT LoRA adapter whose B is random. The base does not change."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=r,
        lora_alpha=2 * r,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def entry(name: str, model: Path, adapter: Path | None = None, **fields: Any) -> dict[str, Any]:
    """A manifest entry for a specialist on disk, with its checksums."""
    source = {"model": str(model)} | ({"adapter": str(adapter)} if adapter else {})
    files = {key: record_files(Path(path)) for key, path in source.items()}
    config = AutoConfig.from_pretrained(model).to_dict()
    return {"name": name, "domain": name, "source": source, "files": files, "config": config, **fields}


def fuse_entries(entries: Sequence[dict[str, Any]], **options: Any) -> UltraFuserForCausalLM:
    """Fuse specialists on disk, as the loader of specialists does."""
    config = UltraFuserConfig(list(entries), **{"gate_hidden_size": 16, **options})
    model = shake_gate(UltraFuserForCausalLM(config, load_groups(config, None)))
    mark_unchanged(model, None)
    return model.eval()
