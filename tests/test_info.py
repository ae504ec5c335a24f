"""`ultrafuser info`: what is in a checkpoint, where the rest is, and whether it is all still there."""

from __future__ import annotations

import json
import shutil

import pytest

from tiny_models import save_adapter
from training_fixtures import NAMES
from ultrafuser.errors import CheckpointError
from ultrafuser.info import describe
from ultrafuser.specialists import fuse


@pytest.fixture
def adapters(tiny_run, tmp_path):
    """A checkpoint of three adapters on a base that the test may destroy."""
    base = shutil.copytree(tiny_run.folder / "text", tmp_path / "base")
    specialists = [s | {"model": str(base)} for s in tiny_run.adapter_recipe(tmp_path, save_adapter)]
    model, _ = fuse(tiny_run.recipe("unused", specialists=specialists))
    model.save_pretrained(tmp_path / "fused")
    return tmp_path / "fused"


def test_references_and_sizes(adapters, tmp_path):
    facts = describe(adapters)
    json.dumps(facts)
    weights = (tmp_path / "base" / "model.safetensors").stat().st_size
    assert facts["folder"] == str(adapters) and facts["mixing"] == "probabilities" and facts["context"] == 192
    assert facts["gate_size_bytes"] == (adapters / "model.safetensors").stat().st_size
    assert facts["size_bytes"] == sum(f.stat().st_size for f in adapters.rglob("*") if f.is_file())
    loras = [specialist["adapter"]["size_bytes"] for specialist in facts["specialists"]]
    assert facts["referenced_size_bytes"] == weights + sum(loras), "the shared base counts once"
    for specialist, name in zip(facts["specialists"], NAMES, strict=True):
        assert specialist["name"] == name and specialist["architecture"] == "llama"
        assert specialist["shares_base_with"] == [mate for mate in NAMES if mate != name]
        assert specialist["model"] == {
            "source": str(tmp_path / "base"),
            "size_bytes": weights,
            "inside": False,
            "status": "here",
        }
        assert specialist["adapter"]["status"] == "here"
    assert not facts["verified"] and not facts["has_recipe"]


def test_copies_lie_inside(tiny_run, tmp_path):
    model, _ = fuse(tiny_run.recipe("unused"))
    model.save_pretrained(tmp_path / "fused", copy=True)
    facts = describe(tmp_path / "fused", verify=True)
    assert facts["referenced_size_bytes"] == 0 and facts["verified"]
    assert all(
        specialist["model"]["inside"] and specialist["shares_base_with"] == [] for specialist in facts["specialists"]
    )


def test_a_moved_folder_of_copies_is_still_whole(tiny_run, tmp_path):
    model, _ = fuse(tiny_run.recipe("unused"))
    model.save_pretrained(tmp_path / "fused", copy=True)
    (tmp_path / "fused").rename(tmp_path / "moved")
    assert describe(tmp_path / "moved", verify=True)["verified"]


def test_a_reference_that_is_gone_is_shown_and_refused_when_verified(adapters, tmp_path):
    shutil.rmtree(tmp_path / "base")
    facts = describe(adapters)
    for specialist in facts["specialists"]:
        assert specialist["model"]["status"] == "gone" and "is gone. Put it back" in specialist["model"]["problem"]
        assert specialist["adapter"]["status"] == "here"
    with pytest.raises(CheckpointError, match="specialist 'text': its source .*base is gone"):
        describe(adapters, verify=True)


def test_a_changed_file_is_refused_when_verified(adapters, tmp_path):
    weights = tmp_path / "code-lora" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    describe(adapters)
    with pytest.raises(
        CheckpointError, match="specialist 'code': the SHA-256 of .*code-lora.* is not the recorded one"
    ):
        describe(adapters, verify=True)


def test_a_changed_gate_is_refused_when_verified(adapters):
    gate = adapters / "model.safetensors"
    gate.write_bytes(gate.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="the gate: the SHA-256"):
        describe(adapters, verify=True)


@pytest.mark.parametrize("case", ["nothing", "empty", "plain"])
def test_what_is_no_fused_checkpoint(tmp_path, tiny_run, case):
    (tmp_path / "empty").mkdir()
    folder = {"nothing": tmp_path / "nothing", "empty": tmp_path / "empty", "plain": tiny_run.folder / "text"}[case]
    message = {
        "nothing": "no such folder",
        "empty": "no config.json",
        "plain": "model_type is 'llama', expected 'ultrafuser'",
    }
    with pytest.raises(CheckpointError, match=message[case]):
        describe(folder)
