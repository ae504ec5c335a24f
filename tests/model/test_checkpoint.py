"""Fused checkpoints: exact round trips, what is written and what is not, and every way a folder can be broken."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from tiny_models import entry, fuse, fuse_entries, save_adapter, shake_gate, tiny, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.model import checkpoint, saving
from ultrafuser.model.fingerprint import WeightMarks
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import is_changed, mark_unchanged

IDS = tokens(2, 7)
NAMES = ("text", "code", "math")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def load(folder, **options):
    return UltraFuserForCausalLM.from_pretrained(folder, **options)


def same(a, b):
    """Bitwise."""
    assert torch.equal(logits(a), logits(b))


def train(model, parameters, steps=2, **options):
    """A few optimizer steps on the given parameters."""
    model.requires_grad_(False)
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
    return model


def size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def manifest(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def fused(full, tmp_path) -> Path:
    """A saved checkpoint of three referenced specialists."""
    full.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


@pytest.fixture
def fused_shared(shared, tmp_path) -> Path:
    shared.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("mixing", ["logits", "probabilities"])
def test_save_then_load_is_exact(full, tmp_path, mixing):
    full.config.mixing = mixing
    full.save_pretrained(tmp_path / "fused")
    reloaded = load(tmp_path / "fused")
    assert not reloaded.training and reloaded.config.mixing == mixing and reloaded.config.names == list(NAMES)
    same(reloaded, full)
    assert torch.equal(reloaded.generate(IDS, max_new_tokens=6), full.generate(IDS, max_new_tokens=6))


def test_save_then_load_of_a_shared_base_is_exact(shared, fused_shared):
    reloaded = load(fused_shared)
    assert [group.size for group in reloaded.groups] == [3]
    same(reloaded, shared)


def test_save_then_load_of_mixed_architectures_and_widths(save, tmp_path):
    model = fuse_entries(
        [
            entry("a", save("a")),
            entry("b", save("b", "gpt2", n_embd=48)),
            entry("c", save("c", "gemma2", hidden_size=16)),
        ]
    )
    model.save_pretrained(tmp_path / "fused")
    same(load(tmp_path / "fused"), model)


def test_a_second_round_trip_changes_nothing(fused, tmp_path):
    once = load(fused)
    once.save_pretrained(tmp_path / "again")
    same(load(tmp_path / "again"), once)
    assert (fused / "model.safetensors").read_bytes() == (tmp_path / "again" / "model.safetensors").read_bytes()


def test_a_model_in_memory_is_written_whole(tmp_path):
    """Specialists that came from nowhere have no source to refer to."""
    model = fuse([tiny(seed=1), tiny("gpt2", 2)], names=["a", "b"])
    model.save_pretrained(tmp_path / "fused")
    same(load(tmp_path / "fused"), model)


def test_saving_in_place(fused):
    model = load(fused)
    train(model, model.gate.parameters())
    model.save_pretrained(fused)
    same(load(fused), model)


def test_generation_settings_survive(full, tmp_path):
    full.generation_config.eos_token_id = [1, 9]
    full.generation_config.max_new_tokens = 3
    full.save_pretrained(tmp_path / "fused")
    reloaded = load(tmp_path / "fused")
    assert reloaded.generation_config.eos_token_id == [1, 9] and reloaded.generation_config.max_new_tokens == 3


def test_other_files_of_the_folder_stay(full, tmp_path):
    folder = tmp_path / "fused"
    folder.mkdir()
    (folder / "README.md").write_text("a model card")
    full.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "a model card"


def test_state_dict_of_all_ranks_is_what_is_written(full, shared, tmp_path):
    """Trainer gathers the state and hands it over; the model itself may hold shards."""
    for model in (full, shared):
        folder = tmp_path / f"fused-{len(model.groups)}"
        train(model, model.groups[0].adapter_parameters() or model.groups[0].parameters())
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = logits(model)
        with torch.no_grad():
            for parameter in [*model.gate.parameters(), *model.groups[0].adapter_parameters()]:
                parameter.zero_()
            if not model.groups[0].loras:
                model.groups[0].model.model.norm.weight.zero_()
        model.save_pretrained(folder, state_dict=state)
        assert torch.equal(logits(load(folder)), expected)


def test_only_the_main_process_writes(full, tmp_path):
    full.save_pretrained(tmp_path / "fused", is_main_process=False)
    assert not (tmp_path / "fused").exists()


# ---------------------------------------------------------------- what is written


def test_stage_one_writes_the_gate_alone(full, tmp_path):
    train(full, full.gate.parameters())
    full.save_pretrained(tmp_path / "fused")
    assert sorted(p.name for p in (tmp_path / "fused").glob("*.safetensors")) == ["model.safetensors"]
    assert not (tmp_path / "fused" / "specialists").exists()
    assert set(load_file(tmp_path / "fused" / "model.safetensors")) == {
        "gate.hidden.weight", "gate.hidden.bias", "gate.score.weight", "gate.score.bias"
    }  # fmt: skip
    data = [file for file in (tmp_path / "fused").iterdir() if file.suffix != ".py"]
    assert sum(file.stat().st_size for file in data) < 15_000
    assert [spec["source"]["model"] for spec in manifest(tmp_path / "fused")["specialists"]] == [
        str(tmp_path / name) for name in NAMES
    ]
    same(load(tmp_path / "fused"), full)


def test_a_checkpoint_loads_under_inference_mode(full, tmp_path):
    full.save_pretrained(tmp_path / "fused")
    with torch.inference_mode():
        same(load(tmp_path / "fused"), full)


def test_a_changed_specialist_is_an_ordinary_checkpoint(full, tmp_path):
    train(full, full.groups[1].parameters())
    full.save_pretrained(tmp_path / "fused")
    assert [p.name for p in (tmp_path / "fused" / "specialists").iterdir()] == ["code"]
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "fused" / "specialists" / "code")
    assert torch.equal(logits(alone), logits(full.specialist("code")))
    same(load(tmp_path / "fused"), full)
    assert manifest(tmp_path / "fused")["specialists"][1]["source"] == {"model": "specialists/code"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_changed_specialists_of_any_kind(save, tmp_path, kind, tied):
    model = fuse_entries([entry("a", save("a", kind, tie_word_embeddings=tied))])
    train(model, model.groups[0].parameters())
    model.save_pretrained(tmp_path / "fused")
    same(load(tmp_path / "fused"), model)


def test_changed_adapters_are_peft_folders(shared, tmp_path):
    peft = pytest.importorskip("peft")
    train(shared, shared.groups[0].adapter_parameters())
    shared.save_pretrained(tmp_path / "fused")
    reloaded = load(tmp_path / "fused")
    same(reloaded, shared)
    assert [group.size for group in reloaded.groups] == [3], "they still share their base"
    for name in NAMES:
        folder = tmp_path / "fused" / "specialists" / name
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        alone = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        torch.testing.assert_close(logits(alone), logits(shared.specialist(name)), rtol=1e-5, atol=1e-5)
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            tmp_path / "base"
        )
    assert not (tmp_path / "fused" / "specialists" / "base").exists()
    assert size_bytes(tmp_path / "fused" / "specialists") < size_bytes(tmp_path / "base")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_new_adapters_are_peft_folders(save, tmp_path, kind):
    """Stage 2 with LoRA on full specialists."""
    peft = pytest.importorskip("peft")
    model = fuse_entries([entry("a", save("a", kind)), entry("b", save("b", kind, seed=1))])
    model.groups[0].new_adapters(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    assert is_changed(model.groups[0]) and not is_changed(model.groups[1])
    train(model, model.groups[0].adapter_parameters())
    model.save_pretrained(tmp_path / "fused")
    same(load(tmp_path / "fused"), model)
    assert [p.name for p in (tmp_path / "fused" / "specialists").iterdir()] == ["a"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    alone = peft.PeftModel.from_pretrained(base, str(tmp_path / "fused" / "specialists" / "a")).eval()
    torch.testing.assert_close(logits(alone), logits(model.specialist("a")), rtol=1e-4, atol=1e-4)


def test_new_adapters_on_a_specialist_inside_the_checkpoint(full, tmp_path):
    """Stage 2 on all weights, then with LoRA: the adapter must not lie beside its base, or it is added twice."""
    train(full, full.groups[0].parameters())
    full.save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    model.groups[0].new_adapters(r=2, alpha=4, dropout=0.0, target_modules="all-linear")
    train(model, model.groups[0].adapter_parameters())
    for target in (tmp_path / "second", tmp_path / "third"):
        model.save_pretrained(target)
        source = manifest(target)["specialists"][0]["source"]
        assert source["model"] == "bases/text" and source["adapter"] == "specialists/text"
        same(load(target), model)
        model = load(target)
        train(model, model.groups[0].adapter_parameters())


def test_adapter_and_base_both_changed(save, tmp_path):
    """An adapter alone on its base, all of it trained: the specialist becomes a merged checkpoint."""
    model = fuse_entries([entry("a", save("base"), save_adapter(tiny(), tmp_path / "lora"))])
    train(model, model.groups[0].parameters())
    model.save_pretrained(tmp_path / "fused")
    torch.testing.assert_close(logits(load(tmp_path / "fused")), logits(model), rtol=1e-4, atol=1e-4)
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "fused" / "specialists" / "a")
    torch.testing.assert_close(logits(alone), logits(model.specialist("a")), rtol=1e-4, atol=1e-4)


def test_a_merged_adapter_that_does_not_change_stays_a_reference(save, tmp_path):
    spec = entry("a", save("base"), save_adapter(tiny(), tmp_path / "lora", use_dora=True), separate=True)
    model = fuse_entries([spec])
    model.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused" / "specialists").exists()
    same(load(tmp_path / "fused"), model)
    train(model, model.groups[0].parameters())
    model.save_pretrained(tmp_path / "trained")
    same(load(tmp_path / "trained"), model)


def test_a_changed_shared_base_is_an_error(shared, tmp_path):
    train(shared, [shared.groups[0].model.model.norm.weight])
    with pytest.raises(CheckpointError, match="base that text, code, math share was changed.*share_base: false"):
        shared.save_pretrained(tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("which", ["full", "shared"])
def test_copy_needs_nothing_else(which, request, tmp_path):
    model = request.getfixturevalue(which)
    model.save_pretrained(tmp_path / "fused", copy=True)
    expected = logits(model)
    for path in tmp_path.iterdir():
        if path.name != "fused":
            shutil.rmtree(path)
    moved = (tmp_path / "fused").rename(tmp_path / "moved")
    reloaded = load(moved)
    assert torch.equal(logits(reloaded), expected)
    assert len(reloaded.groups) == len(model.groups)


def test_copy_of_adapters_on_different_bases(save, tmp_path):
    base_1, base_2 = save("one"), save("two", seed=5)
    lora_1, lora_2 = (save_adapter(tiny(), tmp_path / name, seed) for seed, name in enumerate(("lora", "other")))
    model = fuse_entries([entry("a", base_1, lora_1), entry("b", base_2, lora_2), entry("c", base_1, lora_2)])
    model.save_pretrained(tmp_path / "fused", copy=True)
    expected = logits(model)
    for name in ("one", "two", "lora", "other"):
        shutil.rmtree(tmp_path / name)
    assert torch.equal(logits(load(tmp_path / "fused")), expected)


def test_a_shared_base_is_hashed_once(fused_shared, monkeypatch):
    from ultrafuser.model import references

    hashed, plain = [], references.sha256
    monkeypatch.setattr(references, "sha256", lambda file: (hashed.append(Path(file).parent.name), plain(file))[1])
    load(fused_shared)
    assert sorted(hashed) == ["base", "code-lora", "fused", "math-lora", "text-lora"]


# ---------------------------------------------------------------- what counts as a change


def test_moves_and_casts_are_no_change(full, shared):
    for model in (full, shared):
        model.to("cpu").double().float().double().float()
        model.requires_grad_(False).eval().train()
        model(IDS, labels=IDS)
        assert not any(is_changed(group) for group in model.groups)
        model.to(torch.bfloat16)
        assert not any(is_changed(group) for group in model.groups), "the same weights, rounded"


@pytest.mark.parametrize("optimizer", [
    {"foreach": False}, {"foreach": True}, {"fused": True}, {"foreach": False, "capturable": False, "maximize": True},
])  # fmt: skip
def test_optimizer_steps_are_a_change(full, optimizer):
    train(full, full.groups[2].parameters(), steps=1, **optimizer)
    assert [is_changed(group) for group in full.groups] == [False, False, True]


@pytest.mark.parametrize("write", ["copy_", "load_state_dict", "data", "new parameter"])
def test_writing_weights_is_a_change(full, write):
    model = full.groups[0].model
    weight = model.model.norm.weight
    with torch.no_grad():
        if write == "copy_":
            weight.copy_(torch.ones_like(weight) * 2)
        elif write == "load_state_dict":
            model.load_state_dict(tiny(seed=9).state_dict())
        elif write == "data":  # how DeepSpeed and some optimizers write
            weight.data.mul_(2)
        else:
            model.model.norm.weight = nn.Parameter(weight * 2)
    assert [is_changed(group) for group in full.groups] == [True, False, False]


def test_training_the_gate_leaves_the_specialists_bitwise(full):
    initial = [copy.deepcopy(group.state_dict()) for group in full.groups]
    train(full, full.gate.parameters())
    for group, state in zip(full.groups, initial, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in group.state_dict().items())
    assert not any(is_changed(group) for group in full.groups)


# ---------------------------------------------------------------- moving and saving elsewhere


def test_moving_a_checkpoint_with_its_specialists_inside(full, tmp_path):
    train(full, full.parameters())
    full.save_pretrained(tmp_path / "fused")
    expected = logits(full)
    moved = (tmp_path / "fused").rename(tmp_path / "elsewhere")
    for name in NAMES:
        shutil.rmtree(tmp_path / name)
    assert torch.equal(logits(load(moved)), expected)


def test_saving_elsewhere_takes_along_what_lies_inside(full, tmp_path):
    """Loaded from a checkpoint with one specialist inside, trained in the gate, saved to another folder."""
    train(full, full.groups[0].parameters())
    full.save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    train(model, model.gate.parameters())
    model.save_pretrained(tmp_path / "second")
    expected = logits(model)
    shutil.rmtree(tmp_path / "first")
    assert torch.equal(logits(load(tmp_path / "second")), expected)


def test_saving_elsewhere_takes_the_base_of_new_adapters_along(shared, tmp_path):
    shared.save_pretrained(tmp_path / "first", copy=True)
    model = load(tmp_path / "first")
    train(model, model.groups[0].adapter_parameters())
    model.save_pretrained(tmp_path / "second")
    expected = logits(model)
    for name in ("first", "base", "text-lora", "code-lora", "math-lora"):
        shutil.rmtree(tmp_path / name)
    assert torch.equal(logits(load(tmp_path / "second")), expected)


def test_training_on_in_place(full, tmp_path):
    """Save, load, train on, save over it, twice: nothing old comes back."""
    train(full, full.groups[0].parameters())
    full.save_pretrained(tmp_path / "fused")
    for _ in range(2):
        model = load(tmp_path / "fused")
        train(model, model.groups[0].parameters())
        model.save_pretrained(tmp_path / "fused")
        same(load(tmp_path / "fused"), model)


def test_saving_twice_from_one_model(full, tmp_path):
    """As checkpoints are written in the middle of a run."""
    for step in range(2):
        train(full, full.groups[0].parameters(), steps=1)
        full.save_pretrained(tmp_path / f"step-{step}")
        same(load(tmp_path / f"step-{step}"), full)
    train(full, full.gate.parameters())
    full.save_pretrained(tmp_path / "last")
    same(load(tmp_path / "last"), full)


# ---------------------------------------------------------------- loading as users of transformers do

LOAD_ALONE = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "ultrafuser" not in sys.modules
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto", device_map="cpu")
try:
    import ultrafuser
except ImportError:
    pass
else:
    raise SystemExit("ultrafuser can be imported, so this shows nothing")
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
again = sys.argv[4]
model.save_pretrained(again)
model = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(model(torch.load(sys.argv[2])).logits, torch.load(sys.argv[3]))
"""

HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == "ultrafuser":
            raise ImportError("hidden by the test")
sys.meta_path.insert(0, Hide())
"""


def test_the_saved_code_loads_it_where_ultrafuser_is_not_installed(fused, full, tmp_path):
    torch.save(IDS, tmp_path / "ids.pt")
    blocker = tmp_path / "blocker"  # an editable install of this very package must stay invisible
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(HIDE)
    hidden = {"PYTHONPATH": str(blocker), "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, fused, tmp_path / "ids.pt", tmp_path / "out.pt", tmp_path / "again"],
        env=os.environ | hidden, cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert torch.equal(torch.load(tmp_path / "out.pt"), logits(full))


def test_dtype_and_device_map_go_to_every_specialist(fused):
    model = load(fused, dtype=torch.bfloat16, device_map="cpu")
    assert {p.dtype for group in model.groups for p in group.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.gate.parameters()} == {torch.float32}
    assert logits(model).isfinite().all()
    assert {p.dtype for p in load(fused, dtype="auto").parameters()} == {torch.float32}


def test_a_specialists_own_dtype_wins(save, tmp_path):
    model = fuse_entries([entry("a", save("a")), entry("b", save("b"), dtype="bfloat16")])
    model.save_pretrained(tmp_path / "fused")
    for loaded in (model, load(tmp_path / "fused", dtype=torch.float32)):
        assert [group.model.dtype for group in loaded.groups] == [torch.float32, torch.bfloat16]
        assert logits(loaded).isfinite().all()


def test_attention_implementation_goes_to_every_specialist(fused):
    model = load(fused, attn_implementation="eager")
    assert {group.model.config._attn_implementation for group in model.groups} == {"eager"}


def test_mixing_may_be_chosen_when_loading(fused, full):
    assert load(fused, mixing="logits").config.mixing == "logits"
    with pytest.raises(CheckpointError, match="mixing is 'sum', expected one of logits, probabilities"):
        load(fused, mixing="sum")


def test_loading_info(fused):
    model, info = load(fused, output_loading_info=True)
    assert isinstance(model, UltraFuserForCausalLM) and not info["missing_keys"]


def test_loaded_model_copies(full):
    twin = copy.deepcopy(full)
    same(twin, full)
    train(twin, twin.parameters())
    assert not torch.equal(logits(twin), logits(full))


# ---------------------------------------------------------------- broken folders


def flip_a_byte(file: Path) -> None:
    """Change one bit near the end, where the weights are."""
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def refuses(folder, pattern, **options):
    with pytest.raises(CheckpointError, match=pattern):
        load(folder, **options)


def test_missing_gate(fused):
    (fused / "model.safetensors").unlink()
    refuses(fused, r"fused/model.safetensors: missing. The folder is half written")


def test_missing_manifest(fused):
    (fused / "config.json").unlink()
    refuses(fused, r"fused: no config.json, so it is not a fused checkpoint or was only half written")


def test_broken_manifest(fused):
    text = (fused / "config.json").read_text()
    (fused / "config.json").write_text(text[: len(text) // 2])
    refuses(fused, r"config.json: not JSON")


def test_another_kind_of_checkpoint(save):
    refuses(save("plain"), r"plain: model_type is 'llama', expected 'ultrafuser'. Fuse it")


def test_no_such_folder(tmp_path):
    refuses(tmp_path / "nothing", r"nothing: no such folder. Expected a fused checkpoint or a hub id")
    refuses("nobody/nothing", r"nobody/nothing: no such folder, and the hub did not give it")


def test_truncated_gate(fused):
    data = (fused / "model.safetensors").read_bytes()
    (fused / "model.safetensors").write_bytes(data[: len(data) // 2])
    refuses(fused, r"fused/model.safetensors: .*(corrupted|half written)")


def test_a_flipped_byte_in_the_gate(fused):
    flip_a_byte(fused / "model.safetensors")
    refuses(fused, r"the gate: the SHA-256 of .*fused/model.safetensors is not the recorded one. It is corrupted")


def test_a_gate_of_another_fusion(fused, save, tmp_path):
    another = fuse_entries([entry("a", save("a")), entry("b", save("b", hidden_size=16))])
    another.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", fused)
    facts = manifest(fused)
    facts["gate_files"] = manifest(tmp_path / "other")["gate_files"]
    (fused / "config.json").write_text(json.dumps(facts))
    refuses(fused, r"does not fit the manifest: .*Unexpected key.*projections.*another fusion")


def test_a_gate_of_another_width(fused):
    facts = manifest(fused)
    facts["gate_hidden_size"] = 8
    (fused / "config.json").write_text(json.dumps(facts))
    refuses(fused, r"model.safetensors: does not fit the manifest")


def test_truncated_specialist(fused, tmp_path):
    file = tmp_path / "code" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(fused, r"specialist 'code': .*code/model.safetensors has \d+ bytes, expected \d+: it is corrupted")


def test_truncated_specialist_without_checksums(save, tmp_path):
    fuse_entries([entry("code", save("code"), files=None)]).save_pretrained(tmp_path / "fused")
    file = tmp_path / "code" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuses(tmp_path / "fused", r"specialist 'code': its weights could not be loaded from .*code")


def test_a_flipped_byte_in_a_specialist(fused, tmp_path):
    flip_a_byte(tmp_path / "math" / "model.safetensors")
    refuses(fused, r"specialist 'math': the SHA-256 of .*math/model.safetensors .* corrupted, or was replaced")
    load(fused, verify=False)


def test_a_flipped_byte_in_an_adapter(fused_shared, tmp_path):
    flip_a_byte(tmp_path / "code-lora" / "adapter_model.safetensors")
    refuses(fused_shared, r"specialist 'code': the SHA-256 of .*code-lora/adapter_model.safetensors")


def test_a_flipped_byte_in_a_shared_base(fused_shared, tmp_path):
    flip_a_byte(tmp_path / "base" / "model.safetensors")
    refuses(fused_shared, r"specialist 'text': the SHA-256 of .*base/model.safetensors")


def test_a_missing_file_of_a_specialist(fused, tmp_path):
    (tmp_path / "text" / "model.safetensors").unlink()
    refuses(fused, r"specialist 'text': .*text/model.safetensors is missing")


def test_a_reference_that_is_gone(fused, tmp_path):
    shutil.rmtree(tmp_path / "text")
    refuses(fused, r"specialist 'text': its source .*/text is gone. Put it back, or fuse again")


def test_an_adapter_that_is_gone(fused_shared, tmp_path):
    shutil.rmtree(tmp_path / "math-lora")
    refuses(fused_shared, r"specialist 'math': its source .*/math-lora is gone")


def test_a_specialist_inside_that_is_gone(full, tmp_path):
    train(full, full.groups[0].parameters())
    full.save_pretrained(tmp_path / "fused")
    shutil.rmtree(tmp_path / "fused" / "specialists")
    refuses(tmp_path / "fused", r"specialist 'text': its source specialists/text is gone")


def test_a_package_that_is_gone(save, tmp_path):
    spec = entry("a", save("a"))
    model = fuse_entries([spec])
    for reference, words in (
        ("package:no_such_package/x.gguf", "the Python package 'no_such_package' is not installed. Install it"),
        ("package:transformers/no_such.gguf", "the Python package 'transformers' has no 'no_such.gguf'"),
    ):
        model.config.specialists[0]["source"]["model"] = reference
        with pytest.raises(CheckpointError, match=words):
            checkpoint.load_groups(model.config, None)


def test_pickled_weights_are_refused(save, tmp_path):
    folder = save("a")
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    fuse_entries([entry("a", folder)])  # safetensors beside them are fine
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"specialist 'a': .*a has only pickled weights \(pytorch_model.bin\), which can run"
    ):
        fuse_entries([entry("a", folder)])


def test_a_pickled_adapter_is_refused(save, tmp_path):
    adapter = save_adapter(tiny(), tmp_path / "lora")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"specialist 'a': .*lora has only pickled weights \(adapter_model.bin\)"):
        fuse_entries([entry("a", save("base"), adapter)])


def test_a_specialist_without_weights(save):
    folder = save("a")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="specialist 'a': .* has no weights. Expected"):
        fuse_entries([entry("a", folder)])


def test_a_specialist_with_half_its_weights(save, tmp_path):
    """A shard or a layer that is missing must not be filled with random numbers."""
    from safetensors.torch import save_file

    folder = save("a")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="specialist 'a'.*model.layers.1.mlp.up_proj.weight"):
        fuse_entries([entry("a", folder)])


def test_an_adapter_without_its_configuration(save, tmp_path):
    adapter = save_adapter(tiny(), tmp_path / "lora")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"specialist 'a': .*lora has no adapter_config.json. Expected a PEFT adapter"
    ):
        fuse_entries([entry("a", save("base"), adapter)])


# ---------------------------------------------------------------- a disk that is full


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("fault", ["gate", "specialist", "manifest"])
def test_a_full_disk_leaves_the_old_folder_as_it_was(fused, tmp_path, monkeypatch, fault):
    initial = snapshot(fused)
    model = load(fused)
    if fault == "specialist":
        train(model, model.groups[0].parameters())

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    if fault == "gate":
        monkeypatch.setattr(saving, "save_file", full_disk)
    elif fault == "specialist":
        monkeypatch.setattr(model.groups[0].model, "save_pretrained", full_disk)
    else:
        monkeypatch.setattr(type(model.config), "save_pretrained", full_disk)
    listing = sorted(p.name for p in tmp_path.iterdir())
    for target in (fused, tmp_path / "fresh"):
        with pytest.raises(
            CheckpointError, match=rf"{target.name}: could not be written: the disk is full. Nothing was changed"
        ):
            model.save_pretrained(target)
    assert snapshot(fused) == initial
    assert sorted(p.name for p in tmp_path.iterdir()) == listing, "a temporary folder was left behind"
    monkeypatch.undo()
    same(load(fused), model) if fault != "specialist" else load(fused)


def test_an_error_while_writing_leaves_nothing_behind(fused, tmp_path, monkeypatch):
    initial, listing = snapshot(fused), sorted(p.name for p in tmp_path.iterdir())
    model = load(fused)
    monkeypatch.setattr(saving, "record_files", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(fused)
    assert snapshot(fused) == initial and sorted(p.name for p in tmp_path.iterdir()) == listing


def test_not_writable(full, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        full.save_pretrained(tmp_path / "file" / "fused")


def test_a_crash_while_taking_its_place_is_seen_as_half_written(fused, monkeypatch):
    """The manifest goes first and comes back last."""
    model, plain = load(fused), os.replace

    def crash(source, target):
        if Path(target).name == "modeling_ultrafuser.py":
            raise KeyboardInterrupt
        plain(source, target)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(fused)
    monkeypatch.undo()
    refuses(fused, "half written")


def test_push_to_hub_says_what_to_do(full, tmp_path):
    with pytest.raises(CheckpointError, match=r"save first, then call model.push_to_hub"):
        full.save_pretrained(tmp_path / "fused", push_to_hub=True)


def test_marking_is_what_makes_a_reference(save, tmp_path):
    model = fuse_entries([entry("a", save("a"))])
    assert not is_changed(model.groups[0])
    model.groups[0].marks = WeightMarks()
    assert is_changed(model.groups[0]), "what was never loaded has no source to refer to"
    mark_unchanged(model, None)
    assert not is_changed(shake_gate(model).groups[0])
