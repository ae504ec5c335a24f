"""Has every question answered: claims, calls, keeps each outcome at once; stops when the money or the model ends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ultrafuser.errors import BudgetExceeded, DataError, RecipeError
from ultrafuser.progress import Progress
from ultrafuser.synth.calls.request import ModelClient, Request, Response
from ultrafuser.synth.calls.store import CallStore, new_worker

LEASE_S = 60.0  # that a claim outlives a worker of which nothing can be known; renewed three times as often
GRACE_S = 15.0  # for calls under way when the run has to stop
CLAIMS_AT_ONCE = 32
_LOOK_S = 0.5  # between two looks at what other processes have in hand
_KEPT = "what was answered is kept, and `ultrafuser synth join RECIPE` writes the data set of it"


def answer(
    requests: Sequence[Request],
    store: CallStore,
    clients: Mapping[str, ModelClient],
    *,
    budget_usd: float | None = None,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
    lease_s: float = LEASE_S,
    grace_s: float = GRACE_S,
) -> None:
    """Have every ask answered that has no outcome yet; other processes may do the same with the same store.

    Args:
        callers: role -> the model that answers.
        budget_usd: dollars that all calls in the store may cost; None: no limit.
        budget_tokens: tokens that all calls in the store read and wrote, after which nothing more is sent; what is under
            way then still comes. None: no limit.

    Raises:
        BudgetExceeded: the next call might cost more than what is left, or the tokens are used up; what was answered is
            kept.
        EndpointError: a model cannot be asked any more; what was answered is kept.
        DataError: the store cannot be written; what was stored before is kept.
        RecipeError: a role that no caller has.
    """
    by_key = {request.key: request for request in requests}
    left = [by_key[key] for key in store.missing(by_key)]
    if unknown := {request.role for request in left} - set(clients):
        raise RecipeError(f"no model {sorted(unknown)[0]!r} to ask; there are: {', '.join(clients)}")
    if not left:
        return
    progress = progress or Progress()
    progress.start(", ".join(dict.fromkeys(request.stage for request in left)), len(left))
    try:
        run = _Run(store, budget_usd, budget_tokens, progress, lease_s)
        _in_a_loop_of_its_own(run.work(left, clients, grace_s))
    finally:
        progress.finish()


def _in_a_loop_of_its_own(work: Coroutine[Any, Any, None]) -> None:
    """Run it to its end, also where the caller is inside an event loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # none
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()


class _Run:
    """One call of `answer`: what its workers share."""

    def __init__(
        self,
        store: CallStore,
        budget_usd: float | None,
        budget_tokens: int | None,
        progress: Progress,
        lease_s: float,
    ) -> None:
        self.store, self.progress, self.lease_s = store, progress, lease_s
        self.budget_usd, self.budget_tokens = budget_usd, budget_tokens
        self.worker = new_worker()
        self.asking = 0  # batches that callers have in hand
        self.sent: set[str] = set()
        self.unstored: deque[tuple[Request, Response]] = deque()
        self.clients: dict[str, ModelClient] = {}

    async def work(self, requests: Sequence[Request], clients: Mapping[str, ModelClient], grace_s: float) -> None:
        self.stop, self.changed = asyncio.Event(), asyncio.Event()
        feeds: dict[str, _Feed] = {}
        for request in requests:
            if request.role not in feeds:
                feeds[request.role] = _Feed(self, clients[request.role])
            feeds[request.role].waiting.append(request)
        self.clients = {role: clients[role] for role in feeds}
        heart = asyncio.create_task(self._beat())
        workers: list[asyncio.Task[None]] = []
        opened: list[ModelClient] = []
        try:
            for feed in feeds.values():
                await feed.client.open()
                opened.append(feed.client)
                number = min(feed.client.concurrency, len(feed.waiting))
                workers += [asyncio.create_task(self._work(feed)) for _ in range(number)]
            await self._until_done(workers, heart, grace_s)
        finally:
            for task in (heart, *workers):
                task.cancel()
            await asyncio.gather(heart, *workers, return_exceptions=True)
            for client in opened:
                await client.close()
            with suppress(DataError):  # of a full disk, which is known by then
                self.store.release(self.worker, self.sent)

    async def _until_done(self, workers: list[asyncio.Task[None]], heart: asyncio.Task[None], grace_s: float) -> None:
        """Until all asks are answered, or the first error: then what is under way may still come."""
        pending: set[asyncio.Task[None]] = {heart, *workers}
        failed: list[asyncio.Task[None]] = []
        while not failed and pending != {heart}:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in done if task.exception() is not None]
        if not failed:
            return
        self.stop.set()
        self.changed.set()
        await asyncio.wait(workers, timeout=grace_s)
        try:
            self._store()  # what came while the store could not be written may find room now
        except DataError as error:
            raise DataError(f"{error}; {len(self.unstored)} replies were lost and will be asked for again") from error
        failed[0].result()

    async def _work(self, feed: _Feed) -> None:
        while batch := await feed.take():
            self.asking += 1
            try:
                outcomes = await feed.client.answer(batch, self)
            finally:
                self.asking -= 1
            for request, outcome in zip(batch, outcomes, strict=True):
                if outcome is None:
                    feed.waiting.append(request)
                else:
                    self.unstored.append((request, outcome))
            self._store()
            self.changed.set()

    def _store(self) -> None:
        """Keep what came: nothing is let go of before it is stored."""
        kept = 0
        while self.unstored:
            request, outcome = self.unstored[0]
            self.store.finish(request, outcome, self.worker)
            self.unstored.popleft()
            self.sent.discard(request.key)
            kept += 1
        if kept:  # a batch at once, or the time left would be told from one of its replies
            spent_usd = self.store.spent_usd()
            self.progress.advance(kept, f"${spent_usd:.2f}" if spent_usd else "")

    def tokens_used_up(self) -> bool:
        """Whether the budget of tokens lets nothing more be sent."""
        return self.budget_tokens is not None and self.store.tokens() >= self.budget_tokens

    async def _beat(self) -> None:
        """Renew the claims for as long as this process lives."""
        while True:
            await asyncio.sleep(self.lease_s / 3)
            self.store.renew(self.worker, self.lease_s)

    # ---------------------------------------------------------------- for callers

    @property
    def stopping(self) -> bool:
        """Whether nothing more should be sent."""
        return self.stop.is_set()

    async def wait(self, seconds: float) -> bool:
        """Sleep; False: the run ends."""
        if seconds > 0 and not self.stop.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)
        return not self.stop.is_set()

    def log(self, text: str) -> None:
        """One line of news."""
        self.progress.log(text)

    def reserve_retry(self, request: Request) -> bool:
        """Count what was sent as spent, and set the same aside for another try, if the budget lasts for it."""
        ceiling_usd = self.clients[request.role].ceiling_usd(request)
        return self.store.ask_again(request.key, self.worker, ceiling_usd, self.budget_usd)


class _Feed:
    """The asks of one role, claimed a few at a time.

    Attributes:
        waiting: not claimed by us; perhaps by another process.
    """

    def __init__(self, run: _Run, client: ModelClient) -> None:
        self.run, self.client = run, client
        self.waiting: deque[Request] = deque()
        self._claimed: deque[Request] = deque()
        self._busy = 0  # asks in a row that other processes have in hand
        self._turn = asyncio.Lock()

    async def take(self) -> list[Request]:
        """The next batch; none when all are answered, or the run ends.

        Raises:
            BudgetExceeded: the next call might cost more than what is left, or the tokens are used up, and nothing is
                under way.
        """
        async with self._turn:
            was_idle = False
            while not self.run.stop.is_set():
                if not self.waiting and not self._claimed:
                    return []
                if self.run.tokens_used_up():
                    if not self.run.asking:
                        raise self._out_of_tokens()
                    await self._until_something_changes()
                elif self._claimed:
                    return [self._claimed.popleft() for _ in range(min(self.client.batch_size, len(self._claimed)))]
                elif self._claim(was_idle):
                    was_idle = self.run.store.under_way() == 0
                    await self._until_something_changes()
            return []

    def _claim(self, was_idle: bool) -> bool:
        """Claim the next few; whether there is nothing to do but wait.

        Args:
            was_idle: nobody had anything under way just now, so that no money that is set aside will be freed.
        """
        run = self.run
        size = max(min(CLAIMS_AT_ONCE, self.client.concurrency), self.client.batch_size)
        requests = {
            request.key: request for request in (self.waiting.popleft() for _ in range(min(size, len(self.waiting))))
        }
        ceilings = {key: self.client.ceiling_usd(request) for key, request in requests.items()}
        claim = run.store.claim(ceilings, run.worker, run.lease_s, run.budget_usd)
        self._claimed.extend(requests[key] for key in claim.taken)
        self.waiting.extendleft(requests[key] for key in reversed(claim.dear))
        self.waiting.extend(requests[key] for key in claim.busy)
        if claim.done:
            run.progress.advance(len(claim.done))
        if claim.dear and not claim.taken and was_idle and run.store.under_way() == 0:
            raise self._broke(ceilings[claim.dear[0]])
        self._busy = 0 if claim.taken or claim.done else self._busy + len(claim.busy)
        return not claim.taken and (bool(claim.dear) or self._busy >= len(self.waiting) > 0)

    async def _until_something_changes(self) -> None:
        changed = self.run.changed
        changed.clear()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(changed.wait(), _LOOK_S)

    def _broke(self, ceiling_usd: float) -> BudgetExceeded:
        spent_usd, budget_usd = self.run.store.spent_usd(), self.run.budget_usd
        assert budget_usd is not None
        return BudgetExceeded(
            f"the budget of ${budget_usd:.2f} does not last: ${spent_usd:.4f} is spent, the next call may cost up to "
            f"${ceiling_usd:.4f}, and {len(self.waiting)} questions wait for an answer; raise --budget-usd and run "
            f"again: {_KEPT}"
        )

    def _out_of_tokens(self) -> BudgetExceeded:
        return BudgetExceeded(
            f"the budget of {self.run.budget_tokens:,} tokens is used up: {self.run.store.tokens():,} were read and written, "
            f"and {len(self.waiting) + len(self._claimed)} questions wait for an answer; raise --budget-tokens and run again: "
            f"{_KEPT}"
        )
