"""Clients that leave, full queues, time limits, shutdown, the log, and the metrics."""

from __future__ import annotations

import json
import logging
import re
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from scripted_engine import KEY, QUESTION, RunningServer, ScriptedEngine, wait_for
from ultrafuser.serve.limits import Limits

SLOW = {"texts": ["x"] * 100, "pause_s": 0.05}  # five seconds


def events(response: httpx.Response) -> list[str]:
    return [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]


# ---------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_cancels_its_requests(serve, n):
    engine = ScriptedEngine(**SLOW)
    server = serve(engine)
    with server.client.stream("POST", "/v1/chat/completions", json={"messages": QUESTION, "stream": True, "n": n}) as r:
        lines = r.iter_lines()
        while '"x"' not in next(lines):
            pass
        assert engine.running == n
    wait_for(lambda: engine.running == 0)
    assert engine.num_cancelled == n
    wait_for(lambda: 'route="/v1/chat/completions",status="499"} 1.0' in server.client.get("/metrics").text)


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_before_a_whole_answer_cancels_its_requests(serve, n):
    engine = ScriptedEngine(**SLOW)
    server = serve(engine)
    with pytest.raises(httpx.ReadTimeout):
        server.client.post("/v1/completions", json={"prompt": "Hi?", "n": n, "max_tokens": 90}, timeout=0.5)
    wait_for(lambda: engine.running == 0)
    assert engine.num_cancelled == n


def test_a_choice_that_fails_cancels_the_others(serve):
    engine = ScriptedEngine(texts=["x"] * 100, pause_s=0.02, failure=RuntimeError("no"))
    assert serve(engine).chat(n=3).status_code == 500
    wait_for(lambda: engine.running == 0)


def test_a_refused_choice_cancels_the_accepted_ones(serve):
    engine = ScriptedEngine(**SLOW, capacity=2)
    response = serve(engine).chat(n=3)
    assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
    assert engine.running == 0 and engine.num_cancelled == 2


# ---------------------------------------------------------------- limits


def test_a_full_queue(serve):
    engine = ScriptedEngine(**SLOW, capacity=1)
    server = serve(engine)
    with server.client.stream("POST", "/v1/chat/completions", json={"messages": QUESTION, "stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        response = server.chat()
        assert response.status_code == 429 and response.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(response.headers["retry-after"]) <= 60
    wait_for(lambda: engine.running == 0)
    engine.pause_s = 0.0
    assert server.chat().status_code == 200


def test_a_time_limit(serve):
    engine = ScriptedEngine(**SLOW)
    server = serve(engine, limits=Limits(timeout_s=0.3))
    response = server.chat()
    assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
    assert "not complete after 0.3 s" in response.json()["error"]["message"]
    streamed = events(server.chat(stream=True))
    assert json.loads(streamed[-1])["error"]["code"] == "timeout"
    assert "x" in json.loads(streamed[-2])["choices"][0]["delta"]["content"]
    wait_for(lambda: engine.running == 0)
    assert engine.num_cancelled == 2


def test_a_silent_stream_is_kept_open_by_comments(serve, monkeypatch):
    monkeypatch.setattr("ultrafuser.serve.streaming._COMMENT_INTERVAL_S", 0.05)
    streamed = events(serve(ScriptedEngine(texts=["x"], pause_s=0.3)).chat(stream=True))
    assert streamed.count(": waiting") >= 2 and streamed[-1] == "[DONE]"


def test_a_client_that_does_not_read_is_cut_off(serve, monkeypatch):
    import socket

    monkeypatch.setattr("ultrafuser.serve.streaming._SEND_GRACE_S", 0.0)
    engine = ScriptedEngine(texts=["x" * 100_000] * 100)
    server = serve(engine, limits=Limits(timeout_s=1.0))
    body = json.dumps({"messages": QUESTION, "stream": True, "max_tokens": 100}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port)) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        wait_for(lambda: 'status="499"} 1.0' in server.client.get("/metrics").text)


# ---------------------------------------------------------------- shutdown


def test_a_signal_finishes_running_answers_and_refuses_new_ones(serve):
    engine = ScriptedEngine(texts=["x"] * 20, pause_s=0.05)
    server = serve(engine)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.chat)
        stream = pool.submit(server.chat, stream=True)
        wait_for(lambda: engine.running == 2)
        terminate(server)
        assert server.client.get("/health").status_code == 503
        refused = server.chat()
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) and refused.headers["connection"] == "close"
        assert server.client.get("/metrics").status_code == 200
        assert whole.result().json()["choices"][0]["message"]["content"] == "x" * 20
        assert events(stream.result())[-1] == "[DONE]"
    server.thread.join(10)
    assert not server.thread.is_alive() and engine.is_closed


def test_answers_that_take_longer_than_the_grace_are_cut_off_with_an_error(serve):
    engine = ScriptedEngine(texts=["x"] * 100, pause_s=0.1)
    server = serve(engine)
    server.server._grace_s = 0.3
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(server.chat)
        stream = pool.submit(server.chat, stream=True)
        wait_for(lambda: engine.running == 2)
        terminate(server)
        assert whole.result().status_code == 503
        assert json.loads(events(stream.result())[-1])["error"]["code"] == "shutting_down"
    server.thread.join(10)
    assert not server.thread.is_alive()


def terminate(running: RunningServer) -> None:
    """What the signal handler does, for a server that is not in the main thread."""
    server = running.server
    server._traffic.is_draining = True
    server.servers[0].get_loop().call_soon_threadsafe(server._end, signal.SIGTERM)


# ---------------------------------------------------------------- headers and log


def test_request_ids(serve):
    server = serve()
    assert server.client.get("/health", headers={"X-Request-Id": "abc-1.2:3"}).headers["x-request-id"] == "abc-1.2:3"
    drawn = {
        server.client.get("/health", headers={"X-Request-Id": bad}).headers["x-request-id"]
        for bad in ("a b", "x" * 200)
    }
    assert len(drawn) == 2 and all(re.fullmatch("req-[0-9a-f]{32}", request_id) for request_id in drawn)
    assert server.client.get("/nothing").headers["x-request-id"]


def test_the_log_has_one_line_for_each_request_without_texts_and_keys(serve, caplog):
    caplog.set_level(logging.INFO, "ultrafuser.access")
    server = serve()
    server.chat(messages=[{"role": "user", "content": "my secret"}], user="someone", temperature=0)
    server.client.get("/v1/models/%0a%1b[31mx?key=sk-test")
    server.complete(prompt=5)
    wait_for(lambda: len(caplog.records) >= 3)
    chat, unknown, bad = (record.getMessage() for record in caplog.records if record.name == "ultrafuser.access")
    assert re.fullmatch(r"req-\w+ POST /v1/chat/completions 200 prompt=\d+ tokens=3 ms=\d+ first_ms=\d+", chat)
    assert re.fullmatch(r"req-\w+ GET /v1/models/\S+ 404 ms=\d+", unknown.replace("\n", "")) and "\x1b" not in unknown
    assert re.fullmatch(r"req-\w+ POST /v1/completions 400 ms=\d+", bad)
    assert not any(word in caplog.text for word in ("my secret", "someone", KEY))


def test_cross_origin_requests(serve):
    preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    preflight["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-os"
    server = serve(cors_origins=("https://page.example",))
    with httpx.Client(base_url=server.url, trust_env=False) as client:  # browsers send no key with a preflight
        allowed = client.options("/v1/chat/completions", headers=preflight)
        assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == "https://page.example"
        assert (
            client.options("/v1/chat/completions", headers={**preflight, "Origin": "https://other"}).status_code == 400
        )
        refused = client.get("/v1/models", headers={"Origin": "https://page.example"})
        assert refused.status_code == 401 and "access-control-allow-origin" in refused.headers
    assert "access-control-allow-origin" not in serve().client.get("/v1/models", headers=preflight).headers


def test_a_stream_is_not_held_back_by_proxies(serve):
    response = serve().chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


# ---------------------------------------------------------------- metrics


def test_metrics(serve):
    engine = ScriptedEngine(waiting=4)
    server = serve(engine)
    server.chat(), server.chat(n=2, stream=True), server.chat(temperature=-1), server.client.get("/elsewhere")
    wait_for(lambda: 'route="other"' in server.client.get("/metrics").text)
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    requests = "ultrafuser_requests_total"
    expected = {
        f'{requests}{{route="/v1/chat/completions",status="200"}}': 2,
        f'{requests}{{route="/v1/chat/completions",status="400"}}': 1,
        f'{requests}{{route="other",status="404"}}': 1,
        "ultrafuser_generated_tokens_total": 9,
        'ultrafuser_gate_weight_total{specialist="text"}': 4.5,
        'ultrafuser_gate_weight_total{specialist="math"}': 2.25,
        "ultrafuser_time_to_first_token_seconds_count": 3,
        "ultrafuser_inter_token_seconds_count": 6,
        "ultrafuser_answers_waiting": 4,
        "ultrafuser_answers_running": 0,
    }
    assert {name: float(lines[name]) for name in expected} == expected
    assert float(lines["ultrafuser_prompt_tokens_total"]) > 0
