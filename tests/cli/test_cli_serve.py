"""`ultrafuser serve` as a command: bad input before and after the model is loaded, and a real process with its signals."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="the official client is not installed")
pytest.importorskip("fastapi", reason="the serve extra is not installed")


# ---------------------------------------------------------------- bad input


def broken(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a fused folder whose manifest is changed."""
    shutil.copytree(folder, target)
    manifest = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**manifest, **changes}))
    return target


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{nowhere}", "no such folder"),
        ("{plain}", "model_type is 'llama', expected 'ultrafuser'. Fuse it with `ultrafuser fuse`"),
        ("{other}", "gate_type is 'of a later version', expected one of mlp, static"),
        ("{folder} --engine fast", "--engine 'fast': expected one of auto, embedded, vllm"),
        ("{folder} --dtype int3", "--dtype 'int3'"),
        ("{folder} --device warp", "device 'warp' cannot be used here"),
        ("{folder} --host nowhere.invalid", "--host 'nowhere.invalid' is no address of this machine"),
        ("{folder} --host 192.0.2.1", "port 0 of 192.0.2.1 cannot be used: "),
        ("{folder} --api-key", "ULTRAFUSER_API_KEY is empty, or has blanks"),
        ("{folder} -- --max-num-seqs 4", "'--max-num-seqs' is for vLLM, but the engine is embedded"),
    ],
)  # fmt: skip
def test_bad_input(run, folder, tiny_run, tmp_path, words, message):
    other = broken(folder, tmp_path / "other", gate_type="of a later version")
    names = {"folder": folder, "nowhere": tmp_path / "nowhere", "plain": tiny_run.folder / "text", "other": other}
    options = ["--port=0", *([] if "--engine" in words else ["--engine=embedded"])]
    words = ["serve", *options, *(word.format(**names) for word in words.split())]
    result = run(*words, *(["two words"] if words[-1] == "--api-key" else []))
    assert result.code == 2 and message in result.err, result.err


def test_the_bounds_reach_the_engine(run, folder, monkeypatch):
    engines = []
    monkeypatch.setattr("ultrafuser.cli.serve._serve", lambda engine, *rest: engines.append(engine))
    words = ["--max-batch-size", "3", "--max-batch-tokens", "500", "--max-cached-tokens", "70", "--max-waiting", "2"]
    result = run("serve", folder, "--engine", "embedded", "--port", "0", *words)
    assert result.code == 0, result.err
    (engine,) = engines
    assert (engine._max_batch_size, engine._max_batch_tokens, engine._max_waiting) == (3, 500, 2)
    assert engine._prefixes.max_tokens == 70


def test_a_port_in_use_is_an_error_before_the_model_is_loaded(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("serve", tmp_path / "nowhere", "--engine", "embedded", "--port", port)
    assert result.code == 2
    assert f"port {port} of 127.0.0.1 cannot be used: Address already in use. Choose another one" in result.err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_extra(run, folder, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name == package else find(name, *rest))
    result = run("serve", folder, "--engine", "embedded")
    assert result.code == 2 and 'pip install "ultrafuser[serve]"' in result.err


# ---------------------------------------------------------------- a real process


@dataclass
class Served:
    """A process, and what it has written on stderr."""

    process: subprocess.Popen
    log: Path
    url: str
    client: Any

    def stop(self, sig: int = signal.SIGTERM) -> None:
        self.process.send_signal(sig)

    def answer(self, tokens: int, **fields: Any) -> Any:
        body = {"prompt": "fox", "max_tokens": tokens, "ignore_eos": True, **fields}
        return self.client.post("/v1/completions", json=body)


@contextmanager
def process(folder: Path, log: Path, *options: str) -> Iterator[Served]:
    command = [
        sys.executable,
        "-m",
        "ultrafuser",
        "serve",
        str(folder),
        "--engine",
        "embedded",
        "--port",
        "0",
        *options,
    ]
    environment = {**os.environ, "ULTRAFUSER_API_KEY": "from-the-environment", "HF_HUB_OFFLINE": "1"}
    with log.open("w") as stream:
        child = subprocess.Popen(command, stderr=stream, env=environment)
    try:
        deadline = time.monotonic() + 180
        while not (match := re.search(r"at (http://\S+)/v1 ", log.read_text())):
            assert child.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        headers = {"Authorization": "Bearer from-the-environment"}
        with httpx.Client(base_url=match[1], headers=headers, timeout=60, trust_env=False) as client:
            yield Served(child, log, match[1], client)
    finally:
        child.kill()
        child.wait()


@pytest.mark.slow
def test_sigterm_finishes_running_answers_and_then_ends_the_process(folder, tmp_path):
    with process(folder, tmp_path / "log", "--served-model-name", "zoo", "--grace", "60") as served:
        start = served.log.read_text()
        assert "serving zoo (text, code, math) at http://127.0.0.1:" in start
        assert "for one user or a few. Load belongs to vLLM: pip install 'ultrafuser[vllm]'" in start
        assert httpx.get(f"{served.url}/v1/models", trust_env=False).status_code == 401
        whole = served.answer(180).json()
        with (
            ThreadPoolExecutor(1) as pool,
            served.client.stream(
                "POST",
                "/v1/completions",
                json={"prompt": "fox", "max_tokens": 180, "ignore_eos": True, "stream": True, "temperature": 0},
            ) as stream,
        ):
            lines = stream.iter_lines()
            next(lines)
            running = pool.submit(served.answer, 180)
            while "ultrafuser_answers_running 2.0" not in served.client.get("/metrics").text:
                assert not running.done()
                time.sleep(0.05)
            served.stop()
            while served.client.get("/health").status_code == 200:
                assert not running.done()
                time.sleep(0.05)
            assert served.answer(1).status_code == 503
            assert running.result().json()["usage"]["completion_tokens"] == 180
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert served.process.wait(30) == 0
        log = served.log.read_text()
    assert whole["model"] == "zoo" and whole["usage"]["completion_tokens"] == 180
    assert "finishing 2 requests within 60 s" in log and "from-the-environment" not in log
    assert (
        len(re.findall(r"^\d{4}-\S+ \S+ req-\w+ POST /v1/completions 200 prompt=\d+ tokens=180 ms=\d+", log, re.M)) == 3
    )
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_second_interrupt_ends_the_process_at_once(folder, tmp_path):
    with process(folder, tmp_path / "log", "--grace", "60") as served, ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.answer, 180, n=16)
        while "ultrafuser_answers_running 16.0" not in served.client.get("/metrics").text:
            assert not running.done()
            time.sleep(0.05)
        served.stop(signal.SIGINT)
        while served.client.get("/health").status_code == 200:
            assert not running.done()
            time.sleep(0.05)
        served.stop(signal.SIGINT)
        assert served.process.wait(5) == 130
        with pytest.raises(httpx.TransportError):
            running.result()
    assert "Press Ctrl-C again to end at once" in served.log.read_text()


@pytest.mark.slow
def test_ten_seconds_of_clients_that_leave(folder, tmp_path):
    script = Path(__file__).parents[2] / "benchmarks" / "serve_soak.py"
    command = [
        sys.executable,
        str(script),
        str(folder),
        "--clients=16",
        "--seconds=10",
        f"--output={tmp_path / 'report'}",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    report = json.loads((tmp_path / "report").read_text())
    assert report["finished"] > 16 and report["left"] and not report["wrong"]
