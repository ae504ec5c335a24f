"""The review page as a browser talks to it: what is shown, and what its buttons leave in the store."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from fake_writer import FakeClient, Writer, tiny
from ultrafuser.synth.pipeline import synthesise
from ultrafuser.synth.review.session import ALL_DOMAINS, STATES, ReviewSession

pytest.importorskip("gradio", reason="the review extra is not installed")
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
    assert session.rows[0].id in completed.stdout
    assert all(f">{name}<" in completed.stdout.replace(" <", "<") for name in ("Accept", "Save edit", "Reject"))
