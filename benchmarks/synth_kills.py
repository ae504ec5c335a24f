"""Kill a scripted synthesis at 50 random moments: is the data set the undisturbed one, and was anything asked twice?"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "synth")]

from scripted_writer import tiny  # noqa: E402
from test_synth_whole_runs import RUN, misbehaving, results  # noqa: E402

from crowd_endpoint import crowd_endpoint  # noqa: E402
from ultrafuser.synth.recipe import dump_synth_recipe  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as home, crowd_endpoint(misbehaving, delay_s=0.02) as server:
        counts = {"meta_topics": 6, "sub_topics": 30, "concepts": 3, "instructions": 240}
        domains = [{"name": name, "description": f"The domain {name}.", "counts": counts} for name in ("one", "two")]
        endpoint = {"model": "writer", "base_url": server.url, "concurrency": 16, "timeout_s": 5, "backoff_s": 0.01}

        def start(folder: str) -> subprocess.Popen[bytes]:
            recipe = tiny(
                f"output={home}/{folder}", domains=domains, turns=2, models=[{"name": "writer", "endpoint": endpoint}]
            )
            (Path(home) / f"{folder}.yaml").write_text(dump_synth_recipe(recipe))
            return subprocess.Popen([sys.executable, "-c", RUN, f"{home}/{folder}.yaml"])

        began = time.monotonic()
        if start("whole").wait():
            sys.exit("the undisturbed run failed")
        undisturbed, seconds = server.hits, time.monotonic() - began
        print(f"undisturbed: {undisturbed} requests, {seconds:.1f} s")
        kills = 0
        while kills < options.kills:
            run, hits = start("killed"), server.hits + draw.randrange(1, max(2, 2 * undisturbed // options.kills))
            while server.hits < hits and run.poll() is None:
                time.sleep(0.001)
            if run.poll() is not None:
                print(f"it was done after {kills} kills")
                break
            time.sleep(draw.random() * 0.05)
            run.kill()
            run.wait()
            kills += 1
        if start("killed").wait():
            sys.exit("the last run failed")
        again = server.hits - 2 * undisturbed
        same = results(Path(home) / "killed") == results(Path(home) / "whole")
        print(
            f"{kills} kills: {again} requests more than undisturbed ({again / max(kills, 1):.1f} a kill, 16 were under way at most)"
        )
        print(f"same data set and accounts: {'yes' if same else 'NO'}")
        sys.exit(not same)


if __name__ == "__main__":
    main()
