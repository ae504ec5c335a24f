"""Answers that are read while a server writes them: every kind of stream, and every way in which one fails."""

from __future__ import annotations

import asyncio
import socket
from contextlib import aclosing

import pytest

from fake_endpoint import (
    CUT,
    HANG,
    FakeEndpoint,
    Step,
    chunk,
    event,
    failing,
    fake_endpoint,
    fine,
    listed,
    streamed,
    weighted,
)
from ultrafuser.endpoint.errors import Failure
from ultrafuser.endpoint.messages import Request
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.endpoint.stream import Piece, ServedModel, StreamingEndpoint

pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
QUESTION = Request([{"role": "user", "content": "why?"}], {"stream": True})
WEIGHTS = [(0.75, 0.25), (0.5, 0.5)]


@pytest.fixture
def server():
    with fake_endpoint() as server:
        yield server


def read(server: FakeEndpoint, step: Step, pieces: list[Piece] | None = None, **changes) -> list[Piece]:
    """The pieces of one answer."""
    server.script = [step]
    return read_from(server.recipe(**changes), pieces)


def read_from(recipe: EndpointRecipe, pieces: list[Piece] | None = None) -> list[Piece]:
    pieces = [] if pieces is None else pieces

    async def run() -> None:
        client = StreamingEndpoint(recipe)
        await client.open()
        try:
            async for piece in client.stream(QUESTION):
                pieces.append(piece)
        finally:
            await client.close()

    asyncio.run(run())
    return pieces


def failure(server: FakeEndpoint, step: Step, pieces: list[Piece] | None = None, **changes) -> Failure:
    with pytest.raises(Failure) as caught:
        read(server, step, pieces, **changes)
    return caught.value


# ---------------------------------------------------------------- streams


def test_every_token_has_its_weights(server):
    pieces = read(server, streamed(weighted(["ça", " va"], WEIGHTS), weighted(["😀"], WEIGHTS[:1]), chunk("", "stop")))
    assert pieces == [
        Piece("ça", WEIGHTS[0]),
        Piece(" va", WEIGHTS[1]),
        Piece("😀", WEIGHTS[0]),
        Piece("", None, "stop"),
    ]
    assert server.requests[0] == {
        "model": "judge", "messages": [{"role": "user", "content": "why?"}], "max_tokens": 1024, "temperature": 0.0,
        "stream": True,
    }  # fmt: skip


def test_the_end_belongs_to_the_last_token_of_its_event(server):
    assert read(server, streamed(weighted(["a", "b"], WEIGHTS, "length"))) == [
        Piece("a", WEIGHTS[0]),
        Piece("b", WEIGHTS[1], "length"),
    ]


def test_bytes_that_come_one_by_one(server):
    step = streamed(weighted(["é", "中"], WEIGHTS), chunk(None, "stop"), pause_s=0.0005)
    assert "".join(piece.text for piece in read(server, step)) == "é中"


@pytest.mark.parametrize(
    "body",
    [
        event(chunk("hi")) + event(chunk(None, "stop")) + event("[DONE]"),
        event(chunk("hi")) + event(chunk(None, "stop")),
        event(chunk("hi")) + event(chunk(None, "stop")).rstrip(),
        (": ping\n\nevent: x\nid: 3\n" + event(chunk("hi")) + event(chunk("", "stop"))).replace("\n", "\r\n"),
        event(chunk("hi")).replace("data: ", "data:") + event({"choices": [], "usage": {}}) + event(chunk("", "stop")),
    ],
    ids=["usual", "no DONE", "no last blank line", "comments and CRLF", "usage and no blank"],
)
def test_the_ways_to_write_a_stream(server, body):
    pieces = read(server, Step(body, headers={"content-type": "text/event-stream"}))
    assert "".join(piece.text for piece in pieces) == "hi" and pieces[-1].finish_reason == "stop"


def test_a_server_that_does_not_stream(server):
    assert read(server, fine("whole", "length")) == [Piece("whole", None, "length")]


@pytest.mark.parametrize(
    "gate_weights",
    [
        None,
        "all",
        {"tokens": ["a", "b"], "weights": [[1.0]]},
        {"tokens": ["a"], "weights": [[1.0]]},
        {"tokens": ["a", "b"], "weights": [[0.2, 0.2], [1.0, 0.0]]},
        {"tokens": ["a", "b"], "weights": [[-1, 2], [1.0, 0.0]]},
        {"tokens": ["a", "b"], "weights": [["x"], None]},
        {"tokens": [1, "b"], "weights": [[1.0], [1.0]]},
    ],
)
def test_weights_that_do_not_fit_the_text_are_left_out(server, gate_weights):
    step = streamed(chunk("ab", "stop", gate_weights=gate_weights))
    assert read(server, step) == [Piece("ab", None, "stop")]


def test_half_an_emoji_is_replaced(server):
    assert read(server, streamed(chunk("\ud83d", "stop")))[0].text == "�"


def test_closing_the_answer_closes_the_connection(server):
    server.script = [Step(event(chunk("on ")), headers={"content-type": "text/event-stream"}, endless=True)]

    async def run() -> list[Piece]:
        client = StreamingEndpoint(server.recipe())
        await client.open()
        pieces = []
        async with aclosing(client.stream(QUESTION)) as stream:
            async for piece in stream:
                pieces.append(piece)
                if len(pieces) == 3:
                    break
        await client.close()
        return pieces

    assert asyncio.run(asyncio.wait_for(run(), 10)) == [Piece("on ")] * 3


# ---------------------------------------------------------------- failures

OVERFLOW = "This model's maximum context length is 64 tokens. However, you requested 80."
FAILURES = {
    "no key": (failing(401, "Invalid key"), "unusable", "status 401: Invalid key"),
    "unknown model": (failing(404, "no model 'judge'"), "unusable", "status 404: no model 'judge'"),
    "too long for it": (failing(400, OVERFLOW), "overflow", f"status 400: {OVERFLOW}"),
    "refused": (failing(400, "unknown field 'top_k'"), "refused", "status 400: unknown field 'top_k'"),
    "busy": (failing(429, "slow down"), "busy", "status 429: slow down"),
    "moved": (Step("", 307, {"location": "http://127.0.0.1:1/"}), "unusable", "status 307: no words"),
    "broken": (failing(500, "oh"), "transient", "status 500: oh"),
    "connection": (CUT, "transient", "the connection broke"),
    "an event without JSON": (streamed("{x"), "transient", "an event of the stream is no JSON: '{x'"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_failures_in_the_servers_own_words(server, case):
    step, kind, words = FAILURES[case]
    error = failure(server, step)
    assert error.kind == kind and str(error).startswith(words), (error.kind, str(error))
    assert server.hits == 1, "redirects are not followed, and nothing is retried"


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (streamed(chunk("begun"), done=False), "the answer broke off"),
        (streamed(chunk("begun")), "the answer broke off"),
        (streamed(chunk("begun"), {"error": {"message": "out of memory", "code": 500}}), "out of memory"),
    ],
    ids=["no end", "no reason for the end", "an error event"],
)
def test_an_answer_that_breaks_off_is_a_failure_after_its_beginning(server, step, words):
    pieces: list[Piece] = []
    error = failure(server, step, pieces)
    assert str(error) == words and error.kind == "transient" and pieces == [Piece("begun")]


def test_a_connection_that_breaks_in_an_answer(server):
    pieces: list[Piece] = []
    step = streamed(*[chunk("word ")] * 50, cut=True)
    assert "the connection broke" in str(failure(server, step, pieces)) and len(pieces) > 10


def test_silence_ends_an_answer_but_slowness_does_not(server):
    assert "silent for 0.3 s" in str(failure(server, HANG, timeout_s=0.3))
    slow = streamed(chunk("slow", "stop"), pause_s=0.002)
    assert read(server, slow, timeout_s=0.3)[0].text == "slow", "all bytes together took longer"


def test_an_answer_without_end(server):
    step = Step(event(chunk("x" * 60000)), headers={"content-type": "text/event-stream"}, endless=True)
    assert failure(server, step).kind == "too long"


def test_no_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(Failure) as caught:
        read_from(EndpointRecipe(model="m", base_url=url))
    assert caught.value.kind == "unreachable"


def test_the_key_is_sent_and_never_shown(server, monkeypatch):
    key = "sk-mango-1234567890"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert read(server, streamed(chunk(f"your key is {key}", "stop"))) == [Piece("your key is ***", None, "stop")]
    assert server.headers[0]["authorization"] == f"Bearer {key}"
    for step in (failing(401, f"bad {key}"), streamed({"error": {"message": f"bad {key}"}}), Step(key, 500)):
        assert key not in str(failure(server, step))


# ---------------------------------------------------------------- the list of models


def models(server: FakeEndpoint) -> list[ServedModel]:
    async def run() -> list[ServedModel]:
        client = StreamingEndpoint(server.recipe())
        await client.open()
        try:
            return await client.models()
        finally:
            await client.close()

    return asyncio.run(run())


def test_the_models_of_a_server(server):
    server.models = listed(
        {"id": "fused", "specialists": ["text", "code"], "max_model_len": 8192},
        {"id": "plain"},
        {"id": "odd", "specialists": [1], "max_model_len": "x"},
        {"name": "no id"},
    )
    assert models(server) == [
        ServedModel("fused", ("text", "code"), 8192), ServedModel("plain"), ServedModel("odd"),
    ]  # fmt: skip


@pytest.mark.parametrize("body", ["<html>", "{}", "[]", '{"data": 3}'])
def test_a_list_of_models_that_cannot_be_read(server, body):
    server.models = Step(body)
    with pytest.raises(Failure, match="its list of models cannot be read"):
        models(server)
