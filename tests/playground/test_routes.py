"""The routes behind the page, without a browser: files, policy, export, and the proxy."""

from __future__ import annotations

import json
import re
import time

import httpx
import pytest
from scripted_server import Script
from starlette.applications import Starlette
from starlette.responses import RedirectResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from ultrafuser.display.palette import NEUTRAL, colours
from ultrafuser.errors import DataError, EndpointError
from ultrafuser.playground.export import read_export
from ultrafuser.playground.local_app import SameOrigin, local_app
from ultrafuser.playground.proxy import Upstream, read_url
from ultrafuser.playground.routes import PAGE, add_playground

ANSWERED = {"label": "m", "specialists": ["a", "b"], "tokens": ["x <b>", "y"], "weights": [[0.9, 0.1], [0.2, 0.8]]}
CONVERSATION = {"title": "t", "turns": [{"question": "q <i>", "answers": [ANSWERED]}]}


@pytest.fixture
def client():
    app = Starlette()
    add_playground(app, {"other": Upstream("http://127.0.0.1:9")})
    return TestClient(app)


def test_every_file_is_served_with_a_strict_policy(client):
    for name in ["", *(f"playground/{path.name}" for path in PAGE.iterdir())]:
        response = client.get(f"/{name}")
        assert response.status_code == 200, name
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self';" in policy and "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
    assert client.get("/playground/../routes.py").status_code == 404
    assert client.get("/playground/..%2froutes.py").status_code == 404


def test_the_page_loads_nothing_from_elsewhere_and_has_no_inline_script():
    for path in PAGE.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]* src=)|\son\w+=|<style|\sstyle=", html)
    assert all(
        (PAGE.parent / name.replace("playground/", "page/")).is_file()
        for name in re.findall(r'(?:src|href)="(.*?)"', html)
    )


def test_the_configuration_names_colours_examples_and_compared_servers(client):
    value = client.get("/playground/config.json").json()
    assert value["others"] == ["other"] and set(value["examples"]) == {"text", "code", "math", "mixed"}
    assert value["palette"]["neutral"] == NEUTRAL
    assert value["palette"]["colours"][:9] == list(colours([str(k) for k in range(9)]).values())


def test_an_export_is_the_page_of_inspect(client):
    response = client.post("/playground/export", json=CONVERSATION)
    assert response.status_code == 200 and "attachment" in response.headers["content-disposition"]
    assert "uf-trace" in response.text and "x &lt;b&gt;" in response.text and "q &lt;i&gt;" in response.text
    plain = {**CONVERSATION, "turns": [{"question": "q", "answers": [{**ANSWERED, "specialists": [], "weights": []}]}]}
    response = client.post("/playground/export", json=plain)
    assert "<pre>x &lt;b&gt;y</pre>" in response.text


@pytest.mark.parametrize(
    "body, message",
    [
        ("{", "export: not JSON"),
        ("[" * 100_000, "export: "),
        ("[]", "export: expected an object with the fields title, turns"),
        ({"title": "t", "turns": [{"question": 1, "answers": []}]}, "turns[0].question: got int, expected a text"),
        ({"title": "t", "turns": [{"question": "q", "answers": [{**ANSWERED, "tokens": [1, 2]}]}]}, "answers[0].tokens"),
        ({"title": "t", "turns": [{"question": "q", "answers": [{**ANSWERED, "weights": [["a"], 1]}]}]}, ".weights: expected"),
        ({"title": "t", "turns": [{"question": "q", "answers": [{**ANSWERED, "weights": [[1, 0]]}]}]}, "1 rows of weights"),
        ({"title": "t", "turns": [{"question": "q", "answers": [{**ANSWERED, "weights": [[7, 0]] * 2}]}]}, "sum to 7"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(client, body, message):
    content = body if isinstance(body, str) else json.dumps(body)
    response = client.post("/playground/export", content=content)
    assert response.status_code == 400 and message in response.json()["error"]["message"]


def test_a_field_too_many_is_named_in_the_error():
    with pytest.raises(DataError, match=r"export: expected an object with the fields title, turns"):
        read_export(b'{"title": "t", "turns": [], "x": 1}')


def test_an_export_has_a_limit(client, monkeypatch):
    monkeypatch.setattr("ultrafuser.playground.routes.MAX_EXPORT_BYTES", 100)
    response = client.post("/playground/export", json=CONVERSATION)
    assert response.status_code == 413 and "more than 100 bytes" in response.json()["error"]["message"]


# ---------------------------------------------------------------- the proxy


def test_the_proxy_streams_and_a_client_that_leaves_stops_the_server(run):
    script = Script(pause_s=0.3)
    server = run(script.app())
    proxy = run(local_app(Upstream(server.url)))
    body = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "q"}]}
    with httpx.stream("POST", f"{proxy.url}/v1/chat/completions", json=body, timeout=20) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        started = time.monotonic()
        chunks = response.iter_text()
        for _ in range(3):
            next(chunks)
        assert time.monotonic() - started < 8  # of at least 24 s in all
    deadline = time.monotonic() + 8
    while server.num_streams and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.num_streams == 0


def test_the_proxy_sends_its_own_key_and_no_cookies(run):
    script = Script(key="sk-1")
    proxy = run(local_app(Upstream(run(script.app()).url, "sk-1")))
    headers = {"authorization": "Bearer wrong", "cookie": "a=b"}
    assert httpx.get(f"{proxy.url}/v1/models", headers=headers).json()["data"][0]["id"] == "my-fused"
    proxy = run(local_app(Upstream(run(script.app()).url)))
    assert httpx.get(f"{proxy.url}/v1/models").status_code == 401
    assert httpx.get(f"{proxy.url}/v1/models", headers={"authorization": "Bearer sk-1"}).status_code == 200


def test_a_server_that_is_gone_is_named(run):
    proxy = run(local_app(Upstream("http://127.0.0.1:9")))
    response = httpx.get(f"{proxy.url}/v1/models")
    error = response.json()["error"]
    assert response.status_code == 502 and error["code"] == "server_lost"
    assert error["message"].startswith("the server http://127.0.0.1:9 cannot be reached")
    assert httpx.get(f"{proxy.url}/health").status_code == 502


def test_the_proxy_follows_no_redirect_and_passes_nothing_else_on(run):
    target = Starlette(routes=[Route("/v1/models", lambda request: RedirectResponse("http://127.0.0.1:9/"))])
    proxy = run(local_app(Upstream(run(target).url)))
    assert httpx.get(f"{proxy.url}/v1/models").status_code == 307
    assert httpx.get(f"{proxy.url}/v1/%2e%2e/secret").status_code == 404
    app = Starlette()
    add_playground(app, {"other": Upstream("http://127.0.0.1:9")})
    client = TestClient(app)
    assert "is not passed on" in client.get("/playground/others/other/metrics").json()["error"]["message"]
    assert "is no compared server" in client.get("/playground/others/x/v1/models").json()["error"]["message"]


def test_pages_of_other_sites_cannot_use_the_key(run):
    app = local_app(Upstream(run(Script().app()).url, "sk-1"))
    proxy = run(SameOrigin(app, is_local=True))
    url = f"{proxy.url}/v1/models"
    assert httpx.get(url).status_code == 200
    assert httpx.get(url, headers={"origin": proxy.url}).status_code == 200
    assert httpx.get(url, headers={"origin": "http://evil.example"}).status_code == 403
    refusal = httpx.get(url, headers={"host": f"evil.example:{proxy.port}"})
    assert refusal.status_code == 403 and "is not this machine" in refusal.json()["error"]["message"]
    public = run(SameOrigin(app, is_local=False))
    assert httpx.get(f"{public.url}/v1/models", headers={"host": "model.example"}).status_code == 200


@pytest.mark.parametrize("text", ["http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"])
def test_an_address_with_and_without_v1(text):
    assert read_url(text) == "http://h:1"


@pytest.mark.parametrize("text", ["h:1", "ftp://h", "http://", "http://h/?a=b"])
def test_what_is_no_address_is_refused(text):
    with pytest.raises(EndpointError, match="expected the address of an OpenAI-compatible server"):
        read_url(text)
