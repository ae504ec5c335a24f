"""`ultrafuser eval` killed with -9 in its losses, its answers and its judgements: in the end all is as if it never was."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import HANG, FakeEndpoint, Step, fake_endpoint
from judged_rows import mark_of, opinion, write_gsm8k, write_judged_files
from tiny_models import shake_gate
from training_fixtures import NAMES, TinyRun
from ultrafuser.specialists import fuse
from ultrafuser.train.run import save_fused_folder

SUMS = 24
INSTRUCTIONS = [f"{word} {i}" for i, word in enumerate(("win", "lose", "mumble", "first") * 3)]
CONCURRENCY = 4  # requests to a judge at once, where --judge names it
PATIENCE_S = 180


class TiringJudge:
    """A judge that falls silent after so many verdicts; `left` None: it never tires."""

    def __init__(self, server: FakeEndpoint) -> None:
        self.remaining: int | None = None
        self.silent, self._lock = False, threading.Lock()
        server.reply = self._reply

    def renew(self, remaining: int | None) -> None:
        self.remaining, self.silent = remaining, False

    def _reply(self, prompt: str) -> Step:
        with self._lock:
            if self.remaining == 0:
                self.silent = True
                return HANG
            self.remaining = None if self.remaining is None else self.remaining - 1
        return opinion(prompt)


class Evaluation:
    """One `ultrafuser eval` into one folder, started as often as it takes."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.command, self.output = [*command, "--output", str(output)], output
        self.log = output.with_suffix(".log")

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})

    def run(self) -> None:
        child = self.start()
        try:
            assert child.wait(PATIENCE_S) == 0, self.log.read_text()
        finally:
            child.kill()

    def run_until(self, moment: Callable[[], bool]) -> None:
        """Kill it as soon as the moment has come."""
        child, until = self.start(), time.monotonic() + PATIENCE_S
        try:
            while not moment():
                assert child.poll() is None and time.monotonic() < until, self.log.read_text()
                time.sleep(0.002)
        finally:
            child.kill()
            code = child.wait()
        assert code == -signal.SIGKILL, self.log.read_text()

    def kept(self) -> dict[tuple[str, str], Any]:
        """Every value by kind and key; nothing while the file is being set up."""
        file = self.output / "fused" / "answers.sqlite"
        if not file.exists():
            return {}
        with closing(sqlite3.connect(file)) as db:
            try:
                rows = db.execute("SELECT kind, key, value FROM answers").fetchall()
            except sqlite3.OperationalError:
                return {}
        assert len({row[:2] for row in rows}) == len(rows)
        return {(kind, key): json.loads(value) for kind, key, value in rows}

    def count(self, kind: str) -> int:
        return sum(stored == kind for stored, _ in self.kept())

    def judged(self) -> set[str]:
        """The marks of the questions whose verdicts are kept, which the judge's words begin with."""
        return {value["text"].split()[0] for (kind, _), value in self.kept().items() if kind == "judgement"}

    def results(self) -> dict[str, Any]:
        """Of the one model, without times."""
        stored = json.loads((self.output / "results.json").read_text())["models"]["fused"]
        return {key: value for key, value in stored.items() if key != "seconds"}


def flat(tree: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """The leaves of a tree of JSON by their paths."""
    if not isinstance(tree, dict | list):
        return {path: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {location: leaf for key, value in items for location, leaf in flat(value, (*path, key)).items()}


@pytest.fixture
def server() -> Iterator[FakeEndpoint]:
    pytest.importorskip("aiohttp", reason="an extra is not installed")
    with fake_endpoint() as server:
        yield server


@pytest.fixture
def command(tiny_run: TinyRun, server: FakeEndpoint, tmp_path: Path) -> list[str]:
    """Losses, sums and a judged benchmark of a fused model, in small batches."""
    recipe = tiny_run.recipe("unused")
    model, tokenizer = fuse(recipe)
    folder = save_fused_folder(shake_gate(model), tokenizer, recipe, tmp_path / "run")
    write_gsm8k(tmp_path / "data", SUMS)
    write_judged_files(tmp_path / "data", INSTRUCTIONS)
    rows = [word for name in NAMES for word in ("--data", str(tiny_run.folder / f"{name}.jsonl"))]
    return [sys.executable, "-m", "ultrafuser", "eval", str(folder), "--tasks", "loss,gsm8k,alpaca_eval", *rows,
            "--data-dir", str(tmp_path / "data"), "--max-new-tokens", "24", "--batch-size", "2", "--device", "cpu",
            "--judge", f"judge@{server.url}"]  # fmt: skip


@pytest.mark.slow
def test_kills_change_nothing_and_cost_only_what_was_under_way(command, server, tmp_path):
    draw, judge = random.Random(0), TiringJudge(server)
    uninterrupted = Evaluation(command, tmp_path / "whole")
    uninterrupted.run()
    assert (uninterrupted.count("generate_until"), uninterrupted.count("judgement")) == (
        SUMS + len(INSTRUCTIONS),
        2 * len(INSTRUCTIONS),
    )
    assert server.hits == len({mark_of(prompt) for prompt in server.questions}) == 2 * len(INSTRUCTIONS)

    killed = Evaluation(command, tmp_path / "killed")
    judge.renew(0)  # so that no life can come to its end before it is killed
    killed.run_until((killed.output / "fused" / "features" / "identity.json").exists)
    for answers in (draw.randint(1, SUMS // 2), draw.randint(SUMS // 2 + 1, SUMS)):
        killed.run_until(lambda answers=answers: killed.count("generate_until") >= answers)
    server.requests = []
    verdicts = draw.randint(1, len(INSTRUCTIONS))
    judge.renew(verdicts)
    killed.run_until(lambda: judge.silent and killed.count("judgement") == verdicts)  # each was kept at once
    lives = [(killed.judged(), Counter(map(mark_of, server.questions)))]
    assert len(lives[0][0]) == verdicts and len(lives[0][1] - Counter(lives[0][0])) <= CONCURRENCY
    judge.renew(draw.randint(1, len(INSTRUCTIONS) - CONCURRENCY))
    killed.run_until(lambda: judge.silent)  # while the last verdicts are kept, perhaps
    lives.append((killed.judged(), Counter(map(mark_of, server.questions))))
    assert not (killed.output / "results.json").exists()
    judge.renew(None)
    killed.run()

    counts = Counter(map(mark_of, server.questions))
    for judged, earlier in lives:
        assert {mark: counts[mark] for mark in judged} == {mark: earlier[mark] for mark in judged}
    assert killed.kept() == uninterrupted.kept()
    results, expected = killed.results(), uninterrupted.results()
    for value in ("loss", "gate_weights"):  # the rows may have been read in other batches
        assert flat(results.pop(value)) == pytest.approx(flat(expected.pop(value)), rel=1e-5)
    assert results == expected
    for file in ("table.md", "fused/gsm8k.jsonl", "fused/alpaca_eval.jsonl"):
        assert (killed.output / file).read_text() == (uninterrupted.output / file).read_text()
