"""`rows_per_device: auto`: as many rows as fit, alike on all ranks and after an interruption, and no other result."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import assert_close, fused_and_rows

from ranks import launch
from training_fixtures import GATE, JOINT, NAMES, Interruption, RecordingProgress, StopAt, TinyRun, losses
from ultrafuser.errors import RecipeError, TrainingError
from ultrafuser.recipe import Recipe, dump_recipe, load_recipe
from ultrafuser.specialists import outline
from ultrafuser.train.plan import GIB, StagePlan, fit_rows, plan
from ultrafuser.train.stages import ROWS
from ultrafuser.train.trainer import FusionTrainer

AUTO = {"rows_per_device": "auto"}
PLAIN = JOINT | {"samples_per_domain": 4, "gradient_checkpointing": False}  # 12 rows of three domains
QWEN_7B = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128, "dtype": "bfloat16",
}  # fmt: skip


def planned_stage(recipe: Recipe, **options: Any) -> StagePlan:
    return plan(recipe, **({"memory": 1 << 50, "kind": "cpu"} | options)).stages[-1]


def memory_of(recipe: Recipe, rows: int, **options: Any) -> int:
    """The least memory of a device that rows of this number fit: the plan fills four fifths of it."""
    (stage,) = recipe.stages
    fixed = recipe.model_copy(update={"stages": [stage.model_copy(update={"rows_per_device": rows})]})
    return math.ceil(planned_stage(fixed, **options).total / 0.8)


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize("stage", [PLAIN, GATE | {"samples_per_domain": 4}], ids=["joint", "gate"])
@pytest.mark.parametrize("rows, fewer", [(12, 6), (6, 4), (4, 3), (3, 2), (2, 1), (1, 1)])
def test_the_largest_divisor_of_the_batch_that_fits(tiny_run, stage, rows, fewer):
    recipe = tiny_run.recipe("unused", [stage | AUTO])
    limit = memory_of(recipe, rows)
    assert planned_stage(recipe, memory=limit).rows_per_device == rows
    assert planned_stage(recipe, memory=limit - 2).rows_per_device == fewer


@pytest.mark.parametrize("rows, fewer", [(6, 3), (3, 2), (2, 1)])
def test_two_processes_read_half_of_the_batch_each(tiny_run, rows, fewer):
    recipe = tiny_run.recipe("unused", [PLAIN | AUTO])
    limit = memory_of(recipe, rows, processes=2)
    assert planned_stage(recipe, memory=limit, processes=2).rows_per_device == rows
    assert planned_stage(recipe, memory=limit - 2, processes=2).rows_per_device == fewer
    assert planned_stage(recipe, memory=1 << 50, processes=2).rows_per_device == 6


@pytest.mark.parametrize(
    "gib, processes, rows",
    [(40, 1, 1), (62, 1, 2), (80, 1, 12), (140, 1, 32), (64, 8, 3), (140, 8, 12)],
)
def test_rows_of_three_7b_models(tiny_run, tmp_path, gib, processes, rows):
    """Rows of 1,024 tokens with checkpointing, 96 in a batch: 49.3 GB and 1.6 GB for each, in 0.8 of the memory."""
    recipe = seven_billion(tiny_run, tmp_path, gradient_checkpointing=True)
    assert planned_stage(recipe, memory=gib * GIB, processes=processes, kind="cuda").rows_per_device == rows


def seven_billion(tiny_run: TinyRun, tmp_path: Path, **fields: Any) -> Recipe:
    """Three specialists of Qwen2.5-7B's shape without weights, and a joint stage on 96 rows."""
    specialists = []
    for name in NAMES:
        folder = tmp_path / f"7b-{name}"
        shutil.copytree(tiny_run.folder / "text", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((folder / "config.json").read_text()) | QWEN_7B
        (folder / "config.json").write_text(json.dumps(config))
        specialists.append({"name": name, "model": str(folder)})
    stage = {"name": "joint", "samples_per_domain": 32} | AUTO | fields
    return load_recipe(tiny_run.fields("unused", [stage], specialists=specialists, data={"max_length": 1024}))


def test_fewer_rows_come_before_checkpointing(tiny_run, tmp_path):
    """`auto` of both: a row keeps 27.7 GB without checkpointing, and half of what 46.2 GB of weights leave may be so used."""
    recipe = seven_billion(tiny_run, tmp_path)
    choices = [planned_stage(recipe, memory=gib * GIB, kind="cuda") for gib in (140, 80)]
    assert [(choice.rows_per_device, choice.checkpointing) for choice in choices] == [(1, False), (12, True)]


def test_the_shorter_rows_of_a_run_count(tiny_run):
    recipe = tiny_run.recipe("unused", [PLAIN | AUTO])
    options: dict = {"memory": memory_of(recipe, 3), "processes": 1, "num_domains": 3}
    rows = [fit_rows(outline(recipe), recipe, recipe.stages[0], length=length, **options) for length in (128, 32)]
    assert rows == [3, 12]


def test_quantised_weights_need_a_number(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr("ultrafuser.train.plan.is_quantized", lambda model: True)
    with pytest.raises(
        TrainingError, match=r"rows_per_device is auto, but the weights of text, code, math are .*rows_per_device=1"
    ):
        tiny_run.train(tmp_path, [PLAIN | AUTO])


def test_another_word_than_auto_is_refused(tiny_run):
    with pytest.raises(RecipeError, match=r"rows_per_device.*got 'many'"):
        tiny_run.recipe("unused", [PLAIN | {"rows_per_device": "many"}])


# ---------------------------------------------------------------- the run


@pytest.fixture
def three_rows(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the device have memory for three rows in a pass of the stage `PLAIN`."""
    _, rows, _ = fused_and_rows(tiny_run, tmp_path)
    data = {"max_length": max(row.num_tokens for row in rows)}
    limit = memory_of(tiny_run.recipe("unused", [PLAIN], data=data), 3)
    monkeypatch.setattr("ultrafuser.train.stages.device_bytes", lambda model: limit)


def chosen(progress: RecordingProgress) -> list[str]:
    return [line.partition(" (")[0] for line in progress.news if "in a forward pass" in line]


@pytest.mark.usefixtures("three_rows")
def test_the_losses_are_those_of_the_number(tiny_run, tmp_path):
    progress = RecordingProgress()
    tiny_run.train(tmp_path / "auto", [GATE | AUTO, PLAIN | AUTO], progress=progress)
    tiny_run.train(tmp_path / "fixed", [GATE | {"rows_per_device": 1}, PLAIN | {"rows_per_device": 3}])
    assert chosen(progress) == ["stage gate: 1 row in a forward pass", "stage joint: 3 rows in a forward pass"]
    assert losses(tmp_path / "auto") == losses(tmp_path / "fixed")
    assert_close(losses(tmp_path / "auto"), losses(tiny_run.train(tmp_path / "eight", [GATE, PLAIN])))


@pytest.mark.usefixtures("three_rows")
def test_a_resumed_run_keeps_the_number(tiny_run, tmp_path, monkeypatch):
    stages, options = [PLAIN | AUTO], {"save_every": 1}
    tiny_run.train(tmp_path / "whole", stages, **options)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", stages, progress=StopAt("joint", 3), **options)
    monkeypatch.setattr("ultrafuser.train.stages.device_bytes", lambda model: 1 << 50)
    progress = RecordingProgress()
    tiny_run.train(tmp_path / "run", stages, resume=True, progress=progress, **options)
    assert "stage joint: 3 rows in a forward pass (as before)" in progress.news
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_all_ranks_take_the_number_of_the_smallest_device(tiny_run, tmp_path):
    recipe = tiny_run.recipe(tmp_path / "two", [PLAIN | AUTO])
    _, rows, _ = fused_and_rows(tiny_run, tmp_path)
    same = tiny_run.recipe("unused", [PLAIN | AUTO], data={"max_length": max(row.num_tokens for row in rows)})
    limits = [1 << 50, memory_of(same, 2, processes=2)]
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(recipe))
    prelude = f"""
from ultrafuser.train import stages
stages.device_bytes = lambda model: {limits}[int(os.environ["RANK"])]
"""
    process = launch(tmp_path, 2, file, prelude=prelude)
    assert process.returncode == 0, process.stderr[-3000:]
    assert "stage joint: 2 rows in a forward pass" in process.stderr
    assert json.loads((tmp_path / "two" / "1-joint" / ROWS).read_text()) == 2
    assert_close(losses(tmp_path / "two"), losses(tiny_run.train(tmp_path / "one", [PLAIN])))


# ---------------------------------------------------------------- memory that runs out anyway


def fail_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let a step of every training run out of memory, as a GPU would."""
    compute = FusionTrainer.compute_loss

    def compute_loss(self: FusionTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has more to say")
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", compute_loss)


def test_fewer_rows_are_proposed_and_the_run_goes_on_with_them(tiny_run, tmp_path, monkeypatch):
    fail_at(monkeypatch, 2)
    with pytest.raises(
        TrainingError,
        match=r"stage joint: the device has too little memory for 8 rows in a forward pass\. Lower "
        r"stages.joint.rows_per_device, which changes no result, and continue with --resume \(CUDA out of memory\. "
        r"Tried to allocate 2\.00 GiB\)$",
    ):
        tiny_run.train(tmp_path / "run", [PLAIN], save_every=1)
    monkeypatch.undo()
    tiny_run.train(tmp_path / "run", [PLAIN | {"rows_per_device": 2}], resume=True, save_every=1)
    assert_close(losses(tmp_path / "run"), losses(tiny_run.train(tmp_path / "whole", [PLAIN])))


def test_where_one_row_is_too_much_other_ways_are_named(tiny_run, tmp_path, monkeypatch):
    fail_at(monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"memory for 1 row in a forward pass\. `ultrafuser plan RECIPE` names"):
        tiny_run.train(tmp_path / "run", [PLAIN | {"rows_per_device": 1}])
    with pytest.raises(TrainingError, match=r"memory for all rows in a forward pass\. Lower"):
        tiny_run.train(tmp_path / "all", [PLAIN | {"rows_per_device": None}])
