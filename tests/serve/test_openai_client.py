"""The official client against a running server.

ULTRAFUSER_TEST_SERVER=http://127.0.0.1:8000/v1 runs the same tests against another server of a fused model, such as vLLM's,
with the key in ULTRAFUSER_TEST_KEY.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="the official client is not installed")

from scripted_engine import KEY  # noqa: E402 - needs the serve extra

QUESTION = [{"role": "user", "content": "How many apples are 12 apples and 5 apples?"}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def address(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The URL and the key of a server."""
    if url := os.environ.get("ULTRAFUSER_TEST_SERVER"):
        return url, os.environ.get("ULTRAFUSER_TEST_KEY", "none")
    return f"{request.getfixturevalue('tiny_server').url}/v1", KEY


@pytest.fixture(scope="module")
def client(address) -> Iterator[Any]:
    url, key = address
    with openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def model(client) -> Any:
    return client.models.list().data[0]


def chat(client: Any, model: Any, *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"messages": QUESTION, **GREEDY, **fields}
    return client.chat.completions.create(model=model.id, extra_body=extra, **fields)


def complete(client: Any, model: Any, *, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"prompt": "def add(", **GREEDY, **fields}
    return client.completions.create(model=model.id, extra_body=extra, **fields)


def shares(usage: Any) -> dict[str, float]:
    return usage.model_extra["specialist_shares"]


def weights(choice: Any) -> dict[str, Any]:
    return choice.model_extra["gate_weights"]


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


# ---------------------------------------------------------------- models


def test_the_model_tells_its_specialists_and_its_context(client, model):
    assert len(model.model_extra["specialists"]) > 1 and model.model_extra["max_model_len"] > 64
    assert client.models.retrieve(model.id).id == model.id


# ---------------------------------------------------------------- whole answers


def test_a_chat(client, model):
    answer = chat(client, model)
    [choice] = answer.choices
    assert (answer.object, answer.model, choice.index) == ("chat.completion", model.id, 0)
    assert choice.message.role == "assistant" and choice.finish_reason in ("stop", "length")
    usage = answer.usage
    assert 0 < usage.completion_tokens <= 12 and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert list(shares(usage)) == model.model_extra["specialists"]
    assert sum(shares(usage).values()) == pytest.approx(1, abs=1e-3)


def test_greedy_answers_are_the_same_again_and_alongside_others(client, model):
    first = chat(client, model).choices[0].message.content
    assert chat(client, model).choices[0].message.content == first
    assert all(choice.message.content == first for choice in chat(client, model, n=3).choices)


def test_parts_of_text_are_joined_by_line_breaks(client, model):
    parts = [{"type": "text", "text": "How"}, {"type": "text", "text": "many?"}]
    plain = chat(client, model, messages=[{"role": "user", "content": "How\nmany?"}])
    assert chat(client, model, messages=[{"role": "user", "content": parts}]).usage == plain.usage


def test_an_answer_can_be_sent_back(client, model):
    message = chat(client, model, max_tokens=4).choices[0].message
    turns = [*QUESTION, message, {"role": "user", "content": "And 3 more?"}]
    assert chat(client, model, messages=turns).usage.prompt_tokens > chat(client, model).usage.prompt_tokens


def test_the_limit_of_tokens(client, model):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = chat(client, model, **{"max_tokens": openai.omit, name: 3}, extra={"ignore_eos": True})
        assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_a_stop_text_ends_the_answer_and_is_not_part_of_it(client, model):
    text = complete(client, model, max_tokens=24, extra={"ignore_eos": True}).choices[0].text
    middle = len(text) // 2
    stop = text[middle : middle + 2]
    for given in (stop, ["not in it at all", stop]):
        choice = complete(client, model, max_tokens=24, stop=given, extra={"ignore_eos": True}).choices[0]
        assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"


def test_seeds_reproduce_several_different_answers(client, model):
    drawn = [
        [choice.message.content for choice in chat(client, model, n=3, seed=7, temperature=1.0).choices] for _ in "ab"
    ]
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_a_bias_decides_the_token(client, model):
    prompt = complete(client, model, logprobs=1, max_tokens=1)
    [drawn] = prompt.choices[0].logprobs.tokens
    forced = complete(client, model, logprobs=1, max_tokens=1, logit_bias={"40": 100})
    assert forced.choices[0].logprobs.tokens != [drawn]
    assert forced.choices[0].logprobs.token_logprobs[0] <= prompt.choices[0].logprobs.token_logprobs[0]


# ---------------------------------------------------------------- log-probabilities


def test_log_probabilities_of_a_chat(client, model):
    answer = chat(client, model, logprobs=True, top_logprobs=3)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for token in content:
        top = [other.logprob for other in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True) and token.logprob == pytest.approx(top[0], abs=1e-4)
    assert chat(client, model, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    assert chat(client, model).choices[0].logprobs is None


def test_log_probabilities_of_a_completion(client, model):
    answer = complete(client, model, logprobs=2)
    logprobs = answer.choices[0].logprobs
    count = answer.usage.completion_tokens
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == count
    assert len(logprobs.top_logprobs) == count and logprobs.text_offset[0] == 0
    assert all(logprobs.top_logprobs[i][logprobs.tokens[i]] <= 0 for i in range(count))


# ---------------------------------------------------------------- completions


def test_prompts_of_token_ids_and_of_several_texts(client, model):
    answer = complete(client, model, prompt=["def add(", "12 + 5"], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert texts[0] == texts[1] != texts[2] == texts[3]
    assert texts[0] == complete(client, model).choices[0].text
    ids = [40, 41, 42]
    assert complete(client, model, prompt=ids).usage.prompt_tokens == 3
    assert complete(client, model, prompt=[ids, ids]).usage.prompt_tokens == 6


# ---------------------------------------------------------------- streams


def test_a_streamed_chat_is_the_whole_one(client, model):
    whole = chat(client, model, logprobs=True, top_logprobs=1, extra={"gate_weights": True})
    options = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1}
    chunks = list(chat(client, model, **options, extra={"gate_weights": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    *content, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    choices = [chunk.choices[0] for chunk in content]
    assert "".join(choice.delta.content or "" for choice in choices) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [whole.choices[0].finish_reason]
    logprobs = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in logprobs] == [token.token for token in whole.choices[0].logprobs.content]
    streamed = [weights(choice) for choice in choices if (choice.model_extra or {}).get("gate_weights")]
    rows = list(itertools.chain.from_iterable(part["weights"] for part in streamed))
    texts = itertools.chain.from_iterable(part["tokens"] for part in streamed)
    assert "".join(texts) == whole.choices[0].message.content
    for row, other in zip(rows, weights(whole.choices[0])["weights"], strict=True):
        assert row == pytest.approx(other, abs=2e-3)


def test_a_streamed_completion_is_the_whole_one(client, model):
    whole = complete(client, model, n=2, logprobs=0)
    texts, tokens = {0: "", 1: ""}, {0: [], 1: []}
    for chunk in complete(client, model, n=2, logprobs=0, stream=True):
        assert not chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens if choice.logprobs else []
    assert list(texts.values()) == [choice.text for choice in whole.choices]
    assert list(tokens.values()) == [choice.logprobs.tokens for choice in whole.choices]


def test_many_clients_at_once_get_what_each_gets_alone(address, client, model):
    url, key = address
    chats = [[{"role": "user", "content": f"Count to {i}"}] for i in range(8)]
    alone = [chat(client, model, messages=messages).choices[0].message.content for messages in chats]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url, api_key=key, max_retries=0, timeout=120) as many:
            create = many.chat.completions.create
            answers = await asyncio.gather(*(create(model=model.id, messages=m, **GREEDY) for m in chats))
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(together()) == alone


# ---------------------------------------------------------------- the extension


def test_gate_weights(client, model):
    answer = chat(client, model, extra={"gate_weights": True})
    gate = weights(answer.choices[0])
    assert gate["specialists"] == model.model_extra["specialists"] and "top" not in gate
    assert "".join(gate["tokens"]) == answer.choices[0].message.content
    assert len(gate["tokens"]) == len(gate["weights"]) == answer.usage.completion_tokens
    assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in gate["weights"])
    assert list(shares(answer.usage).values()) == pytest.approx(mean(gate["weights"]), abs=1e-3)
    assert "gate_weights" not in (chat(client, model).choices[0].model_extra or {})


def test_gate_weights_of_a_completion(client, model):
    answer = complete(client, model, n=2, extra={"gate_weights": True})
    for choice in answer.choices:
        assert "".join(weights(choice)["tokens"]) == choice.text
    rows = [row for choice in answer.choices for row in weights(choice)["weights"]]
    assert list(shares(answer.usage).values()) == pytest.approx(mean(rows), abs=1e-3)


def test_a_mask_renormalises_the_weights(client, model):
    first, *others = model.model_extra["specialists"]
    masked = chat(client, model, extra={"gate_weights": True, "specialists": others})
    rows = weights(masked.choices[0])["weights"]
    assert all(row[0] == 0 and sum(row) == pytest.approx(1, abs=1e-3) for row in rows)
    assert shares(masked.usage)[first] == 0
    alone = chat(client, model, extra={"gate_weights": True, "specialists": [first]})
    assert all(row[0] == 1 for row in weights(alone.choices[0])["weights"])
    full = weights(chat(client, model, extra={"gate_weights": True}).choices[0])["weights"][0]
    assert rows[0][1:] == pytest.approx([weight / sum(full[1:]) for weight in full[1:]], abs=2e-3)


def test_each_specialists_most_likely_tokens(client, model):
    names = model.model_extra["specialists"]
    answer = chat(client, model, max_tokens=4, extra={"gate_weights": True, "specialist_logprobs": 2})
    for token in weights(answer.choices[0])["top"]:
        assert len(token) == len(names)
        assert all(len(top) == 2 and top[0]["logprob"] >= top[1]["logprob"] for top in token)
    alone = {"gate_weights": True, "specialist_logprobs": 1, "specialists": [names[1]]}
    lone = chat(client, model, max_tokens=4, extra=alone, logprobs=True)
    top = [token[1][0]["logprob"] for token in weights(lone.choices[0])["top"]]
    assert top == pytest.approx([token.logprob for token in lone.choices[0].logprobs.content], abs=2e-3)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"extra": {"specialists": []}}, "specialist"),
        ({"extra": {"specialists": ["nobody"]}}, "nobody"),
        ({"extra": {"specialist_logprobs": 2}}, "gate_weights"),
        ({"extra": {"unheard_of": 1}}, "unheard_of"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, ""),
        ({"messages": []}, ""),
    ],
    ids=str,
)
def test_bad_requests(client, model, fields, word):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, model, **fields)
    assert word in str(caught.value)


def test_an_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="nothing"):
        client.chat.completions.create(model="nothing", messages=QUESTION)


def test_a_wrong_key(address):
    url, key = address
    if key == "none":
        pytest.skip("the server has no key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="wrong", max_retries=0).models.list()
