"""The store: what is kept, who holds a call, what it costs, which files it opens, and how files are joined."""

from __future__ import annotations

import itertools
import os
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ultrafuser.errors import DataError
from ultrafuser.synth.calls import store as store_module
from ultrafuser.synth.calls.request import CUT_OFF, Request, Response
from ultrafuser.synth.calls.store import CallStore, Review, new_worker
from ultrafuser.synth.calls.store_tables import Merged


def request(text: str, stage: str = "responses", **changes) -> Request:
    return Request(stage, "math", f"item {text}", "writer", (("user", text),), **changes)


def ok(text: str = "yes", usd: float = 0.0) -> Response:
    return Response("ok", text, "", 10, 5, usd)


@pytest.fixture
def store(tmp_path: Path):
    with CallStore(tmp_path / "calls.sqlite", "recipe 1") as store:
        yield store


# ---------------------------------------------------------------- questions


def test_a_question_is_named_by_what_is_asked_not_by_how():
    one = request("why?")
    assert one.key == request("why?", schema={"type": "object"}, temperature=1.0, max_tokens=7).key
    assert one.key == Request("responses", "code", "another item", "writer", (("user", "why?"),)).key
    others = [
        request("how?"),
        request("why?", "judge"),
        request("why?", sample=1),
        Request("responses", "math", "", "judge", one.messages),
    ]
    assert len({one.key, *(other.key for other in others)}) == 5
    assert len(request("half a character: \ud83d").key) == 64


# ---------------------------------------------------------------- what is kept


def test_what_is_finished_is_there_for_the_next_process(store: CallStore):
    outcome = Response("ok", "12 \u2260 13\0\n", "length", 7, 3, 0.25)
    store.finish(request("a"), outcome)
    store.finish(request("b"), Response("failed", reason="context overflow: 9 of 8"))
    store.close()
    with CallStore(store.file, "recipe 1") as again:
        assert again.outcome(request("a").key) == outcome
        assert again.outcome(request("b").key) == Response("failed", reason="context overflow: 9 of 8")
        assert again.outcome(request("c").key) is None
        assert again.missing([request(x).key for x in "dacb"]) == [request("d").key, request("c").key]


def test_the_first_outcome_stays_and_both_were_paid_for(store: CallStore):
    store.finish(request("a"), ok("first", 0.5))
    store.finish(request("a"), ok("second", 0.25))
    assert store.outcome(request("a").key) == ok("first", 0.75)
    assert store.spent_usd() == 0.75


def test_half_characters_are_kept_as_question_marks(store: CallStore):
    store.finish(request("a"), ok("x\ud83dy"))
    assert store.outcome(request("a").key) == ok("x?y")


def test_more_keys_than_a_statement_takes(store: CallStore):
    for i in range(0, 1500, 2):
        store.finish(request(str(i)), ok())
    assert store.missing(request(str(i)).key for i in range(1500)) == [request(str(i)).key for i in range(1, 1500, 2)]


def test_counts_means_and_pace(store: CallStore):
    assert store.counts() == [] and store.pace() is None and store.tokens() == 0
    for number, text in enumerate("abc"):
        store.finish(request(text), Response("ok", text, "", 10 * number, number, 0.1))
    store.finish(request("d", "judge"), Response("failed", reason="unanswered: status 500: x, after 3 tries"))
    store.finish(request("e", "judge"), Response("failed", reason="unanswered: no reply within 5 s, after 3 tries"))
    counts = [
        (c.stage, c.domain, c.status, c.kind, c.calls, c.prompt_tokens, c.completion_tokens) for c in store.counts()
    ]
    assert counts == [("judge", "math", "failed", "unanswered", 2, 0, 0), ("responses", "math", "ok", "", 3, 30, 3)]
    assert store.counts()[1].usd == pytest.approx(0.3)
    assert store.tokens() == 33
    assert 0 < store.pace() <= 5


def test_reviews(store: CallStore):
    assert store.review("row 1") is None
    store.set_review("row 1", "accept")
    store.set_review("row 2", "edit", "[]")
    store.set_review("row 1", "reject", "wrong sum")
    assert store.review("row 1") == Review("reject", "wrong sum", store.reviews()["row 1"].at)
    assert list(store.reviews()) == ["row 1", "row 2"]


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


# ---------------------------------------------------------------- who holds a call


def ceilings(*texts: str, usd: float = 0.0) -> dict[str, float]:
    return {request(text).key: usd for text in texts}


def keys(*texts: str) -> list[str]:
    return [request(text).key for text in texts]


def test_a_call_is_one_workers_until_it_is_done(store: CallStore):
    store.finish(request("a"), ok())
    one, two = new_worker(), new_worker()
    claim = store.claim(ceilings("a", "b", "c"), one, 60)
    assert (claim.done, claim.taken, claim.busy) == (keys("a"), keys("b", "c"), [])
    claim = store.claim(ceilings("c", "d", "b"), two, 60)
    assert (claim.done, claim.taken, claim.busy) == ([], keys("d"), keys("c", "b"))
    assert store.under_way() == 3
    store.finish(request("b"), ok(), one)
    assert store.claim(ceilings("b"), two, 60).done == keys("b")
    assert store.under_way() == 2


def test_a_claim_runs_out_unless_it_is_renewed(store: CallStore, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(store_module.time, "time", lambda: now[0])
    store.claim(ceilings("a", "b"), "elsewhere|1|2|x", 60)
    now[0] += 59
    assert store.claim(ceilings("a"), "other", 60).busy == keys("a")
    store.renew("elsewhere|1|2|x", 60)
    now[0] += 59
    assert store.claim(ceilings("a"), "other", 60).busy == keys("a")
    now[0] += 2
    assert store.claim(ceilings("a"), "other", 60).taken == keys("a")
    assert store.under_way() == 1


def test_a_dead_process_of_this_machine_holds_nothing(store: CallStore):
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    machine, pid, rest = new_worker().rsplit("|", 2)
    store.claim(ceilings("a"), f"{machine}|{done.pid}|{rest}", 3600)
    store.claim(ceilings("b"), f"another-{machine}|{done.pid}|{rest}", 3600)
    assert int(pid) == os.getpid()
    claim = store.claim(ceilings("a", "b"), new_worker(), 60)
    assert (claim.taken, claim.busy) == (keys("a"), keys("b"))


def test_a_worker_that_was_overtaken_changes_nothing_but_the_bill(store: CallStore, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(store_module.time, "time", lambda: now[0])
    store.claim(ceilings("a", usd=1.0), "slow", 60)
    now[0] += 61
    store.claim(ceilings("a", usd=1.0), "fast", 60)
    assert (store.spent_usd(), store.reserved_usd()) == (1.0, 1.0)  # what the slow one sent may be billed
    store.finish(request("a"), ok("slow", 0.25), "slow")
    assert (store.spent_usd(), store.reserved_usd()) == (1.25, 1.0)
    store.finish(request("a"), ok("fast", 0.5), "fast")
    assert store.outcome(request("a").key).text == "slow"
    assert (store.spent_usd(), store.reserved_usd()) == (1.75, 0.0)


# ---------------------------------------------------------------- money


def test_no_more_is_claimed_than_the_budget_lasts_for(store: CallStore):
    worker = new_worker()
    store.finish(request("z"), ok(usd=0.1))
    claim = store.claim(ceilings("z", "a", "b", "c", "d", usd=0.3), worker, 60, budget_usd=1.0)
    assert (claim.done, claim.taken, claim.dear) == (keys("z"), keys("a", "b", "c"), keys("d"))
    assert (store.spent_usd(), store.reserved_usd()) == (0.1, 0.9)  # in whole billionths: exact
    store.finish(request("a"), ok(usd=0.01), worker)
    assert store.claim(ceilings("d", usd=0.3), worker, 60, budget_usd=1.0).dear == keys("d")
    store.finish(request("b"), ok(usd=0.29), worker)
    assert store.claim(ceilings("d", usd=0.3), worker, 60, budget_usd=1.0).taken == keys("d")
    assert store.claim(ceilings("e", usd=0.3), new_worker(), 60).taken == keys("e")  # no budget, no limit


def test_a_try_that_broke_off_is_paid_for_and_so_is_the_next(store: CallStore):
    worker = new_worker()
    store.claim(ceilings("a", usd=0.25), worker, 60, budget_usd=0.75)
    assert store.ask_again(request("a").key, worker, 0.25, 0.75)
    assert (store.spent_usd(), store.reserved_usd()) == (0.25, 0.25)
    assert store.ask_again(request("a").key, worker, 0.25, 0.75)
    assert not store.ask_again(request("a").key, worker, 0.25, 0.75)
    assert (store.spent_usd(), store.reserved_usd(), store.under_way()) == (0.75, 0.0, 0)
    assert store.claim(ceilings("a", usd=0.25), worker, 60, budget_usd=0.75).dear == keys("a")
    assert store.claim(ceilings("a", usd=0.25), worker, 60, budget_usd=1.0).taken == keys("a")
    store.finish(request("a"), ok(usd=0.125), worker)
    assert store.outcome(request("a").key).cost_usd == store.spent_usd() == 0.875
    assert not store.ask_again(request("a").key, worker, 0.25)  # no claim any more


def test_what_was_not_sent_costs_nothing(store: CallStore):
    worker = new_worker()
    store.claim(ceilings("a", "b", "c", usd=0.25), worker, 60)
    store.release(worker, sent=keys("a", "c"))
    assert (store.spent_usd(), store.reserved_usd(), store.under_way()) == (0.5, 0.0, 0)
    assert store.claim(ceilings("a", "b", "c"), new_worker(), 60).taken == keys("a", "b", "c")


def test_failures_may_be_forgotten_but_not_what_they_cost(store: CallStore):
    store.finish(request("a"), ok(usd=0.5))
    for text, reason in (("b", "empty: x"), ("c", "empty"), ("d", "emptyish: x")):
        store.finish(request(text), Response("failed", reason=reason, cost_usd=0.25), "w")
    store.finish(request("e"), Response("ok", "half a", CUT_OFF, cost_usd=0.25), "w")
    assert store.forget_failures() == 4
    assert store.missing(keys(*"abcde")) == keys("b", "c", "d", "e") and store.spent_usd() == 1.5
    store.finish(request("b"), Response("failed", reason="empty: again", cost_usd=0.25), "w")
    assert store.forget_failures() == 1 and store.spent_usd() == 1.75


def test_verdicts_stay_as_they_are_and_are_taken_over(store: CallStore, tmp_path: Path):
    store.keep_verdicts({"a": "", "b": "tests: failed"})
    store.keep_verdicts({"a": "tests: timeout"})
    assert store.verdicts(["a", "b", "c"]) == {"a": "", "b": "tests: failed"}
    with CallStore(tmp_path / "other.sqlite", store.identity()) as other:
        other.keep_verdicts({"b": "", "c": "tests: failed"})
    store.merge(tmp_path / "other.sqlite")
    assert store.verdicts(["a", "b", "c"]) == {"a": "", "b": "", "c": "tests: failed"}


def test_the_running_sum_is_the_sum(store: CallStore):
    worker = new_worker()
    store.claim(ceilings(*"abcdef", usd=0.1), worker, 60)
    for text in "abc":
        store.finish(request(text), ok(usd=0.07), worker)
    store.finish(request("a"), ok(usd=0.02), worker)
    store.ask_again(request("d").key, worker, 0.2)
    db = sqlite3.connect(store.file)
    [(calls,)], [(lost, reserved)] = (
        db.execute(sql).fetchall()
        for sql in ("SELECT sum(cost) FROM calls", "SELECT sum(lost), sum(reserved) FROM leases")
    )
    assert (store.spent_usd(), store.reserved_usd()) == ((calls + lost) / 1e9, reserved / 1e9) == (0.33, 0.4)


# ---------------------------------------------------------------- files


def test_another_recipes_file_is_refused(store: CallStore):
    with pytest.raises(
        DataError, match=r"calls.sqlite: holds the calls of another recipe \('recipe 1'\), expected 'recipe 2'; choose"
    ):
        CallStore(store.file, "recipe 2")
    with CallStore(store.file) as any_recipe:
        assert any_recipe.identity() == "recipe 1"


@pytest.mark.parametrize("version, next_step", [(2, "upgrade ultrafuser"), (0, "move the file away")])
def test_another_versions_file_is_refused(store: CallStore, version, next_step):
    store._db.execute(f"PRAGMA user_version = {version}")
    with pytest.raises(DataError, match=f"written in version {version} of the format, expected 1; {next_step}"):
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
    with pytest.raises(DataError, match="cannot be opened .*; expected a place that can be written to"):
        CallStore(text / "calls.sqlite", "recipe 1")


def test_a_full_disk_is_an_error_and_what_was_stored_stays(store: CallStore):
    store.finish(request("a"), ok())
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(DataError, match=r"calls.sqlite: cannot be used \(database or disk is full\); make room .*kept"):
        store.finish(request("b"), ok("x" * 100_000))
    assert store.missing(keys("a", "b")) == keys("b")
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.finish(request("b"), ok("x" * 100_000))
    assert store.missing(keys("a", "b")) == []


def test_a_file_that_another_program_locks(store: CallStore, monkeypatch):
    store._db.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(store.file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(DataError, match=r"cannot be used \(database is locked\); see what else uses it"):
        store.finish(request("a"), ok())
    assert store.outcome(request("a").key) is None  # readers do not wait
    other.execute("COMMIT")
    store.finish(request("a"), ok())


def test_many_processes_may_make_the_file_at_once(tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from ultrafuser.synth.calls.store import CallStore; "
        "from ultrafuser.synth.calls.request import Request, Response; store = CallStore(Path(sys.argv[1]), 'r'); "
        "[store.finish(Request('judge', 'd', '', 'r', (('user', sys.argv[2] + str(i)),)), Response('ok', 'x', cost_usd=0.1)) "
        "for i in range(20)]"
    )
    file = tmp_path / "calls.sqlite"
    runs = [subprocess.Popen([sys.executable, "-c", code, str(file), f"{n} "]) for n in range(4)]
    assert [run.wait(60) for run in runs] == [0] * 4
    with CallStore(file) as store:
        assert store.counts()[0].calls == 80 and store.spent_usd() == pytest.approx(8.0)


# ---------------------------------------------------------------- joining files


def filled(file: Path, *outcomes: tuple[str, Response], worker: str = "") -> Path:
    with CallStore(file, "recipe 1") as store:
        for text, outcome in outcomes:
            store.finish(request(text), outcome, worker or f"worker of {file.name}")
    return file


def content(store: CallStore) -> dict[str, tuple[str, str]]:
    return {text: (found.status, found.text) for text in "abcdef" if (found := store.outcome(request(text).key))}


def test_files_join_to_the_same_in_any_order_and_however_often(tmp_path: Path):
    parts = [
        filled(
            tmp_path / "1", ("a", ok("one", 1.0)), ("b", ok("zwei", 1.0)), ("c", Response("failed", reason="empty: x"))
        ),
        filled(tmp_path / "2", ("b", ok("two", 2.0)), ("c", ok("three", 2.0)), ("d", ok("four", 2.0))),
        filled(tmp_path / "3", ("b", ok("du\u00e9", 4.0)), ("e", ok("five", 4.0))),
    ]
    results = []
    for number, order in enumerate(itertools.permutations(parts)):
        with CallStore(tmp_path / f"joined {number}", "recipe 1") as store:
            for file in (*order, order[0], order[2]):
                store.merge(file)
            results.append((content(store), store.spent_usd()))
    expected = {"a": "one", "b": "du\u00e9", "c": "three", "d": "four", "e": "five"}
    assert results == [({key: ("ok", text) for key, text in expected.items()}, 16.0)] * 6  # all that was paid for


def test_what_came_of_copies_joins_without_being_counted_twice(tmp_path: Path):
    whole = filled(tmp_path / "whole", ("a", ok("one", 1.0)))
    for name, text in (("left", "b"), ("right", "c")):
        (tmp_path / name).write_bytes(whole.read_bytes())
        filled(tmp_path / name, (text, ok(name, 2.0)))
    with CallStore(whole, "recipe 1") as store:
        assert store.merge(tmp_path / "left") == store.merge(tmp_path / "right") == Merged(added=1, twice=0)
        assert store.spent_usd() == 5.0
        assert content(store) == {"a": ("ok", "one"), "b": ("ok", "left"), "c": ("ok", "right")}


def test_reviews_and_lost_tries_join_too(tmp_path: Path, store: CallStore):
    with CallStore(tmp_path / "other", "recipe 1") as other:
        store.set_review("row 1", "accept")
        other.set_review("row 1", "reject", "later")
        other.set_review("row 2", "accept")
        other.claim(ceilings("a", usd=0.5), "gone", 60)
        other.release("gone")
    for _ in range(2):
        store.merge(tmp_path / "other")
    assert {row: review.decision for row, review in store.reviews().items()} == {"row 1": "reject", "row 2": "accept"}
    assert store.spent_usd() == 0.5
    assert store.claim(ceilings("a"), new_worker(), 60).taken == keys("a")


def test_files_that_cannot_be_joined(tmp_path: Path, store: CallStore):
    CallStore(tmp_path / "foreign", "recipe 2").close()
    with pytest.raises(
        DataError, match=r"foreign: holds the calls of the recipe 'recipe 2', expected 'recipe 1' as in .*calls"
    ):
        store.merge(tmp_path / "foreign")
    with CallStore(tmp_path / "used", "recipe 1") as used:
        used.claim(ceilings("a"), new_worker(), 60)
        with pytest.raises(
            DataError, match="used: 1 calls are under way in it, expected a file that no run uses; wait"
        ):
            store.merge(tmp_path / "used")
    with pytest.raises(DataError, match="missing: no such file"):
        store.merge(tmp_path / "missing")
