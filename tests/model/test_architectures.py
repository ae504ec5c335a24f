"""Which architectures can be fused: a tiny model of each goes through fusion, saving, loading, caches and padding.

docs/models.md lists the same families.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from tiny_models import entry, fuse_entries, left_pad, save_adapter, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.model.fitness import check_head, check_weights
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import is_changed

VOCAB = 72
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_LLAMA = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16}  # fmt: skip
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_DEEPSEEK = {**_SIZES, **_EXPERTS, "num_key_value_heads": 4, "head_dim": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
             "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4, "n_group": 1,
             "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
_LINEAR = {**_LLAMA, **_EXPERTS, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
           "linear_key_head_dim": 8, "linear_value_head_dim": 8}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
# Fields by model_type. The tables of attention layers are listed where a layer of each kind needs it.
FUSED: dict[str, dict[str, Any]] = {
    **{kind: _LLAMA for kind in (
        "llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma", "smollm3", "phi", "olmo", "olmo2", "olmo3", "granite",
        "cohere", "cohere2", "starcoder2", "stablelm", "glm", "glm4", "ernie4_5", "exaone4", "seed_oss", "helium", "nemotron",
        "arcee", "apertus", "persimmon", "hunyuan_v1_dense",
    )},
    **{kind: _LLAMA | _EXPERTS for kind in (
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "gpt_oss", "glm4_moe",
    )},
    "phi3": _LLAMA,
    "gemma2": _LLAMA | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8},
    "gemma3_text": _LLAMA | {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma3n_text": _LLAMA | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8,
                              "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4, "altup_num_inputs": 2,
                              "activation_sparsity_pattern": [0.0] * 4,
                              "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 4},
    "codegen": _GPT2 | {"rotary_dim": 4},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 8,
                "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": _SIZES,
    "falcon": _SIZES,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "opt": _SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "qwen3_next": _LINEAR,
    "qwen3_5_text": _LINEAR,
    "granitemoehybrid": _LLAMA | _EXPERTS | _MAMBA | {"layer_types": ["mamba", "attention"],
                                                      "shared_intermediate_size": 16},
    "falcon_h1": _LLAMA | _MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "lfm2": _LLAMA | {"layer_types": ["conv", "full_attention"]},
}  # fmt: skip
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 1}, "keeps no key-value cache"),
    "mamba2": ({"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1,
                "chunk_size": 8}, "keeps no key-value cache"),
    "falcon_mamba": ({"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "expand": 1}, "keeps no key-value cache"),
    "rwkv": ({"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}, "keeps no key-value cache"),
    "minimax": (_LLAMA | _EXPERTS | {"layer_types": ["linear_attention", "full_attention"], "block_size": 8},
                "cannot run as a specialist"),
    "bamba": (_LLAMA | _MAMBA | {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]}, "with its key-value cache"),
    "jamba": (_LLAMA | _EXPERTS | {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
                                   "mamba_d_state": 4, "mamba_expand": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
              "with its key-value cache"),
    "bert-generation": (_SIZES, "no causal language model"),
}  # fmt: skip


def save_model(kind: str, fields: dict[str, Any], folder: Path) -> Path:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    common = {"vocab_size": VOCAB, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    lengths = {} if kind in ("mpt",) or fields.get("n_positions") else {"max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **lengths, **fields))
        for name, parameter in model.named_parameters():
            if "bias" in name:  # they start at zero, which would hide those that are forgotten
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    return folder


def log_probs(model: Any, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    return model(ids, **inputs).logits[..., :VOCAB].float().log_softmax(-1)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("kind", FUSED)
def test_a_model_of_each_architecture_fuses(kind, tmp_path):
    folder = save_model(kind, FUSED[kind], tmp_path / "model")
    model = fuse_entries([entry("a", folder)])
    [group] = model.groups
    check_weights(group, VOCAB)
    check_head(group, VOCAB)
    ids = tokens(2, 9)
    expected = log_probs(AutoModelForCausalLM.from_pretrained(folder), ids, use_cache=False)
    close(log_probs(model, ids), expected)
    cached = model(ids[:, :6], use_cache=True)
    close(log_probs(model, ids[:, 6:], past_key_values=cached.past_key_values, use_cache=True), expected[:, 6:])
    padded, mask = left_pad([ids[0], ids[1, 3:]])
    close(log_probs(model, padded, attention_mask=mask)[0], expected[0])
    alone = log_probs(AutoModelForCausalLM.from_pretrained(folder), ids[1:, 3:], use_cache=False)
    close(log_probs(model, padded, attention_mask=mask)[1, 3:], alone[0])
    assert not is_changed(group)
    model.save_pretrained(tmp_path / "fused")
    assert torch.equal(UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3", "gpt_neox", "falcon", "qwen2_moe", "lfm2"])
def test_gradients_reach_adapters_in_each_kind_of_layer(kind, tmp_path):
    folder = save_model(kind, FUSED[kind], tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(folder)
    adapter = save_adapter(base, tmp_path / "lora", 1, targets="all-linear")
    model = fuse_entries([entry("a", folder, adapter), entry("b", folder, adapter)])
    check_head(model.groups[0], VOCAB)
    ids = tokens(2, 9)
    model(ids, labels=ids).loss.backward()
    gradients = [lora.lora_B.grad for lora in model.groups[0].loras.values()]
    assert gradients and all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() > 0 for gradient in gradients) > len(gradients) // 2


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_fused_is_refused(kind, tmp_path):
    fields, words = REFUSED[kind]
    folder = save_model(kind, fields, tmp_path / "model")
    with pytest.raises(CheckpointError, match=f"specialist 'a': .*{words}"):
        check_head(fuse_entries([entry("a", folder)]).groups[0], VOCAB)


def test_the_page_lists_what_is_tested():
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    fused, refused = text.split("## What is refused")
    names = set(re.findall(r"`([\w-]+)`", fused.split("<!-- families -->")[1]))
    assert names - {"model_type"} == set(FUSED)
    assert set(REFUSED) <= set(re.findall(r"`([\w-]+)`", refused))
