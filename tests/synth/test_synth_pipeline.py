"""Whole runs on a real store: output files, problems found before the first request, shards, reviews, status."""

from __future__ import annotations

import importlib.util
import json
import os
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from fake_async_endpoint import fake_async_endpoint
from fake_endpoint import failing as status_of
from fake_endpoint import fine
from fake_writer import GERMAN, FakeClient, Memory, Writer, misbehaving, reply_to, tiny
from ultrafuser import sandbox
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.errors import BudgetExceeded, DataError, EndpointError, MissingExtraError, RecipeError, SandboxError
from ultrafuser.progress import Progress
from ultrafuser.synth import pipeline
from ultrafuser.synth.calls.request import Response
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.output import dataset
from ultrafuser.synth.output.card import CARD, INSTRUCTIONS, PARQUET, RECIPE, REPORT, ROWS, TOPICS
from ultrafuser.synth.pipeline import STORE, check, derive, join, synthesise
from ultrafuser.synth.plan import plan
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import load_synth_recipe
from ultrafuser.synth.review.session import ALL_DOMAINS, ReviewSession
from ultrafuser.synth.status import status
from ultrafuser.synth.text import checks


@pytest.fixture
def recipe(tmp_path):
    return tiny(f"output={tmp_path / 'out'}")


def go(recipe, writer=None, **options):
    return synthesise(recipe, clients={"writer": FakeClient(writer or Writer())}, **options)


def rows_of(recipe):
    return [row.to_dict() for row in load_rows(str(Path(recipe.output) / ROWS))]


# ---------------------------------------------------------------- what is written


def test_a_run_writes_rows_card_report_topics_and_recipe(recipe):
    data = go(recipe)
    folder = Path(recipe.output)
    assert rows_of(recipe) == [row.to_dict() for row in data.rows]
    assert [row.to_dict() for row in load_rows(str(folder / PARQUET))] == rows_of(recipe)
    assert {file.name for file in folder.iterdir()} >= {ROWS, PARQUET, CARD, REPORT, TOPICS, RECIPE, STORE}
    report = json.loads((folder / REPORT).read_text())
    assert report["rows"] == len(data.rows) == sum(report["rows_by_domain"].values())
    for entry in report["stages"]:
        assert entry["asked"] == entry["kept"] + entry["open"] + sum(entry["rejected"].values())
    assert sum(count["calls"] for count in report["calls"]) > 150
    topics = json.loads((folder / TOPICS).read_text())
    assert set(topics) == {"text", "math"} and "Tea" in topics["text"]
    assert load_synth_recipe(folder / RECIPE) == recipe


def test_a_second_run_sends_no_request_and_writes_the_same(recipe):
    go(recipe, misbehaving(0.3))
    files = {name: (Path(recipe.output) / name).read_bytes() for name in (ROWS, REPORT, CARD, TOPICS)}
    idle = Writer()
    go(recipe, idle)
    assert not idle.asked
    assert {name: (Path(recipe.output) / name).read_bytes() for name in files} == files


def test_the_store_and_memory_give_the_same(recipe):
    go(recipe, misbehaving(0.3))
    assert rows_of(recipe) == [row.to_dict() for row in derive(recipe, Prompts(), Memory(misbehaving(0.3))).rows]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full to write to")
@pytest.mark.parametrize("name", [ROWS, PARQUET, CARD, REPORT])
def test_a_disk_that_is_full_when_the_data_set_is_written_costs_nothing(recipe, name):
    folder = Path(recipe.output)
    go(recipe, Writer(), until="responses")
    draft = folder / f".{name}.{os.getpid()}.tmp"
    draft.symlink_to("/dev/full")
    with pytest.raises(
        DataError, match=f"{name}: could not be written: the disk is full. Nothing was changed. Free space"
    ):
        go(recipe)
    assert not draft.is_symlink() and not (name != REPORT and (folder / name).exists())
    idle = Writer()
    go(recipe, idle)
    assert not idle.asked and len(rows_of(recipe)) == 144


def test_stopping_after_a_stage_writes_the_report_alone(recipe):
    data = go(recipe, until="sub_topics")
    folder = Path(recipe.output)
    assert data.stopped_after == "sub_topics"
    assert (folder / TOPICS).is_file() and (folder / REPORT).is_file()
    assert not (folder / ROWS).exists() and not (folder / INSTRUCTIONS).exists()


@pytest.mark.parametrize(
    ("until", "origins"),
    [
        ("instructions", {"first"}),
        ("expand", {"first", "strong", "weak"}),
        ("complex", {"first", "strong", "weak", "first complex", "strong complex", "weak complex"}),
        ("responses", {"first", "strong", "weak", "first complex", "strong complex", "weak complex"}),
    ],
)
def test_kept_instructions_are_written(recipe, until, origins):
    go(recipe, misbehaving(0.2), until=until)
    written = [json.loads(line) for line in (Path(recipe.output) / INSTRUCTIONS).read_text().splitlines()]
    assert list(written[0]) == ["id", "domain", "topic", "subtopic", "text", "origin"]
    assert {item["origin"] for item in written} == origins
    instructions = [item for item in derive(recipe, Prompts(), Memory(misbehaving(0.2)), until=until).instructions]
    assert [(item["id"], item["text"]) for item in written] == [(item.id, item.text) for item in instructions]


def test_topics_and_instructions_are_there_before_the_answers(recipe):
    def dying(request):
        if request.stage == "responses":
            raise EndpointError("no more")

    with pytest.raises(EndpointError):
        go(recipe, Writer(dying))
    folder = Path(recipe.output)
    assert (folder / TOPICS).is_file() and len((folder / INSTRUCTIONS).read_text().splitlines()) == 144
    assert not (folder / REPORT).exists()


def test_join_writes_the_stored_answers_after_the_budget_ends(recipe):
    with pytest.raises(BudgetExceeded, match="`ultrafuser synth join RECIPE` writes the data set of them"):
        go(recipe, budget_tokens=2000)
    assert not (Path(recipe.output) / ROWS).exists()
    assert 0 < len(join(recipe).rows) < 144


def test_a_run_without_a_row_says_why(recipe):
    refusing = Writer(
        lambda request: Response("ok", "I'm sorry, but I can't do that.") if request.stage == "responses" else None
    )
    with pytest.raises(DataError, match=r"no row is left; the most frequent reasons: refusal \(144\)"):
        go(recipe, refusing)
    assert json.loads((Path(recipe.output) / REPORT).read_text())["rows"] == 0


def test_other_filters_need_no_new_questions(recipe, tmp_path):
    go(recipe)
    stricter = tiny(f"output={recipe.output}", "filters.min_answer_chars=82")
    assert 0 < len(join(stricter).rows) < 144
    with pytest.raises(DataError, match="no such file, expected the calls of a run"):
        join(tiny(f"output={tmp_path / 'changed'}"))


# ---------------------------------------------------------------- before anything is asked


def failing(request):
    raise AssertionError("nothing should be asked")


@pytest.mark.parametrize(
    ("changes", "options", "kind", "problem"),
    [
        (["filters.decontaminate=[nowhere/test.jsonl]"], {}, DataError, "nowhere/test.jsonl"),
        (["prompts=nowhere"], {}, RecipeError, "prompts: no folder nowhere"),
        ([], {"until": "answers"}, RecipeError, "--until answers: no such stage, expected one of meta_topics"),
        ([], {"shard": (3, 2)}, RecipeError, "--shard 3/2: expected NUMBER/HOW-MANY"),
        (["budget_usd=5"], {}, RecipeError, "a budget of $5.00, but no model has a price"),
        ([], {"budget_usd": 5.0}, RecipeError, "a budget of $5.00, but no model has a price"),
        ([], {"shard": (1, 2)}, DataError, "the topics are not complete, and every shard needs the same ones"),
    ],
)
def test_problems_that_stop_a_run_at_once(tmp_path, changes, options, kind, problem):
    with pytest.raises(kind) as error:
        go(tiny(f"output={tmp_path / 'out'}", *changes), Writer(failing), **options)
    assert problem in str(error.value)


def test_a_prompt_with_an_undefined_variable_stops_a_run_at_once(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "judge.jinja").write_text("{{ colour }}")
    with pytest.raises(RecipeError, match="judge.jinja: undefined variable 'colour'"):
        go(tiny(f"output={tmp_path / 'out'}", f"prompts={tmp_path / 'mine'}"), Writer(failing))


def test_tests_without_a_sandbox(monkeypatch, recipe):
    monkeypatch.setattr(sandbox, "available", lambda: "bubblewrap is not installed")
    wanted = ["domains.math.check=python", "domains.math.tests=true"]
    with pytest.raises(
        SandboxError, match="domains with 'tests' need a sandbox, and there is none: .*unsafe_code=true"
    ):
        check(tiny(*wanted))
    check(tiny(*wanted, "filters.unsafe_code=true"))
    check(recipe)


def test_samples_without_math_verify(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "math_verify" else find_spec(name))
    with pytest.raises(MissingExtraError, match="math-verify"):
        check(tiny("domains.math.samples=2"))
    check(tiny())


def test_near_duplicates_without_datasketch(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(MissingExtraError, match="datasketch"):
        check(tiny("filters.near_duplicates=0.8"))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (
            "/nonexistent/model",
            "model 'answers': no file or folder /nonexistent/model, and no hub id; set models.answers.model",
        ),
        ("some/hub-id+./adapter", "model 'answers': no file or folder ./adapter"),
        (
            "package:nowhere/model",
            "model 'answers': package:nowhere/model: the Python package 'nowhere' is not installed",
        ),
    ],
)
def test_a_local_model_that_is_not_there_stops_a_run_at_once(tmp_path, model, problem):
    models = [{"name": "writer", "endpoint": "writer@http://127.0.0.1:9/v1"},
              {"name": "answers", "endpoint": "local", "model": model}]  # fmt: skip
    recipe = tiny("calls.responses=answers", f"output={tmp_path / 'out'}", models=models)
    with pytest.raises(RecipeError) as error:
        synthesise(recipe)
    assert problem in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(EndpointError):  # it is not asked before the answers
        synthesise(recipe, until="sub_topics")


def test_an_unreachable_model_is_found_before_the_first_stage(tmp_path):
    pytest.importorskip("aiohttp")
    with fake_async_endpoint(lambda question, repeats: fine(reply_to(question))) as cheap:
        with fake_async_endpoint(lambda question, repeats: status_of(401)) as strong:
            models = [cheap.recipe("cheap").model_dump(), strong.recipe("strong").model_dump()]
            recipe = tiny("calls.responses=strong", f"output={tmp_path / 'out'}", models=models)
            with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
                synthesise(recipe)
            assert set(cheap.asked) <= {"Say ok."} and set(strong.asked) == {"Say ok."}
            synthesise(recipe, until="instructions")  # which asks the cheap one alone
            num_hits = strong.hits
            with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
                synthesise(recipe)
            assert "Say ok." not in [body["messages"][0]["content"] for body in strong.bodies[num_hits:]]
            assert cheap.asked["Say ok."] == 1


# ---------------------------------------------------------------- shards


def test_shards_are_joined_to_the_same_data_set(tmp_path):
    expected = tiny(f"output={tmp_path / 'expected'}")
    go(expected, misbehaving(0.2))
    first = tiny(f"output={tmp_path / 'first'}")
    writer = misbehaving(0.2)
    go(first, writer, until="sub_topics")
    stores = []
    for number in (1, 2, 3):
        part = tiny(f"output={tmp_path / f'part{number}'}")
        with CallStore(Path(first.output) / STORE) as store:
            store._database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        Path(part.output).mkdir()
        (Path(part.output) / STORE).write_bytes((Path(first.output) / STORE).read_bytes())
        assert go(part, writer, shard=(number, 3)).rows == []
        stores.append(Path(part.output) / STORE)
    join(first, stores)
    assert rows_of(first) == rows_of(expected)
    assert set(writer.asked.values()) == {1}


def test_joining_a_file_that_is_not_a_store(recipe, tmp_path):
    go(recipe)
    (tmp_path / "letter.txt").write_text("Dear store")
    with pytest.raises(DataError, match="letter.txt: not a file of calls"):
        join(recipe, [tmp_path / "letter.txt"])


# ---------------------------------------------------------------- reviews


def test_decisions_of_a_review_are_in_the_next_data_set(recipe):
    go(recipe)
    session = ReviewSession.open(recipe)
    assert session.domains == (ALL_DOMAINS, *dict.fromkeys(row.domain for row in session.rows))
    assert session.select() == list(range(144)) and len(session.select("math")) == 72
    a, b, c, d = (session.rows[index] for index in range(4))
    session.accept(0)
    session.reject(1, "dull")
    session.edit(2, ["A better question?", "A better answer, with more words."])
    session.edit(3, [content for _, content in d.messages])  # nothing changed
    assert session.select() == list(range(4, 144))
    assert (session.select(state="rejected"), session.select(state="edited"), session.select(state="accepted")) == (
        [1],
        [2],
        [0, 3],
    )
    assert session.summary() == "4 of 144 rows reviewed: 2 accepted, 1 edited, 1 rejected"
    assert session.messages(2)[0] == ("user", "A better question?")
    assert session.decision(b) == "reject" and session.decision(session.rows[9]) == ""
    session.store.close()
    go(recipe, Writer(failing))
    rows = {row["id"]: row for row in rows_of(recipe)}
    assert len(rows) == 143 and b.id not in rows and a.id in rows
    assert rows[c.id]["messages"][0]["content"] == "A better question?"
    session = ReviewSession.open(recipe)  # of rows that hold the edit already
    [edited_index] = session.select(state="edited")
    session.accept(edited_index)
    session.edit(edited_index, [content for _, content in session.messages(edited_index)])
    assert session.decision(session.rows[edited_index]) == "edit"
    session.store.close()
    assert {row["id"]: row for row in [*map(Row.to_dict, join(recipe).rows)]} == rows


def test_a_decision_holds_for_the_words_that_were_read_not_for_the_place(recipe):
    go(recipe)
    session = ReviewSession.open(recipe)
    for index in range(len(session.rows)):
        session.reject(index)
    session.store.close()
    changed = recipe.model_copy(update={"seed": recipe.seed + 1})  # other instructions are rewritten
    assert 0 < len(go(changed).rows) < 144


def test_another_model_under_the_same_name_gets_its_own_requests(recipe):
    go(recipe)
    idle = Writer()
    go(recipe.model_copy(update={"models": [recipe.models[0].model_copy(update={"prompt_usd": 3.0})]}), idle)
    assert not idle.asked
    endpoint = recipe.models[0].endpoint.model_copy(update={"model": "better"})
    model = recipe.models[0].model_copy(update={"endpoint": endpoint})
    busy = Writer()
    data = go(recipe.model_copy(update={"models": [model]}), busy)
    assert busy.asked and {row.source for row in data.rows} == {"synthetic: better"}


def test_verdicts_on_code_are_kept(recipe, monkeypatch):
    code = "Like this:\n```python\ndef f():\n    return %d\n```\n\n```python\nassert f() == 1\n```"
    writer = Writer(
        lambda request: Response("ok", code % (request.item < "8")) if request.stage == "responses" else None
    )
    recipe = tiny(f"output={recipe.output}", "domains.math.check=python", "domains.math.tests=true")
    ran = []

    def run_tests(cases, *, unsafe):
        ran.extend(cases)
        return ["tests: failed" if "return 0" in answer else None for answer, _ in cases]

    monkeypatch.setattr(checks, "run_tests", run_tests)
    first = go(recipe, writer)
    assert len(ran) == len(set(ran)) == 2
    assert any(item.rejected["tests: failed"] for item in first.ledger.entries.values())
    assert [row.id for row in join(recipe).rows] == [row.id for row in first.rows]
    assert status(recipe).rows and len(ran) == 2


def test_answers_of_the_same_code_have_the_same_verdict(recipe, monkeypatch):
    code = "In %s words:\n```python\ndef f():\n    return 1\n```\n\n```python\nassert f() == 1\n```"
    recipe = tiny(f"output={recipe.output}", "domains.math.check=python", "domains.math.tests=true")
    monkeypatch.setattr(checks, "run_tests", lambda cases, *, unsafe: [None] * len(cases))
    data = go(
        recipe, Writer(lambda request: Response("ok", code % request.item) if request.stage == "responses" else None)
    )
    assert data.ledger.entry("checks", "math").kept == 72 and data.ledger.pending() == 0
    assert next(item for item in status(recipe).stages if item.stage == "checks").open == 0


def test_the_first_verdict_of_a_case_stays_and_progress_is_shown(recipe, monkeypatch):
    class Seen(Progress):
        def start(self, stage, total):
            events.append((stage, total))

        def advance(self, steps=1, note=""):
            events.append(steps)

    events, cases = [], [(f"```python\nx = {number}\n```", "assert x") for number in range(5)]
    monkeypatch.setattr(pipeline, "TESTS_AT_ONCE", 3)
    with CallStore(Path(recipe.output) / STORE, recipe.identity()) as store:

        def run_tests(cases, *, unsafe):
            store.verdicts.add({checks.case_key(case): "tests: timeout" for case in cases})  # theirs comes first
            return [None] * len(cases)

        monkeypatch.setattr(checks, "run_tests", run_tests)
        assert set(pipeline.run_missing_tests(recipe, store, cases, Seen()).values()) == {"tests: timeout"}
        assert events == [("answers run with their tests", 5), 3, 2]
        assert set(pipeline.run_missing_tests(recipe, store, cases, Seen()).values()) == {"tests: timeout"}
        assert len(events) == 3


def test_status_runs_no_code(recipe, monkeypatch):
    code = "Like this:\n```python\ndef f():\n    return 1\n```\n\n```python\nassert f() == 1\n```"
    recipe = tiny(f"output={recipe.output}", "domains.math.check=python", "domains.math.tests=true")
    go(
        recipe,
        Writer(lambda request: Response("ok", code) if request.stage == "responses" else None),
        until="responses",
    )
    monkeypatch.setattr(checks, "run_tests", lambda *_, **__: pytest.fail("code was run"))
    assert next(item for item in status(recipe).stages if item.stage == "checks").open == 72


def test_replies_in_another_language_are_left_out(recipe):
    pytest.importorskip("py3langid")
    english = (
        "Water boils at a hundred degrees, and on high mountains it boils at fewer, since the pressure is lower there."
    )
    writer = Writer(
        lambda request: (
            Response("ok", GERMAN if request.domain == "math" else english) if request.stage == "responses" else None
        )
    )
    recipe = tiny(f"output={recipe.output}", "filters.language=en", "filters.language_confidence=0.9")
    data = go(recipe, writer)
    rejected = {key: item.rejected["another language"] for key, item in data.ledger.entries.items()}
    assert rejected["filters", "math"] > 60 and not rejected["filters", "text"]
    assert {row.domain for row in data.rows} == {"text"}


def test_edits_that_a_review_refuses(recipe, tmp_path):
    with pytest.raises(DataError, match="run `ultrafuser synth RECIPE` to its end first"):
        ReviewSession.open(recipe)
    go(recipe)
    session = ReviewSession.open(recipe)
    with pytest.raises(DataError, match="the message of the assistant is empty"):
        session.edit(0, ["Fine?", "  "])
    with pytest.raises(DataError, match="got 1 messages, expected 2"):
        session.edit(0, ["Fine?"])
    session.store.close()


def test_the_page_without_gradio(recipe, monkeypatch):
    import sys

    from ultrafuser.synth.review.page import review_page

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"ultrafuser\[review\]"):
        review_page(None)


def test_an_edit_that_another_hand_spoilt(recipe):
    go(recipe)
    session = ReviewSession.open(recipe)
    session.store.reviews.set(session.rows[0].id, "edit", "nonsense")
    session.store.close()
    with pytest.raises(DataError, match="the edit in the store is not a list"):
        join(recipe)
    assert dataset.DECISIONS == ("accept", "edit", "reject")


# ---------------------------------------------------------------- status and plan


def test_status_of_a_finished_run(recipe):
    go(recipe)
    current = status(recipe)
    assert current.rows == {"math": 72, "text": 72}
    assert (current.left_calls, current.left_usd, current.under_way) == (0, 0.0, 0)
    stages = {item.stage: item for item in current.stages}
    assert (stages["responses"].asked, stages["responses"].kept, stages["responses"].share_kept) == (144, 144, 1.0)
    assert json.loads(json.dumps(current.to_dict()))["calls"] == current.calls


def test_status_in_the_middle(recipe):
    with pytest.raises(DataError, match="no such file, expected the calls of a run"):
        status(recipe)
    go(recipe, until="instructions")
    current = status(recipe)
    stages = {item.stage: item for item in current.stages}
    assert stages["responses"].open == stages["responses"].asked > 0
    assert current.left_calls > 140
    assert current.rows == {}


def test_the_time_left_is_that_of_the_calls_left_at_the_pace_of_the_last_minutes(recipe, monkeypatch):
    go(recipe, until="instructions")
    with closing(sqlite3.connect(Path(recipe.output) / STORE)) as db, db:
        calls, first = db.execute("SELECT count(*), min(at) FROM calls").fetchone()
    monkeypatch.setattr(time, "time", lambda: first + 100)
    current = status(recipe)
    assert current.calls == calls and current.left_s == pytest.approx(current.left_calls * 100 / calls)
    monkeypatch.setattr(time, "time", lambda: first + 100_000)  # nothing was answered for a day
    assert status(recipe).left_s is None


def test_the_plan_matches_the_requests_to_a_perfect_writer(tmp_path):
    recipe = tiny("turns=2", "filters.min_score=1", "domains.math.samples=2", "domains.math.agreement=0", "complex_share=1",
                  f"output={tmp_path / 'out'}", "models.writer.prompt_usd=1", "models.writer.completion_usd=2")  # fmt: skip
    planned = plan(recipe, Prompts())
    memory = Memory(Writer())
    derive(recipe, Prompts(), memory)
    for stage in {item.stage for item in planned}:
        calls = sum(item.calls for item in planned if item.stage == stage)
        assert calls == sum(request.stage == stage for request in memory.requests.values()), stage
    for item in planned:
        assert item.usd == pytest.approx((item.prompt_tokens + 2 * item.completion_tokens) / 1e6)
        assert item.prompt_tokens > 20 * item.calls


def test_the_plan_ends_where_the_run_does_and_tells_like_stages_apart():
    expected = plan(tiny(turns=2), Prompts())
    early = ("meta_topics", "sub_topics", "instructions", "expand")
    assert plan(tiny(turns=2), Prompts(), "expand") == [item for item in expected if item.stage in early]
    assert {(item.stage, item.part) for item in expected if item.part} == {
        ("expand", "strong"), ("expand", "weak"), ("turns", "user"), ("turns", "answer"),
    }  # fmt: skip
    samples = tiny("domains.math.samples=2")
    assert [item.stage for item in plan(samples, Prompts(), "checks")][-1] == "samples"
    assert [item.stage for item in plan(samples, Prompts(), "responses")][-1] == "responses"


def test_the_papers_sizes_cost_something_known():
    recipe = load_synth_recipe(Path(__file__).parents[2] / "recipes" / "ultrachat2.yaml")
    planned = plan(recipe, Prompts(recipe.prompts))
    answers = sum(item.calls for item in planned if item.stage == "responses")
    assert 310_000 <= answers <= 360_000
    assert all(item.calls > 0 for item in planned)


def test_failed_requests_are_repeated_on_demand(recipe):
    broken = Writer(
        lambda request: Response("failed", reason="context overflow: x") if request.stage == "responses" else None
    )
    with pytest.raises(DataError, match=r"call failed: context overflow \(144\)"):
        go(recipe, broken)
    with pytest.raises(DataError):
        go(recipe, Writer())  # kept as it is
    assert len(go(recipe, Writer(), retry_failed=True).rows) == 144
