"""From a recipe's specialists to a fused model, and the refusals on the way."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

import ultrafuser
from tiny_models import VOCAB, force_gate, one_hot, save_adapter, tiny, tokens
from training_fixtures import NAMES
from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.errors import CheckpointError, DataError, RecipeError, TokenizerMismatchError
from ultrafuser.model import checkpoint
from ultrafuser.model.fitness import check_head
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import (
    ModelReference,
    fuse,
    is_fused,
    parse_model_reference,
    pick_device,
)
from ultrafuser.vocabulary import Vocabulary, common_vocabulary


def recipe(*specialists: dict[str, Any], **fields: Any) -> Any:
    return load_recipe({"specialists": list(specialists), "device": "cpu", "gate": {"hidden_size": 16}, **fields})


# ---------------------------------------------------------------- tokenizers


def rebuilt(tokenizer: PreTrainedTokenizerFast, change: Any) -> PreTrainedTokenizerFast:
    """The same tokenizer with its parts changed."""
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    change(fields)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(fields)),
        **{key: getattr(tokenizer, key) for key in ("bos_token", "eos_token", "pad_token")},
    )


def swap_ids(fields: dict[str, Any]) -> None:
    vocab = fields["model"]["vocab"]
    a, b = [token for token in vocab if len(token) == 1][:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def swap_merges(fields: dict[str, Any]) -> None:
    merges = fields["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def drop_merges(fields: dict[str, Any]) -> None:
    del fields["model"]["merges"][5:]


def rename_token(fields: dict[str, Any]) -> None:
    vocab = fields["model"]["vocab"]
    last = max(vocab, key=vocab.get)
    fields["model"]["merges"] = [m for m in fields["model"]["merges"] if "".join(m) != last]
    vocab["zebra"] = vocab.pop(last)


def split_otherwise(fields: dict[str, Any]) -> None:
    fields["pre_tokenizer"]["add_prefix_space"] = True


def common(**tokenizers) -> Vocabulary:
    return common_vocabulary(tokenizers, {name: len(tokenizer) for name, tokenizer in tokenizers.items()})


def test_equal_tokenizers_have_every_token_in_common(tokenizer):
    same = {"a": tokenizer, "b": copy.deepcopy(tokenizer), "c": rebuilt(tokenizer, lambda fields: None)}
    assert common(**same) == Vocabulary(len(tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_ids, r"the same tokens have other ids: '\S+ \(\d+ and \d+\)'"),
        (swap_merges, "their merges differ from merge 3 on"),
        (drop_merges, "their merges differ from merge the end on"),
        (rename_token, r"the same ids are other tokens: '\S+ and zebra'"),
        (split_otherwise, "they split or normalise text differently"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_tokenizers_that_differ_are_refused(tokenizer, change, message):
    with pytest.raises(
        TokenizerMismatchError, match=f"specialist 'b': its tokenizer differs from that of 'a': .*{message}"
    ):
        common(a=tokenizer, b=rebuilt(tokenizer, change))


def test_tokens_that_only_some_have_are_left_out(tokenizer):
    """A pad token, a thought token at another id, another token at the same id."""
    size = len(tokenizer)
    padded, thinking = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    padded.add_tokens([AddedToken("[PAD]", special=True)])
    thinking.add_tokens([AddedToken("<think>", special=True), AddedToken("[PAD]", special=True)])
    assert common(a=tokenizer, b=padded) == common(a=padded, b=thinking) == Vocabulary(size)
    shared = copy.deepcopy(padded)
    shared.add_tokens(["<tool>"])
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("[UNK2]", special=True), AddedToken("<tool>")])
    assert common(a=shared, b=other) == Vocabulary(size + 2, (size,)), "[PAD] and [UNK2] have one id"


def test_tokens_without_a_row_in_a_table_are_left_out(tokenizer):
    rows = {"a": len(tokenizer), "b": len(tokenizer) - 1}
    assert common_vocabulary({"a": tokenizer, "b": tokenizer}, rows) == Vocabulary(len(tokenizer) - 1)


def test_only_some_of_many_tokens_are_named(tokenizer):
    def rename_many(fields: dict[str, Any]) -> None:
        vocab = fields["model"]["vocab"]
        for token in sorted(vocab, key=vocab.get)[-20:]:
            vocab[token + "x"] = vocab.pop(token)
        fields["model"]["merges"] = [m for m in fields["model"]["merges"] if "".join(m) in vocab]

    with pytest.raises(TokenizerMismatchError, match="and 15 more"):
        common(a=tokenizer, b=rebuilt(tokenizer, rename_many))


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("/nowhere/at/all", "specialist 'a': its source /nowhere/at/all is gone"),
        ("nowhere/nothing-there", "specialist 'a': no model in nowhere/nothing-there"),
        ("package:nowhere/x.gguf", "the Python package 'nowhere' is not installed"),
    ],
)
def test_a_missing_model_is_named(model, message):
    with pytest.raises(CheckpointError, match=message):
        fuse(recipe({"name": "a", "model": model}))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=f"specialist 'a': no model in {tmp_path}"):
        fuse(recipe({"name": "a", "model": str(tmp_path)}))


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    tiny().save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError, match=f"specialist 'a': no tokenizer in {tmp_path}/bare"):
        fuse(recipe({"name": "a", "model": str(tmp_path / "bare")}))


def test_a_specialist_without_a_template_is_named(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    bare = {"name": "a", "model": str(tmp_path / "bare")}
    with pytest.raises(DataError, match="specialist 'a': its tokenizer has no chat template. Give one: .*chatml"):
        fuse(recipe(bare))
    model, _ = fuse(recipe(bare | {"chat_template": "plain"}))
    assert model.config.specialists[0]["chat_template"] == BUILTIN["plain"]


def test_an_adapter_folder_without_an_adapter_is_named(tiny_run):
    folder = tiny_run.folder / "text"
    with pytest.raises(CheckpointError, match="specialist 'a': .* has no adapter_config.json. Expected a PEFT adapter"):
        fuse(recipe({"name": "a", "model": str(folder), "adapter": str(tiny_run.folder / "code")}))


@pytest.mark.parametrize("device", ["warp-drive", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error(device):
    with pytest.raises(RecipeError, match=rf"device '{device}' cannot be used here: .*\. Try auto or cpu"):
        pick_device(device)


# ---------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind, expected", [("ultrafuser", True), ("llama", False), (None, False)])
def test_a_fused_checkpoint_is_known_by_its_configuration(tmp_path, monkeypatch, kind, expected):
    folder = tmp_path / "model"
    folder.mkdir()
    assert not is_fused(str(folder)) and not is_fused("package:thing/model.gguf") and not is_fused("a/b+c/d")
    config = folder / "config.json"
    config.write_text(json.dumps({"model_type": kind}))
    assert is_fused(str(folder)) is expected
    monkeypatch.setattr("ultrafuser.specialists.hf_hub_download", lambda repo, file: str(config))
    assert is_fused("owner/name") is expected


def test_a_hub_id_that_cannot_be_had_is_not_fused(monkeypatch):
    def missing(repo: str, file: str) -> str:
        raise FileNotFoundError(f"{repo}/{file}")

    monkeypatch.setattr("ultrafuser.specialists.hf_hub_download", missing)
    assert not is_fused("owner/name")


def test_a_configuration_that_is_not_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "ultra')
    with pytest.raises(CheckpointError, match=r"config.json: not JSON: .*\. Is the folder half written\?"):
        is_fused(str(tmp_path))


def test_every_specialist_keeps_its_template(tiny_run, tmp_path):
    jinja = tmp_path / "own.jinja"
    jinja.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}|")
    chat_templates = [None, "plain", "inst", "alpaca", str(jinja), "{{ messages[0].content }}:"]
    specialists = [
        {"name": f"s{i}", "model": str(tiny_run.folder / "text"), "chat_template": template}
        for i, template in enumerate(chat_templates)
    ]
    model, tokenizer = fuse(recipe(*specialists))
    assert [s["chat_template"] for s in model.config.specialists] == [
        tiny_run.tokenizer.chat_template, BUILTIN["plain"], BUILTIN["inst"], BUILTIN["alpaca"], jinja.read_text(),
        "{{ messages[0].content }}:",
    ]  # fmt: skip
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    jinja.unlink()  # the checkpoint holds the text
    reloaded, renderer = ultrafuser.load(tmp_path / "fused", device_map="cpu")
    prompts = renderer.prompt([{"role": "user", "content": "hi"}])
    assert [tokenizer.decode(ids) for ids in prompts] == [
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "<|bos|>User: hi\nAssistant: ",
        "<|bos|>[INST] hi [/INST] ",
        "<|bos|>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nhi\n\n### Response:\n",
        "<user>hi<assistant>",
        "hi:",
    ]
    assert renderer.max_length == 192, "the context of the specialists"


def test_mixed_architectures_with_one_tokenizer(tmp_path, tokenizer):
    kinds = {"llama": {}, "gpt2": {"n_embd": 24, "n_positions": 64}, "gemma": {"hidden_size": 16}}
    for seed, (kind, changes) in enumerate(kinds.items()):
        tiny(kind, seed, **({"vocab_size": len(tokenizer)} | changes)).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
    model, _ = fuse(recipe(*({"name": kind, "model": str(tmp_path / kind)} for kind in kinds), mixing="logits"))
    ids = tokens(2, 9, high=len(tokenizer))
    assert [state.shape for state in model.specialist_states(ids)] == [(2, 9, 32), (2, 9, 24), (2, 9, 16)]
    for k, kind in enumerate(kinds):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / kind).eval()
        with torch.no_grad():
            logits = force_gate(model, one_hot(k, 3))(ids).logits
            torch.testing.assert_close(logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_each_specialist_may_have_a_dtype_of_its_own(tiny_run, tmp_path):
    paths = [str(tiny_run.folder / name) for name in NAMES]
    model, tokenizer = fuse(
        recipe(
            {"name": "a", "model": paths[0]},
            {"name": "b", "model": paths[1], "dtype": "bfloat16"},
            {"name": "c", "model": paths[2], "dtype": "float16"},
            dtype="float32",
        )
    )
    model.save_pretrained(tmp_path / "fused")
    reloaded = ultrafuser.UltraFuserForCausalLM.from_pretrained(tmp_path / "fused", dtype="float32")
    for loaded_model in (model, reloaded):
        assert [g.model.dtype for g in loaded_model.groups] == [torch.float32, torch.bfloat16, torch.float16]
        assert loaded_model.gate.hidden.weight.dtype == torch.float32


def test_adapters_on_one_base_load_it_once(tiny_run, tmp_path, monkeypatch):
    loaded = []
    real = checkpoint.AutoModelForCausalLM.from_pretrained

    def counting(folder, *args, **kwargs):
        loaded.append(Path(folder))
        return real(folder, *args, **kwargs)

    monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", counting)
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)
    model, tokenizer = fuse(recipe(*specialists))
    assert loaded == [tiny_run.folder / "text"]
    assert len(model.groups) == 1 and model.groups[0].names == list(NAMES)
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    loaded.clear()
    ultrafuser.load(tmp_path / "fused", device_map="cpu")
    assert loaded == [tiny_run.folder / "text"]
    loaded.clear()
    apart, _ = fuse(recipe(*specialists, share_base=False))
    assert len(loaded) == 3 and len(apart.groups) == 3
    ids = tokens(2, 7, high=len(tokenizer))
    with torch.no_grad():
        for states, expected in zip(model.specialist_states(ids), apart.specialist_states(ids), strict=True):
            torch.testing.assert_close(states, expected, atol=1e-4, rtol=1e-4)


def test_the_base_itself_may_be_a_specialist_beside_its_adapters(tiny_run, tmp_path):
    adapters = tiny_run.adapter_recipe(tmp_path, save_adapter)
    model, _ = fuse(recipe({"name": "base", "model": str(tiny_run.folder / "text")}, *adapters))
    plain = AutoModelForCausalLM.from_pretrained(tiny_run.folder / "text").eval()
    ids = tokens(1, 7, high=len(tiny_run.tokenizer))
    with torch.no_grad():
        out = force_gate(model, one_hot(0, 4))(ids).logits
    torch.testing.assert_close(out, plain(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"targets": ["q_proj", "lm_head"]}]
)
def test_adapters_that_are_not_plain_lora_are_merged_by_peft(tiny_run, tmp_path, how):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_run.folder / "text").eval()
    odd = save_adapter(base, tmp_path / "odd", seed=5, **how)
    plain_lora = tiny_run.adapter_recipe(tmp_path, save_adapter)[:2]
    model, tokenizer = fuse(
        recipe(
            {"name": "odd", "model": str(tiny_run.folder / "text"), "adapter": str(odd)}, *plain_lora, mixing="logits"
        )
    )
    assert [group.names for group in model.groups] == [["odd"], ["text", "code"]]
    peft_model = peft.PeftModel.from_pretrained(base, odd).eval()
    ids = tokens(2, 9, high=len(tiny_run.tokenizer))
    model.save_pretrained(tmp_path / "fused")
    tokenizer.save_pretrained(tmp_path / "fused")
    reloaded, _ = ultrafuser.load(tmp_path / "fused", device_map="cpu")
    with torch.no_grad():
        expected = peft_model(ids).logits
        for loaded_model in (model, reloaded):
            logits = force_gate(loaded_model, one_hot(0, 3))(ids).logits
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_with_an_option_that_is_not_known_is_merged_by_peft(tiny_run, tmp_path):
    pytest.importorskip("peft")
    adapters = tiny_run.adapter_recipe(tmp_path, save_adapter)
    plain, _ = fuse(recipe(*adapters))
    path = Path(adapters[0]["adapter"]) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_invented": True}))
    with pytest.warns(UserWarning, match="use_invented"):  # PEFT ignores it
        model, _ = fuse(recipe(*adapters))
    assert [group.names for group in model.groups] == [["text"], ["code", "math"]]
    ids = tokens(2, 9, high=len(tiny_run.tokenizer))
    with torch.no_grad():
        logits = [force_gate(each, one_hot(0, 3))(ids).logits for each in (model, plain)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_the_gate_starts_from_the_seed(tiny_run):
    specialist = {"name": "a", "model": str(tiny_run.folder / "text")}
    gates = [fuse(recipe(specialist, seed=seed))[0].gate.hidden.weight for seed in (0, 0, 1)]
    assert torch.equal(gates[0], gates[1]) and not torch.equal(gates[0], gates[2])


def test_local_folders_are_kept_with_their_full_path_and_checksums(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run.folder)
    model, _ = fuse(recipe({"name": "a", "model": "./text"}))
    [spec] = model.config.specialists
    assert spec["source"]["model"] == str(tiny_run.folder / "text")
    assert list(spec["files"]["model"]) == ["model.safetensors"]


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    tiny(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "bare")
    bare.save_pretrained(tmp_path / "bare")
    model, read = fuse(recipe({"name": "a", "model": str(tmp_path / "bare")}))
    assert read.pad_token == read.eos_token
    assert model.generation_config.pad_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id


# ---------------------------------------------------------------- outputs that cannot be mixed


class Twisted(LlamaForCausalLM):
    """Does something to its logits that no configuration mentions."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits**3
        return out


def test_a_model_that_changes_its_logits_is_refused():
    config = tiny().config
    with pytest.raises(CheckpointError, match="specialist 'odd': Twisted changes its logits after the output layer"):
        check_head(SpecialistGroup(Twisted(config).eval(), ["odd"]), VOCAB)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma", "gemma2", "gpt2"])
def test_known_architectures_pass_that_check(kind):
    check_head(SpecialistGroup(tiny(kind), ["fine"]), VOCAB - 2)


def test_a_head_is_checked_for_adapters_too(shared):
    check_head(shared.groups[0], VOCAB)


# ---------------------------------------------------------------- names of models


def test_a_reference_is_a_model_and_perhaps_an_adapter(tmp_path):
    assert parse_model_reference("org/base+me/adapter") == ModelReference("org/base", "me/adapter")
    assert parse_model_reference("org/base") == parse_model_reference("org/base+") == ModelReference("org/base")
    (tmp_path / "c++").mkdir()
    assert parse_model_reference(str(tmp_path / "c++")) == ModelReference(str(tmp_path / "c++"))


@pytest.mark.parametrize(
    ("text", "plain"),
    [("org/base", True), ("./folder", True), ("base+adapter", False), ("model.gguf", False), ("package:a/b", False)],
)
def test_which_references_transformers_loads_by_itself(text, plain):
    assert parse_model_reference(text).is_plain is plain
