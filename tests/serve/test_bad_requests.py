"""Every bad request gets a status and OpenAI's error object that names the field at fault."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripted_engine import KEY, QUESTION, ScriptedEngine, serving, wait_for
from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.engine import EngineBusyError, EngineClosedError, GenerationError
from ultrafuser.serve.limits import Limits
from ultrafuser.serve.protocol import HARMLESS_FIELDS, UNSUPPORTED_FIELDS, ChatRequest, CompletionRequest

IMAGE = [{"type": "image_url", "image_url": {"url": "data:,"}}]


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": None}, "messages", "valid list"),
    ({"messages": user(None)}, "messages.0.content", "valid string or a valid list"),
    ({"messages": user(5)}, "messages.0.content", "is 5, expected a valid string"),
    ({"messages": user(IMAGE)}, "messages.0.content", "has a part of type 'image_url'. This server reads text alone"),
    ({"messages": user([{"type": "input_audio"}])}, "messages.0.content", "'input_audio'"),
    ({"messages": user([{"type": "text"}])}, "messages.0.content.0.text", "is missing"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "expected 'system', 'developer', 'user' or"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls", "at most 0"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name", "is unknown here"),
    ({"max_tokens": -1}, "max_tokens", "is -1, expected greater than or equal to 1"),
    ({"max_tokens": 0}, "max_tokens", "is 0"),
    ({"max_tokens": "7"}, "max_tokens", "is '7', expected a valid integer"),
    ({"max_completion_tokens": 1.5}, "max_completion_tokens", "is 1.5"),
    ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "they differ"),
    ({"temperature": 2.1}, "temperature", "is 2.1, expected less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "is 'hot', expected a valid number"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_k": -2}, "top_k", "is -2"),
    ({"min_p": 1.5}, "min_p", "is 1.5"),
    ({"presence_penalty": 3}, "presence_penalty", "is 3"),
    ({"frequency_penalty": -3}, "frequency_penalty", "is -3"),
    ({"repetition_penalty": 0}, "repetition_penalty", "is 0"),
    ({"n": 0}, "n", "is 0"),
    ({"n": 10**6}, "n", "is 1000000, expected less than or equal to 128"),
    ({"seed": 2**63}, "seed", "less than"),
    ({"stop": ""}, "stop", "at least 1 character"),
    ({"stop": ["x"] * 17}, "stop", "at most 16"),
    ({"stop": ["x", 3]}, "stop.1", "valid string"),
    ({"logit_bias": {"hello": 1}}, "logit_bias.hello", "is 'hello'"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5", "is 101"),
    ({"logprobs": 2}, "logprobs", "is 2, expected a valid boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs: true"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "is 21"),
    ({"stream": "yes"}, "stream", "is 'yes'"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream: true"),
    ({"stream": True, "stream_options": {"verbose": True}}, "stream_options.verbose", "is unknown here"),
    ({"gate_weights": "yes"}, "gate_weights", "is 'yes'"),
    ({"specialists": []}, "specialists", "at least 1 item"),
    ({"specialists": ["law"]}, "specialists", "has 'law', which is none of text, code, math"),
    ({"specialists": "code"}, "specialists", "valid list"),
    ({"specialist_logprobs": 2}, "specialist_logprobs", "Add gate_weights: true"),
    ({"gate_weights": True, "specialist_logprobs": 6}, "specialist_logprobs", "is 6"),
    ({"temprature": 1}, "temprature", "is unknown here, and this server ignores no fields. Did you mean temperature?"),
    ({"prompt": "x"}, "prompt", "is unknown here, and this server ignores no fields. Leave it out"),
    ({"store": True}, "store", "is True, expected False"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported: this server calls no tools"),
    ({"response_format": {"type": "json_object"}}, "response_format", "answers are plain text"),
    ({"modalities": ["text", "audio"]}, "modalities", "is not supported"),
]
COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": ""}, "prompt", "has no tokens"),
    ({"prompt": []}, "prompt", "at least 1 item"),
    ({"prompt": ["x", 5]}, "prompt.1", "is 5"),
    ({"prompt": [[1], []]}, "prompt.1", "at least 1 item"),
    ({"prompt": [-1]}, "prompt.0", "is -1"),
    ({"prompt": {"text": "x"}}, "prompt", "expected"),
    ({"prompt": ["x"] * 50, "n": 3}, "n", "50 prompts with 3 answers each are 150 answers, expected at most 128"),
    ({"prompt": ["x"] * 129}, "prompt", "are 129 answers"),
    ({"echo": True}, "echo", "is not supported: the prompt is not repeated"),
    ({"best_of": 2}, "best_of", "draw several answers with n"),
    ({"suffix": "x"}, "suffix", "inserts no text"),
    ({"logprobs": 21}, "logprobs", "is 21"),
    ({"logprobs": True}, "logprobs", "is True"),
    ({"messages": QUESTION}, "messages", "is unknown here"),
    ({"max_tokens": 127}, "max_tokens", "maximum context length is 128 tokens"),
    ({"prompt": "x y " * 100}, "prompt", "Shorten the prompt"),
]


@pytest.fixture(scope="module")
def server(three_templates):
    with serving(ScriptedEngine(), three_templates) as server:
        yield server


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


@pytest.mark.parametrize(("fields", "param", "message"), CHATS, ids=lambda value: str(value)[:40])
def test_bad_fields_of_a_chat(server, fields, param, message):
    problem = error(server.chat(**fields), 400)
    assert problem["param"] == param and message in problem["message"]
    assert param.split(".")[0] in problem["message"] and problem["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param", "message"), COMPLETIONS, ids=lambda value: str(value)[:40])
def test_bad_fields_of_a_completion(server, fields, param, message):
    problem = error(server.complete(**fields), 400)
    assert problem["param"] == param and message in problem["message"]


@pytest.mark.parametrize("field", UNSUPPORTED_FIELDS)
def test_an_unsupported_field_may_only_be_null(server, field):
    send = server.complete if field in CompletionRequest.model_fields else server.chat
    assert send(**{field: None}).status_code == 200
    problem = error(send(**{field: {"a": [1, "x"]}}), 400)
    assert problem["param"] == field and problem["code"] == "unsupported_parameter"


def test_every_other_field_has_an_effect_or_is_listed_as_harmless():
    for kind in (ChatRequest, CompletionRequest):
        undescribed = {name for name, field in kind.model_fields.items() if not field.description}
        assert undescribed <= {*HARMLESS_FIELDS, *UNSUPPORTED_FIELDS}


def test_harmless_fields_are_accepted(server):
    fields = {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x"}
    assert server.chat(**fields, prompt_cache_key="k").status_code == 200
    assert {*fields, "prompt_cache_key"} == set(HARMLESS_FIELDS)


def test_nulls_are_as_if_left_out(server):
    for kind, send in ((ChatRequest, server.chat), (CompletionRequest, server.complete)):
        fields = dict.fromkeys(kind.model_fields.keys() - {"messages", "prompt"})
        assert send(**fields).status_code == 200


# ---------------------------------------------------------------- bodies

JSON = {"Content-Type": "application/json"}
BODIES = {
    "malformed": (b'{"messages": [', "not JSON"),
    "empty": (b"", "the body is empty"),
    "a list": (b"[1]", "the body is a list"),
    "a text": (b'"x"', "the body is a str"),
    "NaN": (b'{"prompt": "x", "temperature": NaN}', "NaN is no number of JSON"),
    "Infinity": (b'{"prompt": "x", "temperature": -Infinity}', "-Infinity is no number"),
    "1e999": (b'{"prompt": "x", "temperature": 1e999}', "temperature is inf, expected a finite number"),
    "deep": (b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested"),
    "rather deep": (b'{"prompt": ' + b"[" * 150 + b"]" * 150 + b"}", "nested deeper than 100 levels"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8"),
    "half a character": (b'{"prompt": "\\ud800"}', "holds a lone surrogate"),
    "half a character in a key": (b'{"prompt": "x", "\\udfff": 1}', "holds a lone surrogate"),
    "many digits": (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", "cannot be read"),
}


@pytest.mark.parametrize(("body", "message"), BODIES.values(), ids=BODIES)
def test_bodies_that_are_no_request(server, body, message):
    response = server.client.post("/v1/completions", content=body, headers=JSON)
    assert message in error(response, 400)["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/json5"])
def test_another_content_type(server, kind):
    response = server.client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind})
    assert "expected 'application/json'" in error(response, 415)["message"]


def test_a_content_type_with_a_charset(server):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    response = server.client.post("/v1/completions", content='{"prompt": "é"}'.encode(), headers=headers)
    assert response.status_code == 200


def test_a_large_body(serve):
    server = serve(limits=Limits(max_body_bytes=1000))
    long = json.dumps({"prompt": "x" * 2000}).encode()
    sizes = [len(long), None]  # announced, or in chunks
    for size in sizes:
        content = long if size else iter([long[:500], long[500:]])
        response = server.client.post("/v1/completions", content=content, headers=JSON)
        assert "more than 1000 bytes" in error(response, 413)["message"]


def test_a_body_that_does_not_arrive(serve):
    import socket
    from urllib.parse import urlsplit

    server = serve(limits=Limits(body_timeout_s=0.2))
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        connection.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{{".encode())
        assert b" 408 " in connection.recv(4096)


# ---------------------------------------------------------------- models, paths, keys


def test_an_unknown_model(server):
    for response in (server.chat(model="gpt-4"), server.client.get("/v1/models/gpt-4")):
        problem = error(response, 404)
        assert problem["code"] == "model_not_found" and "'gpt-4' does not exist. Served: 'tiny'" in problem["message"]


def test_unknown_paths_and_methods(server):
    assert "there is no GET /v2/models" in error(server.client.get("/v2/models"), 404)["message"]
    response = server.client.get("/v1/completions")
    assert "has no such method" in error(response, 405)["message"] and response.headers["allow"] == "POST"


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Bearer é", f"Basic {KEY}", KEY, f"Bearer {KEY}x"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/v1/chat/completions"])
def test_a_wrong_key(server, header, path):
    headers = {} if header is None else {"Authorization": header.encode()}
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        response = client.get(path, headers=headers)
    assert error(response, 401)["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


def test_what_needs_no_key(serve):
    server = serve(open_metrics=True)
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/metrics").status_code == 200
    server = serve(api_key=None)
    with httpx.Client(base_url=server.url, trust_env=False) as client:
        assert client.get("/v1/models").status_code == 200


# ---------------------------------------------------------------- what the engine and the templates refuse


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (EngineBusyError("16 run"), 429, "queue_full"),
        (EngineClosedError("closing"), 503, "shutting_down"),
        (UltraFuserError("logit_bias has the token 999"), 400, None),
    ],
)
def test_errors_at_the_call_have_a_status(serve, refusal, status, code):
    server = serve(ScriptedEngine(refusal=refusal))
    for stream in (False, True):
        response = server.chat(stream=stream)
        problem = error(response, status)
        assert problem["code"] == code and problem["message"] == str(refusal)
        assert ("retry-after" in response.headers) == (status != 400)


def test_a_failed_forward_pass(serve):
    server = serve(ScriptedEngine(failure=GenerationError("out of memory")))
    assert error(server.chat(), 500)["code"] == "generation_failed"
    events = server.chat(stream=True).text.strip().split("\n\n")
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "out of memory"
    assert "[DONE]" not in events


def test_a_bug_tells_the_client_nothing_but_the_log_everything(serve, caplog):
    server = serve(ScriptedEngine(failure=RuntimeError("secret path")))
    assert error(server.chat(), 500)["message"] == "the server failed. Its log says why"
    wait_for(lambda: "secret path" in caplog.text)
    assert server.client.get("/health").status_code == 200


def test_a_conversation_that_a_template_refuses(serve, tokenizer):
    from ultrafuser.data.chat_format import ChatFormat
    from ultrafuser.data.templates import Renderer

    refusing = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    renderer = Renderer(tokenizer, [ChatFormat(tokenizer, refusing, name=name) for name in ("text", "code", "math")])
    with serving(ScriptedEngine(), renderer) as server:
        problem = error(server.chat(messages=[{"role": "system", "content": "x"}, *QUESTION]), 400)
    assert problem["param"] == "messages" and "no system turns" in problem["message"]


def test_an_overflow_of_a_chat(server):
    problem = error(server.chat(max_tokens=128), 400)
    assert problem["code"] == "context_length_exceeded" and problem["param"] == "max_tokens"
    prompt_tokens = server.chat(max_tokens=1).json()["usage"]["prompt_tokens"]
    assert f"Lower max_tokens to at most {128 - prompt_tokens}" in problem["message"]
    problem = error(server.chat(messages=user("x y " * 100)), 400)
    assert problem["code"] == "context_length_exceeded" and problem["param"] == "messages"


def test_the_servers_own_limit_of_tokens(serve):
    engine = ScriptedEngine()
    server = serve(engine, limits=Limits(max_new_tokens=5))
    assert "answers with at most 5 tokens" in error(server.chat(max_tokens=6), 400)["message"]
    assert server.chat().status_code == 200
    assert engine.requests[-1].sampling.max_new_tokens == 5


# ---------------------------------------------------------------- the page


def test_the_page_names_every_field():
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    table, _, rest = page.partition("## Request fields")[2].partition("**No field is ignored")
    shown = set(re.findall(r"`(\w+)", table + rest.partition("## Gate weights")[0]))
    fields = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    assert fields - UNSUPPORTED_FIELDS.keys() <= shown
