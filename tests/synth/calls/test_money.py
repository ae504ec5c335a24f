"""What calls cost, and how long prompts are."""

from __future__ import annotations

import pytest

from ultrafuser.synth.calls.money import Prices, likely_prompt_tokens, most_prompt_tokens
from ultrafuser.synth.calls.request import Request


def request(text: str, **changes) -> Request:
    return Request("responses", "math", "", "m", (("user", text),), **changes)


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
