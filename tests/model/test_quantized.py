"""Quantised specialists: loaded, saved as references and turned into ordinary models, or refused with the package to install.

compressed-tensors, torchao and bitsandbytes run on a CPU. A test of a package that is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tiny_models import entry, force_gate, fuse_entries, one_hot, save_adapter, shake_gate, tiny, tokens
from ultrafuser.errors import CheckpointError, TrainingError
from ultrafuser.model.fitness import check_head, check_weights
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.quantized import dense_state, is_quantized
from ultrafuser.model.saving import is_changed, plain_model
from ultrafuser.recipe import load_recipe
from ultrafuser.train.stages import prepare_joint

SIZE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": False}
IDS = tokens(2, 6)


def compressed(model, num_bits, number_type):
    """Round a model's linear layers and pack them, as llm-compressor does without calibration data."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    group = {"strategy": "group", "group_size": 32} if num_bits == 4 else {"strategy": "channel"}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=num_bits, type=number_type, symmetric=True, **group)
    )
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="compressed")
    apply_quantization_config(model, config)
    top = 448.0 if number_type == "float" else 2 ** (num_bits - 1) - 1
    for layer in model.modules():
        if (scale := getattr(layer, "weight_scale", None)) is not None:
            blocks = layer.weight.detach().reshape(*scale.shape, -1)
            scale.data.copy_(blocks.abs().amax(-1) / top)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    return model, compressor


def save_quantized(kind, folder):
    """A checkpoint of quantised weights."""
    if kind.startswith("compressed"):
        number_type, bits = kind.split("-")[1:]
        model, compressor = compressed(tiny(**SIZE), int(bits), number_type)
        model.save_pretrained(folder)
        compressor.update_config(str(folder))
        return folder
    tiny(**SIZE).save_pretrained(folder / "plain")
    if kind == "torchao":
        pytest.importorskip("torchao")
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        config = TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(**{kind: True})
    AutoModelForCausalLM.from_pretrained(folder / "plain", quantization_config=config).save_pretrained(folder)
    return folder


KINDS = ["compressed-int-4", "compressed-int-8", "compressed-float-8", "torchao", "load_in_8bit", "load_in_4bit"]
# bitsandbytes rounds the input of its layers while it multiplies
TOLERANCE = {"load_in_8bit": 0.1, "load_in_4bit": 0.1}


def assert_close(a, b, kind, factor=1.0):
    assert (a - b).abs().max() <= TOLERANCE.get(kind, 1e-4) * factor * b.abs().max()


@pytest.fixture(params=KINDS)
def quantized(request, tmp_path):
    """Kind and folder of a quantised checkpoint."""
    (tmp_path / "model").mkdir()
    return request.param, save_quantized(request.param, tmp_path / "model")


@torch.no_grad()
def test_a_quantised_specialist_fuses_saves_and_loads(quantized, save, tmp_path):
    kind, folder = quantized
    expected = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    model = fuse_entries([entry("small", folder), entry("other", save("other"))], mixing="logits")
    assert is_quantized(model.groups[0].model)
    check_weights(model.groups[0], 72)
    check_head(model.groups[0], 72)
    assert not any(is_changed(group) for group in model.groups)
    model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused" / "specialists").exists()
    reloaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)
    assert_close(force_gate(reloaded, one_hot(0, 2))(IDS).logits, expected, kind)


@torch.no_grad()
def test_an_ordinary_model_of_quantised_weights_has_their_values(quantized):
    kind, folder = quantized
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = model(IDS).logits
    plain = AutoModelForCausalLM.from_config(tiny(**SIZE).config)
    plain.load_state_dict(dense_state(model))
    assert_close(plain(IDS).logits, expected, kind)
    reference = tiny(**SIZE).model.layers[1].mlp.up_proj.weight
    difference = (plain.model.layers[1].mlp.up_proj.weight - reference).abs().max() / reference.abs().max()
    assert 0 < difference < 0.15, "rounded, and no more"


@torch.no_grad()
def test_adapters_on_a_quantised_base(quantized, tmp_path):
    kind, folder = quantized
    adapters = [save_adapter(tiny(**SIZE), tmp_path / f"lora{seed}", seed) for seed in (1, 2)]
    model = fuse_entries([entry(f"s{k}", folder, adapter) for k, adapter in enumerate(adapters)], mixing="logits")
    assert len(model.groups) == 1 and not is_changed(model.groups[0])
    for k in range(2):
        specialist = model.specialist(f"s{k}")
        assert not is_quantized(specialist) and not hasattr(specialist.config, "quantization_config")
        with model.groups[0].only([k]):
            assert_close(specialist(IDS).logits, model.groups[0].model(IDS).logits, kind, 2)
        plain = plain_model(model.groups[0], {})
        weight = "model.layers.0.self_attn.q_proj.weight"
        assert not torch.equal(specialist.get_parameter(weight), plain.get_parameter(weight))
    specialist.save_pretrained(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    assert torch.equal(exported(IDS).logits, specialist(IDS).logits)


def test_adapters_of_a_quantised_base_train_and_save(quantized, tmp_path):
    kind, folder = quantized
    adapter = save_adapter(tiny(**SIZE), tmp_path / "lora", 1)
    model = fuse_entries([entry("small", folder, adapter)])
    model.requires_grad_(False)
    parameters = model.groups[0].adapter_parameters()
    for parameter in parameters:
        parameter.requires_grad_()
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
    torch.optim.AdamW(parameters, lr=1e-2).step()
    model.eval()
    assert is_changed(model.groups[0])
    model.save_pretrained(tmp_path / "fused")
    reloaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    assert reloaded.config.specialists[0]["source"]["model"] == str(folder)
    assert torch.equal(reloaded(IDS).logits, model(IDS).logits)


def test_quantised_weights_are_not_trained_themselves(tmp_path):
    (tmp_path / "model").mkdir()
    model = fuse_entries([entry("small", save_quantized("compressed-int-8", tmp_path / "model"))])
    stage = load_recipe({"specialists": [{"name": "small", "model": "x"}], "stages": [{"name": "joint"}]}).stages[0]
    with pytest.raises(TrainingError, match="specialist 'small': its weights are quantised .*specialists=lora"):
        prepare_joint(model, stage.model_copy(update={"specialists": "full"}))
    prepare_joint(model, stage)
    model.train()(IDS, labels=IDS).loss.backward()
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.groups[0].adapter_parameters())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["torchao", "load_in_8bit", "load_in_4bit"])
def test_the_quantization_field_quantises_a_plain_checkpoint(kind, tmp_path):
    (tmp_path / "model").mkdir()
    folder = save_quantized(kind, tmp_path / "model")
    field = (
        json.loads((folder / "config.json").read_text())["quantization_config"] if kind == "torchao" else {kind: True}
    )
    model = fuse_entries([entry("small", folder / "plain", quantization=field)], mixing="logits")
    expected = fuse_entries([entry("small", folder)], mixing="logits")(IDS).logits
    assert is_quantized(model.groups[0].model)
    assert_close(model(IDS).logits, expected, kind)
    model.save_pretrained(tmp_path / "fused")
    reloaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    assert is_quantized(reloaded.groups[0].model) and torch.equal(reloaded(IDS).logits, model(IDS).logits)


# ---------------------------------------------------------------- packages that are missing

PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "gptq": ("gptqmodel", "optimum gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "torchao": ("torchao", "torchao"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum", "optimum-quanto"),
    "auto-round": ("auto_round", "auto-round"),
    "aqlm": ("aqlm", "'aqlm[gpu,cpu]'"),
}


def absent(method):
    module, command = PACKAGES[method]
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    return rf"specialist 'small': its weights are quantised by {method}, which needs .*Run: pip install {command}"


@pytest.mark.parametrize("method", PACKAGES)
@pytest.mark.parametrize("how", ["checkpoint", "field"])
def test_a_package_that_is_missing_is_named(method, how, save):
    words = absent(method).replace("[", r"\[")
    folder, quantization = save("small"), {"quant_method": method, "bits": 4}
    if how == "checkpoint":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=words):
        fuse_entries([entry("small", folder, **({"quantization": quantization} if how == "field" else {}))])


@pytest.mark.parametrize("key", ["load_in_4bit", "load_in_8bit"])
def test_the_short_form_of_bitsandbytes_names_it_too(key, save):
    with pytest.raises(CheckpointError, match=absent("bitsandbytes")):
        fuse_entries([entry("small", save("small"), quantization={key: True})])


def test_one_specialist_without_its_package_is_found_before_the_others_are_loaded(save, monkeypatch):
    from ultrafuser.model import checkpoint

    words = absent("gptq")
    monkeypatch.setattr(checkpoint, "load_base", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(CheckpointError, match=words):
        fuse_entries([entry("big", save("big")), entry("small", save("small"), quantization={"quant_method": "gptq"})])


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        ({"bits": 4}, "quantization cannot be used: .*quant_method"),
        ({"quant_method": "zip"}, "quantization cannot be used: Unknown quantization type, got zip"),
        ({"quant_method": "fp8"}, "GPU"),
    ],
)
def test_a_quantization_field_that_does_not_fit_is_one_error(quantization, words, save):
    if torch.cuda.is_available() and "GPU" in words:
        pytest.skip("this machine has a GPU")
    with pytest.raises(CheckpointError, match=f"specialist 'small': .*{words}"):
        fuse_entries([entry("small", save("small"), quantization=quantization)])


def test_a_quantised_output_layer_is_refused(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    tiny(**SIZE).save_pretrained(tmp_path / "plain")
    config = TorchAoConfig(quant_type=Int8WeightOnlyConfig(), include_input_output_embeddings=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config).save_pretrained(tmp_path / "q")
    with pytest.raises(CheckpointError, match="specialist 'a': its output layer is quantised .*lm_head out of"):
        fuse_entries([entry("a", tmp_path / "q")])


def test_models_that_are_not_quantised_are_left_alone(save):
    model = shake_gate(fuse_entries([entry("a", save("a"))]))
    assert not is_quantized(model.groups[0].model)
