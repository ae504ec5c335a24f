"""Kill a scripted synthesis at 50 random moments. Is the data set the undisturbed one, and was any stored answer requested
again? The server also misbehaves: floods, errors, hangs, cut connections, broken and foreign replies.

    python benchmarks/synth_kills.py [--kills 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "synth")]

from test_synth_whole_runs import MORE, RUN, misbehaving, results  # noqa: E402

from fake_async_endpoint import FakeAsyncEndpoint, fake_async_endpoint  # noqa: E402
from fake_writer import tiny  # noqa: E402
from ultrafuser.synth.calls.request import STAGES, Request  # noqa: E402
from ultrafuser.synth.pipeline import STORE  # noqa: E402
from ultrafuser.synth.recipe import dump_synth_recipe  # noqa: E402

COUNTS = {"meta_topics": 6, "sub_topics": 30, "concepts": 3, "instructions": 240}
DOMAINS = [{"name": name, "description": f"The domain {name}.", "counts": COUNTS} for name in ("one", "two")]


def start(server: FakeAsyncEndpoint, folder: Path) -> subprocess.Popen[bytes]:
    """A process that runs the recipe into a folder."""
    endpoint = {"model": "writer", "base_url": server.url, "concurrency": 16, "timeout_s": 0.5, "retries": 2,
                "backoff_s": 0.01}  # fmt: skip
    models = [{"name": "writer", "endpoint": endpoint}]
    recipe = tiny(f"output={folder}", *MORE, domains=DOMAINS, turns=2, models=models)
    file = folder.with_suffix(".yaml")
    file.write_text(dump_synth_recipe(recipe))
    return subprocess.Popen([sys.executable, "-c", RUN, str(file)])


def answered(folder: Path) -> set[str]:
    """Keys of the requests whose responses are stored."""
    if not (folder / STORE).is_file():
        return set()
    with closing(sqlite3.connect(folder / STORE)) as db:
        tables = {name for (name,) in db.execute("SELECT name FROM sqlite_master")}
        return {key for (key,) in db.execute("SELECT key FROM calls")} if "calls" in tables else set()


def possible_keys(body: dict[str, Any]) -> set[str]:
    """Possible keys of a request. Its body does not contain the stage."""
    messages = tuple((message["role"], message["content"]) for message in body["messages"])
    return {Request(stage, "", "", "writer", messages).key for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        undisturbed_folder, killed = Path(folder) / "whole", Path(folder) / "killed"
        with fake_async_endpoint(misbehaving, delay_s=0.02) as server:
            began = time.monotonic()
            if start(server, undisturbed_folder).wait():
                sys.exit("the undisturbed run failed")
            undisturbed = server.hits
            print(f"undisturbed: {undisturbed} requests, {time.monotonic() - began:.1f} s")
        repeated = 0
        with fake_async_endpoint(misbehaving, delay_s=0.02) as server:
            for kill in range(options.kills):
                stored, num_hits = answered(killed), server.hits
                run = start(server, killed)
                hits = num_hits + draw.randrange(1, max(2, undisturbed // options.kills))
                while server.hits < hits and run.poll() is None:
                    time.sleep(0.001)
                if run.poll() is not None:
                    sys.exit(f"the run finished after {kill} kills; use fewer")
                time.sleep(draw.random() * 0.05)
                run.kill()
                run.wait()
                repeated += sum(bool(possible_keys(body) & stored) for body in server.bodies[num_hits:])
            stored, num_hits = answered(killed), server.hits
            if start(server, killed).wait():
                sys.exit("the last run failed")
            repeated += sum(bool(possible_keys(body) & stored) for body in server.bodies[num_hits:])
            extra = server.hits - undisturbed
        same = results(killed) == results(undisturbed_folder)
        print(f"{options.kills} kills: {extra} requests more than undisturbed ({extra / options.kills:.1f} per kill, 16 were "
              f"under way at most), {repeated} of them for a question whose answer was stored")  # fmt: skip
        print(f"same data set and accounts: {'yes' if same else 'NO'}")
        sys.exit(not same or repeated > 0)


if __name__ == "__main__":
    main()
