"""Two processes give the losses and the weights of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ranks import launch
from training_fixtures import GATE, JOINT, TinyRun, losses, trained_weights
from ultrafuser.recipe import dump_recipe

CASES = {
    "cached-lora": ({"cache_features": True}, [GATE, JOINT]),
    "uncached-full": (
        {"cache_features": False, "mixing": "logits"},
        [GATE | {"rows_per_device": 1}, {"name": "joint", "steps": 2, "samples_per_domain": 2, "specialists": "full"}],
    ),
}


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


def test_the_main_process_alone_prints(folders: Path) -> None:
    assert (folders / "stdout").read_text().count('"folder"') == len(CASES)
    assert (folders / "stderr").read_text().count("stage joint: done") == len(CASES)
