"""The files of a model folder: what is copied, pickles behind an index, and links and references that lead out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tiny_models import entry, fuse_entries, save_adapter, tiny, tokens
from ultrafuser.errors import CheckpointError
from ultrafuser.info import describe
from ultrafuser.model.files import INDEX_FILE
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import atomic_directory
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

IDS = tokens(2, 7)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def load(folder):
    return UltraFuserForCausalLM.from_pretrained(folder)


def change(model, k=0):
    """Give specialist k other weights, so that it is written."""
    with torch.no_grad():
        model.groups[k].model.model.norm.weight.mul_(1.5)
    return model


def edit_manifest(folder: Path, k: int, **source: str) -> None:
    facts = json.loads((folder / "config.json").read_text())
    facts["specialists"][k]["source"] |= source
    (folder / "config.json").write_text(json.dumps(facts))


def listing(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


# ---------------------------------------------------------------- pickles behind safetensors' names


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def with_index(folder: Path, shard: str, target: Path, name: str = INDEX_FILE) -> Path:
    """Replace the weights by an index that names a pickle."""
    weights = load_file(folder / "model.safetensors")
    torch.save({"x": Payload(target)}, folder / shard)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, shard)}))
    return folder


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "weights.pt", "model.safetensors.zip"])
def test_an_index_that_names_a_pickle_is_refused(save, tmp_path, shard):
    spec = entry("a", save("a"), files=None)
    with_index(tmp_path / "a", shard, tmp_path / "pwned")
    with pytest.raises(
        CheckpointError, match=rf"specialist 'a': .*{INDEX_FILE}: names pickled weights \({shard}\), which can run"
    ):
        fuse_entries([spec])
    assert not (tmp_path / "pwned").exists()


def test_an_index_that_the_configuration_names_is_checked_too(save, tmp_path):
    folder = with_index(save("a"), "x.bin", tmp_path / "pwned", "odd.safetensors.index.json")
    shutil.copy(folder / "other.safetensors", folder / "model.safetensors")
    spec = entry("a", folder)
    spec["config"]["transformers_weights"] = "odd.safetensors.index.json"
    with pytest.raises(CheckpointError, match=r"odd.safetensors.index.json: names pickled weights \(x.bin\)"):
        fuse_entries([spec])
    spec["config"]["transformers_weights"] = "adapter_model.bin"
    with pytest.raises(
        CheckpointError, match=r"configuration in .* names the weights adapter_model.bin. Expected \*.safet"
    ):
        fuse_entries([spec])
    assert not (tmp_path / "pwned").exists()


def test_a_pickled_adapter_beside_other_safetensors_is_refused(save, tmp_path):
    adapter = save_adapter(tiny(), tmp_path / "lora", use_dora=True)
    (adapter / "adapter_model.safetensors").rename(adapter / "other.safetensors")
    torch.save({"x": Payload(tmp_path / "pwned")}, adapter / "adapter_model.bin")
    spec = entry("a", save("base"), adapter, separate=True)
    with pytest.raises(CheckpointError, match=r"specialist 'a': .*lora has only pickled weights \(adapter_model.bin\)"):
        fuse_entries([spec])
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{}", '{"weight_map": null}', '{"weight_map": ["a.safetensors"]}', '{"weig']
)
def test_a_broken_index_is_one_line(save, tmp_path, text):
    spec, folder = entry("a", save("a"), files=None), tmp_path / "a"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(
        CheckpointError, match=r"specialist 'a': .*index.json: no index of weights \(.*\). Expected JSON"
    ):
        fuse_entries([spec])


def test_an_index_that_names_a_file_elsewhere_is_refused(save, tmp_path):
    spec, folder = entry("a", save("a"), files=None), tmp_path / "a"
    shutil.move(folder / "model.safetensors", folder.parent / "x.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index.json: names ../x.safetensors, which is outside of its folder"):
        fuse_entries([spec])


# ---------------------------------------------------------------- copies


def clutter(folder: Path) -> None:
    """What repositories hold beside the model."""
    (folder / "original").mkdir()
    for name in ("original/consolidated.00.pth", "consolidated.safetensors", "pytorch_model.bin", "model.onnx",
                 "notes.txt", "training_args.bin", "modeling_odd.py", "README.md", "original/params.json"):  # fmt: skip
        (folder / name).write_bytes(b"x" * 1000)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_a_copy_takes_only_the_files_of_the_model(tmp_path, tokenizer, max_shard_size):
    folder = tmp_path / "big"
    tiny().save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    model_only = listing(folder)
    assert len(model_only) > 4 and (INDEX_FILE in model_only) == (max_shard_size == "20KB")
    clutter(folder)
    model = fuse_entries([entry("a", folder)])
    model.save_pretrained(tmp_path / "fused", copy=True)
    assert listing(tmp_path / "fused" / "specialists" / "a") == model_only
    shutil.rmtree(folder)
    assert torch.equal(logits(load(tmp_path / "fused")), logits(model))
    assert describe(tmp_path / "fused", verify=True)["verified"]


def test_a_copied_adapter_brings_its_tokenizer_and_template(save, tmp_path, tokenizer):
    adapter = save_adapter(tiny(), tmp_path / "lora")
    tokenizer.save_pretrained(adapter)
    (adapter / "checkpoint-10").mkdir()
    (adapter / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    (adapter / "README.md").unlink(missing_ok=True)
    expected = listing(adapter) - {"checkpoint-10/optimizer.pt"}
    fuse_entries([entry("a", save("base"), adapter)]).save_pretrained(tmp_path / "fused", copy=True)
    assert listing(tmp_path / "fused" / "specialists" / "a") == expected
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= expected


def test_weights_recorded_beside_the_model_do_not_break_its_copy(save, tmp_path):
    """Earlier versions recorded every safetensors file of the folder."""
    folder = save("a")
    spec = entry("a", folder)
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    spec["files"]["model"]["consolidated.safetensors"] = spec["files"]["model"]["model.safetensors"]
    model = fuse_entries([spec])
    model.save_pretrained(tmp_path / "fused", copy=True)
    assert torch.equal(logits(load(tmp_path / "fused")), logits(model))


# ---------------------------------------------------------------- references and links that lead out


@pytest.fixture
def inside(full, tmp_path) -> Path:
    """A checkpoint with one specialist inside."""
    change(full).save_pretrained(tmp_path / "out" / "fused")
    return tmp_path / "out" / "fused"


@pytest.fixture
def private(tmp_path) -> Path:
    file = tmp_path / "private.txt"
    file.write_text("a password")
    return file


@pytest.mark.parametrize("reference", ["l/../../../hooks", "../hooks", "specialists/../../hooks", "l"])
def test_a_reference_that_leads_out_is_refused(inside, tmp_path, reference):
    """`l/../../../hooks`: by the text it lies outside, through the link it lies inside, or the other way round."""
    for hooks in (inside.parent / "hooks", inside / "hooks", tmp_path / "hooks"):
        shutil.copytree(inside / "specialists" / "text", hooks)
    (inside / "l").symlink_to(inside / "specialists" / "text" if ".." in reference else tmp_path / "hooks")
    model, initial = load_before(inside), listing(tmp_path)
    edit_manifest(inside, 0, model=reference)
    for read in (load, partial(describe, verify=True)):
        with pytest.raises(CheckpointError, match="leads out of"):
            read(inside)
    model.config.specialists[0]["source"]["model"] = reference  # the folder changed after it was read
    for target in (tmp_path / "new" / "fused", inside):
        with pytest.raises(CheckpointError, match=f"specialist 'text': its source {reference} leads out of"):
            model.save_pretrained(target)
    assert listing(tmp_path) == initial, "nothing was written anywhere"


def load_before(folder: Path):
    """The checkpoint, loaded before a link was there."""
    links = [(link, os.readlink(link)) for link in folder.rglob("*") if link.is_symlink()]
    for link, _ in links:
        link.unlink()
    model = load(folder)
    for link, target in links:
        link.symlink_to(target)
    return model


@pytest.mark.parametrize("name", ["notes.model", "tokenizer.json", "additional_chat_templates", "config.json"])
def test_a_private_file_behind_a_link_is_not_read_or_copied(inside, private, tmp_path, name):
    specialist = inside / "specialists" / "text"
    model = load(inside)
    (specialist / name).unlink(missing_ok=True)
    if name == "additional_chat_templates":
        (private.parent / "templates").mkdir()
        private.rename(private.parent / "templates" / "x.jinja")
        (specialist / name).symlink_to(private.parent / "templates")
    else:
        (specialist / name).symlink_to(private)
    for read in (load, describe):
        with pytest.raises(
            CheckpointError, match=rf"text/{name} is a link that leads out of .*fused.* Replace it by the file"
        ):
            read(inside)
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_link_out_of_a_specialists_folder_is_not_copied(save, private, tmp_path):
    folder = save("a")
    (folder / "tokenizer.model").symlink_to(private)
    model = fuse_entries([entry("a", folder)])  # a reference to the user's own folder is fine
    model.save_pretrained(tmp_path / "reference")
    assert torch.equal(logits(load(tmp_path / "reference")), logits(model))
    with pytest.raises(CheckpointError, match=r"tokenizer.model is a link that leads out of .*/a,"):
        model.save_pretrained(tmp_path / "copy", copy=True)
    assert not (tmp_path / "copy").exists()


def test_links_within_a_checkpoint_are_fine(inside, tmp_path):
    specialist = inside / "specialists" / "text"
    (specialist / "model.safetensors").rename(inside / "weights.safetensors")
    (specialist / "model.safetensors").symlink_to("../../weights.safetensors")
    model = load(inside)
    model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new" / "specialists" / "text" / "model.safetensors").is_symlink()
    shutil.rmtree(inside)
    assert torch.equal(logits(load(tmp_path / "new")), logits(model))


def as_snapshot(folder: Path, cache: Path) -> Path:
    """The folder as the hub's cache has it: links into a folder of blobs."""
    snapshot, blobs = cache / "models--acme--fused" / "snapshots" / ("c" * 40), cache / "models--acme--fused" / "blobs"
    blobs.mkdir(parents=True)
    for i, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / f"blob{i}")
        link.symlink_to(os.path.relpath(blobs / f"blob{i}", link.parent))
    return snapshot


def test_the_hubs_cache_of_links_is_fine(inside, tmp_path):
    snapshot, expected = as_snapshot(inside, tmp_path / "cache"), logits(load(inside))
    shutil.rmtree(inside)
    model = load(snapshot)
    assert torch.equal(logits(model), expected) and describe(snapshot, verify=True)["verified"]
    model.save_pretrained(tmp_path / "new")
    shutil.rmtree(tmp_path / "cache")
    assert torch.equal(logits(load(tmp_path / "new")), expected)


@pytest.mark.parametrize("trick", ["linked blobs", "another repository"])
def test_a_folder_that_looks_like_the_hubs_cache_is_no_way_out(inside, private, tmp_path, trick):
    snapshot = as_snapshot(inside, tmp_path / "cache")
    blobs = snapshot.parent.parent / "blobs"
    if trick == "linked blobs":
        shutil.copytree(blobs, tmp_path / "elsewhere")
        shutil.rmtree(blobs)
        blobs.symlink_to(tmp_path / "elsewhere")
    else:
        other = tmp_path / "cache" / "models--other--private" / "blobs" / "blob"
        other.parent.mkdir(parents=True)
        shutil.copy(private, other)
        (snapshot / "specialists" / "text" / "notes.model").symlink_to(other)
    with pytest.raises(CheckpointError, match="is a link that leads out of"):
        load(snapshot)


def test_a_link_in_the_target_is_replaced_and_not_followed(full, tmp_path):
    """A folder that is written over may hold links in place of ours."""
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "text").mkdir(parents=True)
    (elsewhere / "text" / "precious").write_text("x")
    target = tmp_path / "fused"
    target.mkdir()
    (target / "specialists").symlink_to(elsewhere)
    (target / "bases").symlink_to(elsewhere)
    change(full).save_pretrained(target)
    assert listing(elsewhere) == {"text/precious"}
    assert not (target / "specialists").is_symlink() and not (target / "bases").exists()
    assert torch.equal(logits(load(target)), logits(full))


@pytest.mark.parametrize("name", ["../../../hooks", "/tmp/x", "a/b", ".."])
def test_a_chat_template_cannot_name_a_file_elsewhere(tmp_path, tokenizer, name):
    """Saving a tokenizer writes each of its named templates to a file."""
    folder = tmp_path / "a"
    tiny(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "x"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    recipe = load_recipe({"specialists": [{"name": "a", "model": str(folder)}], "device": "cpu"})
    with pytest.raises(
        CheckpointError, match=f"specialist 'a': the tokenizer in .* names a chat template '{name}'. Expected"
    ):
        fuse(recipe)


# ---------------------------------------------------------------- drafts of killed processes

KILLED = """
import os, sys
from ultrafuser.model.saving import atomic_directory
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse
from pathlib import Path
with atomic_directory(Path(sys.argv[1])) as draft, atomic_directory(draft) as inner:
    (inner / "weights").write_text("x")
    print(os.getpid(), flush=True)
    input()
"""


def test_the_drafts_of_a_killed_process_are_removed_by_the_next_save(tmp_path):
    target = tmp_path / "fu.sed"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    pid = int(process.stdout.readline())
    drafts = {f".fu.sed.{pid}.tmp", f"..fu.sed.{pid}.tmp.{pid}.tmp"}
    others = {f".{name}.{pid}.tmp" for name in ("fuxsed", "fu", "fu.sed.more")} | {".fu.sed.x.tmp", "fu.sed.1.tmp"}
    for name in others:
        (tmp_path / name).mkdir()
    with atomic_directory(target) as draft:
        (draft / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {"fu.sed"} | drafts | others, "its process runs"
    process.kill()
    process.communicate()
    with atomic_directory(target) as draft:
        (draft / "config.json").write_text("{}")
    assert {path.name for path in tmp_path.iterdir()} == {"fu.sed"} | others
