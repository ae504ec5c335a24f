"""Start several processes that train together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Starting the processes is what costs: one launch trains every recipe, each through the command line.
DRIVER = """
import os
import sys
{prelude}
from ultrafuser.cli.main import app
os.write(1, f"a process of {{os.environ['WORLD_SIZE']}}\\n".encode())  # in one piece
for recipe in sys.argv[1:]:
    app(["train", *recipe.split(), "--json"], standalone_mode=False)
"""


def launch(folder: Path, processes: int, *recipes: object, prelude: str = "") -> subprocess.CompletedProcess:
    """Run `ultrafuser train` on recipes, each perhaps with options, in that many processes on the CPU.

    Args:
        folder: for the script that the processes run.
        prelude: Python that each process runs first. `os.environ["RANK"]` tells them apart.
    """
    script = folder / "driver.py"
    script.write_text(DRIVER.format(prelude=prelude))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
               str(script), *map(str, recipes)]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env["COLUMNS"] = "1000"  # the console would break lines in the middle of a path
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
    assert process.stdout.count(f"a process of {processes}") == processes, process.stderr[-3000:]
    return process
