"""How fast an endpoint is asked, and what calls cost."""

from __future__ import annotations

import asyncio
import time

import pytest

from ultrafuser.synth.calls.money import Prices, likely_prompt_tokens, most_prompt_tokens
from ultrafuser.synth.calls.pace import MAX_BACKOFF_S, MAX_PAUSE_S, Health, Pace
from ultrafuser.synth.calls.request import Request


def request(text: str, **changes) -> Request:
    return Request("responses", "math", "", "m", (("user", text),), **changes)


def test_pauses_double_until_something_is_served(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    health = Health(backoff_s=1.0)
    for number in range(9):
        assert health.pause(now[0], None)
        longest = min(2.0**number, MAX_BACKOFF_S)
        assert longest / 2 <= health.until - now[0] <= longest
        now[0] = health.until
    assert health.failing_s() == now[0] - 1000.0
    health.served()
    assert health.failing_s() == 0
    health.pause(now[0], None)
    assert health.until - now[0] <= 1.0
    assert health.pause(now[0] + 1, 7.0) and health.until == now[0] + 7
    assert health.pause(now[0] + 1, 1e9) and health.until == now[0] + MAX_PAUSE_S


def test_of_requests_sent_together_only_the_first_answer_is_news(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(64, Health(1.0))
    now[0] += 1
    for _ in range(64):
        pace.full(1000.5, None)
    assert pace.slots == 32 and pace.health.until <= 1002
    pace.full(1001.5, None)
    assert pace.slots == 16
    for _ in range(9):
        now[0] += 1
        pace.full(now[0], None)
    assert pace.slots == 1
    for _ in range(5000):
        pace.served()
    assert pace.slots == 64


def test_turns_wait_for_a_slot():
    async def run() -> int:
        pace, most = Pace(8, Health()), 0
        pace.slots = 2.0

        async def one() -> None:
            nonlocal most
            async with pace.turn(1):
                most = max(most, pace.under_way)
                await asyncio.sleep(0.005)

        await asyncio.gather(*(one() for _ in range(20)))
        assert pace.under_way == 0
        return most

    assert asyncio.run(run()) == 2


def test_turns_keep_to_the_tokens_a_minute():
    async def run() -> float:
        pace, began = Pace(8, Health(), tokens_per_minute=60_000), time.monotonic()
        for _ in range(4):
            async with pace.turn(200):
                pass
            pace.settle(200, 100)
        return time.monotonic() - began

    assert 0.28 < asyncio.run(run()) < 1.5  # three waits of 100 tokens at 1,000 a second


def test_no_tokenizer_makes_more_of_a_text():
    texts = ["", "why?", "\u00fc\u6f22\U0001f600" * 20, "a" * 999]
    for text in texts:
        assert most_prompt_tokens(request(text)) >= len(text.encode())
        assert likely_prompt_tokens(request(text)) <= most_prompt_tokens(request(text))
    assert most_prompt_tokens(request("a", schema={"type": "object"})) > most_prompt_tokens(request("a"))


def test_prices():
    prices = Prices(2.0, 8.0)
    assert prices.cost_usd(1_000_000, 500_000) == 6.0
    assert prices.ceiling_usd(request("12345678", max_tokens=1000)) == pytest.approx((40 * 2 + 1000 * 8) / 1e6)
