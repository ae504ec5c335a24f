"""kill -9 at random moments: what was answered is kept and never asked again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

SCRIPT = """
import sys, time
from pathlib import Path
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from ultrafuser.evaluate.lm.response_cache import CachedLM, ResponseCache

folder, total = Path(sys.argv[1]), int(sys.argv[2])

class Slow(LM):
    def generate_until(self, requests):
        answers = []
        for request in requests:
            with open(folder / "asked.txt", "a") as log:
                log.write(request.args[0] + "\\n")
            time.sleep(0.01)
            answers.append(request.args[0].upper())
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers
    def loglikelihood(self, requests): ...
    def loglikelihood_rolling(self, requests): ...

(folder / "ready.txt").write_text("")
requests = [Instance("generate_until", {}, (f"question {i}", {"until": []}), i) for i in range(total)]
answers = CachedLM(Slow(), ResponseCache(folder / "answers.sqlite", "me")).generate_until(requests)
assert answers == [f"QUESTION {i}" for i in range(total)], answers
(folder / "done.txt").write_text("")
"""
TOTAL, MOST_KILLS = 150, 5


def test_kill_at_random_moments(tmp_path: Path):
    rng, kills = random.Random(0), 0
    while not (tmp_path / "done.txt").exists():
        (tmp_path / "ready.txt").unlink(missing_ok=True)
        child = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), str(TOTAL)])
        while child.poll() is None and not (tmp_path / "ready.txt").exists():
            time.sleep(0.01)
        if kills < MOST_KILLS:
            time.sleep(rng.uniform(0.05, 0.5))
            os.kill(child.pid, signal.SIGKILL)
            kills += child.wait() == -signal.SIGKILL
        else:
            assert child.wait() == 0
    requests = Counter((tmp_path / "asked.txt").read_text().split("\n")[:-1])
    assert set(requests) == {f"question {i}" for i in range(TOTAL)}
    assert kills > 1
    # a kill can only cost the one answer that was under way
    assert sum(requests.values()) <= TOTAL + kills
