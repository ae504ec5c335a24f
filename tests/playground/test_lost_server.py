"""The page when things go wrong: no server, no key, refusals."""

from __future__ import annotations

import pytest
from page_actions import IS_IDLE, ask, text_of, until
from scripted_server import ANSWER, Script
from starlette.responses import JSONResponse
from starlette.routing import Route

from ultrafuser.playground.local_app import local_app
from ultrafuser.playground.proxy import Upstream
from ultrafuser.playground.routes import add_playground

pytestmark = pytest.mark.browser


def lose_and_return(page, script, server):
    script.pause_s = 0.03
    page.wait_for_selector("#legend button")
    ask(page, wait=False)
    until(page, "document.querySelectorAll('.answer .t').length > 10")
    server.stop()
    page.wait_for_selector("#banner.bad", state="visible")
    assert "Reconnecting" in page.locator("#banner").inner_text()
    part = text_of(page)
    assert ANSWER.startswith(part) and len(part) > 10
    assert "This is the part that arrived." in page.locator(".answer .problem").inner_text()
    assert page.locator(".shares").is_visible() and page.locator("#send").is_visible()
    page.locator(".retry").click()
    until(page, IS_IDLE)
    assert "cannot be reached" in page.locator(".answer .problem").inner_text()
    script.pause_s = 0
    server.start()
    page.wait_for_selector("#banner.good", state="visible")
    page.wait_for_selector("#banner", state="hidden")
    page.locator(".retry").click()
    until(page, IS_IDLE)
    assert text_of(page) == ANSWER and page.locator(".answer .problem").is_hidden()


def test_a_lost_server_leaves_the_part_and_comes_back(script, playground, open_page):
    lose_and_return(open_page(playground.url), script, playground)


def test_a_lost_server_behind_the_proxy(script, run, open_page):
    server = run(script.app())
    lose_and_return(open_page(run(local_app(Upstream(server.url))).url), script, server)


def test_a_server_that_is_not_there_yet(script, run, open_page):
    server = run(script.app())
    server.stop()
    page = open_page(run(local_app(Upstream(server.url))).url)
    page.wait_for_selector("#banner.bad", state="visible")
    assert "cannot be reached" in page.locator("#banner").inner_text()
    server.start()
    page.wait_for_selector("#legend button")
    ask(page)
    assert text_of(page) == ANSWER


def test_a_server_with_a_key_asks_for_it(script, playground, open_page):
    script.key = "sk-right"
    page = open_page(playground.url)
    page.wait_for_selector("#key-form", state="visible")
    assert page.locator("#key-problem").is_hidden()
    page.fill("#key", "sk-wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-problem", state="visible")
    assert "refused this key" in page.locator("#key-problem").inner_text()
    page.fill("#key", "sk-right")
    page.get_by_role("button", name="Connect").click()
    page.wait_for_selector("#key-form", state="hidden")
    ask(page)
    assert text_of(page) == ANSWER
    page.reload()
    page.wait_for_selector("#legend button")  # the tab remembers the key
    script.key = "sk-other"
    ask(page, wait=False)
    page.wait_for_selector("#key-form", state="visible")
    assert page.evaluate("JSON.stringify(localStorage)").count("sk-") == 0


def test_the_command_lines_key_is_sent_by_the_proxy(script, run, open_page):
    script.key = "sk-right"
    server = run(script.app())
    page = open_page(run(local_app(Upstream(server.url, "sk-right"))).url)
    page.wait_for_selector("#legend button")
    ask(page)
    assert text_of(page) == ANSWER


def test_a_plain_server_has_no_colours_and_the_page_says_so(run, open_page):
    plain = Script(names=(), model="llama")
    page = open_page(run(local_app(Upstream(run(plain.app()).url))).url)
    page.wait_for_selector("#plain", state="visible")
    assert "without colours" in page.locator("#plain").inner_text()
    ask(page)
    assert text_of(page) == ANSWER and page.locator(".answer .code").count() == 1
    assert page.locator(".shares").is_hidden() and "gate_weights" not in plain.requests[0]
    assert page.locator(".playback").is_visible()


def test_a_refusal_is_shown_in_the_servers_words(script, run, open_page):
    async def busy(request):
        error = {"message": "The queue is full.", "type": "server_error", "param": None, "code": None}
        return JSONResponse({"error": error}, 429, headers={"retry-after": "7"})

    app = script.app()
    app.router.routes[0] = Route("/v1/chat/completions", busy, methods=["POST"])
    add_playground(app)
    page = open_page(run(app).url)
    page.wait_for_selector("#legend button")
    ask(page)
    assert page.locator(".answer .problem").inner_text() == "The queue is full. Try again in 7 s."
    assert page.locator(".retry").is_visible() and page.locator("#banner").is_hidden()


def test_a_server_without_a_health_route_is_not_lost(script, run, open_page):
    server = script.app()
    server.router.routes = [route for route in server.router.routes if route.path != "/health"]
    running = run(server)
    page = open_page(run(local_app(Upstream(running.url))).url)
    page.wait_for_selector("#legend button")
    is_healthy = "import('/playground/api.js').then(api => api.isHealthy())"
    assert page.evaluate(is_healthy) is True
    running.stop()
    assert page.evaluate(is_healthy) is False
