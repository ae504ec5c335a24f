"""The scheduler with models in memory: every request is answered once. Money and errors stop it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ultrafuser.errors import BudgetExceeded, DataError, EndpointError, RecipeError
from ultrafuser.progress import Progress
from ultrafuser.synth.calls.request import CallContext, ModelClient, Request, Response
from ultrafuser.synth.calls.scheduler import answer
from ultrafuser.synth.calls.store import CallStore


class Memory:
    """A client that answers from memory and records its batches."""

    def __init__(
        self,
        reply: Callable[[Request], Response | None] | None = None,
        *,
        concurrency: int = 4,
        batch_size: int = 1,
        delay_s: float = 0.0,
        ceiling_usd: float = 0.0,
    ) -> None:
        self.reply = reply or (lambda request: Response("ok", f"re: {request.messages[-1][1]}"))
        self.concurrency, self.batch_size, self.delay_s, self._ceiling_usd = (
            concurrency,
            batch_size,
            delay_s,
            ceiling_usd,
        )
        self.batches: list[list[str]] = []
        self.under_way = self.most_in_flight = self.opened = self.closed = 0

    @property
    def asked(self) -> Counter[str]:
        return Counter(text for batch in self.batches for text in batch)

    def ceiling_usd(self, request: Request) -> float:
        return self._ceiling_usd

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
        self.batches.append([request.messages[-1][1] for request in requests])
        run.sent.update(request.key for request in requests)
        self.under_way += 1
        self.most_in_flight = max(self.most_in_flight, self.under_way)
        await asyncio.sleep(self.delay_s)
        self.under_way -= 1
        return [self.reply(request) for request in requests]


class Seen(Progress):
    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.steps, self.finished, self.notes = 0, 0, []

    def start(self, stage: str, total: int) -> None:
        self.started.append((stage, total))

    def advance(self, steps: int = 1, note: str = "") -> None:
        self.steps += steps
        self.notes.append(note)

    def finish(self) -> None:
        self.finished += 1


def requests(count: int, role: str = "writer", stage: str = "responses") -> list[Request]:
    return [Request(stage, "math", str(i), role, (("user", f"{role} {i}"),)) for i in range(count)]


@pytest.fixture
def store(tmp_path: Path):
    with CallStore(tmp_path / "calls.sqlite", "recipe") as store:
        yield store


def test_fake_clients_follow_the_protocol():
    client: ModelClient = Memory()
    assert client.concurrency == 4


def test_every_request_is_answered_once_and_never_again(store: CallStore):
    client, seen = Memory(delay_s=0.001), Seen()
    answer(requests(50) + requests(50), store, {"writer": client}, progress=seen)
    assert client.asked == Counter(f"writer {i}" for i in range(50))
    assert store.response(requests(50)[49].key) == Response("ok", "re: writer 49")
    assert client.most_in_flight == 4 and (client.opened, client.closed) == (1, 1)
    assert (seen.started, seen.steps, seen.finished) == ([("responses", 50)], 50, 1)
    answer(requests(51), store, {"writer": client})
    assert sum(client.asked.values()) == 51 and client.opened == 2
    answer(requests(51), store, {})
    assert store.under_way() == 0


def test_models_answer_in_parallel_with_their_own_concurrency(store: CallStore):
    local, remote = Memory(concurrency=1, batch_size=8, delay_s=0.002), Memory(concurrency=20, delay_s=0.002)
    answer(requests(20, "one") + requests(60, "many", "judge"), store, {"one": local, "many": remote, "idle": Memory()})
    assert [len(batch) for batch in local.batches] == [8, 8, 4] and local.most_in_flight == 1
    assert remote.most_in_flight == 20 and all(len(batch) == 1 for batch in remote.batches)


def test_a_batch_is_one_step_of_the_progress(store: CallStore):
    """The time left is told from whole batches."""
    seen = Seen()
    answer(requests(20), store, {"writer": Memory(concurrency=1, batch_size=8)}, progress=seen)
    assert seen.steps == 20 and len(seen.notes) == 3


def test_a_role_without_a_client(store: CallStore):
    with pytest.raises(RecipeError, match="no model 'judge' to ask; there are: writer, other"):
        answer(requests(1, "judge"), store, {"writer": Memory(), "other": Memory()})


def test_a_request_without_a_response_is_sent_again(store: CallStore):
    refused: set[str] = set()

    def reply(request: Request) -> Response | None:
        if request.key in refused:
            return Response("ok", "at last")
        refused.add(request.key)
        return None

    client = Memory(reply)
    answer(requests(9), store, {"writer": client})
    assert set(client.asked.values()) == {2} and not store.missing(request.key for request in requests(9))


# ---------------------------------------------------------------- money


def test_the_budget_is_never_exceeded_and_it_is_used_up(store: CallStore):
    client = Memory(lambda request: Response("ok", "x", cost_usd=0.03), concurrency=16, delay_s=0.001, ceiling_usd=0.1)
    with pytest.raises(BudgetExceeded, match=r"the budget of \$1.00 does not last: \$0.9\d00 is spent, the next call may cost up "
                       r"to \$0.1000, and 6\d requests have no answer.*--budget-usd and run again: stored answers are kept, and `ultrafuser synth join RECIPE`"):  # fmt: skip
        answer(requests(100), store, {"writer": client}, budget_usd=1.0)
    assert 0.9 < store.spent_usd() <= 1.0 and store.reserved_usd() == 0 == store.under_way()
    assert store.counts()[0].calls == sum(client.asked.values())
    answer(requests(100), store, {"writer": client}, budget_usd=10.0)
    assert store.counts()[0].calls == 100 and store.spent_usd() == 3.0
    assert set(client.asked.values()) == {1}


def test_an_expensive_model_at_its_ceiling(store: CallStore):
    client = Memory(lambda request: Response("ok", "x", cost_usd=0.25), concurrency=16, ceiling_usd=0.25)
    with pytest.raises(BudgetExceeded):
        answer(requests(9), store, {"writer": client}, budget_usd=1.0)
    assert store.spent_usd() == 1.0 and sum(client.asked.values()) == 4


def test_a_budget_of_tokens_ends_a_run(store: CallStore):
    client = Memory(lambda request: Response("ok", "x", "", 60, 40), concurrency=2, delay_s=0.001)
    with pytest.raises(
        BudgetExceeded, match=r"the budget of 1,000 tokens is used up: 1,\d00 were read .*--budget-tokens"
    ):
        answer(requests(100), store, {"writer": client}, budget_tokens=1000)
    assert 1000 <= store.tokens() <= 1100  # what was under way still came
    answer(requests(100), store, {"writer": client}, budget_tokens=100_000)
    assert store.tokens() == 10_000 and set(client.asked.values()) == {1}


def test_requests_under_way_finish_when_the_tokens_are_used_up(store: CallStore):
    class Slow(Memory):
        async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
            self.delay_s = 0.0 if requests[0].item == "0" else 0.4
            return await super().answer(requests, run)

    client = Slow(lambda request: Response("ok", "x", "", 60, 40), concurrency=4)
    message = "400 were read .* 96 requests .* `ultrafuser synth join RECIPE` writes the data set"
    with pytest.raises(BudgetExceeded, match=message):
        answer(requests(100), store, {"writer": client}, budget_tokens=100, grace_s=0.05)
    assert store.tokens() == 100 * sum(client.asked.values()) == 400 and store.under_way() == 0


def test_the_last_answers_may_use_the_tokens_up(store: CallStore):
    answer(requests(3), store, {"writer": Memory(lambda request: Response("ok", "x", "", 60, 40))}, budget_tokens=300)
    assert not store.missing(request.key for request in requests(3))


def test_no_request_is_sent_without_money(store: CallStore):
    client, seen = Memory(ceiling_usd=2.0), Seen()
    with pytest.raises(BudgetExceeded, match="2 requests have no answer"):
        answer(requests(2), store, {"writer": client}, budget_usd=1.0, progress=seen)
    assert not client.batches and (seen.steps, seen.finished) == (0, 1)


def test_it_waits_for_money_that_an_expensive_call_has_reserved(store: CallStore):
    dear = Memory(lambda request: Response("ok", "x", cost_usd=0.1), delay_s=0.3, ceiling_usd=0.9)
    cheap = Memory(ceiling_usd=0.5)
    answer(requests(1, "dear") + requests(1), store, {"dear": dear, "writer": cheap}, budget_usd=1.0)
    assert not store.missing([requests(1)[0].key, requests(1, "dear")[0].key])


# ---------------------------------------------------------------- errors


def test_an_error_stops_the_run_but_requests_under_way_finish(store: CallStore):
    class Dying(Memory):
        async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
            if requests[0].item == "3":
                raise EndpointError("no more")
            return await super().answer(requests, run)

    client, seen = Dying(delay_s=0.05), Seen()
    with pytest.raises(EndpointError, match="no more"):
        answer(requests(100), store, {"writer": client}, progress=seen)
    assert client.asked == Counter(f"writer {i}" for i in range(3))
    assert store.missing(request.key for request in requests(4)) == [requests(4)[3].key]
    assert client.closed == 1 == seen.finished and store.under_way() == 0
    answer(requests(100), store, {"writer": Memory()})
    assert store.counts()[0].calls == 100


def test_requests_that_hang_when_the_run_ends_are_cancelled_and_count_as_spent(store: CallStore):
    class Dying(Memory):
        async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
            if requests[0].item == "1":
                await asyncio.sleep(0.05)
                raise EndpointError("no more")
            return await super().answer(requests, run)

    with pytest.raises(EndpointError, match="no more"):
        answer(requests(2), store, {"writer": Dying(delay_s=60, ceiling_usd=0.5)}, grace_s=0.1)
    assert (store.spent_usd(), store.reserved_usd(), store.under_way()) == (0.5, 0.0, 0)  # the one that was sent


def test_a_full_disk_keeps_stored_responses_and_reports_lost_ones(store: CallStore):
    client = Memory(lambda request: Response("ok", "x" * 30_000), delay_s=0.001)
    pages = store._database.connection.execute("PRAGMA page_count").fetchone()[0]
    store._database.connection.execute(f"PRAGMA max_page_count = {pages + 100}")
    with pytest.raises(
        DataError, match=r"database or disk is full\); free disk space .*; \d replies were lost and will be asked"
    ):
        answer(requests(50), store, {"writer": client})
    num_stored = store.counts()[0].calls
    assert 5 < num_stored < 50
    store._database.connection.execute("PRAGMA max_page_count = 1000000")
    answer(requests(50), store, {"writer": client})
    assert sum(client.asked.values()) <= 50 + client.concurrency
    assert store.counts()[0].calls == 50


def test_replies_that_came_on_a_full_disk_are_stored_when_there_is_room_again(store: CallStore, monkeypatch):
    has_room, finish = [False], store.finish

    def full(request: Request, response: Response) -> None:
        if not has_room[0]:
            raise DataError("disk is full")
        finish(request, response)

    def reply(request: Request) -> Response:
        has_room[0] = request.item == "3"
        return Response("ok", "x")

    monkeypatch.setattr(store, "finish", full)
    with pytest.raises(DataError, match="disk is full$"):
        answer(requests(4), store, {"writer": Memory(reply, concurrency=4)})
    assert not store.missing(request.key for request in requests(4))


def test_it_may_be_called_from_inside_an_event_loop(store: CallStore):
    async def cell() -> None:
        answer(requests(5), store, {"writer": Memory()})

    asyncio.run(cell())
    assert not store.missing(request.key for request in requests(5))
