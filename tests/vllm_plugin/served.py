"""A tiny fused model on disk, and `ultrafuser serve --engine vllm` in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tiny_models import shake_gate, tiny
from ultrafuser.recipe import Recipe
from ultrafuser.specialists import fuse

START_S = 600  # three processes import vLLM, one after the other
KEY = "secret"
HEADERS = {"authorization": f"Bearer {KEY}"}
NAMES = ("text", "code", "math")
# vLLM's attention on CPUs has heads of at least 32
_WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


def fuse_tiny(folder: Path, tokenizer: Any, **changes: Any) -> Path:
    """A fused checkpoint of three specialists, whose gate has opinions.

    Args:
        changes: to the recipe's specialists.
    """
    specialists = []
    for seed, name in enumerate(NAMES):
        model = tiny("llama", seed, vocab_size=len(tokenizer), max_position_embeddings=256, **_WIDTHS)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        specialists.append({"name": name, "model": str(folder / name), **changes})
    recipe = Recipe(
        specialists=specialists, gate={"hidden_size": 16}, device="cpu", dtype="float32", mixing="probabilities"
    )
    model, fused_tokenizer = fuse(recipe)
    shake_gate(model, scale=3.0).save_pretrained(folder / "fused")
    fused_tokenizer.save_pretrained(folder / "fused")
    return folder / "fused"


@dataclass
class Served:
    """A running server.

    Attributes:
        address: without the path.
        log: what it printed.
    """

    address: str
    process: subprocess.Popen
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.address, headers=HEADERS, timeout=120)

    def stream(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The chunks of a streamed answer."""
        response = self.client().post("/v1/chat/completions", json={**body, "stream": True})
        lines = [line[len("data: ") :] for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]", response.text
        return [json.loads(line) for line in lines[:-1]]

    def metric(self, name: str) -> float:
        """The sum of a counter."""
        lines = self.client().get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))

    def wait_for_records(self, count: int, timeout_s: float = 10.0) -> bool:
        """Whether the workers come to hold the weights of `count` answers."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            body = {"method": "count_gate_records"}
            if self.client().post("/collective_rpc", json=body).json()["results"] == [str(count)]:
                return True
            time.sleep(0.2)
        return False


@contextlib.contextmanager
def serving(folder: Path, directory: Path, *extra_args: str, **limits: Any) -> Iterator[Served]:
    """`vllm_server.run` in a process of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    log, file = directory / "server.log", directory / "server.py"
    extra_args = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", *extra_args)
    file.write_text(
        "from ultrafuser.serve.vllm_server import Limits, run\n\n"
        "if __name__ == '__main__':\n"
        f"    limits = Limits(**{ {'max_new_tokens': 250, **limits}!r})\n"
        f"    options = {{'port': {port}, 'served_model_name': 'fused', 'limits': limits, 'max_queued': 64, 'api_key': {KEY!r}}}\n"
        f"    run({str(folder)!r}, **options, extra_args={list(extra_args)!r})\n",
        encoding="utf-8",
    )
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # other tests run on these cores
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, str(file)], stdout=output, stderr=output, env=environment)
        try:
            _wait(f"http://127.0.0.1:{port}/health", process, log)
            yield Served(f"http://127.0.0.1:{port}", process, log)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(address, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"the server did not start in {START_S} s:\n{log.read_text()[-4000:]}")
