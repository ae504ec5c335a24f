"""NaN: harmless in rows that no token uses, found by name anywhere else."""

from __future__ import annotations

import pytest
import torch

from tiny_models import VOCAB, entry, fuse, fuse_entries, save_adapter, tiny, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.model.fitness import check_head, check_weights
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import is_changed, mark_unchanged
from ultrafuser.model.shared_base import SpecialistGroup

NAN = float("nan")
TOKENS = VOCAB - 4  # the tables have four rows more


def poison(model, name, *index):
    with torch.no_grad():
        model.get_parameter(name)[index] = NAN
    return model


@pytest.mark.parametrize(
    ("kind", "weight", "index"),
    [
        ("llama", "model.layers.1.mlp.up_proj.weight", (3, 5)),
        ("llama", "model.layers.0.input_layernorm.weight", (7,)),
        ("llama", "model.norm.weight", (0,)),
        ("llama", "model.embed_tokens.weight", (TOKENS - 1, 2)),
        ("llama", "lm_head.weight", (40, 31)),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias", (1,)),
        ("gpt2", "transformer.wpe.weight", (60, 0)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_in_a_weight_is_named(kind, weight, index, dtype):
    model = poison(tiny(kind, tie_word_embeddings=False).to(dtype), weight, *index)
    with pytest.raises(CheckpointError, match=f"specialist 'math': its weight {weight} holds NaN"):
        check_weights(SpecialistGroup(model, ["math"]), TOKENS)


def test_nan_in_an_adapter_is_named_with_its_specialist(shared):
    group = shared.groups[0]
    [layer] = [name for name in group.loras if name.endswith("1.self_attn.q_proj")]
    check_weights(group, VOCAB)
    with torch.no_grad():
        group.loras[layer].lora_B[1, 0, 0] = NAN
    with pytest.raises(CheckpointError, match=rf"specialist 'code': its weight {layer}.lora_B holds NaN"):
        check_weights(group, VOCAB)


def with_padding(model, value=NAN):
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENS:] = value
        model.get_output_embeddings().weight[TOKENS:] = value
    return model


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixing", ["probabilities", "logits"])
@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_rows_that_no_token_uses_do_not_matter(tied, mixing, value):
    models = [tiny(seed=seed, tie_word_embeddings=tied) for seed in (1, 2)]
    plain = fuse(models, mixing=mixing, vocab_size=TOKENS)
    ids = tokens(2, 6, high=TOKENS)
    expected = plain(ids, labels=ids).loss, plain(ids).logits
    for model in models:
        with_padding(model, value)
    for group in plain.groups:
        check_weights(group, TOKENS)
        check_head(group, TOKENS)
    plain.requires_grad_(True)
    loss = plain(ids, labels=ids).loss
    assert torch.equal(loss, expected[0]) and torch.equal(plain(ids).logits, expected[1])
    loss.backward()
    assert all(p.grad.isfinite().all() for p in plain.parameters() if p.grad is not None)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_does_not_count_as_a_change(tmp_path, is_shared, dtype):
    base = with_padding(tiny().to(dtype))
    base.save_pretrained(tmp_path / "base")
    adapters = [save_adapter(tiny(), tmp_path / f"lora{seed}", seed) if is_shared else None for seed in (1, 2)]
    entries = [entry(name, tmp_path / "base", lora) for name, lora in zip(("x", "y"), adapters, strict=True)]
    model = fuse_entries(entries, vocab_size=TOKENS)
    assert not any(is_changed(group) for group in model.groups)
    model.groups.float().to(torch.bfloat16)
    assert not any(is_changed(group) for group in model.groups), "the same weights, cast"
    model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused" / "specialists").exists()
    reloaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    ids = tokens(1, 5, high=TOKENS)
    assert torch.equal(reloaded(ids).logits, fuse_entries(entries, vocab_size=TOKENS)(ids).logits)
    with torch.no_grad():
        reloaded.groups[0].model.get_input_embeddings().weight.data[TOKENS + 1] = 1.0  # NaN before
    assert is_changed(reloaded.groups[0]), "a NaN that becomes a number is a change"
    mark_unchanged(reloaded, tmp_path / "fused")
    with torch.no_grad():
        reloaded.groups[0].model.get_input_embeddings().weight.data[0] = NAN
    assert is_changed(reloaded.groups[0]), "a number that becomes NaN is a change"


@pytest.mark.parametrize("value", [float("inf"), 6e4])
def test_logits_that_overflow_are_named(value):
    model = tiny(tie_word_embeddings=False).half()
    with torch.no_grad():
        model.model.norm.weight.fill_(value)
    with pytest.raises(CheckpointError, match="'hot': LlamaForCausalLM in float16 gives logits .* dtype: float32"):
        check_head(SpecialistGroup(model, ["hot"]), VOCAB)


@pytest.mark.parametrize("is_reserved", [True, False])
def test_rounding_of_tokens_that_no_training_has_seen_refuses_no_model(is_reserved):
    model = tiny(tie_word_embeddings=False)

    def round_by_length(module, arguments, output):
        """Another result for another number of tokens, as kernels of low precision give."""
        ids = arguments[0]
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(ids.shape[1])) * module.weight.std()
        return output + noise * ((ids < 6) == is_reserved)[..., None]

    model.get_input_embeddings().register_forward_hook(round_by_length)
    group = SpecialistGroup(model, ["rough"])
    if is_reserved:
        check_head(group, VOCAB)
    else:
        with pytest.raises(CheckpointError, match="predicts other tokens with its key-value cache"):
            check_head(group, VOCAB)
