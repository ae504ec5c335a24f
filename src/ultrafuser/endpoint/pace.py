"""When the next request may go to an endpoint: back-off between retries, pauses, rate limits, bounded concurrency."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

MAX_PAUSE_S = 600.0  # the longest wait that an endpoint may ask for
MAX_BACKOFF_S = 60.0
_POLL_S = 0.25  # between two checks whether a limit lets the next request through


class Stopped(Exception):
    """The run ends, so nothing more is sent."""


def backoff_s(first_s: float, failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubles each time, up to a minute, with jitter."""
    longest = min(first_s * 2 ** min(max(failures - 1, 0), 30), MAX_BACKOFF_S)
    return random.uniform(longest / 2, longest)


def retry_wait_s(first_s: float, failures: int, retry_after_s: float | None) -> float:
    """Seconds until the next attempt: what the endpoint asks for, or the back-off where it names no time."""
    if retry_after_s:  # 0 is no wish: to retry at once would be a flood
        return min(retry_after_s, MAX_PAUSE_S)
    return backoff_s(first_s, failures)


class Backoff:
    """The state of one endpoint, shared by all its models: when it may be asked again, and since when it fails.

    Attributes:
        paused_until: time before which nothing is sent.
        failing_since: time of the first failure after the last reply. None: it serves.
    """

    def __init__(self, first_s: float = 1.0) -> None:
        self.first_s = first_s
        self.paused_until = 0.0
        self.failing_since: float | None = None
        self._pauses = 0  # in a row
        self._last_pause = 0.0

    def record_success(self) -> None:
        """A reply came."""
        self.failing_since, self._pauses = None, 0

    def record_failure(self) -> None:
        """A request was not served."""
        if self.failing_since is None:
            self.failing_since = time.monotonic()

    def failing_s(self) -> float:
        """Seconds since the first failure after the last reply."""
        return 0.0 if self.failing_since is None else time.monotonic() - self.failing_since

    def pause(self, sent_at: float, retry_after_s: float | None) -> bool:
        """Send nothing for `retry_after_s` seconds, or for a time that doubles where the endpoint names none.

        Returns:
            Whether this is a new pause: of requests that were in flight together, only the first refusal counts.
        """
        self.record_failure()
        now_s = time.monotonic()
        is_new = sent_at >= self._last_pause
        if is_new:
            self._last_pause = now_s
            self._pauses += 1
        if not retry_after_s:  # none, or 0: to retry at once would be a flood
            retry_after_s = backoff_s(self.first_s, self._pauses) if is_new else 0.0
        self.paused_until = max(self.paused_until, now_s + min(retry_after_s, MAX_PAUSE_S))
        return is_new


class RateLimiter:
    """Lets the requests of one model through, in order.

    Attributes:
        slots: requests that may be in flight. Halved when the endpoint is busy, grows back with each reply.
    """

    def __init__(
        self,
        concurrency: int,
        backoff: Backoff,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self.concurrency, self.backoff = concurrency, backoff
        self.slots = float(concurrency)
        self.in_flight = 0
        self._s_per_request = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._s_per_token = 60.0 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_request = self._next_token = 0.0
        self._queue = asyncio.Lock()
        self._slot_freed = asyncio.Event()

    @asynccontextmanager
    async def slot(self, estimated_tokens: int, stopping: Callable[[], bool] = lambda: False) -> AsyncIterator[None]:
        """Wait until a request of about so many tokens may be sent. The context lasts as long as the request.

        Raises:
            Stopped: the run ends.
        """
        async with self._queue:  # the first in the queue waits for all
            while not (stopped := stopping()) and (wait_s := self._wait_s()) > 0:
                self._slot_freed.clear()
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._slot_freed.wait(), min(wait_s, _POLL_S))
            if stopped:
                raise Stopped
            now_s = time.monotonic()
            self._next_request = max(now_s, self._next_request) + self._s_per_request
            self._next_token = max(now_s, self._next_token) + self._s_per_token * estimated_tokens
            self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1
            self._slot_freed.set()

    def settle(self, estimated_tokens: int, used_tokens: int) -> None:
        """Replace a request's estimated tokens by those that it used."""
        self._next_token += self._s_per_token * (used_tokens - estimated_tokens)

    def record_success(self) -> None:
        """A reply came."""
        self.backoff.record_success()
        self.slots = min(self.slots + 1 / max(self.slots, 1.0), self.concurrency)

    def record_busy(self, sent_at: float, retry_after_s: float | None) -> bool:
        """The endpoint has too much to do: pause, and send fewer requests at once from then on.

        Returns:
            Whether this is a new pause, as in `Backoff.pause`.
        """
        is_new = self.backoff.pause(sent_at, retry_after_s)
        if is_new:
            self.slots = max(self.slots / 2, 1.0)
        return is_new

    def _wait_s(self) -> float:
        now_s = time.monotonic()
        wait_s = max(self.backoff.paused_until - now_s, self._next_request - now_s, self._next_token - now_s)
        return _POLL_S if wait_s <= 0 and self.in_flight >= int(self.slots) else wait_s
