"""Reading what endpoints send: completions, failures in all their shapes, how long to wait."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest

from ultrafuser.endpoint.errors import Failure, next_step, read_failure, retry_after_s
from ultrafuser.endpoint.messages import Reply, read_reply
from ultrafuser.endpoint.recipe import EndpointRecipe


def body(**message) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", **message}, "finish_reason": "stop"}]}).encode()


def test_read_reply():
    assert read_reply(body(content="hi")) == Reply("hi", "stop")
    assert read_reply(body(content=None, refusal="no")) == Reply("", "stop", "no")
    tree = json.loads(body(content="hi")) | {"usage": {"prompt_tokens": 3, "completion_tokens": None}}
    assert read_reply(json.dumps(tree).encode()).prompt_tokens == 3
    for count in (-1, 2**63, "7"):
        tree = {
            "choices": [{"message": {"content": "hi"}, "finish_reason": 3}],
            "usage": {"prompt_tokens": True, "completion_tokens": count},
        }
        assert read_reply(json.dumps(tree).encode()) == Reply("hi")


def text_item(text, kind="text"):
    return {"type": kind, "text": text}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([text_item("hi")], "hi"),
        ([text_item("4"), text_item("2.\n")], "42.\n"),
        ([text_item("hi", "output_text"), text_item(" you", "output_text")], "hi you"),
        ([{"type": "thinking", "thinking": [text_item("hm")]}, text_item("42")], "42"),
        ([{"type": "reasoning", "text": "hm"}, text_item("42")], "42"),
        ([{"type": "image_url", "image_url": {"url": "data:"}}, text_item("a cat")], "a cat"),
        ([text_item(None), text_item("so \ud83d")], "so \ufffd"),
        ([{"type": "thinking", "thinking": "cut off in its reas"}], ""),
        ([], ""),
        ("", ""),
    ],
)
def test_content_in_several_items_is_joined(content, text):
    assert read_reply(body(content=content)) == Reply(text, "stop")


def test_lone_surrogates_are_replaced():
    assert read_reply(body(content="so \ud83d")) == Reply("so \ufffd", "stop")
    assert read_reply(body(content="so \U0001f600")) == Reply("so \U0001f600", "stop")


@pytest.mark.parametrize("sent", [b"", b"{", b"[]", b"null", b"<html>", b"\xff\xfe", b"[" * 100_000, b'{"choices": []}', b'{"choices": [1]}',
                                  b'{"choices": {"0": 1}}', b'{"choices": [{"message": "hi"}]}', b'{"choices": [{"message": {}}]}',
                                  b'{"error": {"message": "busy"}}', body(content={"a": 1}), body(content=["a"]), body(content=7),
                                  body(content=[{"text": "hi"}, 3]), body(content=[{"type": ["text"], "text": "hi"}, {}])])  # fmt: skip
def test_malformed_replies(sent):
    with pytest.raises(Failure, match="the reply is no chat completion"):
        read_reply(sent)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        ({"message": "busy"}, "transient", "busy"),
        ("model is loading", "transient", "model is loading"),
        ({"message": "slow down", "code": 429}, "busy", "slow down"),
        ({"message": "no credits", "code": 402}, "unusable", "no credits"),
        ({"message": "quota", "code": "insufficient_quota"}, "unusable", "quota"),
        ({"message": "maximum context length is 9"}, "overflow", "maximum context length is 9"),
        ({"message": "flagged", "code": "content_filter"}, "filtered", "flagged"),
        ({"message": "upstream is down", "code": 502}, "transient", "upstream is down"),
        ({"message": "bad field", "code": 400}, "refused", "bad field"),
    ],
)
def test_an_error_of_status_200_is_told_in_the_words_of_the_endpoint(error, kind, words):
    with pytest.raises(Failure) as caught:
        read_reply(json.dumps({"error": error}).encode())
    assert (caught.value.kind, str(caught.value)) == (
        kind,
        f"the reply is no chat completion (no message in it: {words})",
    )
    with pytest.raises(Failure, match=words):
        read_reply(json.dumps({"error": error, "choices": []}).encode())


def test_the_advice_for_a_malformed_reply_is_about_the_address():
    with pytest.raises(Failure) as caught:
        read_reply(b"<html>welcome")
    recipe = EndpointRecipe(model="m", base_url="http://localhost/v1")
    assert next_step(caught.value, recipe) == (
        "Check that `base_url` is the address of a chat completions API, see the server's log, or raise `retries`"
    )


@pytest.mark.parametrize("sent, message, code", [
    ({"error": {"message": "no  such\nmodel", "code": "model_not_found"}}, "no such model", "model_not_found"),
    ({"error": {"message": "no", "type": "BadRequest", "code": None}}, "no", "BadRequest"),
    ({"object": "error", "message": "too long", "code": 400}, "too long", "400"),
    ({"error": "not loaded"}, "not loaded", ""),
    ({"error": None, "message": "not loaded"}, "not loaded", ""),
    ({"detail": [{"msg": "field required"}]}, "[{'msg': 'field required'}]", ""),
    ([1], "[1]", ""),
])  # fmt: skip
def test_a_failure_in_the_words_of_the_endpoint(sent, message, code):
    failure = read_failure(400, json.dumps(sent).encode())
    assert (str(failure), failure.code, failure.status) == (f"status 400: {message}", code, 400)


def test_a_failure_without_words_and_a_long_page():
    assert str(read_failure(500, b"")) == "status 500: no words"
    assert len(str(read_failure(502, b"<html>" + b"x" * 10_000))) == len("status 502: ") + 300


def test_kinds_of_failures():
    def about(status: int, message: str, code: str = ""):
        return read_failure(status, json.dumps({"error": {"message": message, "code": code}}).encode())

    assert about(400, "maximum context length is 9").kind == about(413, "x").kind == "overflow"
    assert about(500, "context length").kind == "transient"
    assert about(400, "x", "content_filter").kind == about(400, "x", "content_policy_violation").kind == "filtered"
    assert about(429, "x").kind == about(503, "x").kind == "busy" and about(400, "x").kind == "refused"
    assert about(408, "x").kind == about(504, "x").kind == "transient" and about(504, "x").billed
    assert about(308, "x").kind == about(401, "x").kind == about(404, "x").kind == "unusable"
    assert about(422, "unknown field response_format").is_about_schema and not about(500, "schema").is_about_schema
    for failure in (
        about(402, "x"),
        about(429, "x", "insufficient_quota"),
        about(400, "x", "billing_hard_limit_reached"),
    ):
        assert failure.is_spent and failure.kind == "unusable"
    assert not about(429, "x").is_spent


def test_retry_after():
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


@pytest.mark.parametrize(
    "error", [["first words", "w"], {"error": {"message": "inner words"}}, {"reason": "other words"}, {"errors": [{"msg": "list words"}]}]
)  # fmt: skip
@pytest.mark.parametrize("status", [200, 400, 422, 500])
def test_words_in_an_unusual_shape_are_shown_too(error, status):

    from ultrafuser.endpoint.errors import read_error, read_failure

    tree = {"error": error}
    failure = read_error(tree) if status == 200 else read_failure(status, json.dumps(tree).encode())
    assert "words" in str(failure) and "no words" not in str(failure)
