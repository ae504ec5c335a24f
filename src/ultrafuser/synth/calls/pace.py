"""When the next request may go to an endpoint: limits a minute, pauses that it asks for, fewer at once when full."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

MAX_PAUSE_S = 600.0  # that an endpoint may ask for
MAX_BACKOFF_S = 60.0
_LOOK_S = 0.25  # between two looks at whether a limit lets the next request through


class Stopped(Exception):
    """The run ends, so nothing more is sent."""


class Health:
    """One endpoint as all its models see it: how long to leave it alone, and since when it has not served anything.

    Attributes:
        until: time before which nothing is sent.
        failing_since: of the first failure after the last reply; None: all is well.
    """

    def __init__(self, backoff_s: float = 1.0) -> None:
        self.backoff_s = backoff_s
        self.until = 0.0
        self.failing_since: float | None = None
        self._pauses = 0  # in a row
        self._last_pause = 0.0

    def served(self) -> None:
        """A reply came."""
        self.failing_since, self._pauses = None, 0

    def failed(self) -> None:
        """A request was not served."""
        if self.failing_since is None:
            self.failing_since = time.monotonic()

    def failing_s(self) -> float:
        """Seconds since the first failure after the last reply."""
        return 0.0 if self.failing_since is None else time.monotonic() - self.failing_since

    def pause(self, sent_at: float, asked_s: float | None) -> bool:
        """It wants no requests now, for `asked_s` seconds if it says so: leave it alone, all of us.

        Returns:
            Whether this is news: of many requests that were under way together, only the first one's answer counts.
        """
        self.failed()
        now = time.monotonic()
        news = sent_at >= self._last_pause
        if news:
            self._last_pause = now
            self._pauses += 1
        if not asked_s:  # none, or 0: at once again would be a flood
            longest = min(self.backoff_s * 2 ** min(self._pauses - 1, 30), MAX_BACKOFF_S)
            asked_s = random.uniform(longest / 2, longest) if news else 0.0
        self.until = max(self.until, now + min(asked_s, MAX_PAUSE_S))
        return news


class Pace:
    """Lets requests of one model through, in order.

    Attributes:
        slots: requests that may be under way at once; halved when the endpoint is full, grows back reply by reply.
    """

    def __init__(
        self,
        concurrency: int,
        health: Health,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self.concurrency, self.health = concurrency, health
        self.slots = float(concurrency)
        self.under_way = 0
        self._s_per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = 0.0
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def turn(self, tokens: int, stopping: Callable[[], bool] = lambda: False) -> AsyncIterator[None]:
        """Wait until a request of about so many tokens may be sent; it is under way as long as the context lasts.

        Raises:
            Stopped: there is no point in waiting any longer.
        """
        async with self._turn:  # the first in the queue waits for all
            while not (stopped := stopping()) and (wait_s := self._wait_s()) > 0:
                self._freed.clear()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._freed.wait(), min(wait_s, _LOOK_S))
            if stopped:
                raise Stopped
            now = time.monotonic()
            self._next_request = max(now, self._next_request) + self._s_per_request
            self._next_token = max(now, self._next_token) + self._s_per_token * tokens
            self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
            self._freed.set()

    def settle(self, thought: int, used: int) -> None:
        """A reply took `used` tokens, and its turn was for `thought`: count what it took."""
        self._next_token += self._s_per_token * (used - thought)

    def served(self) -> None:
        """A reply came."""
        self.health.served()
        self.slots = min(self.slots + 1 / max(self.slots, 1.0), self.concurrency)

    def full(self, sent_at: float, asked_s: float | None) -> bool:
        """The endpoint has too much to do: it is left alone for a while, and gets less at once from then on.

        Returns:
            Whether this is news, as of `Health.pause`.
        """
        news = self.health.pause(sent_at, asked_s)
        if news:
            self.slots = max(self.slots / 2, 1.0)
        return news

    def _wait_s(self) -> float:
        now = time.monotonic()
        wait_s = max(self.health.until - now, self._next_request - now, self._next_token - now)
        return _LOOK_S if wait_s <= 0 and self.under_way >= int(self.slots) else wait_s
