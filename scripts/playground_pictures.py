"""Draw the pictures of docs/playground.md: the page in headless Chromium, before a server that answers by a script."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "playground"))
from scripted_server import Running, Script  # noqa: E402

from ultrafuser.playground.routes import add_playground  # noqa: E402

FOLDER = ROOT / "docs" / "assets"
QUESTION = "Explain compound interest to a teenager, give the formula, and a Python function for it."
LIGHT: dict[str, Any] = {"viewport": {"width": 960, "height": 760}, "color_scheme": "light"}
DARK: dict[str, Any] = {"viewport": {"width": 1180, "height": 760}, "color_scheme": "dark"}
PHONE: dict[str, Any] = {"viewport": {"width": 375, "height": 740}, "is_mobile": True, "has_touch": True}


def ask(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#legend button")


def send(page: Any) -> None:
    page.fill("#message", QUESTION)
    page.click("#send")
    page.wait_for_selector(".shares", state="visible", timeout=600_000)
    page.evaluate("document.activeElement.blur()")


def light(page: Any) -> None:
    """One answer, and the weights of one token."""
    send(page)
    page.locator(".answer .t", has_text="rate").first.hover()
    page.locator("#token-card").wait_for(state="visible")


def dark(page: Any) -> None:
    """Side by side with a specialist, in the middle of a play-back."""
    page.select_option("#compare", index=2)
    send(page)
    page.locator(".playback input").first.fill("44")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a running playground, instead of the scripted server")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    app = Script().app()
    add_playground(app)
    server = Running(app)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, options, act in (("answer", LIGHT, light), ("compare", DARK, dark), ("phone", PHONE, send)):
            page = browser.new_context(**options).new_page()
            ask(page, arguments.url or server.url)
            act(page)
            page.wait_for_timeout(300)
            if name != "phone" or arguments.folder != FOLDER:
                page.screenshot(path=arguments.folder / f"playground-{name}.png")
        browser.close()
    server.stop()


if __name__ == "__main__":
    main()
