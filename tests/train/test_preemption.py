"""SIGTERM ends a run with a checkpoint, exit code 0 and the line that says how to go on."""

from __future__ import annotations

import os
import signal

import pytest
from typer.testing import CliRunner

from training_fixtures import GATE, JOINT, metrics, trained_weights
from ultrafuser.cli.main import app
from ultrafuser.errors import Preempted
from ultrafuser.recipe import dump_recipe
from ultrafuser.train import run as run_module
from ultrafuser.train.trainer import FusionTrainer


@pytest.fixture
def signals_at(monkeypatch):
    """Send SIGTERM to this process in the middle of a step of a stage, once for each time that the step is named."""

    def plan(stage: str, step: int, times: int = 1) -> None:
        training_step = FusionTrainer.training_step

        def step_with_signal(self, *args, **kwargs):
            if (self.stage, self.state.global_step) == (stage, step - 1):
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGTERM)
            return training_step(self, *args, **kwargs)

        monkeypatch.setattr(FusionTrainer, "training_step", step_with_signal)

    before = signal.getsignal(signal.SIGTERM)
    yield plan
    assert signal.getsignal(signal.SIGTERM) is before, "the handler of the caller is back"


@pytest.mark.parametrize("stage, step", [("gate", 2), ("joint", 1)])
def test_the_running_step_is_saved_and_the_resumed_run_equals_the_whole_one(
    tiny_run, tmp_path, signals_at, monkeypatch, stage, step
):
    options = {"data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}
    whole = tiny_run.train(tmp_path / "whole", [GATE, JOINT], **options)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_recipe(tiny_run.recipe(tmp_path / "stopped", [GATE, JOINT], **options)))
    signals_at(stage, step)
    result = CliRunner().invoke(app, ["train", str(recipe)])
    assert result.exit_code == 0, result.output
    steps = {"gate": 4, "joint": 3}[stage]
    assert (
        f"stopped by SIGTERM after step {step} of {steps}, which is saved. Continue with the same command and --resume"
        in result.output
    )
    folder = tmp_path / "stopped"
    assert not (folder / "fused").exists() and list(folder.glob(f"*-{stage}/checkpoint-{step}"))
    monkeypatch.undo()
    assert CliRunner().invoke(app, ["train", str(recipe), "--resume"]).exit_code == 0
    assert metrics(folder) == metrics(whole)
    for name, tensor in trained_weights(whole).items():
        assert tensor.equal(trained_weights(folder)[name]), name


def test_a_second_signal_ends_at_once(tiny_run, tmp_path, signals_at):
    signals_at("gate", 3, times=2)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM$"):
        tiny_run.train(tmp_path / "run")
    assert not list((tmp_path / "run").glob("*/checkpoint-*"))


def test_outside_of_the_steps_a_signal_ends_at_once(tiny_run, tmp_path, signals_at, monkeypatch):
    read = run_module.read_sources

    def read_and_signal(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return read(*args, **kwargs)

    monkeypatch.setattr(run_module, "read_sources", read_and_signal)
    with pytest.raises(Preempted, match=r"^stopped by SIGTERM$"):
        tiny_run.train(tmp_path / "run")
