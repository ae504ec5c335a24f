"""Passwords of addresses and keys are used, and never shown or saved, also when the endpoint sends them back."""

from __future__ import annotations

import json
import pickle
import re
from base64 import b64encode

import pytest
from pydantic import ValidationError

from fake_endpoint import FakeEndpoint, Step, failing, fake_endpoint, fine
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.endpoint.messages import Request
from ultrafuser.endpoint.recipe import EndpointRecipe, logins_for_children
from ultrafuser.errors import EndpointError, RecipeError, RequestError, UltraFuserError, hide_logins
from ultrafuser.evaluate.lm.load import endpoint_recipe, load_model
from ultrafuser.recipe import load_node
from ultrafuser.synth.recipe import dump_synth_recipe, load_synth_recipe

QUESTION = Request([{"role": "user", "content": "why?"}])
KEY, PASSWORD = "sk-mango-1234567890", "Pa55/wörd@here"
QUOTED = "Pa55%2Fw%C3%B6rd%40here"
SENT = b64encode(f"user:{PASSWORD}".encode()).decode()


@pytest.fixture
def server():
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with fake_endpoint() as server:
        yield server


def with_login(url: str, login: str = f"user:{QUOTED}") -> str:
    return url.replace("://", f"://{login}@")


def has_secret(text: str) -> bool:
    return any(secret in text for secret in (KEY, PASSWORD, QUOTED, SENT, SENT.replace("/", "\\/"), "Pa55"))


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("at http://user:pass@host/v1, and", "at http://***@host/v1, and"),
        ("m@https://token@host:8000/v1", "m@https://***@host:8000/v1"),
        ("http://u:p@ss@host/v1", "http://***@host/v1"),
        ("http://u:p/a?s#s@host/v1", "http://***@host/v1"),
        ("two: http://a:b@c and 'ftp://d:e@f'", "two: http://***@c and 'ftp://***@f'"),
        ("http://localhost:8000/v1/@x", "http://localhost:8000/v1/@x"),
        ("https://example.org/@user/pkg@1.0", "https://example.org/@user/pkg@1.0"),
        ("write to me@example.org", "write to me@example.org"),
    ],
)
def test_logins_are_hidden_in_every_text(text, hidden):
    assert hide_logins(text) == hidden
    assert str(UltraFuserError(text)) == str(RecipeError(text)) == hidden


@pytest.mark.parametrize(
    ("login", "header"),
    [
        ("user:password", b"user:password"),
        (f"user:{QUOTED}", f"user:{PASSWORD}".encode()),
        ("t0ken", b"t0ken:"),
        (":password", b":password"),
    ],
)
def test_the_login_of_an_address_is_sent_and_not_saved(server: FakeEndpoint, login, header):
    recipe = server.recipe(base_url=with_login(server.url, login))
    assert recipe.base_url == server.url
    [(_, reply)] = Endpoint(recipe).ask_all([QUESTION])
    assert reply.text == "ok"
    assert server.headers[0]["authorization"] == "Basic " + b64encode(header).decode()
    texts = [
        repr(recipe),
        str(recipe),
        json.dumps(recipe.model_dump()),
        recipe.model_dump_json(),
        Endpoint(recipe).name,
    ]
    assert not any(login in text or header.decode() in text for text in texts)
    assert recipe.model_copy().login == pickle.loads(pickle.dumps(recipe)).login == recipe.login


def test_one_string_holds_the_login_too(server: FakeEndpoint):
    for text in (f"openai:org/m@{with_login(server.url)}", f"m@{with_login(server.url).replace('http:', 'HTTP:')}"):
        recipe = endpoint_recipe(text)
        assert (recipe.login, recipe.base_url.lower()) == (f"user:{PASSWORD}", server.url)
    loaded = load_model(f"openai:m@{with_login(server.url)}")
    assert not has_secret(f"{loaded.name} {loaded.fingerprint} {loaded.lm.tokenizer_name}")


ECHOES = {
    "no access": failing(401, f"Incorrect API key provided: {KEY} {SENT}"),
    "a refusal at the end of a line that is cut": failing(400, "x " * 140 + KEY),
    "a server error": failing(500, f"header was Bearer {KEY}, Basic {SENT}"),
    "a page": Step(f"<html>{KEY} {SENT}</html>", 500),
    "another shape": Step(json.dumps({"detail": [{"input": {"authorization": f"Bearer {KEY}", "basic": SENT}}]}), 422),
    "slashes of JSON": Step(json.dumps({"error": f"{KEY} {SENT}"}).replace("/", "\\/"), 400),
    "no completion": Step(json.dumps({"debug": {"key": KEY, "sent": SENT, "login": f"user:{PASSWORD}"}})),
    "an answer": fine(f"Your key is {KEY}, sent as {SENT}, decoded {PASSWORD}."),
    "a refusal": fine(None, refusal=f"not with {KEY} {SENT}"),
    "a redirect": Step("", 308, {"location": f"http://x/?key={KEY}"}),
}


@pytest.mark.parametrize("with_password", [False, True])
@pytest.mark.parametrize("echo", ECHOES)
def test_what_the_endpoint_sends_back_is_hidden(server: FakeEndpoint, monkeypatch, echo, with_password):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.script = [ECHOES[echo]] * 3
    url = with_login(server.url) if with_password else server.url
    endpoint = Endpoint(server.recipe(base_url=url, retries=0))
    try:
        [(_, outcome)] = endpoint.ask_all([QUESTION])
        text = f"{outcome!r} {outcome}"
    except EndpointError as error:
        text = f"{error!r} {error} {error.__cause__!r} {error.__context__!r}"
    assert server.hits == 1
    assert KEY not in text
    if with_password:
        assert not has_secret(text), text


def test_placeholders_are_no_secrets(server: FakeEndpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    server.script = [fine("The list is EMPTY.")]
    [(_, reply)] = Endpoint(server.recipe()).ask_all([QUESTION])
    assert reply.text == "The list is EMPTY."


def test_an_endpoint_that_is_down_is_named_without_its_login():
    recipe = EndpointRecipe(model="m", base_url=with_login("http://127.0.0.1:9/v1"), retries=0)
    with pytest.raises(EndpointError, match="endpoint http://127.0.0.1:9/v1, model 'm': cannot be reached") as error:
        list(Endpoint(recipe).ask_all([QUESTION]))
    assert not has_secret(f"{error.value} {error.value.__cause__!r}")
    with fake_endpoint([failing(500)] * 9) as server:
        [(_, outcome)] = Endpoint(server.recipe(base_url=with_login(server.url))).ask_all([QUESTION])
        assert isinstance(outcome, RequestError) and not has_secret(str(outcome))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"model": "m", "base_url": "ftp://user:Pa55word@host/v1"}, "base_url: got 'ftp://***@host/v1', expected an address"),
        ({"model": "m", "base_url": "http://user:Pa55/word@host/v1"}, "got 'http://***@host/v1', expected .* as %2F %3F"),
        ({"model": "m", "base_url": "http://user:12#Pa55@host/v1"}, "got 'http://***@host/v1', expected an address"),
        ({"model": "m", "base_url": "http://user:12?Pa55@host/v1"}, "got 'http://***@host/v1', expected an address"),
        ({"model": "m@http://user:Pa55word@host/v1", "base_url": "http://h/v1"}, "m@http://***@host/v1' and 'base_url'"),
        ({"model": "m@ftp://user:Pa55word@host/v1"}, "model: got 'm@ftp://***@host/v1', expected NAME or NAME@http"),
        ({"model": "m", "base_url": ["http://user:Pa55word@host/v1"]}, "base_url: got "),
        ({"model": "m", "base_urI": "http://user:Pa55word@host/v1"}, "base_urI: unknown key"),
        ({"model": "m", "api_key_env": "sk-Pa55-key"}, "api_key_env: got something else than the name of an environment"),
    ],
)  # fmt: skip
def test_errors_of_recipes_hide_it(fields, problem):
    with pytest.raises(RecipeError) as error:
        load_node(EndpointRecipe, fields)
    assert "Pa55" not in f"{error.value} {error.value.__cause__} {error.value.__context__}"
    assert re.search(problem.replace("***", r"\*\*\*"), str(error.value)), error.value
    with pytest.raises(ValidationError) as error:
        EndpointRecipe.model_validate(fields)
    assert "Pa55" not in str(error.value)


@pytest.mark.parametrize("text", ["m@ftp://user:Pa55@h/v1", "openai:m@http://user:Pa55@/v1", "ftp://user:Pa55@h"])
def test_errors_of_the_command_line_hide_it(text):
    with pytest.raises(RecipeError, match=r"://\*\*\*@") as error:
        endpoint_recipe(text)
    assert "Pa55" not in f"{error.value} {error.value.__cause__}"


def test_overrides_and_copies_of_a_recipe_hide_it(tmp_path):
    domains = [{"name": "text", "description": "Everything."}]
    source = {"models": [{"name": "m", "endpoint": f"m@{with_login('http://h/v1')}"}], "domains": domains}
    recipe = load_synth_recipe(source)
    assert recipe.models[0].endpoint.login == f"user:{PASSWORD}"
    assert not has_secret(dump_synth_recipe(recipe)) and not has_secret(recipe.models[0].location)
    source["models"][0]["endpoint"] = {"model": "m"}
    changed = load_synth_recipe(source, [f"models.m.endpoint.base_url={with_login('http://other/v1')}"])
    assert (changed.models[0].endpoint.login, changed.models[0].location) == (f"user:{PASSWORD}", "http://other/v1")
    with pytest.raises(RecipeError) as error:
        load_synth_recipe(source, [f"models.m.endpont={with_login('http://h/v1')}"])
    assert "models.m.endpont" in str(error.value) and not has_secret(str(error.value))


def test_child_processes_get_the_login_of_a_saved_recipe():
    recipe = EndpointRecipe(model="m", base_url=with_login("http://h/v1"))
    saved = recipe.model_dump()
    assert EndpointRecipe(**saved).login == ""
    with logins_for_children([recipe]):
        assert EndpointRecipe(**saved).login == recipe.login
        assert EndpointRecipe(**saved | {"base_url": "http://other/v1"}).login == ""
    assert EndpointRecipe(**saved).login == ""
