"""An endpoint as an lm-eval model: chats, stop strings, what it cannot do, and answers that survive a failure."""

from __future__ import annotations

from typing import Any

import pytest

from fake_endpoint import FakeEndpoint, failing, fake_endpoint, fine
from ultrafuser.errors import EndpointError, UltraFuserError
from ultrafuser.evaluate.lm.chat import encode_chat

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "why?"}]


@pytest.fixture
def server():
    for package in ("aiohttp", "lm_eval"):
        pytest.importorskip(package, reason="an extra is not installed")
    with fake_endpoint() as server:
        yield server


def lm_of(server: FakeEndpoint, **changes: Any):
    from ultrafuser.evaluate.lm.endpoint import Endpoint, EndpointLM

    return EndpointLM(Endpoint(server.recipe(**changes)))


def instances(*texts: str, kind: str = "generate_until", **options: Any):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, (text, {"until": [], **options}), i, ("task", i, 1)) for i, text in enumerate(texts)]


class Hook:
    """What was reported as finished."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def add_partial(self, kind: str, args: tuple, answer: str) -> None:
        assert kind == "generate_until"
        self.seen[args[0]] = answer


def test_chats_keep_their_messages_and_texts_are_one_user_message(server: FakeEndpoint):
    lm = lm_of(server, max_tokens=77)
    assert lm.apply_chat_template(CHAT) == encode_chat(CHAT)
    assert lm.generate_until(instances(encode_chat(CHAT), "plain")) == ["ok", "ok"]
    assert [request["messages"] for request in server.requests] == [CHAT, [{"role": "user", "content": "plain"}]]
    assert all(request["max_tokens"] == 77 and request["temperature"] == 0 for request in server.requests)


def test_generation_options_are_sent(server: FakeEndpoint):
    lm = lm_of(server)
    lm.generate_until(instances("a", max_gen_toks=5, do_sample=True, temperature=0.8, top_p=0.9, until=["\n"]))
    lm.generate_until(instances("a", do_sample=False, temperature=0.8))
    sampled, greedy = server.requests
    assert {key: sampled[key] for key in ("max_tokens", "temperature", "top_p", "stop")} == {
        "max_tokens": 5, "temperature": 0.8, "top_p": 0.9, "stop": ["\n"]}  # fmt: skip
    assert greedy["temperature"] == 0 and "top_p" not in greedy and "stop" not in greedy


def test_no_temperature_is_sent_to_a_model_that_refuses_it(server: FakeEndpoint):
    lm_of(server, temperature=None).generate_until(instances("a", do_sample=False))
    assert "temperature" not in server.requests[0]


def test_four_stop_strings_are_sent_and_the_text_is_truncated_at_all(server: FakeEndpoint):
    server.reply = lambda _: fine("one two three four")
    stops = ["a!", "b!", "c!", "d!", " four", " three", ""]
    assert lm_of(server).generate_until(instances("x", until=stops)) == ["one two"]
    assert server.requests[0]["stop"] == stops[:4]


def test_an_answer_start_is_continued(server: FakeEndpoint):
    lm_of(server).generate_until(instances(encode_chat([*CHAT, {"role": "assistant", "content": "Since"}])))
    assert server.requests[0]["continue_final_message"] is True
    assert server.requests[0]["add_generation_prompt"] is False


def test_answers_are_in_the_order_of_the_requests_and_reported_as_they_come(server: FakeEndpoint):
    server.reply = lambda question: fine(question * 2)
    lm, hook = lm_of(server, concurrency=4), Hook()
    lm.set_cache_hook(hook)
    texts = [f"q{i}" for i in range(12)]
    assert lm.generate_until(instances(*texts)) == [text * 2 for text in texts]
    assert hook.seen == {text: text * 2 for text in texts}


def test_a_filtered_answer_is_empty(server: FakeEndpoint):
    server.reply = lambda _: fine(None, "content_filter")
    assert lm_of(server).generate_until(instances("x")) == [""]


@pytest.mark.parametrize("method", ["loglikelihood", "loglikelihood_rolling"])
def test_it_does_not_score_given_text(server: FakeEndpoint, method):
    with pytest.raises(UltraFuserError, match=f"{server.url}.*task 'task' compares the log-probabilities.*gsm8k"):
        getattr(lm_of(server), method)(instances("x", kind=method))
    assert server.hits == 0


def test_an_unknown_generation_option(server: FakeEndpoint):
    with pytest.raises(UltraFuserError, match="task 'task': the generation option 'num_beams' does not exist"):
        lm_of(server).generate_until(instances("x", num_beams=3))


def test_a_rerun_asks_only_what_is_missing(server: FakeEndpoint, tmp_path):
    from ultrafuser.evaluate.lm.response_cache import CachedLM, ResponseCache

    failed_once: list[str] = []

    def reply(question: str):
        if question == "q3" and not failed_once:
            failed_once.append(question)
            return failing(400, "maximum context length is 8 tokens")
        return fine(question.upper())

    server.reply = reply
    texts = [f"q{i}" for i in range(6)]
    store = ResponseCache(tmp_path / "answers.sqlite", "owner")
    with pytest.raises(
        EndpointError, match="context overflow.*1 of the requests failed. 5 of 6 requests were answered"
    ):
        CachedLM(lm_of(server), store).generate_until(instances(*texts))
    assert CachedLM(lm_of(server), store).generate_until(instances(*texts)) == [text.upper() for text in texts]
    assert server.hits == 7


def test_a_dead_endpoint(server: FakeEndpoint):
    server.script = [fine("a"), *[failing(401)] * 50]
    with pytest.raises(EndpointError, match=r"status 401.*\(1 of 20 requests were answered"):
        lm_of(server).generate_until(instances(*map(str, range(20))))
