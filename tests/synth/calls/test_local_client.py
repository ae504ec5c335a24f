"""A model in this process: batches, what does not fit, sampled draws that differ and come again the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ultrafuser.errors import CheckpointError
from ultrafuser.synth.calls.clients import make_clients
from ultrafuser.synth.calls.local import LocalClient
from ultrafuser.synth.calls.request import Request, Response
from ultrafuser.synth.calls.scheduler import answer
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.recipe import LocalModel

pytest.importorskip("lm_eval", reason="the eval extra is not installed")


@pytest.fixture
def model(save, tokenizer) -> str:
    """A tiny model with a context of 256 tokens that never ends an answer by itself, as a rule."""
    folder = save("writer", vocab_size=320, max_position_embeddings=256)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe(model: str, **changes) -> LocalModel:
    return LocalModel.model_validate(
        {"name": "writer", "endpoint": "local", "model": model, "batch_size": 2, **changes}
    )


def requests(count: int, **changes) -> list[Request]:
    settings = {"max_tokens": 6, **changes}
    return [
        Request("responses", "math", str(i), "writer", (("user", f"{'why? ' * i}{i}"),), **settings)
        for i in range(count)
    ]


def outcomes(folder: Path, client: LocalClient, requests_: list[Request]) -> list[Response]:
    with CallStore(folder / "calls.sqlite", "recipe") as store:
        answer(requests_, store, {"writer": client})
        return [store.response(request.key) for request in requests_]


def test_answers_are_those_of_the_model_itself(tmp_path: Path, model: str):
    from ultrafuser.evaluate.lm.chat import answer_chats
    from ultrafuser.evaluate.lm.load import load_model

    responses = outcomes(tmp_path, make_clients([recipe(model)])["writer"], requests(5))
    expected = answer_chats(load_model(model).lm, "", [request.chat() for request in requests(5)], 6)
    assert [response.text for response in responses] == [text if text.strip() else "" for text in expected]
    assert all(response.prompt_tokens > 5 and response.cost_usd == 0 for response in responses)
    assert [response.prompt_tokens for response in responses] == sorted(
        response.prompt_tokens for response in responses
    )


def test_a_reply_continues_its_given_start(tmp_path: Path, model: str):
    """The tokens of the beginning stand behind those of the template's, as if the model had written them."""
    plain, begun = (
        requests(1)[0],
        replace(requests(1)[0], messages=(*requests(1)[0].messages, ("assistant", "1. Write"))),
    )
    client = LocalClient(recipe(model))
    first, second = outcomes(tmp_path, client, [plain, begun])
    assert client._model is not None and client._model.renderer is not None
    [text] = client._model.renderer.prompt_texts(begun.chat())
    assert text == client._model.renderer.prompt_texts(plain.chat())[0] + "1. Write"
    added = len(client._model.renderer.tokenizer.encode(text, add_special_tokens=False)) - first.prompt_tokens
    assert second.prompt_tokens == first.prompt_tokens + added > first.prompt_tokens
    assert not second.text.startswith("1. Write") and begun.full_reply(second.text) == "1. Write" + second.text


def test_the_weights_are_loaded_once_and_kept(tmp_path: Path, model: str):
    client = LocalClient(recipe(model))
    outcomes(tmp_path, client, requests(1))
    served = client._model
    outcomes(tmp_path, client, requests(3))
    assert client._model is served is not None


def test_a_prompt_that_does_not_fit_fails_alone(tmp_path: Path, model: str):
    long = Request("responses", "math", "long", "writer", (("user", "0123456789 " * 60),), max_tokens=6)
    responses = outcomes(tmp_path, LocalClient(recipe(model)), [*requests(2), long])
    assert (
        responses[2].status == "failed"
        and responses[2].kind == "context overflow"
        and "tokens leaves no room" in responses[2].reason
    )
    assert not any(response.kind == "context overflow" for response in responses[:2])


def test_a_reply_ends_where_its_limit_or_the_context_does(tmp_path: Path, model: str):
    responses = outcomes(tmp_path, LocalClient(recipe(model)), requests(1, max_tokens=4000))
    assert responses[0].prompt_tokens + responses[0].completion_tokens <= 256


def test_samples_differ_and_are_repeatable(tmp_path: Path, model: str):
    drawn = [request for n in range(4) for request in requests(2, temperature=1.0, sample=n)]
    first = outcomes(tmp_path / "1", LocalClient(recipe(model)), drawn)
    client = LocalClient(recipe(model))
    outcomes(tmp_path / "2", client, drawn[:4])
    repeated = outcomes(tmp_path / "2", LocalClient(recipe(model)), drawn)  # a run that was cut off and goes on
    assert repeated == first
    assert len({response.text for response in first[::2]}) > 1


def test_models_that_sample_beside_each_other_draw_as_if_alone(tmp_path: Path, model: str):
    settings = {"max_tokens": 60, "temperature": 1.0}
    requests_ = {
        role: [replace(request, role=role) for request in requests(6, **settings)] for role in ("writer", "other")
    }

    def together(folder: str, *roles: str) -> list[Response | None]:
        with CallStore(tmp_path / folder / "calls.sqlite", "recipe") as store:
            clients = {role: LocalClient(recipe(model)) for role in roles}
            answer([request for role in roles for request in requests_[role]], store, clients)
            return [store.response(request.key) for role in roles for request in requests_[role]]

    assert together("both", "writer", "other") == [*together("1", "writer"), *together("2", "other")]


def test_further_arguments_of_generate(tmp_path: Path, model: str):
    plain = outcomes(tmp_path / "1", LocalClient(recipe(model)), requests(1, temperature=1.0))
    greedy = outcomes(tmp_path / "2", LocalClient(recipe(model, generation={"top_k": 1})), requests(1, temperature=1.0))
    assert greedy == outcomes(tmp_path / "3", LocalClient(recipe(model)), requests(1)) and len(plain) == 1


def test_a_model_that_is_not_there(tmp_path: Path):
    with pytest.raises(CheckpointError):
        outcomes(tmp_path, LocalClient(recipe(str(tmp_path / "nothing"))), requests(1))
