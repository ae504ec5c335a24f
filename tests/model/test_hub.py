"""Models of the hub: pinned to commits, and reached with the caller's token and cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import ultrafuser
from tiny_models import save_adapter, tiny, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.info import describe
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

IDS = tokens(2, 7)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def recipe(*specialists, **fields):
    return load_recipe({"specialists": list(specialists), "device": "cpu", "gate": {"hidden_size": 16}, **fields})


def manifest(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def sources(folder: Path) -> list[dict]:
    return [spec["source"] for spec in manifest(folder)["specialists"]]


def write(model_and_tokenizer, folder: Path) -> Path:
    model, tokenizer = model_and_tokenizer
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path, tokenizer):
    """model_folder(seed): a tiny model with its tokenizer."""

    def make(seed: int = 0, **options) -> Path:
        folder = tmp_path / f"model-{seed}"
        tiny(seed=seed, vocab_size=len(tokenizer)).save_pretrained(folder, **options)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def adapter_folder(tmp_path, tokenizer):
    """adapter_folder(seed): an adapter on the model of seed 0."""
    return lambda seed: save_adapter(tiny(vocab_size=len(tokenizer)), tmp_path / f"lora-{seed}", seed)


# ---------------------------------------------------------------- pinned to commits


@pytest.mark.parametrize("revision", [None, "main", "v1"])
def test_a_fused_model_stays_the_same_when_the_branch_moves(hub, model_folder, tmp_path, revision):
    hub.push("acme/tiny", model_folder(0))
    commit = hub.push("acme/tiny", model_folder(1), revision or "main")
    model, tokenizer = fuse(recipe({"name": "a", "model": "acme/tiny", "revision": revision}))
    folder = write((model, tokenizer), tmp_path / "fused")
    assert sources(folder) == [{"model": "acme/tiny", "revision": commit}]
    expected = logits(model)
    hub.push("acme/tiny", model_folder(2), revision or "main")
    for cached in (True, False):
        if not cached:
            shutil.rmtree(tmp_path / "hub-cache")
        assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(folder)), expected)
        assert describe(folder, verify=True)["specialists"][0]["model"]["status"] == "on the hub"
    plain = AutoModelForCausalLM.from_pretrained(model_folder(1)).eval()
    torch.testing.assert_close(expected.log_softmax(-1), logits(plain).log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_an_adapter_and_its_base_are_pinned(hub, model_folder, adapter_folder, tmp_path):
    base, one = hub.push("acme/base", model_folder(0)), hub.push("acme/one", adapter_folder(1))
    two = hub.push("acme/two", adapter_folder(2), "beta")
    hub.push("acme/two", adapter_folder(3))
    specialists = [
        {"name": "a", "model": "acme/base", "adapter": "acme/one"},
        {"name": "b", "model": "acme/base", "adapter": "acme/two", "adapter_revision": "beta"},
    ]
    model, tokenizer = fuse(recipe(*specialists))
    folder = write((model, tokenizer), tmp_path / "fused")
    assert [group.names for group in model.groups] == [["a", "b"]]
    assert sources(folder) == [
        {"model": "acme/base", "revision": base, "adapter": "acme/one", "adapter_revision": one},
        {"model": "acme/base", "revision": base, "adapter": "acme/two", "adapter_revision": two},
    ]
    hub.push("acme/base", model_folder(5))
    for name, branch in (("acme/one", "main"), ("acme/two", "beta")):
        hub.push(name, adapter_folder(6), branch)
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(folder)), logits(model))


def test_a_hub_model_without_a_commit_is_told_and_pinned_when_it_is_saved(hub, model_folder, tmp_path, caplog):
    commit = hub.push("acme/tiny", model_folder(0))
    folder = write(fuse(recipe({"name": "a", "model": "acme/tiny"})), tmp_path / "fused")
    facts = manifest(folder)
    facts["specialists"][0]["source"]["revision"] = "main"
    (folder / "config.json").write_text(json.dumps(facts))
    assert describe(folder)["specialists"][0]["model"]["status"] == "on the hub, not pinned to a commit"
    with pytest.raises(
        CheckpointError, match=r"specialist 'a': acme/tiny has no recorded commit, so a push .* Fuse again"
    ):
        describe(folder, verify=True)
    model = UltraFuserForCausalLM.from_pretrained(folder)
    assert f"no commit of acme/tiny is recorded. Loading {commit}" in caplog.text
    model.save_pretrained(tmp_path / "pinned")
    assert sources(tmp_path / "pinned") == [{"model": "acme/tiny", "revision": commit}]
    assert describe(tmp_path / "pinned", verify=True)["verified"]


def test_a_commit_that_is_gone_fails_to_verify(hub, model_folder, tmp_path):
    commit = hub.push("acme/tiny", model_folder(0))
    folder = write(fuse(recipe({"name": "a", "model": "acme/tiny"})), tmp_path / "fused")
    hub.push("acme/tiny", model_folder(1))
    del hub.commits["acme/tiny", commit]
    assert describe(folder, verify=True)["verified"], "the cache has it"
    shutil.rmtree(tmp_path / "hub-cache")
    for read in (lambda: describe(folder, verify=True), lambda: UltraFuserForCausalLM.from_pretrained(folder)):
        with pytest.raises(CheckpointError, match=r"specialist 'a': no model in acme/tiny: .*the hub did not give it"):
            read()


def test_a_folder_of_the_working_folder_is_not_taken_for_a_hub_model(hub, model_folder, tmp_path, monkeypatch):
    hub.push("acme/tiny", model_folder(0))
    model, tokenizer = fuse(recipe({"name": "a", "model": "acme/tiny"}))
    folder = write((model, tokenizer), tmp_path / "fused")
    shutil.copytree(model_folder(1), tmp_path / "acme" / "tiny")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(folder)), logits(model))


# ---------------------------------------------------------------- token, cache_dir, local_files_only, force_download


def test_token_and_cache_reach_every_specialist(hub, model_folder, adapter_folder, tmp_path, tokenizer):
    hub.push("acme/base", model_folder(0, max_shard_size="30KB"))
    adapter = adapter_folder(1)
    tokenizer.save_pretrained(adapter)
    hub.push("acme/lora", adapter)
    hub.tokens = dict.fromkeys(("acme/base", "acme/lora", "acme/fused"), "secret")
    specialists = recipe(
        {"name": "a", "model": "acme/base", "adapter": "acme/lora"}, {"name": "b", "model": "acme/base"}
    )
    access = {"token": "secret", "cache_dir": tmp_path / "cache"}
    with pytest.raises(
        CheckpointError, match="specialist 'a': no model in acme/base: no such folder, and the hub did not"
    ):
        fuse(specialists)
    model, tokenizer = fuse(specialists, **access)
    hub.push("acme/fused", write((model, tokenizer), tmp_path / "fused"))
    for source in (tmp_path / "fused", "acme/fused"):
        with pytest.raises(CheckpointError, match="the hub did not give it"):
            ultrafuser.load(source, device_map="cpu", cache_dir=tmp_path / "empty")
        loaded, _ = ultrafuser.load(source, device_map="cpu", **access)
        assert torch.equal(logits(loaded), logits(model))
        loaded = AutoModelForCausalLM.from_pretrained(source, **access)
        assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "copy", copy=True)  # with the same token
    assert not list((tmp_path / "hub-cache").glob("*/blobs")), "the default cache was not used"
    hub.requests.clear()
    expected = logits(model)
    for cached in (tmp_path / "fused", "acme/fused"):
        loaded, _ = ultrafuser.load(cached, device_map="cpu", local_files_only=True, cache_dir=tmp_path / "cache")
        assert torch.equal(logits(loaded), expected)
    assert hub.requests == [], "nothing was requested"
    with pytest.raises(
        CheckpointError, match="specialist 'a': no model in acme/base: .*outgoing traffic has been disabled"
    ):
        fuse(specialists, local_files_only=True, cache_dir=tmp_path / "empty")


def test_force_download_loads_everything_again_and_once(hub, model_folder, adapter_folder, tmp_path):
    hub.push("acme/base", model_folder(0))
    hub.push("acme/lora", adapter_folder(1))
    specialists = recipe(
        {"name": "a", "model": "acme/base", "adapter": "acme/lora"}, {"name": "b", "model": "acme/base"}
    )
    folder = write(fuse(specialists), tmp_path / "fused")
    for load in (lambda **k: fuse(specialists, **k), lambda **k: ultrafuser.load(folder, device_map="cpu", **k)):
        hub.requests.clear()
        load()
        assert hub.downloads() == []
        load(force_download=True)
        files = [path.rpartition("/")[2] for path in hub.downloads()]
        assert {"config.json", "model.safetensors", "adapter_config.json", "adapter_model.safetensors"} <= set(files)
        assert files.count("model.safetensors") == 1 and files.count("adapter_model.safetensors") == 1


def test_only_the_files_of_the_model_are_downloaded_and_copied(hub, model_folder, tmp_path):
    folder = model_folder(0)
    expected = {path.name for path in folder.iterdir()}
    for name in ("original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin", "model.onnx", "x.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x" * 100)
    hub.push("acme/tiny", folder)
    model, tokenizer = fuse(recipe({"name": "a", "model": "acme/tiny"}))
    assert {path.rpartition("/")[2] for path in hub.downloads()} == expected
    model.save_pretrained(tmp_path / "fused", copy=True)
    tokenizer.save_pretrained(tmp_path / "fused")
    copied = tmp_path / "fused" / "specialists" / "a"
    assert {path.name for path in copied.iterdir()} == expected
    assert manifest(tmp_path / "fused")["specialists"][0]["files"]["model"].keys() == {"model.safetensors"}
    hub.commits.clear()
    shutil.rmtree(tmp_path / "hub-cache")
    assert describe(tmp_path / "fused", verify=True)["verified"]
    assert torch.equal(logits(UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")), logits(model))


def test_pickles_on_the_hub_are_refused(hub, model_folder):
    folder = model_folder(0)
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.push("acme/pickled", folder)
    with pytest.raises(CheckpointError, match=r"specialist 'a': .* has no weights. Expected \*.safetensors"):
        fuse(recipe({"name": "a", "model": "acme/pickled"}))
    index = {"weight_map": dict.fromkeys(state, "pytorch_model.bin")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.push("acme/pickled", folder)
    with pytest.raises(CheckpointError, match=r"names pickled weights \(pytorch_model.bin\), which can run code"):
        fuse(recipe({"name": "a", "model": "acme/pickled"}))


def test_a_hub_that_is_offline_serves_from_the_cache(hub, model_folder, tmp_path, monkeypatch):
    commit = hub.push("acme/tiny", model_folder(0))
    specialist = recipe({"name": "a", "model": "acme/tiny"})
    model, _ = fuse(specialist)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    again, _ = fuse(specialist)
    assert again.config.specialists[0]["source"]["revision"] == commit
    assert torch.equal(logits(again), logits(model))


# ---------------------------------------------------------------- pushing


@pytest.mark.parametrize("copy", [False, True])
def test_push_to_hub_uploads_the_folders_of_specialists(hub, model_folder, tmp_path, tokenizer, caplog, copy):
    specialists = [{"name": name, "model": str(model_folder(seed))} for seed, name in enumerate(("a", "b"))]
    model, tokenizer = fuse(recipe(*specialists))
    with torch.no_grad():
        model.groups[0].model.model.norm.weight.mul_(1.5)
    model.push_to_hub("acme/fused", copy=copy, max_shard_size="30KB", commit_message="first", tags=["test"])
    tokenizer.push_to_hub("acme/fused")
    names = hub.commits["acme/fused", hub.branches["acme/fused", "main"]]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= set(names)
    assert "specialists/a/model.safetensors.index.json" in names, "max_shard_size is obeyed"
    assert ("specialists/b/model.safetensors" in names) == copy
    assert (f"only this machine has {model_folder(1)}. Push with copy=True" in caplog.text) == (not copy)
    if copy:
        shutil.rmtree(tmp_path / "model-0"), shutil.rmtree(tmp_path / "model-1")
    loaded, _ = ultrafuser.load("acme/fused", device_map="cpu")
    assert torch.equal(logits(loaded), logits(model))
    loaded.push_to_hub("acme/fused")  # again, now in one file
    names = hub.commits["acme/fused", hub.branches["acme/fused", "main"]]
    assert {name for name in names if name.startswith("specialists/a/") and "model" in name} == {
        name for name in names if name.startswith("specialists/a/model-0")
    } | {"specialists/a/model.safetensors.index.json"}, "unchanged specialists are uploaded as they are"


def test_a_push_that_the_hub_refuses_is_one_line(hub, model_folder):
    model, _ = fuse(recipe({"name": "a", "model": str(model_folder(0))}))
    hub.branches["acme/private", "main"], hub.tokens["acme/private"] = hub.commit("acme/private", {}), "secret"
    with pytest.raises(CheckpointError, match=r"acme/private: the hub did not take the model: "):
        model.push_to_hub("acme/private")


@pytest.mark.parametrize("adapter", [False, True])
def test_max_shard_size_splits_the_weights_of_changed_specialists(model_folder, adapter_folder, tmp_path, adapter):
    specialist = {"name": "a", "model": str(model_folder(0))} | ({"adapter": str(adapter_folder(1))} if adapter else {})
    model, _ = fuse(recipe(specialist))
    with torch.no_grad():
        model.groups[0].model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "fused", max_shard_size="20KB")
    shards = sorted((tmp_path / "fused" / "specialists" / "a").glob("*.safetensors"))
    assert len(shards) > 2, "a tensor larger than that has a file of its own"
    assert manifest(tmp_path / "fused")["specialists"][0]["files"]["model"].keys() == {file.name for file in shards}
    loaded = UltraFuserForCausalLM.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
