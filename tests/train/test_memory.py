"""Gradient checkpointing: the same training in less memory, chosen where activations would not fit."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from activations import count_saved, make_group
from tiny_models import save_adapter
from training_fixtures import GATE, JOINT, RecordingProgress, losses
from ultrafuser.errors import TrainingError
from ultrafuser.train import memory
from ultrafuser.train.memory import activation_bytes

CUDA = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
)
LINE = "stage joint: gradient checkpointing is on"


@pytest.mark.parametrize("shared", [True, False], ids=["shared-base", "separate"])
def test_it_changes_no_loss(tiny_run, tmp_path, shared):
    specialists = {"specialists": tiny_run.adapter_recipe(tmp_path, save_adapter)} if shared else {}
    runs, kept = [], []

    def count(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for value in (False, True):
        kept.append(0)
        progress = RecordingProgress()
        stages = [GATE, JOINT | {"gradient_checkpointing": value}]
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            runs.append(losses(tiny_run.train(tmp_path / str(value), stages, progress=progress, **specialists)))
        assert (LINE in progress.news) == value
    for (*step, plain), (*same, again) in zip(*runs, strict=True):
        assert step == same and again == pytest.approx(plain, abs=1e-6)
    assert kept[1] < 0.6 * kept[0], "fewer numbers are kept for the backward pass"


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_offload_changes_no_loss_and_says_so(tiny_run, tmp_path, device):
    runs = []
    for value in (True, "offload"):
        progress = RecordingProgress()
        stages = [GATE, JOINT | {"gradient_checkpointing": value}]
        runs.append(losses(tiny_run.train(tmp_path / str(value), stages, progress=progress, device=device)))
    for (*step, loss), (*same, expected) in zip(*runs, strict=True):
        assert step == same
        assert loss == pytest.approx(expected, abs=1e-6)
    host = "" if device == "cpu" else ", with the inputs of the layers in the host's memory"
    assert LINE + host in progress.news


@pytest.mark.parametrize("free, chosen", [(1 << 40, False), (1 << 10, True)])
def test_auto_chooses_it_where_activations_would_fill_the_memory(tiny_run, tmp_path, monkeypatch, free, chosen):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    progress = RecordingProgress()
    tiny_run.train(tmp_path / "run", [JOINT], progress=progress)
    assert (LINE in progress.news) == chosen


def test_a_model_without_it_is_refused_where_it_is_asked_for_and_left_alone_otherwise(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1 << 10)
    with pytest.raises(
        TrainingError, match=r"specialists text: LlamaForCausalLM has no gradient .*gradient_checkpointing=false"
    ):
        tiny_run.train(tmp_path / "on", [JOINT | {"gradient_checkpointing": True}])
    progress = RecordingProgress()
    tiny_run.train(tmp_path / "auto", [JOINT], progress=progress)
    assert LINE not in progress.news


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(448, 2368), (512, 1792), (192, 1120)], ids=["qwen2.5-7b", "llama-3-8b", "qwen2.5-1.5b"]
)
def test_the_estimate_is_what_a_layer_keeps(shape, dtype):
    """Counted at 1/8 of the width of public models, where an adapter of rank 16 weighs more than in the models themselves."""
    one, two = (make_group((*shape, 8, 4), layers, dtype) for layers in (1, 2))
    assert memory.layer_bytes(one, 32) == pytest.approx(count_saved(two, 32) - count_saved(one, 32), rel=0.05)


def test_the_estimate_at_the_shape_of_qwen2_5_7b():
    """9.0 MB for each token and specialist in bfloat16. A row of 1,024 tokens is 0.5 GB with checkpointing."""

    class Config:
        num_hidden_layers, intermediate_size = 28, 18944

        def get_text_config(self):
            return self

    class Model:
        config, dtype = Config(), torch.bfloat16

    class Group:
        model, width, size = Model(), 3584, 1

    assert activation_bytes(Group(), 1) == pytest.approx(9.0e6, rel=0.01)
    assert 3 * activation_bytes(Group(), 1024, checkpointing=True) < 1.7e9
    inputs = 1024 * 28 * 3584 * 2
    offloaded = activation_bytes(Group(), 1024, checkpointing=True, offload=True)
    assert offloaded == activation_bytes(Group(), 1024, checkpointing=True) - inputs


def test_free_memory_of_this_machine_is_some():
    assert memory.free_bytes(torch.device("cpu")) > 1 << 20
