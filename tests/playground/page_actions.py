"""What tests do with the page in a browser."""

from __future__ import annotations

import re
import time
from typing import Any

IS_IDLE = "!document.querySelector('[aria-busy]')"


def until(page: Any, condition: str, timeout_s: float = 15.0) -> None:
    """Wait until a JavaScript expression is true. Playwright's own way evaluates text, which the page's policy forbids."""
    deadline = time.monotonic() + timeout_s
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"after {timeout_s:g} s not yet: {condition}"
        time.sleep(0.03)


def ask(page, question="Explain compound interest.", wait=True):
    page.fill("#message", question)
    page.click("#send")
    if wait:
        page.wait_for_selector("#send", state="visible")
        until(page, IS_IDLE)


def text_of(page, answer=0):
    """The text of the token spans of an answer."""
    spans = ".answer >> nth={} >> .tokens"
    return page.locator(spans.format(answer)).evaluate(
        "root => [...root.querySelectorAll('.t')].map(span => span.textContent).join('')"
    )


def token(page, text, answer=0):
    """The first span with exactly this text."""
    return page.locator(f".answer >> nth={answer} >> .t").filter(has_text=re.compile(f"^{re.escape(text)}$")).first


def shares(page, answer=0):
    items = page.locator(f".answer >> nth={answer} >> .shares li").all_inner_texts()
    return {item.split()[0]: float(item.split()[1]) for item in items}
