"""Two processes give the losses and the weights of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ranks import launch
from training_fixtures import GATE, JOINT, NAMES, TinyRun, losses, trained_weights
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.recipe import Recipe, dump_recipe, load_recipe
from ultrafuser.specialists import fuse

ROOT = Path(__file__).parents[2]

CASES = {
    "cached-lora": ({"cache_features": True}, [GATE, JOINT | {"kl_coef": 500}]),
    "uncached-full": (
        {"cache_features": False, "mixing": "logits"},
        [GATE | {"rows_per_device": 1}, {"name": "joint", "steps": 2, "samples_per_domain": 2, "specialists": "full"}],
    ),
}


# Shipped recipes with their settings, but tiny models of the same architectures, few rows and few steps.
RECIPES = {"paper": ("llama", []), "qwen2.5-7b": ("qwen2", ["parallel.specialist=2"])}
TINY = [
    "stages.gate.steps=2",
    "stages.gate.samples_per_domain=2",
    "stages.joint.steps=2",
    "stages.joint.samples_per_domain=2",
]


def miniature(name: str, tiny_run: TinyRun, folder: Path) -> Recipe:
    """A shipped recipe of three specialists in small."""
    kind, overrides = RECIPES[name]
    for k, domain in enumerate(NAMES):
        tiny_run.specialist(f"{name}-{domain}", kind, seed=k)
        overrides = [*overrides, f"specialists.{k}.model={tiny_run.folder / f'{name}-{domain}'}"]
    rows = json.dumps([str(tiny_run.folder / f"{domain}.jsonl") for domain in NAMES])
    overrides += [*TINY, f"data.train={rows}", "data.validation=[]", "device=cpu", f"output={folder / 'two' / name}"]
    return load_recipe(ROOT / "recipes" / f"{name}.yaml", overrides)


@pytest.fixture(scope="module")
def folders(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each case, alone/CASE and two/CASE, and the output of the launch."""
    folder = tmp_path_factory.mktemp("ranks")
    files = []
    for case, (changes, stages) in CASES.items():
        changes = changes | {"eval_every": 2, "data": {"validation": [str(tiny_run.folder / "held-out.jsonl")]}}
        tiny_run.train(folder / "alone" / case, stages, **changes)
        files.append(folder / f"{case}.yaml")
        files[-1].write_text(dump_recipe(tiny_run.recipe(folder / "two" / case, stages, **changes)))
    for name in RECIPES:
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(dump_recipe(miniature(name, tiny_run, folder)))
    process = launch(folder, 2, *files)
    assert process.returncode == 0, process.stderr[-3000:]
    (folder / "stdout").write_text(process.stdout)
    (folder / "stderr").write_text(process.stderr)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_losses_of_one(folders: Path, case: str) -> None:
    one_rank, two_ranks = losses(folders / "alone" / case), losses(folders / "two" / case)
    assert [row[:2] for row in one_rank] == [row[:2] for row in two_ranks]
    for (*location, loss), (*_, expected) in zip(two_ranks, one_rank, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5, rel=1e-5), location
    weights = trained_weights(folders / "two" / case)
    for name, tensor in trained_weights(folders / "alone" / case).items():
        if "score.bias" not in name:  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(tensor, weights[name], atol=1e-3, rtol=1e-3, msg=name)
    assert (folders / "two" / case / "fused" / "config.json").is_file()


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_train_in_two_processes(folders: Path, tiny_run: TinyRun, name: str) -> None:
    output, recipe = folders / "two" / name, miniature(name, tiny_run, folders)
    rows = losses(output)
    assert [row[:2] for row in rows] == [("gate", 1), ("gate", 2), ("joint", 1), ("joint", 2)]
    assert all(0 < loss < 10 for *_, values in rows for loss in values.values())
    trained = UltraFuserForCausalLM.from_pretrained(output / "fused", dtype=torch.float32)
    untrained = fuse(recipe.model_copy(update={"dtype": "float32"}))[0]
    assert trained.config.mixing == recipe.mixing
    saved = torch.bfloat16 if recipe.stages[1].trains_all_weights else torch.float32
    for domain in NAMES:
        before = untrained.specialist(domain).state_dict()
        after = trained.specialist(domain).state_dict()
        assert any(not torch.equal(before[key].to(saved).float(), after[key]) for key in before), domain
    assert not torch.equal(trained.gate.hidden.weight, untrained.gate.hidden.weight)


def test_the_main_process_alone_prints(folders: Path) -> None:
    runs = len(CASES) + len(RECIPES)
    assert (folders / "stdout").read_text().count('"folder"') == runs
    assert (folders / "stderr").read_text().count("stage joint: done") == runs
