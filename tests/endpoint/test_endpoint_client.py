"""The endpoint client against a server of our own: retries, errors in words, bounded concurrency, counted tokens."""

from __future__ import annotations

import asyncio
import gzip
import re
import socket
import sys
import threading
import time
from base64 import b64encode
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from pydantic import ValidationError

from fake_endpoint import HANG, UNUSABLE, FakeEndpoint, Step, failing, fake_endpoint, fine
from recipe_docs import describe
from ultrafuser.endpoint.client import MAX_FAILURES, Endpoint
from ultrafuser.endpoint.errors import read_failure
from ultrafuser.endpoint.messages import Reply, Request
from ultrafuser.endpoint.pace import MAX_BACKOFF_S, retry_wait_s
from ultrafuser.endpoint.recipe import OPENAI_URL, EndpointRecipe
from ultrafuser.errors import ContextOverflowError, EndpointError, MissingExtraError, RequestError, UltraFuserError

QUESTION = [{"role": "user", "content": "why?"}]
VLLM_OVERFLOW = "This model's maximum context length is 64 tokens. However, you requested 80 tokens."


def ask(endpoint: Endpoint, messages, **fields) -> Reply:
    (_, outcome), *_ = endpoint.ask_all([Request(messages, fields)])
    if isinstance(outcome, RequestError):
        raise outcome
    return outcome


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with fake_endpoint() as server:
        yield server


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def test_the_request_follows_the_recipe_and_the_caller(server: FakeEndpoint, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    recipe = server.recipe(api_key_env="JUDGE_KEY", max_tokens=9, extra_body={"top_k": 3})
    reply = ask(Endpoint(recipe), QUESTION, stop=["\n"], top_p=None)
    assert reply == Reply("ok", "stop", None, 7, 3)
    assert server.requests == [
        {"model": "judge", "messages": QUESTION, "max_tokens": 9, "temperature": 0.0, "stop": ["\n"], "top_k": 3}
    ]
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_max_completion_tokens_and_no_temperature(server: FakeEndpoint):
    endpoint = Endpoint(server.recipe(max_tokens_key="max_completion_tokens", temperature=None))
    ask(endpoint, QUESTION, max_tokens=5)
    assert server.requests == [{"model": "judge", "messages": QUESTION, "max_completion_tokens": 5}]


def test_tokens_are_counted(server: FakeEndpoint):
    server.script = [failing(500)]
    endpoint = Endpoint(server.recipe())
    ask(endpoint, QUESTION)
    ask(endpoint, QUESTION)
    usage = endpoint.usage
    assert (usage.requests, usage.replies, usage.prompt_tokens, usage.completion_tokens) == (3, 2, 14, 6)


@pytest.mark.parametrize("name", UNUSABLE)
def test_transient_failures_are_retried(server: FakeEndpoint, name):
    server.script = [UNUSABLE[name]] * 2
    recipe = server.recipe(timeout_s=0.2 if UNUSABLE[name] is HANG else 5)
    assert ask(Endpoint(recipe), QUESTION).text == "ok"
    assert server.hits == 3


@pytest.mark.parametrize("name, message", [("429", "429: slow down"), ("hang", "no reply within 0.2 s"), ("500", "500"),
                                        ("cut", "connection broke"), ("malformed JSON", "no chat completion")])  # fmt: skip
def test_the_error_after_all_retries_names_the_cause(server: FakeEndpoint, name, message):
    server.script = [UNUSABLE[name]] * 3
    recipe = server.recipe(timeout_s=0.2 if UNUSABLE[name] is HANG else 5)
    with pytest.raises(RequestError, match=f"{server.url}, model 'judge': .*{message}.*, after 3 tries. .*`retries`"):
        ask(Endpoint(recipe), QUESTION)
    assert server.hits == 3


def test_a_password_in_the_address_comes_before_the_key(server: FakeEndpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    ask(Endpoint(server.recipe(base_url=server.url.replace("//", "//user:password@"))), QUESTION)
    assert server.headers[0]["authorization"] == "Basic " + b64encode(b"user:password").decode()


@pytest.mark.parametrize("code", [401, 403])
def test_no_access(server: FakeEndpoint, monkeypatch, code):
    server.script = [failing(code, "bad key")] * 2
    with pytest.raises(
        EndpointError, match=f"{server.url}, model 'judge': status {code}: bad key. .*OPENAI_API_KEY is not"
    ):
        ask(Endpoint(server.recipe()), QUESTION)
    monkeypatch.setenv("OPENAI_API_KEY", "hidden")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is set, but its key was not accepted") as caught:
        ask(Endpoint(server.recipe()), QUESTION)
    assert "hidden" not in str(caught.value)
    assert server.hits == 2  # never tried again


def test_a_key_that_no_header_can_hold_is_not_shown(server: FakeEndpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "hid\nden")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY holds blanks or letters that no key has") as caught:
        Endpoint(server.recipe())
    assert "hid" not in str(caught.value)
    monkeypatch.setenv("OPENAI_API_KEY", " key\n")  # as a file's end leaves it
    ask(Endpoint(server.recipe()), QUESTION)
    assert server.headers[0]["authorization"] == "Bearer key"


def test_one_request_that_is_forbidden_where_others_are_served(server: FakeEndpoint):
    server.script = [fine("a"), failing(403, "flagged by moderation"), fine("b")]
    outcomes = dict(Endpoint(server.recipe()).ask_all(requests(3)))
    assert [type(outcomes[i]) for i in range(3)] == [Reply, RequestError, Reply]
    assert "status 403: flagged by moderation" in str(outcomes[1])


def test_unknown_model(server: FakeEndpoint):
    server.script = [failing(404, "The model `judge` does not exist", "model_not_found")]
    with pytest.raises(EndpointError, match=f"status 404: The model `judge` does not exist. .*{server.url}/models"):
        ask(Endpoint(server.recipe()), QUESTION)
    assert server.hits == 1


def test_wrong_address(server: FakeEndpoint):
    with pytest.raises(EndpointError, match="status 404.*an address usually ends in /v1"):
        ask(Endpoint(server.recipe(base_url=server.url.removesuffix("/v1"))), QUESTION)


def test_unreachable_host():
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match=f"{url}, model 'm': cannot be reached .*Check the address") as caught:
            ask(Endpoint(EndpointRecipe(model="m", base_url=url, backoff_s=100)), QUESTION)
    assert not isinstance(caught.value, RequestError)


def test_a_spent_account_is_not_retried(server: FakeEndpoint):
    server.script = [failing(429, "quota", "insufficient_quota")]
    with pytest.raises(EndpointError, match="429: quota. This account has nothing left to spend"):
        ask(Endpoint(server.recipe()), QUESTION)
    assert server.hits == 1


@pytest.mark.parametrize("step", [failing(400, "too long", "context_length_exceeded"), failing(400, VLLM_OVERFLOW),
                                  failing(413, "body too large")])  # fmt: skip
def test_context_overflow(server: FakeEndpoint, step):
    server.script = [step]
    with pytest.raises(
        ContextOverflowError, match=f"{server.url}, model 'judge': context overflow.*Lower `max_tokens`"
    ):
        ask(Endpoint(server.recipe()), QUESTION)
    assert server.hits == 1


def test_a_refused_request_is_not_retried(server: FakeEndpoint):
    server.script = [failing(400, "Unsupported parameter: 'max_tokens'")]
    with pytest.raises(RequestError, match="status 400: Unsupported parameter: 'max_tokens'. .*`max_tokens_key`"):
        ask(Endpoint(server.recipe()), QUESTION)
    assert server.hits == 1


@pytest.mark.parametrize("step, message", [
    (Step('{"detail": "no such field"}', 422), "status 422: no such field"),
    (Step('{"error": {"message": "model is loading"}}'), "no message in it: .*model is loading"),
    (Step(b"\xff\xfe"), "no JSON"),
])  # fmt: skip
def test_the_words_of_the_endpoint_reach_the_user(server: FakeEndpoint, step, message):
    server.script = [step]
    with pytest.raises(RequestError, match=message):
        ask(Endpoint(server.recipe(retries=0)), QUESTION)


def test_a_filtered_question_is_a_reply_without_text(server: FakeEndpoint):
    server.script = [failing(400, "filtered", "content_filter")]
    assert ask(Endpoint(server.recipe()), QUESTION) == Reply("", "content_filter")


def test_waits_double_with_jitter_unless_the_endpoint_asks_for_a_time():
    for failures in range(1, 13):
        longest = min(2 * 2 ** (failures - 1), MAX_BACKOFF_S)
        waits = [retry_wait_s(2, failures, None) for _ in range(20)]
        assert all(longest / 2 <= wait <= longest for wait in waits) and len(set(waits)) > 1

    def wait_s(header: str) -> float:
        return retry_wait_s(2, 1, read_failure(500, b"", {"retry-after": header}).retry_after_s)

    for header, seconds in {"7": 7, "0.5": 0.5, "1e9": 600}.items():
        assert wait_s(header) == seconds
    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 28 < wait_s(format_datetime(later, usegmt=True)) <= 30
    for past in ("-3", "0", "Wed, 21 Oct 2015 07:28:00 GMT", "soon"):  # no flood
        assert 1 <= wait_s(past) <= 2


# ---------------------------------------------------------------- bounds


@pytest.mark.parametrize("step", [
    Step("x" * 10_000, endless=True),
    Step(gzip.compress(b" " * 50_000_000), headers={"content-encoding": "gzip"}),
    Step("x" * 10_000, 500, endless=True),
])  # fmt: skip
def test_a_long_reply_is_not_read_to_its_end(server: FakeEndpoint, step, monkeypatch):
    monkeypatch.setattr("ultrafuser.endpoint.client.MAX_REPLY_BYTES", 1_000_000)
    server.script = [step]
    with pytest.raises(RequestError, match="a reply of more than 1,000,000 bytes. Lower `max_tokens`"):
        ask(Endpoint(server.recipe()), QUESTION)
    assert server.hits == 1


def test_the_timeout_holds_for_the_whole_request(server: FakeEndpoint):
    server.reply = lambda _: replace(fine("ok"), pause_s=0.05)
    began = time.monotonic()
    with pytest.raises(RequestError, match="no reply within 0.3 s, after 1 try"):
        ask(Endpoint(server.recipe(timeout_s=0.3, retries=0)), QUESTION)
    assert time.monotonic() - began < 3


def test_redirects_are_not_followed(server: FakeEndpoint):
    server.script = [Step("", 308, {"location": f"{server.url}/chat/completions"})]
    with pytest.raises(EndpointError, match="status 308: no words. The endpoint has moved. Set `base_url`"):
        ask(Endpoint(server.recipe()), QUESTION)
    assert server.hits == 1


def test_inside_a_running_loop(server: FakeEndpoint):
    async def run() -> str:
        return ask(Endpoint(server.recipe()), QUESTION).text

    assert asyncio.run(run()) == "ok"


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(MissingExtraError, match=r'pip install "ultrafuser\[endpoint\]"'):
        Endpoint(EndpointRecipe(model="m"))


# ---------------------------------------------------------------- many at once


def requests(count: int) -> list[Request]:
    return [Request([{"role": "user", "content": str(i)}]) for i in range(count)]


def test_as_many_requests_run_at_once_as_the_recipe_says(server: FakeEndpoint):
    together = threading.Barrier(3, timeout=10)  # broken, and a 500 for it, unless three are there at once
    in_flight, counts = [], []

    def reply(question: str):
        in_flight.append(question)
        counts.append(len(in_flight))
        together.wait()
        in_flight.remove(question)
        return fine(question)

    server.reply = reply
    outcomes = dict(Endpoint(server.recipe(concurrency=3)).ask_all(requests(9)))
    assert {i: reply.text for i, reply in outcomes.items()} == {i: str(i) for i in range(9)}
    assert max(counts) == 3


def test_too_many_failures_in_a_row_stop_the_run(server: FakeEndpoint):
    server.script = [fine("a"), *[failing(500)] * 100]
    outcomes = {}
    with pytest.raises(EndpointError, match=f"status 500.*{MAX_FAILURES} requests in a row failed, so no more"):
        for i, outcome in Endpoint(server.recipe(retries=0)).ask_all(requests(50)):
            outcomes[i] = outcome
    assert server.hits == len(outcomes) == 1 + MAX_FAILURES
    assert isinstance(outcomes[0], Reply) and all(
        isinstance(outcomes[i], RequestError) for i in range(1, len(outcomes))
    )


def test_scattered_failures_are_outcomes(server: FakeEndpoint):
    server.script = [*[failing(500)] * (MAX_FAILURES - 1), fine("a")] * 3
    outcomes = dict(Endpoint(server.recipe(retries=0)).ask_all(requests(3 * MAX_FAILURES)))
    assert sum(isinstance(outcome, Reply) for outcome in outcomes.values()) == 3


def test_context_overflows_do_not_count_as_failures_in_a_row(server: FakeEndpoint):
    server.reply = lambda _: failing(400, VLLM_OVERFLOW)
    outcomes = dict(Endpoint(server.recipe()).ask_all(requests(2 * MAX_FAILURES)))
    assert len(outcomes) == 2 * MAX_FAILURES
    assert all(isinstance(outcome, ContextOverflowError) for outcome in outcomes.values())


def test_no_access_stops_the_run_but_requests_in_flight_finish(server: FakeEndpoint):
    together = threading.Barrier(2, timeout=10)

    def reply(question: str):
        if question in "01":
            together.wait()
        return failing(401) if question == "0" else fine(question)

    server.reply = reply
    outcomes = {}
    with pytest.raises(EndpointError, match="status 401"):
        for i, outcome in Endpoint(server.recipe(concurrency=2, retries=0)).ask_all(requests(40)):
            outcomes[i] = outcome
    assert server.hits < 40
    assert outcomes[1].text == "1"


def test_closing_the_generator_stops_the_rest(server: FakeEndpoint):
    outcomes = Endpoint(server.recipe()).ask_all(requests(200))
    next(outcomes)
    outcomes.close()
    assert server.hits < 200


# ---------------------------------------------------------------- the recipe


@pytest.mark.parametrize("text", ["org/name@http://127.0.0.1:8000/v1/", "openai:org/name@http://127.0.0.1:8000/v1"])
def test_a_bare_string_is_name_and_address(text):
    recipe = EndpointRecipe.model_validate(text)
    assert (recipe.model, recipe.base_url) == ("org/name", "http://127.0.0.1:8000/v1")
    assert EndpointRecipe.model_validate({"model": text, "temperature": 1}).base_url == recipe.base_url
    assert EndpointRecipe.model_validate(recipe.model_dump()) == recipe


def test_a_bare_name_uses_the_address_of_openai():
    assert EndpointRecipe.model_validate("name").base_url == OPENAI_URL


def test_the_page_lists_the_fields_and_their_defaults():
    page = (Path(__file__).parents[2] / "docs" / "judged.md").read_text(encoding="utf-8")
    listed = [(name, default.strip("`")) for name, default in re.findall(r"^\| `(\w+)` \| ([^|]+) \|", page, re.M)]
    fields = [(path, default.removesuffix(".0")) for path, _, default, _ in describe(EndpointRecipe)]
    assert [row for row in listed if row[0] in EndpointRecipe.model_fields] == fields


@pytest.mark.parametrize("fields, message", [
    ({"model": "m@http://a/v1", "base_url": "http://b/v1"}, "expected the address once"),
    ({"model": "m", "base_url": "localhost:8000"}, "expected an address such as http"),
    ({"model": "m", "base_url": "http://"}, "expected an address such as http"),
    ({"model": "m@http://[::1/v1"}, "expected an address such as http"),
    ({"model": "m", "retrys": 1}, "Extra inputs"),
])  # fmt: skip
def test_recipes_that_cannot_be_used(fields, message):
    with pytest.raises(ValidationError, match=message):
        EndpointRecipe.model_validate(fields)


def test_the_errors_are_of_our_tree():
    assert issubclass(ContextOverflowError, RequestError) and issubclass(RequestError, EndpointError)
    assert issubclass(EndpointError, UltraFuserError)
