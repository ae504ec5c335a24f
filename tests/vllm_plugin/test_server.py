"""vLLM's own server with a fused model: its gate weights, masks and shares are those of the model in transformers."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import httpx
from served import HEADERS, KEY, NAMES, Served, fuse_tiny, serving

from ultrafuser.specialists import load

pytestmark = pytest.mark.vllm

OTHER_END = 5  # a second end token, as in models that have several
# Prompts are read in chunks, and the cache holds fewer tokens than eight answers need.
SMALL = ("--max-num-seqs", "8", "--max-num-batched-tokens", "48", "--num-gpu-blocks-override=12", "--block-size=32")
QUESTION = [{"role": "user", "content": "how many?"}]
LONG = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog, and 12345 + 67890 = 80235. " * 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    fused = fuse_tiny(tmp_path_factory.mktemp("fused"), tokenizer)
    file = fused / "generation_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "eos_token_id": [settings["eos_token_id"], OTHER_END]}))
    return fused


@pytest.fixture(scope="module")
def fused(folder):
    """The model in transformers, and its renderer."""
    return load(folder, dtype=torch.float32, device_map="cpu")


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    with serving(folder, tmp_path_factory.mktemp("server"), *SMALL, shutdown_s=120) as server:
        yield server


def answer_all(
    served: Served, bodies: list[dict[str, Any]], path: str = "/v1/chat/completions"
) -> list[dict[str, Any]]:
    """The answers to concurrent requests. Choices carry their token ids."""

    async def run() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(base_url=served.address, headers=HEADERS, timeout=120) as client:
            responses = await asyncio.gather(*(client.post(path, json={"return_token_ids": True, **b}) for b in bodies))
        for response in responses:
            assert response.status_code == 200, response.text
        return [response.json() for response in responses]

    return asyncio.run(run())


def chat(messages: list[dict[str, str]] = QUESTION, **fields: Any) -> dict[str, Any]:
    return {
        "messages": messages,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "gate_weights": True,
        **fields,
    }


def reference_weights(
    fused: Any, prompt: list[int], ids: list[int], specialists: list[str] | None = None
) -> torch.Tensor:
    """(T, K) the weights in transformers over the same tokens, renormalised over some specialists."""
    model, _ = fused
    with torch.inference_mode():
        weights = model(torch.tensor([prompt + ids]), output_gate_weights=True).gate_weights[0]
    weights = weights[len(prompt) - 1 : -1]
    mask = torch.tensor([specialists is None or name in specialists for name in NAMES])
    return weights * mask / (weights * mask).sum(-1, keepdim=True)


def check_choice(
    fused: Any, prompt: list[int], choice: dict[str, Any], specialists: list[str] | None = None
) -> torch.Tensor:
    weights = torch.tensor(choice["gate_weights"]["weights"])
    expected = reference_weights(fused, prompt, choice["token_ids"], specialists)
    assert (weights - expected).abs().max() < 1e-3
    return expected


def test_concurrent_answers_have_the_weights_of_their_own_tokens(served, fused):
    masks = [None, ["math"], ["text", "code"], None, ["code"], ["code", "math"], None, ["text"]] * 2
    bodies = [
        chat(LONG if i % 3 == 0 else QUESTION, max_tokens=40 + i, **({"specialists": mask} if mask else {}))
        for i, mask in enumerate(masks)
    ]
    for answer, mask in zip(answer_all(served, bodies), masks, strict=True):
        expected = check_choice(fused, answer["prompt_token_ids"], answer["choices"][0], mask)
        shares = list(answer["usage"]["specialist_shares"].values())
        assert shares == pytest.approx(expected.mean(0).tolist(), abs=1e-3)
        text = answer["choices"][0]["message"]["content"]
        assert "".join(answer["choices"][0]["gate_weights"]["tokens"]) == text
    assert served.metric("vllm:num_preemptions_total") > 0, "the test is meant to preempt some of them"


@pytest.mark.parametrize("name", NAMES)
def test_one_specialist_answers_as_it_does_alone(served, fused, name):
    answer = answer_all(served, [chat(specialists=[name])])[0]
    ids, prompt = answer["choices"][0]["token_ids"], answer["prompt_token_ids"]
    with torch.inference_mode():
        logits = fused[0].specialist(name)(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == ids


def test_samples_and_prompts_keep_their_own_weights(served, fused):
    prompts = ["how many?", "def add(a, b):"]
    body = {
        "prompt": prompts,
        "n": 3,
        "max_tokens": 12,
        "temperature": 1,
        "seed": 3,
        "ignore_eos": True,
        "gate_weights": True,
    }
    answer = answer_all(served, [body], "/v1/completions")[0]
    assert len({tuple(choice["token_ids"]) for choice in answer["choices"]}) == 6
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == fused[1].tokenizer(prompts[choice["index"] // 3])["input_ids"]
        check_choice(fused, choice["prompt_token_ids"], choice)


def test_each_specialist_s_most_likely_tokens(served, fused):
    model, renderer = fused
    answer = answer_all(served, [chat(specialist_logprobs=3), chat()])[0]
    ids, prompt = answer["choices"][0]["token_ids"], answer["prompt_token_ids"]
    for k, name in enumerate(NAMES):
        with torch.inference_mode():
            logits = model.specialist(name)(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        top = logits.log_softmax(-1).topk(3)
        for position, token in enumerate(answer["choices"][0]["gate_weights"]["top"]):
            assert [entry["logprob"] for entry in token[k]] == pytest.approx(top.values[position].tolist(), abs=2e-3)
            assert token[k][0]["token"] == renderer.tokenizer.decode([int(top.indices[position, 0])])


@pytest.mark.parametrize("stop", [None, "o"])
def test_streamed_and_whole_answers_agree(served, stop):
    body = chat(max_tokens=40, ignore_eos=False, **({"stop": stop} if stop else {}))
    whole = answer_all(served, [body])[0]
    chunks = served.stream({**body, "stream_options": {"include_usage": True}})
    weights = [c["gate_weights"] for chunk in chunks for c in chunk["choices"] if c.get("gate_weights")]
    expected = whole["choices"][0]["gate_weights"]
    assert [row for w in weights for row in w["weights"]] == expected["weights"]
    text = "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])
    assert "".join(token for w in weights for token in w["tokens"]) == text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["usage"]["specialist_shares"] == whole["usage"]["specialist_shares"]


def test_prompts_are_those_of_the_renderer(served, fused):
    conversations = [QUESTION, LONG, [*QUESTION, {"role": "assistant", "content": "Well,"}], [*QUESTION, *QUESTION]]
    answers = answer_all(served, [chat(messages, max_tokens=1) for messages in conversations])
    for answer, messages in zip(answers, conversations, strict=True):
        assert [answer["prompt_token_ids"]] * 3 == fused[1].prompt(messages)


@pytest.mark.parametrize("end", [1, OTHER_END])
def test_each_end_token_ends_the_answer(served, end):
    answer = answer_all(served, [chat(ignore_eos=False, logit_bias={str(end): 100})])[0]
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"specialists": ["poetry"]}, 400, "specialists"),
        ({"specialists": []}, 400, "specialists"),
        ({"gate_weihgts": True}, 400, "gate_weihgts"),
        ({"guided_json": {}}, 400, "guided_json"),
        ({"max_tokens": -1}, 400, None),
        ({"max_tokens": 1000}, 400, "max_tokens"),
        ({"model": "other"}, 404, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            400,
            None,
        ),
        ({"messages": [{"role": "user", "content": "how many? " * 300}]}, 400, None),
    ],
)
def test_bad_requests_are_errors(served, fields, status, param):
    response = served.client().post("/v1/chat/completions", json=chat(**fields))
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["message"] and (param is None or error["param"] == param)


def test_clients_that_go_away_leave_nothing_behind(served):
    async def leave(client: httpx.AsyncClient, i: int) -> None:
        body = chat(max_tokens=200, stream=i % 2 == 0, n=1 + i % 3)
        try:
            await asyncio.wait_for(client.post("/v1/chat/completions", json=body), 0.05 * i)
        except asyncio.TimeoutError:
            pass

    async def run() -> None:
        async with httpx.AsyncClient(base_url=served.address, headers=HEADERS, timeout=120) as client:
            await asyncio.gather(*(leave(client, i) for i in range(12)))

    asyncio.run(run())
    answer_all(served, [chat()])
    assert served.wait_for_records(0)


def test_seeded_answers_to_prompts_that_are_read_in_pieces(served):
    """vLLM alone ends on a CPU: it rewinds the generator of a request whose prompt is not complete."""
    questions = [[{"role": "user", "content": f"{i} " * 60}] for i in range(3)]
    bodies = [chat(question, max_tokens=12, temperature=1.0, seed=i, n=2) for i, question in enumerate(questions)]
    first, again = (
        [[choice["token_ids"] for choice in answer["choices"]] for answer in answer_all(served, bodies)] for _ in "ab"
    )
    assert first == again and len({tuple(ids) for answer in first for ids in answer}) > 3


def test_models_and_health(served):
    model = served.client().get("/v1/models").json()["data"][0]
    assert (model["id"], model["specialists"], model["max_model_len"]) == ("fused", list(NAMES), 256)


def test_the_official_client(served):
    """The tests of the embedded server."""
    pytest.importorskip("openai", reason="the official client is not installed")
    suite = Path(__file__).parents[1] / "serve" / "test_openai_client.py"
    environment = {**os.environ, "ULTRAFUSER_TEST_SERVER": f"{served.address}/v1", "ULTRAFUSER_TEST_KEY": KEY}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-6000:]


def test_sigterm_finishes_running_answers(served, fused):
    """The last test: it ends the server."""
    body = chat(max_tokens=50, stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    chunks: list[dict[str, Any]] = []
    with served.client().stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunks.append(json.loads(line[len("data: ") :]))
            if len(chunks) == 5:
                served.process.send_signal(signal.SIGTERM)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ids = [token for choice in choices for token in choice.get("token_ids") or []]
    weights = [row for choice in choices if choice.get("gate_weights") for row in choice["gate_weights"]["weights"]]
    assert len(ids) == len(weights) == 50 and choices[-1]["finish_reason"] == "length"
    expected = reference_weights(fused, chunks[0]["prompt_token_ids"], ids)
    assert (torch.tensor(weights) - expected).abs().max() < 1e-3
    assert chunks[-1]["usage"]["specialist_shares"]["text"] == pytest.approx(float(expected[:, 0].mean()), abs=1e-3)
    assert served.process.wait(120) == 0


def test_speculation_keeps_weights_and_masks(folder, fused, tmp_path):
    speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    with serving(folder, tmp_path, *SMALL[:4], "--speculative-config", json.dumps(speculation)) as server:
        masks = [None, ["math"], None, ["text", "code"], ["code"]]
        bodies = [chat(max_tokens=60, **({"specialists": mask} if mask else {})) for mask in masks]
        for answer, mask in zip(answer_all(server, bodies), masks, strict=True):
            check_choice(fused, answer["prompt_token_ids"], answer["choices"][0], mask)
        assert server.metric("vllm:spec_decode_num_accepted_tokens_total") > 0
