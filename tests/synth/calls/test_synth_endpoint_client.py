"""Models behind an endpoint in a synthesis: requests, retries, final failures, fatal errors, pauses and money."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fake_async_endpoint import FakeAsyncEndpoint, fake_async_endpoint
from fake_endpoint import CUT, HANG, HTML, NOT_JSON, UNUSABLE, Step, failing, fine
from ultrafuser.endpoint.pace import Backoff
from ultrafuser.errors import BudgetExceeded, EndpointError, MissingExtraError
from ultrafuser.progress import Progress
from ultrafuser.synth.calls import endpoint_client
from ultrafuser.synth.calls.clients import make_clients
from ultrafuser.synth.calls.endpoint_client import EndpointClient
from ultrafuser.synth.calls.request import Request, Response
from ultrafuser.synth.calls.scheduler import answer
from ultrafuser.synth.calls.store import CallStore

pytest.importorskip("aiohttp", reason="the synth extra is not installed")


@pytest.fixture
def server():
    with fake_async_endpoint() as server:
        yield server


@pytest.fixture
def store(tmp_path: Path):
    with CallStore(tmp_path / "calls.sqlite", "recipe") as store:
        yield store


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def request(text: str, **changes: Any) -> Request:
    return Request("responses", "math", text, "m", (("system", "be brief"), ("user", text)), **changes)


def ask(store: CallStore, client: EndpointClient, *requests: Request, **options: Any) -> list[Response | None]:
    answer(requests, store, {"m": client}, **options)
    return [store.response(request.key) for request in requests]


def scripted(*steps: Step):
    """Responses to a question's first attempts. Then it is answered."""
    return lambda question, attempt: steps[attempt] if attempt < len(steps) else fine("ok")


# ---------------------------------------------------------------- what is sent


def test_the_request_follows_the_recipe_and_the_stage(server: FakeAsyncEndpoint, store: CallStore, monkeypatch):
    monkeypatch.setenv("WRITER_KEY", " secret\n")
    client = EndpointClient(server.recipe(endpoint_api_key_env="WRITER_KEY", endpoint_extra_body={"top_k": 3}))
    assert ask(store, client, request("why?", temperature=0.5, max_tokens=9)) == [Response("ok", "re: why?", "", 7, 3)]
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}]
    assert server.bodies == [{"model": "writer", "messages": messages, "max_tokens": 9, "temperature": 0.5, "top_k": 3}]
    assert server.headers[0]["authorization"] == "Bearer secret"
    assert server.headers[0]["content-type"] == "application/json"


def test_max_completion_tokens_and_no_temperature(server: FakeAsyncEndpoint, store: CallStore):
    recipe = server.recipe(endpoint_max_tokens_key="max_completion_tokens", endpoint_temperature=None)
    ask(store, EndpointClient(recipe), request("a", temperature=0.5, max_tokens=9))
    assert server.bodies[0] | {"messages": 0} == {"model": "writer", "messages": 0, "max_completion_tokens": 9}
    assert "authorization" not in server.headers[0]


def test_a_stage_without_a_temperature_uses_the_endpoints(server: FakeAsyncEndpoint, store: CallStore):
    ask(store, EndpointClient(server.recipe(endpoint_temperature=0.4)), request("a"))
    assert server.bodies[0]["temperature"] == 0.4


def test_a_reply_start_is_continued(server: FakeAsyncEndpoint, store: CallStore):
    begun = Request(
        "instructions", "code", "i", "m", (("user", "Write tasks."), ("assistant", "1. Write")), schema=SCHEMA
    )
    ask(store, EndpointClient(server.recipe(structured=True)), begun, request("a"))
    first, second = sorted(server.bodies, key=lambda body: "continue_final_message" not in body)
    assert first["messages"][-1] == {"role": "assistant", "content": "1. Write"}
    assert (first["continue_final_message"], first["add_generation_prompt"]) == (True, False)
    assert "response_format" not in first, "a schema holds for a reply from its start"
    assert "continue_final_message" not in second


SCHEMA = {"type": "object", "properties": {"topics": {"type": "array"}}}


def test_structured_output_where_the_endpoint_has_it(server: FakeAsyncEndpoint, store: CallStore):
    ask(store, EndpointClient(server.recipe(structured=True)), request("a", schema=SCHEMA), request("b"))
    form = {"type": "json_schema", "json_schema": {"name": "responses", "schema": SCHEMA, "strict": True}}
    assert {body["messages"][-1]["content"]: body.get("response_format") for body in server.bodies} == {
        "a": form,
        "b": None,
    }
    ask(store, EndpointClient(server.recipe()), request("c", schema=SCHEMA))
    assert "response_format" not in server.bodies[-1]


def test_structured_output_is_turned_off_where_the_endpoint_has_none(server: FakeAsyncEndpoint, store: CallStore):
    def reply(question: str, attempt: int) -> Step:
        return (
            failing(400, "response_format json_schema is not supported")
            if "response_format" in server.bodies[-1]
            else fine("ok")
        )

    server.reply = reply
    client = EndpointClient(server.recipe(structured=True, endpoint_concurrency=1, endpoint_retries=0))
    responses = ask(store, client, *[request(str(i), schema=SCHEMA) for i in range(5)])
    assert {response.text for response in responses} == {"ok"} and server.hits == 6
    ask(store, client, request("later", schema=SCHEMA))
    assert server.hits == 7


def test_concurrency_is_that_of_the_recipe(server: FakeAsyncEndpoint, store: CallStore):
    server.delay_s = 1.0
    ask(store, EndpointClient(server.recipe(endpoint_concurrency=256)), *[request(str(i)) for i in range(400)])
    assert server.most_in_flight == 256 and server.hits == 400


# ---------------------------------------------------------------- what may pass


@pytest.mark.parametrize("name", UNUSABLE)
def test_transient_failures_are_retried(server: FakeAsyncEndpoint, store: CallStore, name):
    server.reply = scripted(UNUSABLE[name], UNUSABLE[name])
    client = EndpointClient(server.recipe(endpoint_timeout_s=0.3 if UNUSABLE[name] is HANG else 5))
    assert ask(store, client, request("a"))[0].text == "ok" and server.hits == 3


@pytest.mark.parametrize("step, message", [(failing(500), "status 500: no"), (HANG, "no reply within 0.3 s"), (CUT, "the connection broke"),
                                        (NOT_JSON, "the reply is no chat completion"), (HTML, "no JSON: '<html>welcome")])  # fmt: skip
def test_a_request_that_fails_alone_is_a_failure_after_all_retries(
    server: FakeAsyncEndpoint, store: CallStore, step, message
):
    server.reply = lambda question, attempt: step if question == "bad" else fine("ok")
    client = EndpointClient(server.recipe(endpoint_timeout_s=0.3 if step is HANG else 5))
    [response] = ask(store, client, request("bad"))
    assert (
        response.status == "failed"
        and response.kind == "unanswered"
        and message in response.reason
        and "after 3 tries" in response.reason
    )
    assert server.asked == {"bad": 3, "Say ok.": 1}  # nothing else had been served, so it was tried


def test_no_probe_is_sent_while_others_are_served(server: FakeAsyncEndpoint, store: CallStore):
    server.reply = lambda question, attempt: failing(500) if question == "bad" else fine("ok")
    server.delay_s = 0.01
    responses = ask(
        store,
        EndpointClient(server.recipe(endpoint_concurrency=2)),
        request("bad"),
        *[request(str(i)) for i in range(20)],
    )
    assert [response.status for response in responses] == ["failed"] + ["ok"] * 20
    assert server.asked["Say ok."] == 0


# ---------------------------------------------------------------- what is final


def test_context_overflow_is_final(server: FakeAsyncEndpoint, store: CallStore):
    server.reply = lambda question, attempt: failing(400, "This model's maximum context length is 64 tokens.")
    responses = ask(store, EndpointClient(server.recipe()), *[request(str(i)) for i in range(20)])
    assert {response.kind for response in responses} == {"context overflow"} and set(server.asked.values()) == {1}
    assert "maximum context length is 64 tokens" in responses[0].reason


def test_filtered_questions_and_refusals_of_the_model(server: FakeAsyncEndpoint, store: CallStore):
    steps = {
        "a": failing(400, "filtered", "content_filter"), "b": fine("", "content_filter"), "c": fine(None, refusal="I will not"),
        "d": fine(""), "e": fine("", "length"), "f": fine("half a sen", "length"),
    }  # fmt: skip
    server.reply = lambda question, attempt: steps[question]
    responses = ask(store, EndpointClient(server.recipe()), *[request(text) for text in steps])
    assert [response.reason for response in responses] == ["filtered: status 400: filtered", "filtered: the reply", "refused: I will not",
                                             "empty: finish reason 'stop'", "empty: finish reason 'length'", "length"]  # fmt: skip
    assert [response.status for response in responses] == ["failed"] * 5 + ["ok"] and server.hits == 6


def test_one_refused_request_is_final(server: FakeAsyncEndpoint, store: CallStore):
    server.reply = lambda question, attempt: failing(400, "odd letters") if question == "bad" else fine("ok")
    responses = ask(store, EndpointClient(server.recipe()), request("bad"), request("good"))
    assert [response.reason for response in responses] == ["refused: status 400: odd letters", ""] and server.asked[
        "bad"
    ] == 1


def test_a_long_reply_is_not_read_to_its_end(server: FakeAsyncEndpoint, store: CallStore, monkeypatch):
    monkeypatch.setattr("ultrafuser.endpoint.client.MAX_REPLY_BYTES", 100_000)
    server.reply = lambda question, attempt: fine("x" * 300_000 if question == "giant" else "ok")
    client = EndpointClient(server.recipe(completion_usd=1000.0))
    responses = ask(store, client, request("giant", max_tokens=100), request("small"))
    assert responses[0].reason == "too long: a reply of more than 100,000 bytes" and responses[1].text == "ok"
    assert responses[0].cost_usd == pytest.approx(0.1) and server.asked["giant"] == 1


# ---------------------------------------------------------------- what is fatal


@pytest.mark.parametrize("status", [401, 403])
def test_no_access(server: FakeAsyncEndpoint, store: CallStore, monkeypatch, status):
    server.reply = lambda question, attempt: failing(status, "bad key")
    with pytest.raises(
        EndpointError, match=f"{server.url}, model 'writer': status {status}: bad key. .*OPENAI_API_KEY is not set"
    ):
        ask(store, EndpointClient(server.recipe()), *[request(str(i)) for i in range(50)])
    monkeypatch.setenv("OPENAI_API_KEY", "hidden")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is set, but its key was not accepted") as caught:
        ask(store, EndpointClient(server.recipe()), request("a"))
    assert "hidden" not in str(caught.value) and not store.counts() and store.spent_usd() == 0 and server.hits < 20


def test_a_key_that_no_header_can_hold_is_not_shown(server: FakeAsyncEndpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hid\nden")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds blanks or letters that no key has") as caught:
        EndpointClient(server.recipe())
    assert "hid" not in str(caught.value)


@pytest.mark.parametrize("step, message", [(failing(404, "no model `writer`", "model_not_found"), "404: no model `writer`. No such model or address. .*/v1/models"),
                                        (failing(429, "quota", "insufficient_quota"), "429: quota. This account has nothing left to spend"),
                                        (failing(402, "pay"), "402: pay. This account has nothing left"),
                                        (Step("", 308, {"location": "/v2"}), "308: no words. The endpoint has moved. Set `base_url`"),
                                        (failing(400, "no max_tokens"), "400: no max_tokens. The endpoint does not accept such .*`max_tokens_key`")])  # fmt: skip
def test_fatal_errors_stop_the_run(server: FakeAsyncEndpoint, store: CallStore, step, message):
    server.reply = lambda question, attempt: step
    with pytest.raises(EndpointError, match=f"endpoint {server.url}, model 'writer': status {message}"):
        ask(store, EndpointClient(server.recipe()), *[request(str(i)) for i in range(50)])
    assert server.hits < 20 and not store.counts() and store.under_way() == 0


def test_an_unreachable_endpoint(server: FakeAsyncEndpoint, store: CallStore):
    recipe = server.recipe(endpoint_backoff_s=100)
    server.down()
    with pytest.raises(
        EndpointError, match=f"{server.url}, model 'writer': cannot be reached .*Check the address and that"
    ):
        ask(store, EndpointClient(recipe), request("a"))


def test_an_endpoint_that_goes_away_and_comes_back(server: FakeAsyncEndpoint, store: CallStore):
    def reply(question: str, attempt: int) -> Step:
        if server.hits == 30:
            server._loop.create_task(server._down())
            server._loop.call_later(0.7, lambda: server._loop.create_task(server._up()))
        return fine("ok")

    server.reply, server.delay_s = reply, 0.01
    client = EndpointClient(server.recipe(endpoint_retries=1, endpoint_backoff_s=0.2))
    responses = ask(store, client, *[request(str(i)) for i in range(100)])
    assert {response.text for response in responses} == {"ok"}
    assert server.hits <= 100 + 4


def test_an_endpoint_that_stays_away_stops_the_run_in_the_end(server: FakeAsyncEndpoint, store: CallStore):
    def reply(question: str, attempt: int) -> Step:
        if server.hits == 30:
            server._loop.create_task(server._down())
        return fine("ok")

    server.reply, server.delay_s = reply, 0.01
    client = EndpointClient(server.recipe(endpoint_backoff_s=0.1), patience_s=1.0)
    with pytest.raises(
        EndpointError,
        match=r"no reply for \d+ s, at last .*cannot be reached any more.*run again: answered requests are kept",
    ):
        ask(store, client, *[request(str(i)) for i in range(100)])
    counts = store.counts()
    assert [(count.status, count.calls) for count in counts] == [("ok", counts[0].calls)] and 20 < counts[0].calls <= 30
    server.up()
    server.reply = scripted()
    ask(store, EndpointClient(server.recipe()), *[request(str(i)) for i in range(100)])
    assert store.counts()[0].calls == 100


def test_an_endpoint_that_serves_nothing_any_more_is_not_blamed_on_the_requests(
    server: FakeAsyncEndpoint, store: CallStore
):
    server.reply = lambda question, attempt: failing(500, "out of memory")
    client = EndpointClient(server.recipe(endpoint_backoff_s=0.02), patience_s=0.5)
    with pytest.raises(EndpointError, match=r"no reply for \d+ s, at last status 500: out of memory"):
        ask(store, client, *[request(str(i)) for i in range(20)])
    assert not store.counts()


def test_an_endpoint_that_breaks_in_the_middle_is_not_blamed_on_the_requests(
    server: FakeAsyncEndpoint, store: CallStore
):
    """Of the requests in flight when it broke, some had seen others being served after they were sent."""
    server.reply = lambda question, attempt: fine("x") if server.hits <= 30 else failing(500, "out of memory")
    client = EndpointClient(server.recipe(endpoint_backoff_s=0.02, endpoint_concurrency=16), patience_s=0.5)
    with pytest.raises(EndpointError, match=r"no reply for \d+ s, at last status 500: out of memory"):
        ask(store, client, *[request(str(i)) for i in range(100)])
    assert [(count.status, count.calls) for count in store.counts()] == [("ok", 30)]


# ---------------------------------------------------------------- floods


def test_a_pause_holds_for_all_requests(server: FakeAsyncEndpoint, store: CallStore):
    full_until: list[float] = []

    def reply(question: str, attempt: int) -> Step:
        if server.hits == 40:
            full_until.append(time.monotonic() + 1.0)
        if full_until and time.monotonic() < full_until[0]:
            return failing(429, "slow down", retry_after="1")
        return fine("ok")

    server.reply, server.delay_s = reply, 0.02
    models = [server.recipe("m", endpoint_concurrency=32, endpoint_retries=0), server.recipe("n", endpoint_retries=0)]
    many = [request(str(i)) for i in range(150)] + [
        Request("judge", "math", "", "n", (("user", f"n {i}"),)) for i in range(30)
    ]
    answer(many, store, make_clients(models))
    assert store.counts()[0].calls + store.counts()[1].calls == 180 and {c.status for c in store.counts()} == {"ok"}
    began = full_until[0] - 1.0
    assert not [when for when in server.times if began + 0.2 < when < began + 0.95]  # nobody asks, of neither model
    assert server.hits <= 180 + 40


def test_endless_429s_stop_the_run(server: FakeAsyncEndpoint, store: CallStore):
    server.reply = lambda question, attempt: failing(429, "slow down", retry_after="0.1")
    client = EndpointClient(server.recipe(endpoint_concurrency=64), patience_s=1.0)
    with pytest.raises(EndpointError, match="no reply for .* at last status 429: slow down"):
        ask(store, client, *[request(str(i)) for i in range(200)], grace_s=1.0)
    assert not store.counts() and server.hits < 64 * 6  # fewer at once each time


# ---------------------------------------------------------------- money


def test_cost_follows_the_token_counts_of_the_endpoint(server: FakeAsyncEndpoint, store: CallStore):
    client = EndpointClient(server.recipe(prompt_usd=1000, completion_usd=10_000))
    assert ask(store, client, request("a"))[0].cost_usd == pytest.approx(0.007 + 0.03) == store.spent_usd()


def test_without_token_counts_the_maximum_cost_is_charged(server: FakeAsyncEndpoint, store: CallStore):
    body = json.loads(fine("four").body)
    del body["usage"]
    server.reply = lambda question, attempt: Step(json.dumps(body))
    client = EndpointClient(server.recipe(prompt_usd=1000, completion_usd=1000))
    [response] = ask(store, client, request("a"))
    assert (response.prompt_tokens, response.completion_tokens) == (len("be brief" + "a") + 3 * 16, 4)


def test_a_broken_reply_is_charged_and_the_budget_holds(server: FakeAsyncEndpoint, store: CallStore):
    server.reply = lambda question, attempt: CUT
    client = EndpointClient(server.recipe(completion_usd=1000.0, endpoint_retries=50))
    with pytest.raises(BudgetExceeded, match=r"\$1.0000 is spent"):
        ask(store, client, request("a", max_tokens=100), budget_usd=1.05)
    assert server.hits == 10


def test_a_refused_request_costs_nothing(server: FakeAsyncEndpoint, store: CallStore):
    server.reply = scripted(failing(500), failing(429, retry_after="0.01"))
    client = EndpointClient(server.recipe(completion_usd=1000.0))
    assert ask(store, client, request("a", max_tokens=100), budget_usd=0.1)[0].cost_usd == pytest.approx(0.003)


# ---------------------------------------------------------------- limits, packages


def test_requests_per_minute(server: FakeAsyncEndpoint, store: CallStore):
    client = EndpointClient(server.recipe(requests_per_minute=1200, endpoint_concurrency=50))
    ask(store, client, *[request(str(i)) for i in range(21)])
    assert 0.95 < server.times[-1] - server.times[0] < 2.0
    assert min(b - a for a, b in zip(server.times, server.times[1:], strict=False)) > 0.02


def test_tokens_per_minute_count_used_tokens(server: FakeAsyncEndpoint, store: CallStore):
    """600 tokens per second. Each request may use 1,000 and more, and uses 10."""
    client = EndpointClient(server.recipe(tokens_per_minute=36_000, endpoint_concurrency=1))
    ask(store, client, *[request(str(i), max_tokens=1000) for i in range(20)])
    assert server.times[-1] - server.times[0] < 2.0


def test_models_at_one_address_share_its_backoff(server: FakeAsyncEndpoint):
    clients = make_clients([server.recipe("a"), server.recipe("b"), server.recipe("c", endpoint_api_key_env="OTHER")])
    assert clients["a"].backoff is clients["b"].backoff is not clients["c"].backoff
    assert isinstance(clients["a"].backoff, Backoff)


def test_without_the_package(server: FakeAsyncEndpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingExtraError, match=r'pip install "ultrafuser\[synth\]"'):
        EndpointClient(server.recipe())


def test_a_long_pause_is_logged_once(server: FakeAsyncEndpoint, store: CallStore, monkeypatch):
    class RecordingProgress(Progress):
        lines: list[str] = []

        def log(self, text: str) -> None:
            self.lines.append(text)

    monkeypatch.setattr(endpoint_client, "_LONG_PAUSE_S", 0.2)
    server.reply, server.delay_s = scripted(failing(429, "slow down", retry_after="0.3")), 0.05
    ask(store, EndpointClient(server.recipe()), *[request(str(i)) for i in range(4)], progress=RecordingProgress())
    assert RecordingProgress.lines == [
        f"endpoint {server.url}, model 'writer': status 429: slow down. Nothing is sent for 0 s"
    ]
