"""A model behind an endpoint through `ultrafuser eval`: its score, its answers, and no question asked twice."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from fake_endpoint import FakeEndpoint, Step, failing, fine
from judged_rows import write_gsm8k
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import EndpointError
from ultrafuser.evaluate.options import EvalOptions
from ultrafuser.evaluate.run import evaluate_models
from ultrafuser.evaluate.tasks import TaskOptions
from ultrafuser.progress import Progress

DOCUMENTS = 8


def solution(question: str) -> Step:
    """Right, but for every fourth sum, which is wrong, and the last one, which has no number."""
    i = int(question.split()[0])
    answer = "many" if i == DOCUMENTS - 1 else i + 1 if i % 4 else 1000
    return fine(f"Let us see.\n\nThe answer is {answer}.")


@pytest.fixture
def server(server):
    server.reply = solution
    return server


@pytest.fixture
def data_dir(tmp_path: Path) -> str:
    return write_gsm8k(tmp_path / "data", DOCUMENTS)


def measured(server: FakeEndpoint, data_dir: str, output: Path, **options: Any) -> dict[str, Any]:
    results = evaluate_models(
        [f"openai:org/chat@{server.url}"],
        EvalOptions(["gsm8k"], **options, task_options=TaskOptions(data_dir)),
        output,
    )
    assert json.loads((output / "results.json").read_text()) == results
    return results["models"]["chat"]


def test_the_score_is_right_and_the_answers_are_kept(server, data_dir, tmp_path):
    first = measured(server, data_dir, tmp_path / "out")
    cell = first["tasks"]["gsm8k"]
    assert (cell["metric"], cell["value"], cell["samples"]) == ("exact_match", 5 / DOCUMENTS, DOCUMENTS)
    assert cell["counts"]["unparsed"] == 1
    assert first["parameters"] is None and "loss" not in first
    records = [json.loads(line) for line in (tmp_path / "out" / "chat" / "gsm8k.jsonl").read_text().splitlines()]
    assert [record["exact_match"] for record in records] == [0, 1, 1, 1, 0, 1, 1, 0]
    for i, record in enumerate(records):
        assert record["answer"] == [json.loads(solution(f"{i} + 1").body)["choices"][0]["message"]["content"]]
    assert sorted(server.questions) == [f"{i} + 1 = ?" for i in range(DOCUMENTS)]
    assert {request["model"] for request in server.requests} == {"org/chat"}
    second = measured(server, data_dir, tmp_path / "out")
    assert server.hits == DOCUMENTS
    assert second | {"seconds": 0} == first | {"seconds": 0}


def test_a_larger_limit_asks_only_for_the_new_documents(server, data_dir, tmp_path):
    measured(server, data_dir, tmp_path / "out", limit=3)
    assert server.hits == 3
    assert measured(server, data_dir, tmp_path / "out", limit=6)["tasks"]["gsm8k"]["samples"] == 6
    assert server.hits == len(set(server.questions)) == 6


def test_an_endpoint_that_refuses_half_way_is_resumed(server, data_dir, tmp_path):
    uninterrupted = measured(server, data_dir, tmp_path / "whole")
    replies, lock = iter(range(3)), threading.Lock()
    answered: list[str] = []

    def reply(question: str) -> Step:
        with lock:
            if next(replies, None) is None:
                return failing(401, "the key has expired")
            answered.append(question)
        return solution(question)

    server.reply, server.requests = reply, []
    with pytest.raises(EndpointError, match="the key has expired.*3 of 8 requests were answered"):
        measured(server, data_dir, tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()
    server.reply, server.requests = solution, []
    resumed = measured(server, data_dir, tmp_path / "out")
    assert sorted([*answered, *server.questions]) == [f"{i} + 1 = ?" for i in range(DOCUMENTS)]
    assert resumed["tasks"] == uninterrupted["tasks"]
    files = [tmp_path / run / "chat" / "gsm8k.jsonl" for run in ("whole", "out")]
    assert files[0].read_text() == files[1].read_text()


def test_no_file_and_no_line_has_the_password_or_the_key(server, data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mango-1234567890")
    lines: list[str] = []

    class Lines(Progress):
        def log(self, text: str) -> None:
            lines.append(text)

    server.reply = lambda question: fine(f"{solution(question)} sk-mango-1234567890 mango-password")
    url = server.url.replace("//", "//user:mango-password@")
    judge = EndpointRecipe(model="judge", base_url=url)
    options = EvalOptions(["gsm8k"], judge=judge, task_options=TaskOptions(data_dir))
    results = evaluate_models([f"openai:m@{url}"], options, tmp_path / "out", Lines())
    assert results["models"]["m"]["source"] == f"openai:m@{server.url.replace('//', '//***@')}"
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    texts = [file.read_bytes().decode("utf-8", "replace") for file in files] + lines
    assert len(files) > 3 and any("***" in text for text in texts)
    assert not [text for text in texts if "mango" in text and "sk-mango" in text]
    assert not [text for text in texts if "mango-password" in text]
