"""Whole processes against a server that misbehaves: killed at random moments, the data set is the undisturbed one."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from fake_async_endpoint import FakeAsyncEndpoint, fake_async_endpoint
from fake_endpoint import CUT, HANG, HTML, NOT_JSON, Step, failing, fine
from fake_writer import FAULTS, reply_to, tiny
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.output.card import REPORT, ROWS
from ultrafuser.synth.pipeline import STORE
from ultrafuser.synth.recipe import dump_synth_recipe

for package in ("aiohttp", "py3langid"):
    pytest.importorskip(package, reason="the synth extra is not installed")
MORE = ("filters.language=en", "filters.language_confidence=0.9")

RUN = """
import sys
from ultrafuser.errors import UltraFuserError
from ultrafuser.synth.pipeline import synthesise
from ultrafuser.synth.recipe import load_synth_recipe

try:
    synthesise(load_synth_recipe(sys.argv[1], sys.argv[2:]))
except UltraFuserError as error:
    sys.exit(str(error))
"""
PASSING = [failing(429, "slow down", retry_after="0"), failing(500), Step("busy", 503), CUT, NOT_JSON, HTML,
           Step('{"choices": []}'), HANG]  # fmt: skip
LASTING = [fine(outcome.text) for outcome in FAULTS.values() if outcome.status == "ok"]
LASTING += [HANG, fine(None), fine("", finish_reason="content_filter"), fine(None, refusal="no"), fine('["half a list", "of', finish_reason="length"),
            failing(400, "this model's maximum context length is 64 tokens", code="context_length_exceeded")]  # fmt: skip


def misbehaving(question: str, repeats: int) -> Step:
    """By the question: fine, wrong for good, or wrong at first."""
    draw = random.Random(hashlib.sha256(question.encode()).hexdigest())
    kind = draw.random()
    if kind < 0.2:
        return draw.choice(LASTING)
    if kind < 0.5 and repeats == 0:
        return draw.choice(PASSING)
    return fine(reply_to(question))


@pytest.fixture
def start(tmp_path: Path):
    """start(server, folder): a process that runs the tiny recipe into a folder."""
    runs: list[subprocess.Popen[str]] = []

    def start(server: FakeAsyncEndpoint, folder: str, *overrides: str) -> subprocess.Popen[str]:
        model = {
            "name": "writer",
            "endpoint": {
                "model": "writer",
                "base_url": server.url,
                "concurrency": 16,
                "timeout_s": 0.5,
                "retries": 2,
                "backoff_s": 0.01,
            },
        }
        recipe = tiny(f"output={tmp_path / folder}", *MORE, models=[model], turns=2)
        (tmp_path / f"{folder}.yaml").write_text(dump_synth_recipe(recipe))
        command = [sys.executable, "-c", RUN, str(tmp_path / f"{folder}.yaml"), *overrides]
        runs.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def finish(run: subprocess.Popen[str]) -> None:
    assert run.wait(120) == 0, run.stderr and run.stderr.read()


def results(folder: Path) -> tuple[str, list[object]]:
    """Rows, and the accounts: what a run was disturbed by shows in neither."""
    report = json.loads((folder / REPORT).read_text())
    for entry in report["stages"]:
        assert entry["asked"] == entry["kept"] + entry["open"] + sum(entry["rejected"].values())
        assert entry["open"] == 0
    return (folder / ROWS).read_text(), report["stages"]


def test_killed_again_and_again_it_ends_as_if_it_had_not_been(tmp_path, start):
    draw = random.Random(7)
    with fake_async_endpoint(misbehaving, delay_s=0.01) as server:
        finish(start(server, "whole"))
    with fake_async_endpoint(misbehaving, delay_s=0.01) as server:
        for _ in range(5):
            run, hits = start(server, "killed"), server.hits + draw.randrange(1, 80)
            while server.hits < hits and run.poll() is None:
                time.sleep(0.002)
            time.sleep(draw.random() * 0.05)
            run.kill()
            run.wait()
        finish(start(server, "killed"))
        rows, stages = results(tmp_path / "killed")
        assert (rows, stages) == results(tmp_path / "whole")
        reasons = sum((Counter(entry["rejected"]) for entry in stages), Counter())
        assert reasons["another language"] and reasons["call failed: unanswered"]  # of what hangs for good
        num_hits = server.hits
        finish(start(server, "killed"))  # all is there
        assert server.hits == num_hits


def test_a_second_process_on_one_store_is_refused(tmp_path, start):
    with fake_async_endpoint(misbehaving, delay_s=0.01) as server:
        with CallStore(tmp_path / "one" / STORE, tiny().identity()):
            second = start(server, "one")
            assert second.wait(120) == 1
        message = f"{tmp_path / 'one'}: another synthesis is running in this folder. Wait until it ends, or choose another folder"
        assert message in second.stderr.read() and not server.hits
        finish(start(server, "one"))
        results(tmp_path / "one")


def test_a_budget_ends_a_run_and_a_larger_one_goes_on(tmp_path, start):
    prices = ("models.writer.prompt_usd=100", "models.writer.completion_usd=100")
    with fake_async_endpoint(lambda question, repeats: fine(reply_to(question))) as server:
        run = start(server, "money", *prices, "budget_usd=0.3")
        assert run.wait(60) == 1
        assert "budget" in run.stderr.read()
        assert not (tmp_path / "money" / ROWS).exists()
        finish(start(server, "money", *prices, "budget_usd=5000"))
        assert (tmp_path / "money" / ROWS).is_file()


def test_an_endpoint_that_is_not_there(tmp_path, start):
    with fake_async_endpoint() as server:
        pass
    run = start(server, "nobody")
    assert run.wait(60) == 1
    output = run.stderr.read()
    assert server.url in output and "\n" not in output.strip()
