"""A run whose model cannot be written whole: the gate and all that can be written are saved, and --resume does the rest."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ultrafuser
from tiny_models import save_adapter, tiny, tokens
from training_fixtures import GATE, JOINT, trained_weights
from ultrafuser.errors import DiskError, TrainingError
from ultrafuser.model import saving
from ultrafuser.train import run
from ultrafuser.train.stages import run_stage

FULL = {key: value for key, value in JOINT.items() if key != "lora"} | {"specialists": "full", "lr": 1e-3}


def gate_of(folder):
    return load_file(folder / "model.safetensors")


def assert_trained_gate(folder, output):
    gate = gate_of(folder)
    finished = {k: v for k, v in trained_weights(output).items() if "/gate." in k}
    stage = max(key.split("/")[0] for key in finished)
    assert gate and all(torch.equal(tensor, finished[f"{stage}/{name}"]) for name, tensor in gate.items())


def test_a_run_over_a_shared_base_with_nan_in_rows_that_no_token_uses(tiny_run, tmp_path):
    rows = len(tiny_run.tokenizer) + 4
    options = {"vocab_size": rows, "max_position_embeddings": 192, "tie_word_embeddings": False}
    base = tiny(seed=0, **options)
    with torch.no_grad():
        for layer in (base.get_input_embeddings(), base.get_output_embeddings()):
            layer.weight[-4:] = float("nan")
    base.save_pretrained(tmp_path / "base")
    tiny_run.tokenizer.save_pretrained(tmp_path / "base")
    clean = tiny(seed=0, **options)
    specialists = [
        {"name": name, "model": str(tmp_path / "base"),
         "adapter": str(save_adapter(clean, tmp_path / f"{name}-lora", seed)), "chat_template": "chatml"}
        for seed, name in enumerate(("text", "code", "math"))
    ]  # fmt: skip
    output = tiny_run.train(tmp_path / "run", [GATE, JOINT], specialists=specialists)
    model, _ = ultrafuser.load(output / "fused", device_map="cpu")
    assert [spec["source"]["model"] for spec in model.config.specialists] == [str(tmp_path / "base")] * 3
    assert_trained_gate(output / "fused", output)
    assert model(tokens(1, 5)).logits.isfinite().all()


def change_the_base(monkeypatch):
    """Something writes to the shared base during the run, as a wrapper of the model may do."""

    def stage(stage_run):
        run_stage(stage_run)
        if stage_run.stage.name == "joint":
            stage_run.model.groups[0].model.get_input_embeddings().weight.data[5] += 1

    monkeypatch.setattr(run, "run_stage", stage)


def test_a_changed_shared_base_leaves_the_gate_and_the_adapters(tiny_run, tmp_path, monkeypatch):
    specialists = tiny_run.adapter_recipe(tmp_path, save_adapter)
    change_the_base(monkeypatch)
    with pytest.raises(TrainingError) as caught:
        tiny_run.train(tmp_path / "run", [GATE, JOINT], specialists=specialists)
    message = str(caught.value)
    partial = tmp_path / "run" / "fused-partial"
    assert f"{partial} holds the trained gate and model without the changed base of text, code, math." in message
    assert "--resume" in message and f"{tmp_path}/run/2-joint/finished.safetensors" in message
    assert_trained_gate(partial, tmp_path / "run")
    model, _ = ultrafuser.load(partial, device_map="cpu")
    plain = AutoModelForCausalLM.from_pretrained(tiny_run.folder / "text")
    assert torch.equal(model.groups[0].model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    monkeypatch.undo()
    tiny_run.train(tmp_path / "run", [GATE, JOINT], specialists=specialists, resume=True)
    whole, _ = ultrafuser.load(tmp_path / "run" / "fused", device_map="cpu")
    ids = tokens(2, 6)
    assert torch.equal(whole(ids).logits, model(ids).logits), "the adapters were saved too"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), RuntimeError("tensors share memory"),
                                   NotImplementedError("this quantization cannot be serialized"),
                                   TypeError("not JSON serializable")])  # fmt: skip
def test_a_specialist_that_cannot_be_written_is_left_out(tiny_run, tmp_path, monkeypatch, fault):
    plain_save = type(tiny()).save_pretrained

    def save(self, folder, *args, **kwargs):
        if str(folder).endswith("code"):
            raise fault
        plain_save(self, folder, *args, **kwargs)

    monkeypatch.setattr(type(tiny()), "save_pretrained", save)
    kind = DiskError if isinstance(fault, OSError) else TrainingError
    with pytest.raises(
        kind, match=r"fused: could not be written: .*holds the trained gate and model without the changes of code\."
    ):
        tiny_run.train(tmp_path / "run", [GATE, FULL])
    partial = tmp_path / "run" / "fused-partial"
    assert_trained_gate(partial, tmp_path / "run")
    model, _ = ultrafuser.load(partial, device_map="cpu")
    sources = {spec["name"]: spec["source"]["model"] for spec in model.config.specialists}
    assert sources == {"text": "specialists/text", "code": str(tiny_run.folder / "code"), "math": "specialists/math"}
    monkeypatch.undo()
    tiny_run.train(tmp_path / "run", [GATE, FULL], resume=True)
    whole, _ = ultrafuser.load(tmp_path / "run" / "fused", device_map="cpu")
    assert torch.equal(whole.groups[2].model.lm_head.weight, model.groups[2].model.lm_head.weight)
    assert not torch.equal(whole.groups[1].model.lm_head.weight, model.groups[1].model.lm_head.weight)


def test_a_base_that_is_gone_when_the_run_ends(tiny_run, tmp_path, monkeypatch):
    """The gate is saved with its references, so that it works when the folder is back."""
    shutil.copytree(tiny_run.folder / "text", tmp_path / "base")
    specialists = [{"name": "text", "model": str(tmp_path / "base")}, {"name": "code", "model": str(tiny_run.folder / "code"), "chat_template": "plain"}]  # fmt: skip

    def stage(stage_run):
        run_stage(stage_run)
        (tmp_path / "base").rename(tmp_path / "elsewhere")

    monkeypatch.setattr(run, "run_stage", stage)
    with pytest.raises(TrainingError, match=r"source .*base is gone.*fused-partial holds the trained gate"):
        tiny_run.train(tmp_path / "run", specialists=specialists)
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    assert_trained_gate(tmp_path / "run" / "fused-partial", tmp_path / "run")
    ultrafuser.load(tmp_path / "run" / "fused-partial", device_map="cpu")


def test_a_full_disk_names_the_trained_weights(tiny_run, tmp_path, monkeypatch):
    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "save_file", full_disk)
    with pytest.raises(DiskError, match=r"the disk is full.*1-gate/finished.safetensors.*--resume") as caught:
        tiny_run.train(tmp_path / "run")
    assert "fused-partial" not in str(caught.value)
    monkeypatch.undo()
    tiny_run.train(tmp_path / "run", resume=True)
    assert_trained_gate(tmp_path / "run" / "fused", tmp_path / "run")
