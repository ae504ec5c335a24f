"""Gets every request answered: reserves money, calls the clients, stores each response at once.

A run stops when the money or the tokens end, or at the first error. Requests under way then still have a while to finish.
"""

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
from ultrafuser.synth.calls.store import CallStore

GRACE_S = 15.0  # for requests under way when the run has to stop
RESERVATIONS_AT_ONCE = 32  # one transaction for several requests
_POLL_S = 0.5  # between two looks at whether money has come free
_NEXT_STEP = "stored answers are kept, and `ultrafuser synth join RECIPE` writes the data set of them"


def answer(
    requests: Sequence[Request],
    store: CallStore,
    clients: Mapping[str, ModelClient],
    *,
    budget_usd: float | None = None,
    budget_tokens: int | None = None,
    progress: Progress | None = None,
    grace_s: float = GRACE_S,
) -> None:
    """Get a response to every request that has none yet.

    Args:
        clients: role -> the model that answers.
        budget_usd: dollars that all calls in the store may cost. None: no limit.
        budget_tokens: tokens read and written by all calls in the store, after which nothing more is sent. Requests
            under way then still finish. None: no limit.

    Raises:
        BudgetExceeded: the next call might cost more than what remains, or the tokens are used up.
        EndpointError: a model cannot be reached any more.
        DataError: the store cannot be written.
        RecipeError: a role without a client.
    """
    by_key = {request.key: request for request in requests}
    missing = [by_key[key] for key in store.missing(by_key)]
    if unknown := {request.role for request in missing} - set(clients):
        raise RecipeError(f"no model {sorted(unknown)[0]!r} to ask; there are: {', '.join(clients)}")
    if not missing:
        return
    progress = progress or Progress()
    progress.start(", ".join(dict.fromkeys(request.stage for request in missing)), len(missing))
    try:
        run = _CallRun(store, budget_usd, budget_tokens, progress)
        _run_in_new_loop(run.answer_all(missing, clients, grace_s))
    finally:
        progress.finish()


def _run_in_new_loop(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine to its end, also if the caller is inside an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # no loop
        asyncio.run(work)
    else:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(asyncio.run, work).result()


class _CallRun:
    """One call of `answer`: the state that its workers share. Clients see it as a `CallContext`."""

    def __init__(
        self, store: CallStore, budget_usd: float | None, budget_tokens: int | None, progress: Progress
    ) -> None:
        self.store, self.progress = store, progress
        self.budget_usd, self.budget_tokens = budget_usd, budget_tokens
        self.active_batches = 0
        self.sent: set[str] = set()
        self.unstored: deque[tuple[Request, Response]] = deque()
        self.clients: dict[str, ModelClient] = {}

    async def answer_all(self, requests: Sequence[Request], clients: Mapping[str, ModelClient], grace_s: float) -> None:
        self.stop, self.changed = asyncio.Event(), asyncio.Event()
        # 1. One queue per role.
        queues: dict[str, _Queue] = {}
        for request in requests:
            if request.role not in queues:
                queues[request.role] = _Queue(self, clients[request.role])
            queues[request.role].waiting.append(request)
        self.clients = {role: clients[role] for role in queues}
        workers: list[asyncio.Task[None]] = []
        opened: list[ModelClient] = []
        try:
            # 2. As many workers per queue as its client takes batches at once.
            for queue in queues.values():
                await queue.client.open()
                opened.append(queue.client)
                num_workers = min(queue.client.concurrency, len(queue.waiting))
                workers += [asyncio.create_task(self._work(queue)) for _ in range(num_workers)]
            await self._until_done(workers, grace_s)
        finally:
            # 3. Whatever happened: stop the workers, close the clients, end the reservations.
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            for client in opened:
                await client.close()
            with suppress(DataError):  # a full disk, which has been reported by then
                self.store.release(self.sent)

    async def _until_done(self, workers: list[asyncio.Task[None]], grace_s: float) -> None:
        """Wait for all workers. After the first error, requests under way may still finish."""
        pending = set(workers)
        failed: list[asyncio.Task[None]] = []
        while pending and not failed:
            finished, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            failed = [task for task in finished if task.exception() is not None]
        if not failed:
            return
        self.stop.set()
        self.changed.set()
        await asyncio.wait(workers, timeout=grace_s)
        try:
            self._store_responses()  # there may be room on the disk again
        except DataError as error:
            raise DataError(f"{error}; {len(self.unstored)} replies were lost and will be asked for again") from error
        failed[0].result()

    async def _work(self, queue: _Queue) -> None:
        """One worker: take a batch, have it answered, store the responses, until nothing is left."""
        while batch := await queue.take():
            self.active_batches += 1
            try:
                responses = await queue.client.answer(batch, self)
            finally:
                self.active_batches -= 1
            for request, response in zip(batch, responses, strict=True):
                if response is None:
                    queue.waiting.append(request)
                else:
                    self.unstored.append((request, response))
            self._store_responses()
            self.changed.set()

    def _store_responses(self) -> None:
        """Store what came. A response leaves the queue only after it is stored."""
        stored = 0
        while self.unstored:
            request, response = self.unstored[0]
            self.store.finish(request, response)
            self.unstored.popleft()
            self.sent.discard(request.key)
            stored += 1
        if stored:  # one step per batch: the time left is estimated from whole batches
            spent_usd = self.store.spent_usd()
            self.progress.advance(stored, f"${spent_usd:.2f}" if spent_usd else "")

    # ---------------------------------------------------------------- the `CallContext` of clients

    @property
    def stopping(self) -> bool:
        """Whether nothing more should be sent."""
        return self.stop.is_set()

    async def wait(self, seconds: float) -> bool:
        """Sleep. False: the run stops."""
        if seconds > 0 and not self.stop.is_set():
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stop.wait(), seconds)
        return not self.stop.is_set()

    def log(self, text: str) -> None:
        """Print one line beside the progress bar."""
        self.progress.log(text)

    def reserve_retry(self, request: Request) -> bool:
        """Count the last try as spent, and set the same aside for another one if the budget lasts for it."""
        ceiling_usd = self.clients[request.role].ceiling_usd(request)
        return self.store.reserve_retry(request.key, ceiling_usd, self.budget_usd)


class _Queue:
    """The requests of one role.

    Attributes:
        waiting: without a reservation yet.
        reserved: with money set aside, about to be sent.
    """

    def __init__(self, run: _CallRun, client: ModelClient) -> None:
        self.run, self.client = run, client
        self.waiting: deque[Request] = deque()
        self.reserved: deque[Request] = deque()

    async def take(self) -> list[Request]:
        """The next batch to send. Empty: nothing is left, or the run stops.

        Raises:
            BudgetExceeded: money or tokens are used up, and no request under way can free any.
        """
        was_idle = False
        while not self.run.stopping and (self.reserved or self.waiting):
            if self.run.budget_tokens is not None and self.run.store.tokens() >= self.run.budget_tokens:
                if not self.run.active_batches:
                    raise BudgetExceeded(
                        f"the budget of {self.run.budget_tokens:,} tokens is used up: {self.run.store.tokens():,} were read "
                        f"and written, and {len(self.waiting) + len(self.reserved)} requests have no answer; raise "
                        f"--budget-tokens and run again: {_NEXT_STEP}"
                    )
                await self._until_something_changes()
            elif self.reserved:
                size = min(self.client.batch_size, len(self.reserved))
                return [self.reserved.popleft() for _ in range(size)]
            elif not self._reserve():
                # A request under way may cost less than was set aside for it. With none, waiting frees nothing.
                idle = self.run.store.under_way() == 0
                if idle and was_idle:
                    assert self.run.budget_usd is not None
                    raise BudgetExceeded(
                        f"the budget of ${self.run.budget_usd:.2f} does not last: ${self.run.store.spent_usd():.4f} is "
                        f"spent, the next call may cost up to ${self.client.ceiling_usd(self.waiting[0]):.4f}, and "
                        f"{len(self.waiting)} requests have no answer; raise --budget-usd and run again: {_NEXT_STEP}"
                    )
                was_idle = idle
                await self._until_something_changes()
        return []

    def _reserve(self) -> bool:
        """Set money aside for the next few requests. Returns whether the budget lasts for one at least."""
        size = max(min(RESERVATIONS_AT_ONCE, self.client.concurrency), self.client.batch_size)
        batch = [self.waiting.popleft() for _ in range(min(size, len(self.waiting)))]
        ceilings = {request.key: self.client.ceiling_usd(request) for request in batch}
        count = len(self.run.store.reserve(ceilings, self.run.budget_usd))
        self.reserved.extend(batch[:count])
        self.waiting.extendleft(reversed(batch[count:]))
        return count > 0

    async def _until_something_changes(self) -> None:
        self.run.changed.clear()
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.run.changed.wait(), _POLL_S)
