"""Reading what endpoints send: completions, refusals in all their shapes, how long to wait."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from ultrafuser.synth.calls.replies import Completion, Malformed, read_completion, read_refusal, retry_after_s


def body(**message) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}]}).encode()


def test_a_completion():
    assert read_completion(body(content="hi")) == Completion("hi", "stop")
    assert read_completion(body(content=None, refusal="no")) == Completion("", "stop", "no")
    tree = json.loads(body(content="hi")) | {"usage": {"prompt_tokens": 3, "completion_tokens": None}}
    assert read_completion(json.dumps(tree).encode()).prompt_tokens == 3
    odd = {
        "choices": [{"message": {"content": "hi"}, "finish_reason": 3}],
        "usage": {"prompt_tokens": True, "completion_tokens": -1},
    }
    assert read_completion(json.dumps(odd).encode()) == Completion("hi")


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b"null", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"choices": []}', b'{"choices": [1]}',
                                  b'{"choices": {"0": 1}}', b'{"choices": [{"message": "hi"}]}', b'{"choices": [{"message": {}}]}',
                                  b'{"error": {"message": "busy"}}', body(content={"a": 1}), body(content=["a"])])  # fmt: skip
def test_what_is_no_completion(sent):
    with pytest.raises(Malformed):
        read_completion(sent)


@pytest.mark.parametrize("sent, message, code", [
    ({"error": {"message": "no  such\nmodel", "code": "model_not_found"}}, "no such model", "model_not_found"),
    ({"error": {"message": "no", "type": "BadRequest", "code": None}}, "no", "BadRequest"),
    ({"object": "error", "message": "too long", "code": 400}, "too long", "400"),
    ({"error": "not loaded"}, "not loaded", ""),
    ({"detail": [{"msg": "field required"}]}, "[{'msg': 'field required'}]", ""),
    ([1], "[1]", ""),
])  # fmt: skip
def test_a_refusal(sent, message, code):
    refusal = read_refusal(400, json.dumps(sent).encode())
    assert (refusal.message, refusal.code, str(refusal)) == (message, code, f"status 400: {message}")


def test_a_refusal_without_words_and_a_long_page():
    assert read_refusal(500, b"").message == "no words"
    assert len(read_refusal(502, b"<html>" + b"x" * 10_000).message) == 300


def test_what_a_refusal_is_about():
    def about(status: int, message: str, code: str = ""):
        return read_refusal(status, json.dumps({"error": {"message": message, "code": code}}).encode())

    assert about(400, "maximum context length is 9").is_overflow and about(413, "x").is_overflow
    assert not about(500, "context length").is_overflow
    assert about(400, "x", "content_filter").is_filter
    assert about(422, "unknown field response_format").is_about_schema and not about(500, "schema").is_about_schema
    assert about(402, "x").is_spent and about(429, "x", "insufficient_quota").is_spent and not about(429, "x").is_spent


def test_how_long_to_wait():
    assert (
        retry_after_s({}) is None
        and retry_after_s({"retry-after": "soon"}) is None
        and retry_after_s({"retry-after": "nan"}) is None
    )
    assert retry_after_s({"retry-after": "1.5"}) == 1.5 and retry_after_s({"retry-after": "-3"}) == 0
    assert retry_after_s({"retry-after": "2", "retry-after-ms": "1500"}) == 1.5
    later = datetime.now(timezone.utc) + timedelta(seconds=30)
    assert 28 < retry_after_s({"retry-after": format_datetime(later, usegmt=True)}) <= 30
    assert retry_after_s({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
