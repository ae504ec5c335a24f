"""Processes that divide the weights of the specialists give the losses and the weights of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import launch
from tiny_models import save_adapter
from training_fixtures import GATE, JOINT, NAMES, TEMPLATES, TinyRun, losses, trained_weights
from ultrafuser.recipe import Recipe, dump_recipe

FULL = {"name": "joint", "steps": 3, "samples_per_domain": 2, "specialists": "full", "lr": 0.005}
CLIPPED = {"max_grad_norm": 0.1, "rows_per_device": 1}  # gradients are accumulated
# (stages, other fields, specialists)
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "lora-checkpointed": (
        [GATE, JOINT | CLIPPED | {"gradient_checkpointing": True}],
        {"cache_features": True, "keep_best": True, "eval_every": 1, "data": {"train": ["many"]}},
        "separate",
    ),
    "full-tied-logits": ([GATE, FULL], {"cache_features": False, "mixing": "logits"}, "tied"),
    "full-clipped": ([GATE, FULL | CLIPPED], {"cache_features": True, "save_every": 1}, "separate"),
    "shared-base-logits": ([GATE, JOINT], {"cache_features": True, "mixing": "logits"}, "shared"),
}


@pytest.fixture(scope="module")
def specialists(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Specialists of a recipe: separate models, models with tied embeddings, and adapters on one base."""
    for seed, name in enumerate(NAMES):
        tiny_run.specialist(f"tied-{name}", seed=seed, tie_word_embeddings=True)
    templates = {name: {"chat_template": TEMPLATES[name]} if TEMPLATES[name] else {} for name in NAMES}
    return {
        "separate": [{"name": name, "model": str(tiny_run.folder / name)} | templates[name] for name in NAMES],
        "tied": [{"name": name, "model": str(tiny_run.folder / f"tied-{name}")} | templates[name] for name in NAMES],
        "shared": tiny_run.adapter_recipe(tmp_path_factory.mktemp("adapters"), save_adapter),
    }


@pytest.fixture(scope="module")
def folders(
    tiny_run: TinyRun, specialists: dict[str, list[dict[str, Any]]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with the runs of one process, alone/CASE, and of two that divide the weights, two/CASE."""
    folder = tmp_path_factory.mktemp("sharded")
    files = []

    def recipe(case: str, processes: str, **changes: Any) -> Recipe:
        stages, fields, kind = CASES[case]
        data = {"validation": [{"path": str(tiny_run.folder / "held-out.jsonl"), "limit": 1}]}  # none for one of two
        if "data" in fields:  # enough rows to measure temperatures
            data |= {"train": [str(tiny_run.rows("many", 25, domains=NAMES))]}
            fields = {key: value for key, value in fields.items() if key != "data"}
        fields = {"specialists": specialists[kind], "eval_every": 2, "ddp_timeout": 60, "data": data} | fields | changes
        return tiny_run.recipe(folder / processes / case, stages, **fields)

    from ultrafuser.train.run import train
    for case in CASES:
        train(recipe(case, "alone"))
        files.append(folder / f"{case}.yaml")
        files[-1].write_text(dump_recipe(recipe(case, "two", parallel={"shard": True})))
    process = launch(folder, 2, *files)
    assert process.returncode == 0, process.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_losses_and_weights_of_one(folders: Path, case: str) -> None:
    expected, measured = losses(folders / "alone" / case), losses(folders / "two" / case)
    assert [row[:2] for row in expected] == [row[:2] for row in measured]
    for (*location, loss), (*_, other) in zip(measured, expected, strict=True):
        assert loss == pytest.approx(other, abs=1e-5, rel=1e-5), location
    weights = trained_weights(folders / "two" / case)
    expected_weights = trained_weights(folders / "alone" / case)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        if "score.bias" not in name:  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(weights[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
