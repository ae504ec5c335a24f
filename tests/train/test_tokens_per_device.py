"""`tokens_per_device`: passes of a bounded number of tokens give the losses and the weights of any other split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_stages import assert_close, fused_and_rows

from ranks import launch
from training_fixtures import GATE, JOINT, Interruption, StopAt, TinyRun, losses, trained_weights
from ultrafuser.errors import RecipeError, TrainingError
from ultrafuser.recipe import dump_recipe, load_recipe
from ultrafuser.train.plan import plan
from ultrafuser.train.trainer import FusionTrainer

WIDE = {"samples_per_domain": 4}  # 12 rows of three domains
STAGES = {"gate": GATE | WIDE, "joint": JOINT | WIDE}
MAX_TOKENS = 130  # a few rows of about 30 to 70 tokens


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The rows and tokens of each pass of the runs of a test."""
    shapes: list[tuple[int, int]] = []
    compute = FusionTrainer.compute_loss

    def compute_loss(self: FusionTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        rows, _, longest = inputs["specialist_input_ids"].shape
        shapes.append((rows, rows * longest))
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(FusionTrainer, "compute_loss", compute_loss)
    return shapes


def assert_same(output: Path, reference: Path) -> None:
    assert_close(losses(output), losses(reference))
    weights = trained_weights(output)
    for name, tensor in trained_weights(reference).items():
        if "score.bias" not in name:  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("stage", STAGES)
def test_losses_and_weights_are_those_of_one_pass(tiny_run, tmp_path, stage, cache):
    fields = STAGES[stage] | {"rows_per_device": None}
    tiny_run.train(tmp_path / "rows", [fields], cache_features=cache)
    tiny_run.train(tmp_path / "tokens", [fields | {"tokens_per_device": MAX_TOKENS}], cache_features=cache)
    assert_same(tmp_path / "tokens", tmp_path / "rows")


def test_no_pass_is_larger_and_each_step_has_the_rows_of_the_sampler(tiny_run, tmp_path, passes):
    _, rows, _ = fused_and_rows(tiny_run, tmp_path)
    assert max(row.num_tokens for row in rows) < MAX_TOKENS
    tiny_run.train(tmp_path / "run", [STAGES["joint"] | {"tokens_per_device": MAX_TOKENS}])
    assert all(tokens <= MAX_TOKENS for _, tokens in passes)
    assert sum(size for size, _ in passes) == 3 * 12, "three steps"
    assert 3 * 2 < len(passes) < 3 * 12


def test_fewer_passes_than_by_rows_of_the_same_largest_pass(tiny_run, tmp_path, passes):
    tiny_run.train(tmp_path / "rows", [STAGES["joint"] | {"rows_per_device": 2}])
    by_rows = passes.copy()
    passes.clear()
    largest = max(tokens for _, tokens in by_rows)
    tiny_run.train(tmp_path / "tokens", [STAGES["joint"] | {"tokens_per_device": largest}])
    assert max(tokens for _, tokens in passes) <= largest
    assert len(passes) < len(by_rows)


def test_a_longer_row_has_a_pass_of_its_own(tiny_run, tmp_path, passes):
    tiny_run.train(tmp_path / "run", [STAGES["joint"] | {"tokens_per_device": 1}])
    assert {size for size, _ in passes} == {1} and len(passes) == 3 * 12


def test_a_run_resumes_in_mid_epoch(tiny_run, tmp_path):
    stages = [STAGES["joint"] | {"tokens_per_device": MAX_TOKENS, "lora": JOINT["lora"] | {"dropout": 0.3}}]
    tiny_run.train(tmp_path / "whole", stages, save_every=1)
    with pytest.raises(Interruption):
        tiny_run.train(tmp_path / "run", stages, progress=StopAt("joint", 2), save_every=1)
    tiny_run.train(tmp_path / "run", stages, resume=True, save_every=1)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    weights = trained_weights(tmp_path / "run")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in trained_weights(tmp_path / "whole").items())


MESHES = {"two": (2, {}), "shared": (4, {"parallel": {"specialist": 2}})}


@pytest.fixture(scope="module")
def folders(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, of two, and of four that share the specialists by two."""
    folder = tmp_path_factory.mktemp("tokens")
    stages = [{**stage, "tokens_per_device": MAX_TOKENS} for stage in STAGES.values()]
    tiny_run.train(folder / "one", list(STAGES.values()))
    for mesh, (processes, fields) in MESHES.items():
        (folder / f"{mesh}.yaml").write_text(dump_recipe(tiny_run.recipe(folder / mesh, stages, **fields)))
        process = launch(folder, processes, folder / f"{mesh}.yaml")
        assert process.returncode == 0, process.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mesh", MESHES)
def test_several_processes_give_the_losses_of_one(folders, mesh):
    assert_close(losses(folders / mesh), losses(folders / "one"))


# ---------------------------------------------------------------- the recipe and the plan


def test_the_two_bounds_exclude_each_other(tiny_run):
    both = JOINT | {"tokens_per_device": 4096, "rows_per_device": 2}
    with pytest.raises(RecipeError, match="got both 'rows_per_device' and 'tokens_per_device', expected one of them"):
        tiny_run.recipe("unused", [both])
    recipe = tiny_run.recipe("unused", [JOINT | {"tokens_per_device": 4096}])
    assert recipe.stages[0].rows_per_device is None
    assert tiny_run.recipe("unused", [both | {"rows_per_device": None}]) == recipe


def test_the_recipe_is_read_back(tiny_run, tmp_path):
    recipe = tiny_run.recipe("unused", [JOINT | {"tokens_per_device": 4096}])
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize("tokens, planned", [(1, 128), (128, 128), (300, 300), (12 * 128, 12 * 128), (9999, 12 * 128)])
def test_the_plan_counts_the_tokens_of_a_pass(tiny_run, tokens, planned):
    """A row of 128 tokens at least, the twelve rows of a step at most."""
    bounded = tiny_run.recipe("unused", [STAGES["joint"] | {"tokens_per_device": tokens}])
    one_row = tiny_run.recipe("unused", [STAGES["joint"] | {"rows_per_device": 1}])
    of_pass, of_row = (plan(recipe, memory=1 << 50).stages[0].memory["activations"] for recipe in (bounded, one_row))
    assert of_pass * 128 == of_row * planned


def test_what_does_not_fit_is_proposed_with_fewer_tokens(tiny_run):
    stage = STAGES["joint"] | {"tokens_per_device": 1024, "gradient_checkpointing": False}
    less = plan(tiny_run.recipe("unused", [stage | {"tokens_per_device": 256}]), memory=1 << 50).stages[0].total
    on = plan(tiny_run.recipe("unused", [stage | {"gradient_checkpointing": True}]), memory=1 << 50).stages[0].total
    proposals = plan(tiny_run.recipe("unused", [stage]), memory=min(less, on) - 1).proposals["joint"]
    assert proposals[0] == "stages.joint.gradient_checkpointing=true"
    assert proposals[1].startswith("stages.joint.tokens_per_device=")


def test_memory_that_runs_out_is_named_in_tokens(tiny_run, tmp_path, monkeypatch):
    def compute_loss(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(FusionTrainer, "compute_loss", compute_loss)
    with pytest.raises(
        TrainingError, match=r"memory for 130 tokens in a forward .*Lower stages.gate.tokens_per_device"
    ):
        tiny_run.train(tmp_path / "run", [GATE | {"tokens_per_device": MAX_TOKENS}])
