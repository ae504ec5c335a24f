"""Judged benchmarks all through `ultrafuser eval`: means, counts, what a silent judge leaves, and what is asked again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import HANG, FakeEndpoint, fine
from judged_rows import ALPACA_SCORES, MT_BENCH_SCORES, opinion, request_of, write_judged_files
from training_fixtures import TinyRun
from ultrafuser.cli import main as cli
from ultrafuser.evaluate.lm.fused import FusionLM
from ultrafuser.evaluate.lm.load import LoadOptions
from ultrafuser.evaluate.options import EvalOptions
from ultrafuser.evaluate.results import markdown
from ultrafuser.evaluate.run import evaluate_models
from ultrafuser.evaluate.tasks import TaskOptions

TASKS = ["alpaca_eval", "mt_bench"]
ALPACA_COUNTS = {"ok": 10, "unparsed": 2, "refused": 0, "error": 0, "unscored": 1}
MT_BENCH_COUNTS = {"ok": 3, "unparsed": 1, "refused": 0, "error": 0, "unscored": 1}


@pytest.fixture
def server(server):
    server.reply = opinion
    return server


@pytest.fixture
def data_dir(tmp_path: Path) -> str:
    return write_judged_files(tmp_path / "data")


def measured(tiny_run: TinyRun, server: FakeEndpoint, data_dir: str, output: Path, **judge: Any) -> dict[str, Any]:
    """The tasks of one tiny model, as a run leaves them in results.json."""
    options = EvalOptions(
        TASKS,
        judge=server.recipe(**judge),
        task_options=TaskOptions(data_dir, max_new_tokens=4),
        load_options=LoadOptions(batch_size=4),
    )
    results = evaluate_models([str(tiny_run.folder / "text")], options, output)
    assert json.loads((output / "results.json").read_text()) == results
    assert (output / "table.md").read_text() == markdown(results)
    return results["models"]["text"]["tasks"]


def by_document(output: Path, task: str, metric: str) -> dict[str, float | None]:
    lines = (output / "text" / f"{task}.jsonl").read_text().splitlines()
    return {record["id"]: record[metric] for record in map(json.loads, lines)}


def test_means_by_question_and_counts_by_status(tiny_run, server, data_dir, tmp_path):
    tasks = measured(tiny_run, server, data_dir, tmp_path / "out")
    alpaca, mt_bench = tasks["alpaca_eval"], tasks["mt_bench"]
    assert (alpaca["metric"], alpaca["value"], alpaca["samples"]) == ("win_rate", pytest.approx(0.6), 5)
    assert (mt_bench["metric"], mt_bench["value"], mt_bench["samples"]) == ("rating", 6.5, 2)
    assert alpaca["ci95"][0] <= 0.6 <= alpaca["ci95"][1] and mt_bench["ci95"] == [4, 9]
    assert (alpaca["counts"], mt_bench["counts"]) == (ALPACA_COUNTS, MT_BENCH_COUNTS)
    assert alpaca["details"]["inconsistent"] == 1
    assert mt_bench["details"]["turns"] == {"1": 7, "2": 3}
    assert {
        k: v for k, v in by_document(tmp_path / "out", "alpaca_eval", "win_rate").items() if v is not None
    } == ALPACA_SCORES
    ratings = by_document(tmp_path / "out", "mt_bench", "rating")
    assert {question: ratings[question] for question in MT_BENCH_SCORES} == MT_BENCH_SCORES
    assert sum("truth" in question for question in server.questions) == 2  # the references of `math` alone


def test_a_judge_without_a_readable_verdict_leaves_no_value(tiny_run, server, data_dir, tmp_path):
    server.reply = lambda _: fine("Who knows?")
    tasks = measured(tiny_run, server, data_dir, tmp_path / "out")
    for task, requests, unscored in (("alpaca_eval", 12, 6), ("mt_bench", 4, 4)):
        assert (tasks[task]["value"], tasks[task]["ci95"], tasks[task]["samples"]) == (None, None, 0)
        assert tasks[task]["counts"] == {"ok": 0, "unparsed": requests, "refused": 0, "error": 0, "unscored": unscored}
    row = next(line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| text "))
    assert [cell.split()[0] for cell in row.split("|")[2:-1]] == ["–", "–"]
    measured(tiny_run, server, data_dir, tmp_path / "out")
    assert server.hits == 16  # what could not be read is kept all the same


def test_errors_are_asked_again_and_verdicts_are_not(tiny_run, server, data_dir, tmp_path, monkeypatch):
    silent_on = {"win 1", "rate it 5"}
    server.reply = lambda prompt: HANG if request_of(prompt) in silent_on else opinion(prompt)
    first = measured(tiny_run, server, data_dir, tmp_path / "out", timeout_s=1, retries=0, concurrency=4)
    assert first["alpaca_eval"]["counts"] == {"ok": 8, "unparsed": 2, "refused": 0, "error": 2, "unscored": 2}
    assert first["mt_bench"]["counts"] == {"ok": 2, "unparsed": 1, "refused": 0, "error": 1, "unscored": 2}
    assert first["alpaca_eval"]["value"] == 0.5 and first["mt_bench"]["value"] == 6  # without them
    assert server.hits == 12 + 4

    def refuse(*_: Any) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(FusionLM, "generate_until", refuse)
    server.reply = opinion
    second = measured(tiny_run, server, data_dir, tmp_path / "out")
    assert sorted(map(request_of, server.questions[16:])) == ["rate it 5", "win 1", "win 1"]
    assert second["alpaca_eval"]["counts"] == ALPACA_COUNTS and second["mt_bench"]["counts"] == MT_BENCH_COUNTS
    assert second["alpaca_eval"]["value"] == pytest.approx(0.6) and second["mt_bench"]["value"] == 6.5
    assert measured(tiny_run, server, data_dir, tmp_path / "out") == second
    assert server.hits == 16 + 3


@pytest.mark.parametrize(("reply", "cells"), [(opinion, ["60.00 %", "6.50"]), (lambda _: fine("Hm."), ["–", "–"])])
def test_the_command_line(tiny_run, server, data_dir, tmp_path, monkeypatch, capsys, reply, cells):
    server.reply = reply
    words = ["eval", tiny_run.folder / "text", "--tasks", "alpaca_eval,mt_bench", "--judge", f"judge@{server.url}",
             "--data-dir", data_dir, "--max-new-tokens", 4, "--output", tmp_path / "out"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["ultrafuser", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["text"])
    assert row.split(maxsplit=1)[1].split() == " ".join(cells).split()
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["models"]["text"]["tasks"]
    assert list(tasks) == TASKS and server.hits == 16
