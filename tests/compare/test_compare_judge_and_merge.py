"""`ultrafuser compare` with a judge, in best-of-K and in benchmarks, and with merged weights."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from fake_endpoint import HANG, FakeEndpoint, Step, fine
from judged_rows import answers_in, opinion, request_of, write_gsm8k, write_judged_files
from tiny_models import save_adapter
from training_fixtures import NAMES, TinyRun
from ultrafuser.compare.recipe import CompareRecipe, load_compare_recipe
from ultrafuser.compare.run import compare
from ultrafuser.compare.system import RECIPE, read_measured
from ultrafuser.compare.systems.merge import find_program
from ultrafuser.errors import MissingExtraError
from ultrafuser.report.data import Comparison

BY_JUDGE = {"kind": "best_of", "by": "judge"}
DOCUMENTS = [str(i) for i in range(6)]


@pytest.fixture
def recipe(tiny_run: TinyRun, tmp_path: Path) -> dict[str, Any]:
    """A comparison of three adapters on one base, without systems."""
    training = tiny_run.fields("unused", specialists=tiny_run.adapter_recipe(tmp_path, save_adapter))
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(training))
    write_gsm8k(tmp_path / "data", len(DOCUMENTS))
    return {
        "recipe": str(tmp_path / "train.yaml"),
        "data_dir": write_judged_files(tmp_path / "data"),
        "max_new_tokens": 6,
        "decode": {"prompts": 1, "new_tokens": 2, "repeats": 1},
        "output": str(tmp_path / "out"),
    }


def load(
    recipe: dict[str, Any], systems: list[Any], server: FakeEndpoint | None = None, **fields: Any
) -> CompareRecipe:
    judge = {"judge": server.recipe(timeout_s=1, retries=0, concurrency=4).model_dump()} if server else {}
    return load_compare_recipe(recipe | {"systems": systems} | judge | fields)


def answers(recipe: dict[str, Any], name: str, task: str = "gsm8k") -> dict[str, str]:
    """What a system answered, by document."""
    loaded = load_compare_recipe(Path(recipe["output"]) / RECIPE)
    measured = read_measured(loaded, loaded.system(name))
    return {document: texts[0] for document, texts in measured.tasks[task].answers.items()}


def errors(results: Comparison) -> dict[str, str]:
    return {name: system.error for name, system in results.systems.items() if system.error}


# ---------------------------------------------------------------- best of K, by a judge


def taste(answer: str) -> tuple[int, str]:
    return len(set(answer)), answer


def connoisseur(prompt: str) -> Step:
    """Likes the answer of most different letters, wherever it is shown."""
    texts = answers_in(prompt)
    return fine(f"Variety.\n[[{1 + texts.index(max(texts, key=taste))}]]")


def test_the_answer_that_the_judge_likes_is_given(recipe, server, in_process):
    server.reply = connoisseur
    systems = ["specialist", "best_of", BY_JUDGE]
    results = compare(load(recipe, systems, server, tasks=["gsm8k"]))
    assert not errors(results)
    specialist_answers, returned = [answers(recipe, name) for name in NAMES], answers(recipe, "best_of-judge")
    assert returned == {
        document: max((by_document[document] for by_document in specialist_answers), key=taste)
        for document in DOCUMENTS
    }
    assert returned != answers(recipe, "best_of-log_prob")
    assert results.systems["best_of-judge"].tasks["gsm8k"].samples == len(DOCUMENTS)
    assert results.systems["best_of-judge"].loss is None
    sums = [request for prompt in server.questions if (request := request_of(prompt)).endswith("= ?")]
    open_documents = [
        document for document in DOCUMENTS if len({by_document[document] for by_document in specialist_answers}) > 1
    ]
    assert sorted(sums) == [f"{document} + 1 = ?" for document in open_documents]
    assert results.systems["best_of-judge"].chosen["by"]["judge"] == len(open_documents)
    assert max(Counter(server.questions).values()) == 1
    in_process.clear()
    hits = server.hits
    assert compare(load(recipe, systems, server, tasks=["gsm8k"])).systems == results.systems
    assert in_process == [] and server.hits == hits


def test_the_order_in_which_answers_are_shown_differs(recipe, server, in_process):
    server.reply = connoisseur
    assert not errors(compare(load(recipe, ["specialist", BY_JUDGE], server, tasks=["gsm8k"])))
    specialist_answers, orders = [answers(recipe, name) for name in NAMES], set()
    for prompt in server.questions:
        document, texts = request_of(prompt).split()[0], answers_in(prompt)
        if document in DOCUMENTS and len(set(texts)) == len(NAMES):
            orders.add(tuple(texts.index(by_document[document]) for by_document in specialist_answers))
    assert len(orders) > 1


def test_without_a_readable_verdict_the_log_probability_chooses(recipe, server, in_process):
    server.reply = lambda _: fine("I like them all.")
    results = compare(load(recipe, ["best_of", BY_JUDGE], server, tasks=["gsm8k"]))
    assert not errors(results)
    assert answers(recipe, "best_of-judge") == answers(recipe, "best_of-log_prob")
    assert server.hits > 0


def test_a_missing_verdict_is_an_error_and_its_request_is_repeated(recipe, server, in_process):
    server.reply = lambda prompt: HANG if request_of(prompt) == "2 + 1 = ?" else connoisseur(prompt)
    systems = ["specialist", BY_JUDGE]
    first = compare(load(recipe, systems, server, tasks=["gsm8k"]))
    assert list(errors(first)) == ["best_of-judge"] and "no reply within 1 s" in errors(first)["best_of-judge"]
    hits = server.hits
    server.reply = connoisseur
    second = compare(load(recipe, systems, server, tasks=["gsm8k"]))
    assert not errors(second)
    assert list(map(request_of, server.questions[hits:])) == ["2 + 1 = ?"]
    specialist_answers = [answers(recipe, name) for name in NAMES]
    liked = {
        document: max((by_document[document] for by_document in specialist_answers), key=taste)
        for document in DOCUMENTS
    }
    assert answers(recipe, "best_of-judge") == liked
    assert {name: second.systems[name] for name in NAMES} == {name: first.systems[name] for name in NAMES}


# ---------------------------------------------------------------- judged benchmarks


def test_a_judged_benchmark_side_by_side(recipe, server, in_process, tmp_path):
    server.reply = opinion
    results = compare(load(recipe, ["specialist", "best_of"], server, tasks=["alpaca_eval", "mt_bench"]))
    assert not errors(results)
    for name in (*NAMES, "best_of-log_prob"):
        alpaca, talks = (results.systems[name].tasks[task] for task in ("alpaca_eval", "mt_bench"))
        assert (alpaca.value, alpaca.samples) == (pytest.approx(0.6), 5)
        assert (talks.value, talks.samples) == (6.5, 2)
    assert results.tasks["alpaca_eval"].metric == "win_rate" and results.tasks["mt_bench"].metric == "rating"
    pair = results.systems["best_of-log_prob"].paired["best_specialist"]["task/alpaca_eval"]
    assert pair.difference == 0 and pair.ci95 == (0, 0)  # this judge reads no answers
    assert "6.5" in (tmp_path / "out" / "report.html").read_text()


def test_failed_requests_to_the_judge_are_counted_and_repeated(recipe, server, in_process):
    server.reply = lambda prompt: HANG if request_of(prompt) == "win 1" else opinion(prompt)
    silent = compare(load(recipe, ["base"], server, tasks=["alpaca_eval"])).systems["base"].tasks["alpaca_eval"]
    assert (silent.value, silent.samples, silent.counts["error"]) == (0.5, 4, 2)
    in_process.clear()
    hits = server.hits
    server.reply = opinion
    cell = compare(load(recipe, ["base"], server, tasks=["alpaca_eval"])).systems["base"].tasks["alpaca_eval"]
    assert in_process == [("measure", "base")]
    assert list(map(request_of, server.questions[hits:])) == ["win 1"] * 2
    assert (cell.value, cell.samples, cell.counts.get("error", 0)) == (pytest.approx(0.6), 5, 0)
    assert cell.counts["unparsed"] == 2  # an answer all the same
    in_process.clear()
    compare(load(recipe, ["base"], server, tasks=["alpaca_eval"]))
    assert in_process == [] and server.hits == hits + 2


def test_a_benchmark_without_verdicts_is_no_score(recipe, server, in_process, tmp_path):
    server.reply = lambda _: fine("Who knows?")
    results = compare(load(recipe, ["specialist"], server, tasks=["gsm8k", "alpaca_eval"]))
    assert not errors(results)
    for name in NAMES:
        assert list(results.systems[name].tasks) == ["gsm8k"]
    json.dumps(results.model_dump(mode="json"), allow_nan=False)
    assert (tmp_path / "out" / "report.html").is_file()


# ---------------------------------------------------------------- merged weights


@pytest.fixture
def mergekit() -> None:
    try:
        find_program()
    except MissingExtraError:
        if os.environ.get("CI"):
            raise
        pytest.skip("mergekit is not installed (extra: merge)")


@pytest.mark.slow
def test_equivalent_merges_by_two_methods_agree(mergekit, recipe, tiny_run, in_process):
    """theta_0 + sum d_k / K is the mean of the theta_k."""
    rows = {"test": [str(tiny_run.folder / f"{name}.jsonl") for name in NAMES], "tasks": ["gsm8k"]}
    shifted = {"kind": "merge", "method": "task_arithmetic", "weight": 1 / len(NAMES)}
    results = compare(load(recipe, ["base", "specialist", "merge", shifted], **rows))
    assert not errors(results)
    systems = results.systems
    for domain in (*NAMES, "mean"):
        loss = {name: system.loss[domain].nll for name, system in systems.items()}
        assert loss["linear"] == pytest.approx(loss["task_arithmetic"], rel=1e-4)
        assert all(abs(loss["linear"] - loss[name]) > 1e-3 for name in ("base", *NAMES))
    assert answers(recipe, "linear") == answers(recipe, "task_arithmetic")
    for name in ("linear", "task_arithmetic"):
        assert systems[name].parameters == systems["base"].parameters  # one model, nothing trained
        assert systems[name].tokens_per_s.median > 0
    in_process.clear()
    compare(load(recipe, ["base", "specialist", "merge", shifted], **rows))
    assert in_process == []
