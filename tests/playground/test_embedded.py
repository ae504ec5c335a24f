"""The page in front of the embedded engine with a real, tiny fused model, and the command that starts both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import httpx
import pytest
from page_actions import ask, shares, text_of
from scripted_server import Script

from embedded_fixtures import fused, renderer_of
from training_fixtures import NAMES
from ultrafuser.cli.main import main
from ultrafuser.cli.playground import compared_servers
from ultrafuser.errors import EndpointError, RecipeError
from ultrafuser.playground.routes import add_playground
from ultrafuser.serve.app import Settings, build_app
from ultrafuser.serve.embedded import EmbeddedEngine
from ultrafuser.specialists import fuse


@pytest.fixture
def served(tokenizer, run):
    """The URL of a tiny fused model with the page."""
    renderer = renderer_of(tokenizer)
    engine = EmbeddedEngine(fused(tokenizer, names=["text", "code", "math"]), renderer)
    app = build_app(engine, renderer, Settings("tiny"))
    add_playground(app)
    return run(app).url


@pytest.mark.browser
def test_a_real_answer_is_the_one_of_the_api(served, open_page):
    page = open_page(served)
    page.wait_for_selector("#legend button")
    assert page.locator("#legend button").all_inner_texts() == ["text", "code", "math"]
    page.click("#open-settings")
    assert page.locator("input[name=max_tokens]").input_value() == "96"  # of a context of 192
    page.fill("input[name=max_tokens]", "24")
    page.fill("#temperature", "0")
    page.locator("#legend button").nth(1).click()
    ask(page, "how many?")
    body = {
        "messages": [{"role": "user", "content": "how many?"}],
        "temperature": 0,
        "max_tokens": 24,
        "specialists": ["text", "math"],
        "gate_weights": True,
        "specialist_logprobs": 3,
    }
    answer = httpx.post(f"{served}/v1/chat/completions", json=body, timeout=60).json()
    [choice] = answer["choices"]
    assert text_of(page) == choice["message"]["content"] != ""
    tokens = page.evaluate("document.querySelector('.answer').answer.tokens")
    assert [token["text"] for token in tokens] == choice["gate_weights"]["tokens"]
    for token, weights in zip(tokens, choice["gate_weights"]["weights"], strict=True):
        assert token["weights"] == pytest.approx(weights, abs=2e-3)
        assert token["weights"][1] == 0 and [len(tops) for tops in token["top"]] == [3, 3, 3]
    expected = {name: 100 * share for name, share in answer["usage"]["specialist_shares"].items()}
    assert shares(page) == pytest.approx(expected, abs=0.6) and expected["code"] == 0


@pytest.mark.browser
def test_a_refusal_of_the_real_server_says_what_to_do(served, open_page):
    page = open_page(served)
    page.wait_for_selector("#legend button")
    ask(page, "how many? " * 200)
    assert "context" in page.locator(".answer .problem").inner_text()
    assert page.locator("#banner").is_hidden()


@pytest.mark.browser
def test_two_answers_of_a_real_model_side_by_side(served, open_page):
    page = open_page(served)
    page.wait_for_selector("#legend button")
    page.select_option("#compare", label="math alone")
    ask(page, "how many?")
    assert shares(page, 1) == {"text": 0, "code": 0, "math": 100}
    assert sum(shares(page, 0).values()) == pytest.approx(100, abs=1.5)


# ---------------------------------------------------------------- the command


def start(*words):
    """The command, and the address that it prints."""
    command = [sys.executable, "-m", "ultrafuser", *map(str, words), "--port", "0"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    line = (process.stdout if words[0] == "playground" else process.stderr).readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert address, line + process.stderr.read()
    return process, address[0]


def stop(process):
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors
    return process.returncode


def get(url):
    with urllib.request.urlopen(url, timeout=20) as response:
        return response.read().decode()


def test_the_command_serves_the_page_of_a_server(run):
    server = run(Script(key="sk-1").app())
    process, address = start(
        "playground", f"{server.url}/v1", "--api-key", "sk-1", "--compare", f"same={server.url}", "--no-browser"
    )
    assert "<title>ultrafuser playground</title>" in get(address)
    assert json.loads(get(f"{address}/v1/models"))["data"][0]["id"] == "my-fused"
    assert json.loads(get(f"{address}/playground/config.json"))["others"] == ["same"]
    assert stop(process) in (0, 130, -signal.SIGINT)


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A fused folder."""
    model, tokenizer = fuse(tiny_run.recipe("unused"))
    model.save_pretrained(tmp_path / "my-fused")
    tokenizer.save_pretrained(tmp_path / "my-fused")
    return tmp_path / "my-fused"


def test_the_command_serves_a_folder(folder):
    process, address = start("playground", folder, "--device", "cpu", "--no-browser")
    assert "<title>ultrafuser playground</title>" in get(address)
    [model] = json.loads(get(f"{address}/v1/models"))["data"]
    assert (model["id"], model["specialists"]) == ("my-fused", [*NAMES])
    assert stop(process) in (0, 130, -signal.SIGINT)


def test_serve_adds_the_page_on_request(folder):
    process, address = start("serve", folder, "--engine", "embedded", "--device", "cpu", "--playground")
    assert "<title>ultrafuser playground</title>" in get(address)
    assert stop(process) in (0, 130, -signal.SIGINT)


def test_serve_on_vllm_names_the_other_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ultrafuser", "serve", "my-fused", "--engine", "vllm", "--playground"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    assert "then run: ultrafuser playground http://127.0.0.1:8000" in capsys.readouterr().err


@pytest.mark.parametrize(
    "pair, error, message",
    [
        ("http://127.0.0.1:1", RecipeError, "expected NAME=URL"),
        ("a b=http://127.0.0.1:1", RecipeError, "expected NAME=URL"),
        ("a=127.0.0.1", EndpointError, "expected the address"),
    ],
)
def test_a_compared_server_has_a_name_and_an_address(pair, error, message):
    with pytest.raises(error, match=message):
        compared_servers([pair], None)
    with pytest.raises(RecipeError, match="'a' is used twice"):
        compared_servers(["a=http://h:1", "a=http://h:2"], None)
    servers = compared_servers(["a=http://h:1/v1", "b.c=http://h:2"], "key")
    assert {name: (server.url, server.api_key) for name, server in servers.items()} == {
        "a": ("http://h:1", "key"),
        "b.c": ("http://h:2", "key"),
    }
