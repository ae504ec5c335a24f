"""How fast an endpoint is asked: back-off, pauses, rate limits."""

from __future__ import annotations

import asyncio
import time

from ultrafuser.endpoint.pace import MAX_BACKOFF_S, MAX_PAUSE_S, Backoff, RateLimiter


def test_pauses_double_until_something_is_served(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    backoff = Backoff(first_s=1.0)
    for pauses in range(9):
        assert backoff.pause(clock[0], None)
        longest = min(2.0**pauses, MAX_BACKOFF_S)
        assert longest / 2 <= backoff.paused_until - clock[0] <= longest
        clock[0] = backoff.paused_until
    assert backoff.failing_s() == clock[0] - 1000.0
    backoff.record_success()
    assert backoff.failing_s() == 0
    backoff.pause(clock[0], None)
    assert backoff.paused_until - clock[0] <= 1.0
    assert backoff.pause(clock[0] + 1, 7.0) and backoff.paused_until == clock[0] + 7
    assert backoff.pause(clock[0] + 1, 1e9) and backoff.paused_until == clock[0] + MAX_PAUSE_S


def test_of_requests_in_flight_only_the_first_refusal_starts_a_pause(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    limiter = RateLimiter(64, Backoff(1.0))
    clock[0] += 1
    for _ in range(64):
        limiter.record_busy(1000.5, None)
    assert limiter.slots == 32 and limiter.backoff.paused_until <= 1002
    limiter.record_busy(1001.5, None)
    assert limiter.slots == 16
    for _ in range(9):
        clock[0] += 1
        limiter.record_busy(clock[0], None)
    assert limiter.slots == 1
    for _ in range(5000):
        limiter.record_success()
    assert limiter.slots == 64


def test_requests_wait_for_a_slot():
    async def run() -> int:
        limiter, most_in_flight = RateLimiter(8, Backoff()), 0
        limiter.slots = 2.0

        async def send() -> None:
            nonlocal most_in_flight
            async with limiter.slot(1):
                most_in_flight = max(most_in_flight, limiter.in_flight)
                await asyncio.sleep(0.005)

        await asyncio.gather(*(send() for _ in range(20)))
        assert limiter.in_flight == 0
        return most_in_flight

    assert asyncio.run(run()) == 2


def test_requests_keep_to_the_tokens_per_minute():
    async def run() -> float:
        limiter, began = RateLimiter(8, Backoff(), tokens_per_minute=60_000), time.monotonic()
        for _ in range(4):
            async with limiter.slot(200):
                pass
            limiter.settle(200, 100)
        return time.monotonic() - began

    assert 0.28 < asyncio.run(run()) < 1.5  # three waits of 100 tokens at 1,000 a second
