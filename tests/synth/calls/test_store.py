"""The store: responses, the lock, money, opening and migrating files, joining files."""

from __future__ import annotations

import itertools
import re
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest

from ultrafuser.errors import DataError
from ultrafuser.synth.calls.request import CUT_OFF, Request, Response
from ultrafuser.synth.calls.schema import Merged
from ultrafuser.synth.calls.store import CallStore, Review


def request(text: str, stage: str = "responses", **changes) -> Request:
    return Request(stage, "math", f"item {text}", "writer", (("user", text),), **changes)


def ok(text: str = "yes", usd: float = 0.0) -> Response:
    return Response("ok", text, "", 10, 5, usd)


@pytest.fixture
def store(tmp_path: Path):
    with CallStore(tmp_path / "calls.sqlite", "recipe 1") as store:
        yield store


# ---------------------------------------------------------------- keys


def test_the_key_depends_on_the_prompt_and_not_on_settings():
    why = request("why?")
    assert why.key == request("why?", schema={"type": "object"}, temperature=1.0, max_tokens=7).key
    assert why.key == Request("responses", "code", "another item", "writer", (("user", "why?"),)).key
    different = [
        request("how?"),
        request("why?", "judge"),
        request("why?", sample=1),
        Request("responses", "math", "", "judge", why.messages),
    ]
    assert len({why.key, *(second.key for second in different)}) == 5
    assert len(request("half a character: \ud83d").key) == 64


# ---------------------------------------------------------------- responses, reviews, verdicts


def test_stored_responses_are_there_for_the_next_process(store: CallStore):
    outcome = Response("ok", "12 \u2260 13\0\n", "length", 7, 3, 0.25)
    store.finish(request("a"), outcome)
    store.finish(request("b"), Response("failed", reason="context overflow: 9 of 8"))
    store.close()
    with CallStore(store.file, "recipe 1") as reader:
        assert reader.response(request("a").key) == outcome
        assert reader.response(request("b").key) == Response("failed", reason="context overflow: 9 of 8")
        assert reader.response(request("c").key) is None
        assert reader.missing([request(x).key for x in "dacb"]) == [request("d").key, request("c").key]


def test_the_first_outcome_stays_and_both_were_paid_for(store: CallStore):
    store.finish(request("a"), ok("first", 0.5))
    store.finish(request("a"), ok("second", 0.25))
    assert store.response(request("a").key) == ok("first", 0.75)
    assert store.spent_usd() == 0.75


def test_lone_surrogates_are_stored_as_question_marks(store: CallStore):
    store.finish(request("a"), ok("x\ud83dy"))
    assert store.response(request("a").key) == ok("x?y")


def test_more_keys_than_a_statement_takes(store: CallStore):
    for i in range(0, 1500, 2):
        store.finish(request(str(i)), ok())
    assert store.missing(request(str(i)).key for i in range(1500)) == [request(str(i)).key for i in range(1, 1500, 2)]


def test_counts_means_and_pace(store: CallStore):
    assert store.counts() == [] and store.calls_per_second() is None and store.tokens() == 0
    for index, text in enumerate("abc"):
        store.finish(request(text), Response("ok", text, "", 10 * index, index, 0.1))
    store.finish(request("d", "judge"), Response("failed", reason="unanswered: status 500: x, after 3 tries"))
    store.finish(request("e", "judge"), Response("failed", reason="unanswered: no reply within 5 s, after 3 tries"))
    counts = [
        (c.stage, c.domain, c.status, c.kind, c.calls, c.prompt_tokens, c.completion_tokens) for c in store.counts()
    ]
    assert counts == [("judge", "math", "failed", "unanswered", 2, 0, 0), ("responses", "math", "ok", "", 3, 30, 3)]
    assert store.counts()[1].usd == pytest.approx(0.3)
    assert store.tokens() == 33
    assert 0 < store.calls_per_second() <= 5


def test_reviews(store: CallStore):
    assert store.reviews.get("row 1") is None
    store.reviews.set("row 1", "accept")
    store.reviews.set("row 2", "edit", "[]")
    store.reviews.set("row 1", "reject", "wrong sum")
    assert store.reviews.get("row 1") == Review("reject", "wrong sum", store.reviews.all()["row 1"].at)
    assert list(store.reviews.all()) == ["row 1", "row 2"]


def test_several_threads_may_write(store: CallStore):
    threads = [
        threading.Thread(target=lambda n=n: [store.finish(request(f"{n} {i}"), ok(usd=0.1)) for i in range(50)])
        for n in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.spent_usd() == 20.0 and store.counts()[0].calls == 200


# ---------------------------------------------------------------- reservations and the lock


def ceilings(*texts: str, usd: float = 0.0) -> dict[str, float]:
    return {request(text).key: usd for text in texts}


def keys(*texts: str) -> list[str]:
    return [request(text).key for text in texts]


def test_a_call_is_under_way_until_it_is_answered(store: CallStore):
    store.finish(request("a"), ok())
    assert store.missing(keys("a", "b", "c")) == keys("b", "c")
    assert store.reserve(ceilings("b", "c")) == keys("b", "c") and store.under_way() == 2
    store.finish(request("b"), ok())
    assert store.missing(keys("a", "b", "c")) == keys("c") and store.under_way() == 1


def test_a_second_run_on_the_same_store_is_refused(store: CallStore):
    message = "another synthesis is running in this folder. Wait until it ends, or choose another folder"
    with pytest.raises(DataError, match=f"{re.escape(str(store.file.parent))}: {message}"):
        CallStore(store.file, "recipe 1")
    with CallStore(store.file, shared=True) as reader:  # status and review work beside a run
        reader.reviews.set("row 1", "accept")
        assert reader.missing(keys("a")) == keys("a")
    store.close()
    CallStore(store.file, "recipe 1").close()


def test_a_second_process_is_refused_and_the_lock_ends_with_the_first(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from ultrafuser.synth.calls.store import CallStore; "
        "store = CallStore(Path(sys.argv[1]), 'r'); print('open', flush=True); sys.stdin.read()"
    )
    file = tmp_path / "calls.sqlite"
    arguments = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        with pytest.raises(DataError, match="another synthesis is running in this folder"):
            CallStore(file, "r")
        process.kill()
    CallStore(file, "r").close()


# ---------------------------------------------------------------- money


def test_no_more_is_reserved_than_the_budget_lasts_for(store: CallStore):
    store.finish(request("z"), ok(usd=0.1))
    assert store.reserve(ceilings("a", "b", "c", "d", usd=0.3), budget_usd=1.0) == keys("a", "b", "c")
    assert (store.spent_usd(), store.reserved_usd()) == (0.1, 0.9)  # in whole billionths: exact
    store.finish(request("a"), ok(usd=0.01))
    assert store.reserve(ceilings("d", usd=0.3), budget_usd=1.0) == []
    store.finish(request("b"), ok(usd=0.29))
    assert store.reserve(ceilings("d", usd=0.3), budget_usd=1.0) == keys("d")
    assert store.reserve(ceilings("e", usd=0.3)) == keys("e")  # no budget, no limit


def test_a_try_that_broke_off_is_paid_for_and_so_is_the_next(store: CallStore):
    store.reserve(ceilings("a", usd=0.25), budget_usd=0.75)
    assert store.reserve_retry(request("a").key, 0.25, 0.75)
    assert (store.spent_usd(), store.reserved_usd()) == (0.25, 0.25)
    assert store.reserve_retry(request("a").key, 0.25, 0.75)
    assert not store.reserve_retry(request("a").key, 0.25, 0.75)
    assert (store.spent_usd(), store.reserved_usd(), store.under_way()) == (0.75, 0.0, 0)
    assert store.reserve(ceilings("a", usd=0.25), budget_usd=0.75) == []
    assert store.reserve(ceilings("a", usd=0.25), budget_usd=1.0) == keys("a")
    store.finish(request("a"), ok(usd=0.125))
    assert store.response(request("a").key).cost_usd == store.spent_usd() == 0.875
    assert not store.reserve_retry(request("a").key, 0.25)  # nothing is reserved any more


def test_a_call_that_is_reserved_again_may_have_been_billed(store: CallStore):
    store.reserve(ceilings("a", usd=1.0))
    store.reserve(ceilings("a", usd=2.0))
    assert (store.spent_usd(), store.reserved_usd()) == (1.0, 2.0)
    store.finish(request("a"), ok(usd=0.5))
    assert store.response(request("a").key).cost_usd == 1.5
    assert (store.spent_usd(), store.reserved_usd()) == (1.5, 0.0)


def test_requests_that_were_not_sent_cost_nothing(store: CallStore):
    store.reserve(ceilings("a", "b", "c", usd=0.25))
    store.release(billed=keys("a", "c"))
    assert (store.spent_usd(), store.reserved_usd(), store.under_way()) == (0.5, 0.0, 0)
    assert store.reserve(ceilings("a", "b", "c")) == keys("a", "b", "c")


def test_requests_sent_by_a_killed_run_count_as_spent_in_the_next_one(store: CallStore):
    store.reserve(ceilings("a", "b", usd=0.25))
    store.finish(request("a"), ok(usd=0.125))
    store._database.close()  # as a kill does: nothing is released
    with CallStore(store.file, shared=True) as reader:
        assert (reader.spent_usd(), reader.reserved_usd(), reader.under_way()) == (0.125, 0.25, 1)
    with CallStore(store.file, "recipe 1") as next_run:
        assert (next_run.spent_usd(), next_run.reserved_usd(), next_run.under_way()) == (0.375, 0.0, 0)
        assert next_run.missing(keys("a", "b")) == keys("b")
        next_run.finish(request("b"), ok(usd=0.125))
        assert next_run.response(request("b").key).cost_usd == 0.375


def test_failures_may_be_forgotten_but_not_what_they_cost(store: CallStore):
    store.finish(request("a"), ok(usd=0.5))
    for text, reason in (("b", "empty: x"), ("c", "empty"), ("d", "emptyish: x")):
        store.finish(request(text), Response("failed", reason=reason, cost_usd=0.25))
    store.finish(request("e"), Response("ok", "half a", CUT_OFF, cost_usd=0.25))
    assert store.forget_failures() == 4
    assert store.missing(keys(*"abcde")) == keys("b", "c", "d", "e") and store.spent_usd() == 1.5
    store.finish(request("b"), Response("failed", reason="empty: again", cost_usd=0.25))
    assert store.forget_failures() == 1 and store.spent_usd() == 1.75


def test_verdicts_stay_as_they_are_and_are_taken_over(store: CallStore, tmp_path: Path):
    store.verdicts.add({"a": "", "b": "tests: failed"})
    store.verdicts.add({"a": "tests: timeout"})
    assert store.verdicts.get(["a", "b", "c"]) == {"a": "", "b": "tests: failed"}
    with CallStore(tmp_path / "other.sqlite", store.identity()) as second:
        second.verdicts.add({"b": "", "c": "tests: failed"})
    store.merge(tmp_path / "other.sqlite")
    assert store.verdicts.get(["a", "b", "c"]) == {"a": "", "b": "", "c": "tests: failed"}


def test_the_running_sum_is_the_sum(store: CallStore):
    store.reserve(ceilings(*"abcdef", usd=0.1))
    for text in "abc":
        store.finish(request(text), ok(usd=0.07))
    store.finish(request("a"), ok(usd=0.02))
    store.reserve_retry(request("d").key, 0.2)
    db = sqlite3.connect(store.file)
    [(calls,)], [(lost,)], [(reserved,)] = (
        db.execute(f"SELECT sum({column}) FROM {table}").fetchall()
        for table, column in (("calls", "cost"), ("lost", "cost"), ("sent", "ceiling"))
    )
    assert (store.spent_usd(), store.reserved_usd()) == ((calls + lost) / 1e9, reserved / 1e9) == (0.33, 0.4)


# ---------------------------------------------------------------- files


def test_another_recipes_file_is_refused(store: CallStore):
    store.close()
    with pytest.raises(
        DataError, match=r"calls.sqlite: holds the calls of another recipe \('recipe 1'\), expected 'recipe 2'; choose"
    ):
        CallStore(store.file, "recipe 2")
    with CallStore(store.file) as any_recipe:
        assert any_recipe.identity() == "recipe 1"


@pytest.mark.parametrize("version, next_step", [(3, "upgrade ultrafuser"), (0, "move the file away")])
def test_another_versions_file_is_refused(store: CallStore, version, next_step):
    store._database.connection.execute(f"PRAGMA user_version = {version}")
    store.close()
    with pytest.raises(DataError, match=f"written in version {version} of the format, expected 2; {next_step}"):
        CallStore(store.file, "recipe 1")


def test_other_files_are_refused(tmp_path: Path):
    text, foreign, empty = (tmp_path / name for name in ("text", "foreign", "empty"))
    text.write_text("not a database, but long enough to have a header of a hundred bytes" * 3)
    empty.write_text("")
    sqlite3.connect(foreign).execute("CREATE TABLE t (x)")
    for file, problem in ((text, "file is not a database"), (foreign, "another program's database")):
        with pytest.raises(DataError, match=rf"{file.name}: not a file of calls \({problem}\); move it away"):
            CallStore(file, "recipe 1")
    with pytest.raises(DataError, match=r"empty: not a file of calls \(an empty file\)"):
        CallStore(empty)
    with pytest.raises(DataError, match="missing: no such file, expected the calls of a run; start one first"):
        CallStore(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(DataError, match="cannot be opened .*; expected a folder that can be written to"):
        CallStore(text / "calls.sqlite", "recipe 1")


def test_a_full_disk_is_an_error_and_stored_responses_stay(store: CallStore):
    store.finish(request("a"), ok())
    pages = store._database.connection.execute("PRAGMA page_count").fetchone()[0]
    store._database.connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(
        DataError, match=r"calls.sqlite: cannot be used \(database or disk is full\); free disk space .*kept"
    ):
        store.finish(request("b"), ok("x" * 100_000))
    assert store.missing(keys("a", "b")) == keys("b")
    store._database.connection.execute("PRAGMA max_page_count = 1000000")
    store.finish(request("b"), ok("x" * 100_000))
    assert store.missing(keys("a", "b")) == []


def test_a_file_that_another_program_locks(store: CallStore, monkeypatch):
    store._database.connection.execute("PRAGMA busy_timeout = 50")
    second = sqlite3.connect(store.file, isolation_level=None)
    second.execute("BEGIN IMMEDIATE")
    with pytest.raises(DataError, match=r"cannot be used \(database is locked\); see what else uses it"):
        store.finish(request("a"), ok())
    assert store.response(request("a").key) is None  # readers do not wait
    second.execute("COMMIT")
    store.finish(request("a"), ok())


VERSION_1 = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT);
CREATE TABLE calls (key TEXT PRIMARY KEY, stage TEXT, domain TEXT, item TEXT, role TEXT, sample INTEGER,
 status TEXT, reason TEXT, prompt_tokens INTEGER, completion_tokens INTEGER, cost INTEGER, worker TEXT, at REAL, text TEXT);
CREATE INDEX calls_by_stage ON calls (stage, domain, status);
CREATE INDEX calls_by_time ON calls (at);
CREATE TABLE leases (key TEXT PRIMARY KEY, worker TEXT, expires REAL, reserved INTEGER, lost INTEGER);
CREATE TABLE dropped (worker TEXT, key TEXT, cost INTEGER, PRIMARY KEY (worker, key));
CREATE TABLE verdicts (key TEXT PRIMARY KEY, reason TEXT);
CREATE TABLE reviews (row TEXT PRIMARY KEY, decision TEXT, note TEXT, at REAL);
CREATE TABLE money (spent INTEGER, reserved INTEGER, tokens INTEGER);
INSERT INTO money VALUES (0, 0, 0);
CREATE TRIGGER calls_INSERT AFTER INSERT ON calls BEGIN UPDATE money SET spent = spent + NEW.cost, reserved = reserved + 0, tokens = tokens + (NEW.prompt_tokens + NEW.completion_tokens); END;
CREATE TRIGGER calls_DELETE AFTER DELETE ON calls BEGIN UPDATE money SET spent = spent - OLD.cost, reserved = reserved - 0, tokens = tokens - (OLD.prompt_tokens + OLD.completion_tokens); END;
CREATE TRIGGER calls_UPDATE AFTER UPDATE ON calls BEGIN UPDATE money SET spent = spent + NEW.cost - OLD.cost, reserved = reserved + 0 - 0, tokens = tokens + (NEW.prompt_tokens + NEW.completion_tokens) - (OLD.prompt_tokens + OLD.completion_tokens); END;
CREATE TRIGGER dropped_INSERT AFTER INSERT ON dropped BEGIN UPDATE money SET spent = spent + NEW.cost, reserved = reserved + 0, tokens = tokens + 0; END;
CREATE TRIGGER dropped_DELETE AFTER DELETE ON dropped BEGIN UPDATE money SET spent = spent - OLD.cost, reserved = reserved - 0, tokens = tokens - 0; END;
CREATE TRIGGER dropped_UPDATE AFTER UPDATE ON dropped BEGIN UPDATE money SET spent = spent + NEW.cost - OLD.cost, reserved = reserved + 0 - 0, tokens = tokens + 0 - 0; END;
CREATE TRIGGER leases_INSERT AFTER INSERT ON leases BEGIN UPDATE money SET spent = spent + NEW.lost, reserved = reserved + NEW.reserved, tokens = tokens + 0; END;
CREATE TRIGGER leases_DELETE AFTER DELETE ON leases BEGIN UPDATE money SET spent = spent - OLD.lost, reserved = reserved - OLD.reserved, tokens = tokens - 0; END;
CREATE TRIGGER leases_UPDATE AFTER UPDATE ON leases BEGIN UPDATE money SET spent = spent + NEW.lost - OLD.lost, reserved = reserved + NEW.reserved - OLD.reserved, tokens = tokens + 0 - 0; END;
INSERT INTO facts VALUES ('identity', 'recipe 1');
INSERT INTO dropped VALUES ('host|1|2|x', 'old', 250000000);
INSERT INTO verdicts VALUES ('code', 'tests: failed');
INSERT INTO reviews VALUES ('row 1', 'reject', 'dull', 5.0);
PRAGMA application_id = 1430672217;
PRAGMA user_version = 1;
"""  # what version 0.1 wrote


@pytest.fixture
def version_1(tmp_path: Path) -> Path:
    """A store of the first version: one answer, a call that a killed process had under way, a lost try."""
    file = tmp_path / "version 1.sqlite"
    with closing(sqlite3.connect(file)) as db:
        db.executescript(VERSION_1)
        db.execute(
            "INSERT INTO calls VALUES (?, 'responses', 'math', 'item a', 'writer', 0, 'ok', '', 10, 5, 500000000, 'host|1|2|x', 1.0, 'yes')",
            (request("a").key,),
        )
        leases = [(request("b").key, "host|1|2|x", 9e9, 125_000_000, 0), (request("c").key, "", 0, 0, 62_500_000)]
        db.executemany("INSERT INTO leases VALUES (?, ?, ?, ?, ?)", leases)
        db.commit()
    return file


def test_a_store_of_the_first_version_is_migrated(version_1: Path):
    for _ in range(2):  # the second time it is of this version already
        with CallStore(version_1, "recipe 1") as store:
            assert store.response(request("a").key) == ok("yes", 0.5)
            assert store.missing(keys("a", "b", "c")) == keys("b", "c")
            assert (store.spent_usd(), store.reserved_usd(), store.under_way()) == (0.9375, 0.0, 0)
            assert store.verdicts.get(["code"]) == {"code": "tests: failed"}
            assert store.reviews.get("row 1") == Review("reject", "dull", 5.0) and store.tokens() == 15
    with CallStore(version_1, "recipe 1") as store:
        store.finish(request("c"), ok(usd=0.0625))
        assert store.response(request("c").key).cost_usd == 0.125 and store.spent_usd() == 1.0


def test_a_store_of_the_first_version_joins(version_1: Path, store: CallStore):
    assert store.merge(version_1) == Merged(added=1, duplicates=0)
    assert store.merge(version_1) == Merged(added=0, duplicates=0)
    assert store.spent_usd() == 0.9375 and store.response(request("a").key) == ok("yes", 0.5)


def test_readers_migrate_too(version_1: Path):
    with CallStore(version_1, shared=True) as reader:
        assert reader.spent_usd() == 0.9375 and reader.under_way() == 0


# ---------------------------------------------------------------- joining files


def filled(file: Path, *outcomes: tuple[str, Response]) -> Path:
    with CallStore(file, "recipe 1") as store:
        for text, outcome in outcomes:
            store.finish(request(text), outcome)
    return file


def content(store: CallStore) -> dict[str, tuple[str, str]]:
    return {
        text: (response.status, response.text) for text in "abcdef" if (response := store.response(request(text).key))
    }


def test_files_join_to_the_same_in_any_order_and_however_often(tmp_path: Path):
    files = [
        filled(
            tmp_path / "1", ("a", ok("one", 1.0)), ("b", ok("zwei", 1.0)), ("c", Response("failed", reason="empty: x"))
        ),
        filled(tmp_path / "2", ("b", ok("two", 2.0)), ("c", ok("three", 2.0)), ("d", ok("four", 2.0))),
        filled(tmp_path / "3", ("b", ok("du\u00e9", 4.0)), ("e", ok("five", 4.0))),
    ]
    results = []
    for index, order in enumerate(itertools.permutations(files)):
        with CallStore(tmp_path / f"joined {index}", "recipe 1") as store:
            for file in (*order, order[0], order[2]):
                store.merge(file)
            results.append((content(store), store.spent_usd()))
    expected = {"a": "one", "b": "du\u00e9", "c": "three", "d": "four", "e": "five"}
    assert results == [({key: ("ok", text) for key, text in expected.items()}, 16.0)] * 6  # all that was paid for


def test_copies_join_without_being_counted_twice(tmp_path: Path):
    original = filled(tmp_path / "whole", ("a", ok("one", 1.0)))
    for name, text in (("left", "b"), ("right", "c")):
        (tmp_path / name).write_bytes(original.read_bytes())
        filled(tmp_path / name, (text, ok(name, 2.0)))
    with CallStore(original, "recipe 1") as store:
        assert store.merge(tmp_path / "left") == store.merge(tmp_path / "right") == Merged(added=1, duplicates=0)
        assert store.spent_usd() == 5.0
        assert content(store) == {"a": ("ok", "one"), "b": ("ok", "left"), "c": ("ok", "right")}


def test_reviews_and_lost_tries_join_too(tmp_path: Path, store: CallStore):
    with CallStore(tmp_path / "other", "recipe 1") as second:
        store.reviews.set("row 1", "accept")
        second.reviews.set("row 1", "reject", "later")
        second.reviews.set("row 2", "accept")
        second.reserve(ceilings("a", usd=0.5))  # and is killed
    for _ in range(2):
        store.merge(tmp_path / "other")
    assert {row: review.decision for row, review in store.reviews.all().items()} == {
        "row 1": "reject",
        "row 2": "accept",
    }
    assert store.spent_usd() == 0.5
    assert store.reserve(ceilings("a")) == keys("a")


def test_files_that_cannot_be_joined(tmp_path: Path, store: CallStore):
    CallStore(tmp_path / "foreign", "recipe 2").close()
    with pytest.raises(
        DataError, match=r"foreign: holds the calls of the recipe 'recipe 2', expected 'recipe 1' as in .*calls"
    ):
        store.merge(tmp_path / "foreign")
    with CallStore(tmp_path / "used", "recipe 1"):
        with pytest.raises(
            DataError, match=f"{re.escape(str(tmp_path))}: another synthesis is running in this folder. Wait"
        ):
            store.merge(tmp_path / "used")
    with pytest.raises(DataError, match="missing: no such file"):
        store.merge(tmp_path / "missing")
