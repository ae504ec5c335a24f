"""Adapters whose files hold more than LoRA: the tables that PEFT saves after tokens were added, and whole modules."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForCausalLM

import ultrafuser
from tiny_models import force_gate, one_hot, save_adapter, tiny, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.model.adapters import is_plain_lora
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

peft = pytest.importorskip("peft")


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path, tokenizer):
    model = tiny(vocab_size=len(tokenizer), tie_word_embeddings=request.param)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def train_adapter(base, folder, tokenizer, added=0, save_tables="auto", **options):
    """A LoRA adapter beside tables that changed, as TRL and PEFT leave it after tokens were added."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken(f"<|new{i}|>", special=True) for i in range(added)])
    if added:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
            nn.init.normal_(layer.weight, std=0.3)
        model.tie_weights()
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options
        )
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(folder), save_embedding_layers=save_tables)
    tokenizer.save_pretrained(folder)
    return model.eval()


def recipe(base, *adapters):
    specialists = [
        {"name": f"s{k}", "chat_template": "chatml", "model": str(base), "adapter": str(adapter)}
        for k, adapter in enumerate(adapters)
    ]
    return load_recipe({"specialists": specialists, "device": "cpu", "mixing": "logits", "gate": {"hidden_size": 16}})


@torch.no_grad()
@pytest.mark.parametrize("added", [0, 1, 5])
def test_tables_saved_beside_plain_lora_load_as_peft_does(base, tmp_path, tokenizer, added):
    expected_model = train_adapter(base, tmp_path / "lora", tokenizer, added, save_tables=True)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert is_plain_lora(config), "the configuration says nothing about the tables"
    plain = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain", 1)
    model, read = fuse(recipe(base, tmp_path / "lora", plain))
    assert [group.names for group in model.groups] == [["s0"], ["s1"]]
    assert model.config.vocab_size == len(tokenizer), "the tokens that both have"
    model.save_pretrained(tmp_path / "fused")
    read.save_pretrained(tmp_path / "fused")
    ids = tokens(2, 6, high=len(tokenizer) - 1)
    expected = expected_model(ids).logits[..., : len(tokenizer)]
    other = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), plain)
    for each in (model, ultrafuser.load(tmp_path / "fused", device_map="cpu")[0]):
        torch.testing.assert_close(force_gate(each, one_hot(0, 2))(ids).logits, expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(force_gate(each, one_hot(1, 2))(ids).logits, other(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_added_tokens_of_a_single_adapter_are_used(base, tmp_path, tokenizer):
    expected_model = train_adapter(base, tmp_path / "lora", tokenizer, added=3)
    model, read = fuse(recipe(base, tmp_path / "lora"))
    assert model.config.vocab_size == len(read) == len(tokenizer) + 3
    ids = torch.tensor([[5, len(tokenizer), 9, len(tokenizer) + 2]])
    torch.testing.assert_close(model(ids).logits, expected_model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["norm"], ["mlp"],
                                     ["input_layernorm", "lm_head"]])  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_modules_to_save_load_as_peft_does(base, tmp_path, tokenizer, modules):
    expected_model = train_adapter(base, tmp_path / "lora", tokenizer, modules_to_save=modules)
    expected_model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    model, _ = fuse(recipe(base, tmp_path / "lora"))
    ids = tokens(2, 6, high=len(tokenizer) - 1)
    torch.testing.assert_close(model(ids).logits, expected_model(ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("IA3Config", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        ("LoHaConfig", {"target_modules": ["q_proj"], "r": 4}),
        ("LoKrConfig", {"target_modules": ["q_proj"], "r": 4}),
        ("OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4}),
        ("LNTuningConfig", {"target_modules": ["norm", "input_layernorm"]}),
    ],
)
def test_other_kinds_of_adapters_equal_peft(kind, options, base, tmp_path, tokenizer):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(str(tmp_path / "adapter"))
    ids = tokens(2, 6, high=len(tokenizer) - 1)
    expected = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()(
        ids
    )
    bare = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (expected.logits - bare).abs().max() > 0.1, "the adapter changes something"
    fused, _ = fuse(recipe(base, tmp_path / "adapter"))
    torch.testing.assert_close(fused(ids).logits, expected.logits, atol=1e-3, rtol=1e-3)


def test_trained_changes_of_a_resized_adapter_are_an_ordinary_checkpoint(base, tmp_path, tokenizer):
    train_adapter(base, tmp_path / "lora", tokenizer, added=3)
    model, read = fuse(recipe(base, tmp_path / "lora"))
    with torch.no_grad():
        model.groups[0].model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "fused")
    read.save_pretrained(tmp_path / "fused")
    reloaded, _ = ultrafuser.load(tmp_path / "fused", device_map="cpu")
    ids = torch.tensor([[5, len(tokenizer), 9]])
    assert torch.equal(reloaded(ids).logits, model(ids).logits)
    assert "table_rows" not in reloaded.config.specialists[0]


def test_an_adapter_without_its_tables_keeps_those_of_the_base(base, tmp_path, tokenizer):
    train_adapter(base, tmp_path / "lora", tokenizer, save_tables=False)
    plain = save_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "plain", 1)
    model, _ = fuse(recipe(base, tmp_path / "lora", plain))
    assert [group.names for group in model.groups] == [["s0", "s1"]]


def test_peft_that_is_not_installed_is_named(base, tmp_path, tokenizer, monkeypatch):
    train_adapter(base, tmp_path / "lora", tokenizer, save_tables=True)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(CheckpointError, match="specialist 's0': its adapter is no plain LoRA.*Run: pip install peft"):
        fuse(recipe(base, tmp_path / "lora"))
