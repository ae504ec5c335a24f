"""Two processes give the losses and the weights of one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training_fixtures import GATE, JOINT, TinyRun, losses, trained_weights
from ultrafuser.recipe import dump_recipe

CASES = {
    "cached-lora": ({"cache_features": True}, [GATE, JOINT]),
    "uncached-full": (
        {"cache_features": False, "mixing": "logits"},
        [GATE | {"rows_per_device": 1}, {"name": "joint", "steps": 2, "samples_per_domain": 2, "specialists": "full"}],
    ),
}


# Starting two processes is what costs: one launch trains every recipe, each through the command line.
DRIVER = """
import sys
from ultrafuser.cli.main import app
for recipe in sys.argv[1:]:
    app(["train", recipe, "--json"], standalone_mode=False)
"""


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
    (folder / "driver.py").write_text(DRIVER)
    process = _launch(str(folder / "driver.py"), *map(str, files))
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


def _launch(*command: str) -> subprocess.CompletedProcess:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", port]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(launcher + list(command), capture_output=True, text=True, env=env, timeout=300)
