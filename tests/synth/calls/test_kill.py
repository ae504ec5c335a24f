"""Whole processes against one server: killed at any moment, several at once; nothing answered is ever asked again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fake_async_endpoint import FakeAsyncEndpoint, fake_async_endpoint
from fake_endpoint import failing, fine
from ultrafuser.synth.calls.request import Request
from ultrafuser.synth.calls.store import CallStore

pytest.importorskip("aiohttp", reason="the synth extra is not installed")

RUN = """
import signal, sys
from pathlib import Path
from ultrafuser.errors import UltraFuserError
from ultrafuser.synth.calls.request import Request
from ultrafuser.synth.calls.clients import make_clients
from ultrafuser.synth.recipe import ServedModel
from ultrafuser.synth.calls.scheduler import answer
from ultrafuser.synth.calls.store import CallStore

signal.signal(signal.SIGINT, signal.default_int_handler)  # where the tests run in the background
file, url, number, concurrency, budget_usd = sys.argv[1:]
model = ServedModel.model_validate({
    "name": "writer", "prompt_usd": 1000, "completion_usd": 1000,
    "endpoint": {"model": "m", "base_url": url, "concurrency": int(concurrency), "backoff_s": 0.01, "timeout_s": 10},
})
requests = [Request("responses", "math", str(i), "writer", (("user", str(i)),), max_tokens=20) for i in range(int(number))]
try:
    with CallStore(Path(file), "recipe") as store:
        answer(requests, store, make_clients([model]), budget_usd=float(budget_usd))
except UltraFuserError as error:
    sys.exit(str(error))
"""
COST_USD = 0.01  # of a scripted reply: 10 tokens


@pytest.fixture
def start(tmp_path: Path):
    """start(server, number): a process that has so many questions answered into the same store."""
    runs: list[subprocess.Popen[str]] = []

    def start(
        server: FakeAsyncEndpoint, count: int, concurrency: int = 16, budget_usd: float = 1e6
    ) -> subprocess.Popen[str]:
        arguments = [str(tmp_path / "calls.sqlite"), server.url, str(count), str(concurrency), str(budget_usd)]
        runs.append(subprocess.Popen([sys.executable, "-c", RUN, *arguments], stderr=subprocess.PIPE, text=True))
        return runs[-1]

    yield start
    for run in runs:
        run.kill()
        run.communicate()


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert run.poll() is None, run.stderr and run.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.002)


def stored(tmp_path: Path, count: int) -> set[str]:
    """Questions that have an answer."""
    requests = [Request("responses", "math", str(i), "writer", (("user", str(i)),)) for i in range(count)]
    with CallStore(tmp_path / "calls.sqlite") as store:
        missing = set(store.missing(request.key for request in requests))
    return {request.item for request in requests if request.key not in missing}


def finish(run: subprocess.Popen[str]) -> None:
    assert run.wait(60) == 0, run.stderr and run.stderr.read()


@pytest.mark.parametrize("seed", range(3))
def test_a_kill_costs_at_most_the_calls_under_way(tmp_path: Path, start, seed):
    count, draw = 300, random.Random(seed)
    with fake_async_endpoint(delay_s=0.02) as server:
        for progress in (0.1, 0.4, 0.7):
            run = start(server, count)
            hits = int(count * (progress + draw.random() / 10))
            wait_for(lambda hits=hits: server.hits >= hits, run)
            os.kill(run.pid, signal.SIGKILL)
            run.wait()
            answered, asked = stored(tmp_path, count), server.asked
            assert len(asked) - len(answered) <= 16  # no reply that had come is missing
            time.sleep(0.05)
            at_kill = server.asked
        finish(start(server, count))
        assert stored(tmp_path, count) == {str(i) for i in range(count)}
        assert all(server.asked[text] == at_kill[text] for text in answered)
        assert sum(server.asked.values()) <= count + 3 * 16
    with CallStore(tmp_path / "calls.sqlite") as store:
        assert store.counts()[0].calls == count and store.under_way() == 0


def test_requests_sent_by_a_killed_process_are_within_the_budget(tmp_path: Path, start):
    """Each call may be billed: those of the killed process count as spent."""
    with fake_async_endpoint(delay_s=0.02) as server:
        run = start(server, 200, budget_usd=1.5)
        wait_for(lambda: server.hits >= 30, run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        end = start(server, 200, budget_usd=1.5)
        assert end.wait(60) == 1
        assert "the budget of $1.50 does not last" in end.stderr.read()
        with CallStore(tmp_path / "calls.sqlite") as store:
            assert store.spent_usd() <= 1.5
            assert store.spent_usd() >= COST_USD * server.hits - 1e-9


def test_a_second_process_is_refused_and_the_first_one_finishes(tmp_path: Path, start):
    with fake_async_endpoint(delay_s=2.0) as server:
        first = start(server, 200)
        wait_for(lambda: server.hits >= 16, first)
        second = start(server, 200)
        assert second.wait(60) == 1
        assert f"{tmp_path}: another synthesis is running in this folder. Wait until it ends" in second.stderr.read()
        assert first.poll() is None
        server.delay_s = 0.01
        finish(first)
        assert set(server.asked.values()) == {1} and len(server.asked) == 200
    assert len(stored(tmp_path, 200)) == 200


def test_an_interrupted_run_ends_at_once_and_leaves_no_reservation(tmp_path: Path, start):
    with fake_async_endpoint(delay_s=0.1) as server:
        run = start(server, 300)
        wait_for(lambda: server.hits >= 50, run)
        run.send_signal(signal.SIGINT)
        assert run.wait(10) != 0
        with CallStore(tmp_path / "calls.sqlite") as store:
            assert store.under_way() == 0
        finish(start(server, 300))
        assert 300 <= server.hits <= 316


def test_the_store_agrees_with_the_server_on_a_bad_day(tmp_path: Path, start):
    """Errors, cut connections and floods now and then, and a kill in between: all is answered in the end."""
    draw = random.Random(0)

    def reply(question: str, asked: int):
        kind = draw.random()
        if kind < 0.05:
            return failing(500)
        if kind < 0.1:
            return failing(429, "slow down", retry_after="0.01")
        if kind < 0.15:
            return fine("x" * 5000) if asked else failing(503)
        return fine(f"re: {question}")

    with fake_async_endpoint(reply, delay_s=0.005) as server:
        run = start(server, 400)
        wait_for(lambda: server.hits >= 150, run)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        finish(start(server, 400))
        assert len(stored(tmp_path, 400)) == 400
