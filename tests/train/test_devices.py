"""Placement: one device for a process's batches, and parts that were placed on several devices stay there."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from accelerate import PartialState
from test_stages import assert_close, fused_and_rows

from training_fixtures import GATE, JOINT, losses
from ultrafuser.errors import TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.train import run as run_module
from ultrafuser.train import stages
from ultrafuser.train.stages import StageRun, run_stage


def test_one_process_that_sees_two_gpus_trains_on_one(tiny_run, tmp_path, monkeypatch):
    """transformers would wrap the model in DataParallel, which fails in the first step."""
    arguments = stages.training_arguments

    def two_gpus(*args, **kwargs):
        made = arguments(*args, **kwargs)
        made._n_gpu = 2
        return made

    expected = losses(tiny_run.train(tmp_path / "one", [GATE, JOINT]))
    monkeypatch.setattr(stages, "training_arguments", two_gpus)
    assert_close(losses(tiny_run.train(tmp_path / "two", [GATE, JOINT])), expected)


def test_a_model_on_one_device_has_no_device_map(tiny_run, tmp_path):
    model, _, _ = fused_and_rows(tiny_run, tmp_path)
    assert not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_training_leaves_parts_on_their_devices(tiny_run, tmp_path, monkeypatch, cache):
    """The parts are in fact all on the CPU. What is tested is that nothing moves a model whose map names several devices."""
    model, rows, recipe = fused_and_rows(tiny_run, tmp_path, stages=[GATE, JOINT], cache_features=cache)
    for device, group in enumerate(model.groups):
        group.model.hf_device_map = {"model": device, "lm_head": device}
    assert model.hf_device_map == {f"groups.{g}.model.{part}": g for g in range(3) for part in ("model", "lm_head")}

    def refuse(self, *args, **kwargs):
        raise AssertionError(f"moved to {args} {kwargs}")

    monkeypatch.setattr(UltraFuserForCausalLM, "to", refuse)
    initial = model.gate.score.weight.clone()
    for stage in recipe.stages:
        run_stage(StageRun(model, stage, recipe, rows, [], tmp_path / stage.name))
    assert not torch.equal(model.gate.score.weight, initial)


def test_the_first_state_of_a_run_has_the_timeout_of_the_recipe(tiny_run, tmp_path, monkeypatch):
    """It starts the process group, on a CPU where the run is on one. Later ones change nothing."""
    states = []
    monkeypatch.setattr(run_module, "PartialState", lambda **options: states.append(options) or PartialState())
    tiny_run.train(tmp_path / "run", ddp_timeout=11)
    assert states[0] == {"cpu": True, "timeout": timedelta(seconds=11)} and not any(states[1:])


def test_joint_training_in_float16_is_refused(tiny_run, tmp_path):
    """Without loss scaling its gradients lose a tenth of a percent at one row and a third at 64,000 tokens."""
    with pytest.raises(TrainingError, match=r"specialists text: .* float16 .* Use dtype=bfloat16 or dtype=float32"):
        tiny_run.train(tmp_path / "run", [GATE, JOINT], dtype="float16")
    assert not (tmp_path / "run" / "1-gate").exists(), "refused before stage 1"
