"""A browser, and servers for it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scripted_server import Running, Script

from ultrafuser.playground.routes import add_playground


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A headless browser. CI has one, elsewhere the tests skip without it."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None and not os.environ.get("CI"):
        pytest.skip("Chromium is not installed")
    if not os.environ.get("CI"):
        pytest.importorskip("playwright", reason="playwright is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def run() -> Iterator[Callable[[Any], Running]]:
    """run(application): a running server."""
    servers: list[Running] = []

    def start(app: Any) -> Running:
        servers.append(Running(app))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def script() -> Script:
    """What the server of `playground` says."""
    return Script()


@pytest.fixture
def playground(script: Script, run: Callable[[Any], Running]) -> Running:
    """A running fused server with the page."""
    app = script.app()
    add_playground(app)
    return run(app)


@pytest.fixture
def open_page(chromium: Any) -> Iterator[Callable[..., Any]]:
    """open_page(url, **options of the browser context): the page. An error of its scripts fails the test."""
    contexts, errors = [], []

    def open_page(url: str, **options: Any) -> Any:
        options.setdefault("viewport", {"width": 1180, "height": 820})
        context = chromium.new_context(accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if "Content Security" in message.text else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
