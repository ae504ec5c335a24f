"""The review page as a browser talks to it: what is shown, and what its buttons leave in the store."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from dataclasses import replace
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest

from fake_writer import FakeClient, Writer, tiny
from ultrafuser.synth.pipeline import synthesise
from ultrafuser.synth.review.session import ALL_DOMAINS, STATES, ReviewSession

pytest.importorskip("gradio", reason="the review extra is not installed")
HTML_LIKE = re.compile(r"[<>\[\]*{}$]")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A session and the address of its page."""
    from ultrafuser.synth.review.page import review_page

    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    recipe = tiny(f"output={tmp_path / 'out'}")
    synthesise(recipe, clients={"writer": FakeClient(Writer())})
    session = ReviewSession.open(recipe)
    page = review_page(session)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, share=False)
    yield session, url
    page.close()
    session.store.close()


def test_buttons_write_to_the_store(served):
    from gradio_client import Client

    session, url = served
    client = Client(url, verbose=False)
    first = client.predict(ALL_DOMAINS, STATES[0], api_name="/show")
    assert session.rows[0].id in first[0] and "0 of 144 rows reviewed" in first[1]
    assert [box["value"] for box in first[3:5]] == [content for _, content in session.rows[0].messages]
    after = client.predict(ALL_DOMAINS, STATES[0], api_name="/accept")
    assert session.decision(session.rows[0]) == "accept" and session.rows[1].id in after[0]
    after = client.predict(ALL_DOMAINS, STATES[0], "dull", api_name="/reject")
    assert session.store.reviews.get(session.rows[1].id).note == "dull" and session.rows[2].id in after[0]
    rejected = client.predict(ALL_DOMAINS, "rejected", api_name="/show")
    assert session.rows[1].id in rejected[0] and rejected[2] == "dull"
    client.predict(ALL_DOMAINS, STATES[0], api_name="/show")
    after = client.predict(ALL_DOMAINS, STATES[0], "A better question?", "A better answer.", api_name="/save")
    assert session.messages(2) == [("user", "A better question?"), ("assistant", "A better answer.")]
    assert "3 of 144 rows reviewed" in after[1]
    with pytest.raises(Exception, match="the message of the assistant is empty"):
        client.predict(ALL_DOMAINS, STATES[0], "A question?", " ", api_name="/save")
    assert session.decision(session.rows[3]) == ""


HOSTILE = "![x](http://127.0.0.1:9/p.png) <img src=http://127.0.0.1:9/p.png> [a](javascript:x) **b** {{c}} ${d}"


def test_text_of_rows_is_in_text_boxes_alone(served):
    from gradio_client import Client

    session, url = served
    session.rows[0] = replace(session.rows[0], id=HOSTILE, topic=HOSTILE, subtopic=HOSTILE, source=HOSTILE)
    client = Client(url, verbose=False)
    shown = client.predict(ALL_DOMAINS, "all", api_name="/show")
    assert shown[0].count(HOSTILE) == 4
    components = {component["id"]: component for component in client.config["components"]}
    [outputs] = [call["outputs"] for call in client.config["dependencies"] if call["api_name"] == "show"]
    types = [components[output]["type"] for output in outputs]
    assert types[1:3] == ["textbox", "markdown"] and set(types[3:]) == {"textbox"}
    assert not HTML_LIKE.search(shown[1]), "the summary, which is Markdown, has counts alone"
    with pytest.raises(Exception, match="the message of the assistant is empty") as error:
        client.predict(ALL_DOMAINS, "all", "A question?", " ", api_name="/save")
    assert not HTML_LIKE.search(str(error.value))


HOSTS = {
    "127.0.0.1:{port}": 200,
    "localhost:{port}": 200,
    "LOCALHOST": 200,
    "attacker.example": 400,
    "attacker.example:{port}": 400,
    "127.0.0.1.attacker.example:{port}": 400,
    "localhost.attacker.example": 400,
    "127.0.0.1@attacker.example": 400,
    "": 400,
}


def test_requests_to_another_host_are_refused(served):
    _, url = served
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/call/accept"):
        for host, status in HOSTS.items():
            assert get(url, path, host) == (status, status == 400), (path, host)


def get(url: str, path: str, host: str) -> tuple[int, bool]:
    """The status of a response, and whether it names the Host header as its reason."""
    address = urlsplit(url)
    connection = HTTPConnection(address.hostname, address.port, timeout=30)
    is_call = path.startswith("/gradio_api/call")
    connection.putrequest("POST" if is_call else "GET", path, skip_host=True)
    connection.putheader("Host", host.format(port=address.port))
    body = json.dumps({"data": [ALL_DOMAINS, STATES[0]]}).encode() if is_call else b""
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content == b"Invalid host header"


def test_a_page_for_all_addresses_knows_the_names_of_this_machine():
    from ultrafuser.synth.review.page import _own_hosts

    hosts = _own_hosts("0.0.0.0").kwargs["allowed_hosts"]
    assert {"127.0.0.1", "localhost", socket.gethostname()} <= set(hosts) and "*" not in hosts
    assert _own_hosts("192.0.2.7").kwargs["allowed_hosts"] == ["127.0.0.1", "192.0.2.7", "localhost"]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_in_a_browser(served):
    session, url = served
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=20000",
        "--dump-dom",
        url,
    ]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "0 of 144 rows reviewed" in completed.stdout  # a text box's own text is no part of the document
    assert all(f">{name}<" in completed.stdout.replace(" <", "<") for name in ("Accept", "Save edit", "Reject"))
