"""The extension of the API in front of a scripted vLLM: weights, masks, shares, limits, keys."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the serve extra is not installed")
httpx = pytest.importorskip("httpx")

from scripted_vllm import NAMES, ScriptedVLLM, weights_of  # noqa: E402

from ultrafuser.serve.vllm_middleware import Limits  # noqa: E402
from ultrafuser.vllm_plugin.gate_records import KEY, MASK, TOP  # noqa: E402

CHAT = {"model": "fused", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "fused", "prompt": "Hi"}
PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


@pytest.fixture
def vllm(tokenizer) -> ScriptedVLLM:
    return ScriptedVLLM(tokenizer)


def send(vllm: ScriptedVLLM, path: str, body: Any = None, headers: Any = None, **options: Any) -> Any:
    """One request. GET without a body."""

    async def exchange() -> Any:
        transport = httpx.ASGITransport(app=vllm.app(**options))
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            if body is None:
                return await client.get(path, headers=headers)
            content = body if isinstance(body, bytes) else json.dumps(body)
            response = await client.post(
                path, content=content, headers={"content-type": "application/json", **(headers or {})}
            )
            await asyncio.sleep(0.01)  # weights are released behind the answer
            return response

    return asyncio.run(exchange())


def chunks(response: Any) -> list[dict[str, Any]]:
    lines = [line[len("data: ") :] for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def text_of(choice: dict[str, Any]) -> str:
    part = choice.get("message") or choice.get("delta")
    return (part.get("content") or "") if part is not None else choice["text"]


def mean_shares(vllm: ScriptedVLLM, choices: list[tuple[int, int]]) -> dict[str, float]:
    rows = [weights_of(prompt, sample, i) for prompt, sample in choices for i in range(len(vllm.engine.ids))]
    return dict(zip(NAMES, np.mean(rows, axis=0).tolist(), strict=True))


@pytest.mark.parametrize(("kind", "body"), [("chat", CHAT), ("completion", COMPLETION)])
def test_a_whole_answer_has_the_weights_of_its_tokens(vllm, kind, body):
    answer = send(vllm, PATHS[kind], {**body, "gate_weights": True}).json()
    weights = answer["choices"][0]["gate_weights"]
    assert weights["specialists"] == list(NAMES)
    assert "".join(weights["tokens"]) == text_of(answer["choices"][0]) == vllm.engine.text
    assert np.allclose(weights["weights"], [weights_of(0, 0, i) for i in range(len(vllm.engine.ids))], atol=1e-4)
    assert answer["usage"]["specialist_shares"] == pytest.approx(mean_shares(vllm, [(0, 0)]), abs=1e-4)
    assert answer["choices"][0]["token_ids"] is answer["prompt_token_ids"] is None, "the client did not ask for them"
    assert not {"gate_weights", "specialists"} & vllm.requests[0].keys()
    assert len(vllm.engine.records) == 0


@pytest.mark.parametrize("held", [0, 4])
@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize(("kind", "body"), [("chat", CHAT), ("completion", {**COMPLETION, "prompt": ["a", "b"]})])
def test_streamed_and_whole_answers_agree(vllm, kind, body, per_chunk, held):
    vllm.tokens_per_chunk, vllm.held = per_chunk, held
    body = {**body, "gate_weights": True, "n": 2}
    whole = send(vllm, PATHS[kind], body).json()
    stream = chunks(send(vllm, PATHS[kind], {**body, "stream": True, "stream_options": {"include_usage": True}}))
    assert stream[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [c for chunk in stream for c in chunk["choices"] if c["index"] == choice["index"]]
        weights = [part["gate_weights"] for part in parts if "gate_weights" in part]
        for part in parts:
            if "gate_weights" in part:
                assert "".join(part["gate_weights"]["tokens"]) == text_of(part)
            assert part.get("token_ids") is None
        assert [row for w in weights for row in w["weights"]] == choice["gate_weights"]["weights"]
        if not held:
            assert [token for w in weights for token in w["tokens"]] == choice["gate_weights"]["tokens"]
        assert "".join(map(text_of, parts)) == vllm.engine.text
    assert len(vllm.engine.records) == 0


def test_tokens_of_one_character_share_its_text_with_the_last(vllm):
    weights = send(vllm, PATHS["chat"], {**CHAT, "gate_weights": True}).json()["choices"][0]["gate_weights"]
    pieces = [
        (token, vllm.engine.tokenizer.decode([i])) for token, i in zip(weights["tokens"], vllm.engine.ids, strict=True)
    ]
    assert ("", "\ufffd") in pieces and all(ours in (theirs, "") or "\ufffd" in theirs for ours, theirs in pieces)


@pytest.mark.parametrize("choices", [[(0, 0)], [(0, 0), (0, 1), (1, 0), (1, 1)]])
@pytest.mark.parametrize("stream", [False, True])
def test_usage_always_has_the_shares(vllm, stream, choices):
    body = COMPLETION if len(choices) == 1 else {**COMPLETION, "prompt": ["a", "b"], "n": 2}
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = send(vllm, PATHS["completion"], {**body, **options})
    usage = chunks(response)[-1]["usage"] if stream else response.json()["usage"]
    assert usage["specialist_shares"] == pytest.approx(mean_shares(vllm, choices), abs=1e-4)
    assert "gate_weights" not in response.text
    assert vllm.requests[0].get("return_token_ids") == (True if len(choices) > 1 else None)


def test_a_stream_without_weights_and_usage_passes_unchanged(vllm):
    send(vllm, PATHS["chat"], {**CHAT, "stream": True})
    assert "vllm_xargs" not in vllm.requests[0] and vllm.engine.calls == ["connect_gate"]


def test_one_call_fetches_for_all_that_wait(vllm):
    async def run() -> None:
        transport = httpx.ASGITransport(app=vllm.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            await asyncio.gather(*(client.post(PATHS["chat"], json={**CHAT, "gate_weights": True}) for _ in range(20)))

    asyncio.run(run())
    assert len(vllm.requests) == 20 and vllm.engine.calls.count("take_gate_weights") < 15


def test_specialists_become_a_mask(vllm):
    send(vllm, PATHS["chat"], {**CHAT, "specialists": ["math", "text"], "vllm_xargs": {"other": 1}})
    arguments = vllm.requests[0]["vllm_xargs"]
    assert arguments[MASK] == [1, 0, 1] and arguments["other"] == 1 and KEY in arguments
    send(vllm, PATHS["chat"], {**CHAT, "specialists": ["math", "text", "code"]})
    assert MASK not in vllm.requests[1]["vllm_xargs"], "all take part"


def test_each_specialist_s_most_likely_tokens(vllm):
    answer = send(vllm, PATHS["chat"], {**CHAT, "gate_weights": True, "specialist_logprobs": 2}).json()
    assert vllm.requests[0]["vllm_xargs"][TOP] == 2
    top = answer["choices"][0]["gate_weights"]["top"]
    decode = vllm.engine.tokenizer.decode
    assert len(top) == len(vllm.engine.ids) and {len(token) for token in top} == {3}
    assert top[0][0] == [{"token": decode([3]), "logprob": 0.0}, {"token": decode([4]), "logprob": -1.0}]


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"specialists": ["poetry"]}, "specialists", "there is no specialist 'poetry'. Expected some of"),
        ({"specialists": []}, "specialists", "no specialist is left"),
        ({"specialists": "math"}, "specialists", "expected a list of names"),
        ({"gate_weights": "yes"}, "gate_weights", "expected true or false"),
        ({"n": "2"}, "n", "expected a whole number"),
        ({"specialist_logprobs": 9, "gate_weights": True}, "specialist_logprobs", "from 0 to 5"),
        ({"specialist_logprobs": 2}, "specialist_logprobs", 'Add "gate_weights": true'),
        ({"gate_weights": True, "echo": True}, "echo", "prompts have no gate weights"),
        ({"gate_weights": True, "use_beam_search": True}, "use_beam_search", "cannot be combined"),
        ({"specialists": ["math"], "prompt_logprobs": 1}, "specialists", "log-probabilities of prompts"),
        ({"vllm_xargs": {MASK: [1, 0, 0]}}, "vllm_xargs", "belongs to the server"),
        ({"gate_weihgts": True}, "gate_weihgts", "gate_weihgts is unknown here"),
        ({"messages": []}, "messages", "expected at least a user's"),
        ({"max_tokens": 101}, "max_tokens", "at most 100 tokens. Lower it"),
    ],
)
def test_what_cannot_be_done_is_refused(vllm, fields, param, words):
    response = send(vllm, PATHS["chat"], {**CHAT, **fields}, limits=Limits(max_new_tokens=100))
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and words in error["message"]
    assert error["type"] == "invalid_request_error" and not vllm.requests


def test_fields_without_a_value_are_no_fields(vllm):
    assert (
        send(vllm, PATHS["chat"], {**CHAT, "foo": None, "specialists": None, "metadata": {"a": "b"}}).status_code == 200
    )


def test_an_answer_that_has_begun_is_continued(vllm):
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]}
    send(vllm, PATHS["chat"], chat)
    assert vllm.requests[0]["continue_final_message"] is True and vllm.requests[0]["add_generation_prompt"] is False
    send(vllm, PATHS["chat"], CHAT)
    assert "continue_final_message" not in vllm.requests[1]


def test_several_greedy_choices_are_drawn_from_the_most_likely_token(vllm):
    """vLLM refuses them at temperature 0."""
    send(vllm, PATHS["chat"], {**CHAT, "n": 2, "temperature": 0})
    assert (vllm.requests[0]["temperature"], vllm.requests[0]["top_k"]) == (1.0, 1)
    for fields in ({"n": 1, "temperature": 0}, {"n": 2, "temperature": 0.5}, {"n": 2}):
        send(vllm, PATHS["chat"], {**CHAT, **fields})
        assert vllm.requests[-1].get("temperature") == fields.get("temperature") and "top_k" not in vllm.requests[-1]


def test_the_extension_is_refused_where_it_does_nothing(vllm):
    response = send(vllm, "/v1/responses", {"input": "Hi", "specialists": ["math"]})
    assert response.status_code == 400 and "not on /v1/responses" in response.json()["error"]["message"]
    assert send(vllm, "/v1/responses", {"input": "Hi"}).status_code == 200


@pytest.mark.parametrize("body", [b"{not json", b'{"temperature": NaN}', b"[" * 10_000])
def test_what_is_no_json_is_refused(vllm, body):
    response = send(vllm, PATHS["chat"], body)
    assert response.status_code == 400 and response.json()["error"]["message"].startswith("the body")
    assert not vllm.requests


def test_a_body_that_is_no_object_is_left_to_vllm(vllm):
    assert send(vllm, "/v1/responses", b"{not json").json()["error"]["message"] == "JSON decode error"


def test_half_a_surrogate_pair_is_refused(vllm):
    response = send(vllm, PATHS["chat"], b'{"messages": [{"role": "user", "content": "\\ud83d"}]}')
    assert response.status_code == 400 and "surrogate" in response.json()["error"]["message"]


def test_models_name_their_specialists(vllm):
    response = send(vllm, "/v1/models")
    model = {"id": "fused", "max_model_len": 64, "specialists": list(NAMES)}
    assert response.json()["data"] == [model]
    assert send(vllm, "/v1/models/fused").json() == model
    missing = send(vllm, "/v1/models/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations"])
def test_a_wrong_key_is_refused_before_the_body_is_read(vllm, path):
    response = send(vllm, path, b"{" * 10_000, api_key="secret", limits=Limits(max_body_bytes=100))
    assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
    right = send(vllm, path, CHAT, {"authorization": "Bearer secret"}, api_key="secret")
    assert right.status_code == 200
    assert send(vllm, "/health", api_key="secret").status_code == 200
    assert send(vllm, "/v1/models", api_key="secret").status_code == 401


def test_large_bodies_are_refused(vllm):
    response = send(vllm, PATHS["chat"], CHAT | {"user": "x" * 1000}, limits=Limits(max_body_bytes=1000))
    assert response.status_code == 413 and "more than 1000 bytes" in response.json()["error"]["message"]


def test_a_full_queue_tells_when_to_come_back(vllm):
    vllm.status = 503
    response = send(vllm, PATHS["chat"], CHAT)
    assert response.status_code == 429 and response.headers["retry-after"] == "1"
    assert response.json()["error"]["type"] == "rate_limit_error"
    vllm.engine.errored = True
    assert send(vllm, PATHS["chat"], CHAT).status_code == 503, "a broken engine is not a full queue"


def test_an_answer_goes_out_without_weights_that_the_engine_does_not_give(vllm, caplog):
    async def run() -> Any:
        transport = httpx.ASGITransport(app=vllm.app())
        async with httpx.AsyncClient(transport=transport, base_url="http://vllm") as client:
            await client.get("/v1/models")
            vllm.engine.failure = RuntimeError("engine dead")
            return await client.post(PATHS["chat"], json=CHAT)

    response = asyncio.run(run())
    assert response.status_code == 200 and text_of(response.json()["choices"][0]) == vllm.engine.text
    assert "specialist_shares" not in response.json()["usage"] and "engine dead" in caplog.text


def test_a_dead_engine_is_an_error_of_the_server(vllm):
    vllm.engine.failure = RuntimeError("engine dead")
    response = send(vllm, PATHS["chat"], CHAT)
    assert response.status_code == 503 and response.json()["error"]["message"].endswith("engine dead")


# ---------------------------------------------------------------- time, and clients that go away


class RawClient:
    """A client that sees messages as they come, and can hang up."""

    def __init__(self, body: dict[str, Any], path: str = PATHS["chat"]) -> None:
        self.scope = {
            "type": "http", "method": "POST", "path": path, "root_path": "", "query_string": b"", "http_version": "1.1",
            "headers": [(b"content-type", b"application/json")], "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        self.body, self.messages = json.dumps(body).encode(), []
        self.gone, self.sent = asyncio.Event(), asyncio.Event()
        self.has_asked = False

    async def receive(self) -> dict[str, Any]:
        if not self.has_asked:
            self.has_asked = True
            return {"type": "http.request", "body": self.body}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        if message["type"] == "http.response.body":
            self.sent.set()

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.messages).decode()


def test_a_client_that_goes_away_leaves_nothing_behind(vllm):
    async def run() -> None:
        vllm.waits.clear()
        client = RawClient({**CHAT, "gate_weights": True, "stream": True})
        task = asyncio.create_task(vllm.app()(client.scope, client.receive, client.send))
        await asyncio.wait_for(client.sent.wait(), 5)
        while not len(vllm.engine.records):
            await asyncio.sleep(0)
        client.gone.set()
        await asyncio.wait_for(task, 5)
        await asyncio.sleep(0.01)

    asyncio.run(run())
    assert vllm.disconnects == 1 and len(vllm.engine.records) == 0


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long_is_cut_off(vllm, stream):
    async def run() -> RawClient:
        vllm.waits.clear()
        client = RawClient({**CHAT, "stream": stream})
        app = vllm.app(limits=Limits(timeout_s=0.1))
        await asyncio.wait_for(app(client.scope, client.receive, client.send), 5)
        return client

    client = asyncio.run(run())
    assert client.messages[0]["status"] == (200 if stream else 504)
    assert client.text.count("the answer was not complete after 0.1 s") == 1 and vllm.disconnects == 1
    assert not client.messages[-1].get("more_body")
