"""Optimizers of the joint stage beside AdamW."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers.optimization import Adafactor

from training_fixtures import GATE, JOINT, Interruption, StopAt, TinyRun, losses
from ultrafuser.errors import RecipeError, TrainingError
from ultrafuser.recipe import load_recipe
from ultrafuser.train import checks, trainer

FULL = {"name": "joint", "steps": 3, "samples_per_domain": 2, "specialists": "full", "lr": 0.005}
INSTALLED = importlib.util.find_spec("bitsandbytes") is not None


def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """The optimizers that trainings make from now on."""
    made: list[torch.optim.Optimizer] = []
    create = trainer.FusionTrainer.create_optimizer
    monkeypatch.setattr(
        trainer.FusionTrainer, "create_optimizer", lambda self, model=None: made.append(create(self, model)) or made[-1]
    )
    return made


def test_adamw_is_torchs_own_with_its_own_rates(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = optimizers(monkeypatch)
    tiny_run.train(tmp_path / "run", [JOINT | {"specialist_lr": 0.001, "weight_decay": 0.1, "schedule": "constant"}])
    (optimizer,) = set(made)
    assert type(optimizer) is torch.optim.AdamW
    assert [group["lr"] for group in optimizer.param_groups] == [JOINT["lr"], 0.001]
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


@pytest.mark.parametrize("stage", [JOINT, FULL], ids=["lora", "full"])
def test_adafactor_trains_and_resumes(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: dict
) -> None:
    made = optimizers(monkeypatch)
    stages, changes = [GATE, stage | {"optim": "adafactor"}], {"save_every": 1, "keep_best": False}
    whole = losses(tiny_run.train(tmp_path / "whole", stages, **changes))
    assert type(made[-1]) is Adafactor
    assert whole != losses(tiny_run.train(tmp_path / "adamw", [GATE, stage]))
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", stages, progress=StopAt("joint", 3), **changes)
    assert losses(tiny_run.train(tmp_path / "run", stages, resume=True, **changes)) == whole


def test_a_missing_package_is_named_before_anything_is_loaded(
    tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(
        TrainingError,
        match="stages.joint.optim=adamw_8bit needs 'bitsandbytes', which is not .*pip install bitsandbytes",
    ):
        tiny_run.train(tmp_path / "run", [GATE, JOINT | {"optim": "adamw_8bit"}])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_bitsandbytes_trains_and_resumes(tiny_run: TinyRun, tmp_path: Path, optim: str) -> None:
    stages, changes = [GATE, FULL | {"optim": optim}], {"save_every": 1, "keep_best": False}
    whole = losses(tiny_run.train(tmp_path / "whole", stages, **changes))
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", stages, progress=StopAt("joint", 3), **changes)
    resumed = losses(tiny_run.train(tmp_path / "run", stages, resume=True, **changes))
    for (*_, loss), (*_, expected) in zip(resumed, whole, strict=True):
        assert loss == pytest.approx(expected, abs=1e-4)


def test_divided_weights_take_adamw_alone(tiny_run: TinyRun, tmp_path: Path) -> None:
    fields = tiny_run.fields(tmp_path, [GATE, FULL | {"optim": "adafactor"}], parallel={"shard": True})
    with pytest.raises(
        RecipeError, match=r"parallel.shard divides the states of 'adamw_torch' alone. Leave 'optim' out"
    ):
        load_recipe(fields)
