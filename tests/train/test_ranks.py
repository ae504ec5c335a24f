"""Two processes give the losses and the weights of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ultrafuser.recipe import dump_recipe
from workbench import GATE, JOINT, Workshop, losses, trained_weights

CASES = {
    "cached-lora": ({"cache_features": True}, [GATE, JOINT]),
    "uncached-full": (
        {"cache_features": False, "mixing": "logits"},
        [GATE | {"rows_per_device": 1}, {"name": "joint", "steps": 2, "samples_per_domain": 2, "specialists": "full"}],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_losses_of_one(workshop: Workshop, tmp_path: Path, case: str) -> None:
    changes, stages = CASES[case]
    changes = changes | {"eval_every": 2, "data": {"validation": [str(workshop.folder / "held-out.jsonl")]}}
    alone = workshop.train(tmp_path / "alone", stages, **changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(workshop.recipe(tmp_path / "two", stages, **changes)))
    done = _launch("-m", "ultrafuser", "train", str(file), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count('"folder"') == 1, "the main process alone prints"

    ours, theirs = losses(alone), losses(tmp_path / "two")
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for (*where, own), (*_, other) in zip(ours, theirs, strict=True):
        assert own == pytest.approx(other, abs=1e-5, rel=1e-5), where
    weights = trained_weights(tmp_path / "two")
    for name, tensor in trained_weights(alone).items():
        if "score.bias" not in name:  # the softmax cancels it: its gradient is rounding alone
            torch.testing.assert_close(tensor, weights[name], atol=1e-3, rtol=1e-3, msg=name)
    assert (tmp_path / "two" / "fused" / "config.json").is_file()


def _launch(*command: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(launcher + list(command), capture_output=True, text=True, env=env, timeout=300)
