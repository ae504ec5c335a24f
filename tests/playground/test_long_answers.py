"""Long answers stay fast."""

from __future__ import annotations

import pytest
from page_actions import ask, text_of

pytestmark = pytest.mark.browser


def test_a_long_answer_stays_responsive(script, playground, open_page):
    """4,000 tokens in prose, code and one line of 1,600. A frame takes 17 ms, or more on a busy machine."""
    words = " ".join(f"word{i}" for i in range(800))
    text = f"{words}\n\n```\n" + "x = 1 + 2\n" * 160 + "```\n" + "A line of prose, and more.\n" * 150
    script.answer = lambda question: text
    page = open_page(playground.url)
    page.wait_for_selector("#legend button")
    page.click("#open-settings")
    page.fill("input[name=max_tokens]", "8000")
    page.evaluate(
        "window.frameTimes = []; let last = performance.now();"
        "const tick = (now) => { frameTimes.push(now - last); last = now; requestAnimationFrame(tick) };"
        "requestAnimationFrame(tick)"
    )
    ask(page)
    count = len(script.tokens(text, {}))
    assert count > 4000 and text_of(page) == text
    assert page.locator(".answer .t").count() >= count
    page.locator(".playback input").fill("2000")
    page.locator(".playback input").fill("100")
    assert page.locator(".t.later").count() >= count - 100
    times = sorted(page.evaluate("frameTimes"))
    assert times[len(times) // 2] < 100 and times[-1] < 2000  # ms: median and longest
    started = page.evaluate("performance.now()")
    page.locator(".answer .t").nth(50).hover()
    page.locator("#token-card").wait_for(state="visible")
    assert page.evaluate("performance.now()") - started < 2000


def test_past_thousands_of_tokens_neighbours_share_a_span(script, playground, open_page):
    text = "word " * 7200
    script.answer = lambda question: text
    page = open_page(playground.url)
    page.click("#open-settings")
    page.fill("input[name=max_tokens]", "8000")
    ask(page)
    count = len(script.tokens(text, {}))
    assert count > 7000 and text_of(page) == text
    assert page.locator(".answer .t").count() < count - 500
    page.locator(".answer .tokens").focus()
    page.keyboard.press("End")
    page.locator("#token-card").wait_for(state="visible")
    assert "mean of tokens" in page.locator("#token-card").inner_text()
