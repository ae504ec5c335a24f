"""Processor time per call of a synthesis: 256 calls in flight to a local server.

The server has its own process and answers each request after `--delay` seconds with a reply of `--words` words. The
benchmark measures the client's process: the scheduler, the requests, and the store, which saves each reply in its own
transaction. For comparison, the same requests go through the `openai` package where it is installed (`pip install
openai`), without scheduler and store.

    python benchmarks/synth_throughput.py [--calls 5000] [--concurrency 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.synth.calls.clients import make_clients
from ultrafuser.synth.calls.request import Request
from ultrafuser.synth.calls.scheduler import answer
from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.recipe import ServedModel

TARGET = 0.10  # of a core at 100 calls a second
PROMPT_WORDS = 150


class Protocol(asyncio.Protocol):
    """The part of HTTP that the clients need."""

    def __init__(self, reply: bytes, delay_s: float) -> None:
        self.reply, self.delay_s, self.buffer = reply, delay_s, b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, end, body = self.buffer.partition(b"\r\n\r\n")
        if not end:
            return
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        if len(body) >= length:
            self.buffer = body[length:]
            asyncio.get_running_loop().call_later(self.delay_s, self.transport.write, self.reply)


def serve(words: int, delay_s: float, channel: Connection) -> None:
    """The server, until its process is ended."""
    message = {"role": "assistant", "content": "word " * words}
    usage = {"prompt_tokens": 200, "completion_tokens": words, "total_tokens": 200 + words}
    completion = {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m", "usage": usage,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
    }  # fmt: skip
    body = json.dumps(completion).encode()
    reply = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: Protocol(reply, delay_s), "127.0.0.1", 0, backlog=1024
        )
        channel.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def make_requests(calls: int) -> list[Request]:
    """Requests of a realistic length."""
    prompt = "word " * PROMPT_WORDS
    return [Request("responses", "math", str(i), "m", (("user", f"{prompt}{i}"),)) for i in range(calls)]


def synthesis(url: str, calls: int, concurrency: int, file: Path) -> tuple[float, float]:
    """Wall-clock and processor seconds of a synthesis."""
    endpoint = EndpointRecipe(model="m", base_url=url, concurrency=concurrency)
    clients = make_clients([ServedModel(name="m", endpoint=endpoint, prompt_usd=1.0, completion_usd=1.0)])
    requests = make_requests(calls)
    with CallStore(file, "benchmark") as store:
        wall, cpu = time.perf_counter(), time.process_time()
        answer(requests, store, clients, budget_usd=1e6)
        return time.perf_counter() - wall, time.process_time() - cpu


def plain_openai(url: str, calls: int, concurrency: int) -> tuple[float, float]:
    """The same requests by `AsyncOpenAI`. The replies are discarded."""
    import openai

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            slots = asyncio.Semaphore(concurrency)

            async def send(request: Request) -> None:
                messages: Any = request.chat()
                async with slots:
                    await client.chat.completions.create(
                        model="m", messages=messages, max_tokens=request.max_tokens, temperature=0
                    )

            await asyncio.gather(*(send(request) for request in make_requests(calls)))

    wall, cpu = time.perf_counter(), time.process_time()
    asyncio.run(run())
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--words", type=int, default=350)
    parser.add_argument("--delay", type=float, default=1.0, help="seconds that the server takes for a reply")
    parser.add_argument("--no-openai", action="store_true", help="leave the comparison out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    channel, server_channel = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(args.words, args.delay, server_channel), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{channel.recv()}/v1"
    runs: dict[str, tuple[float, float]] = {}
    try:
        with tempfile.TemporaryDirectory() as folder:
            synthesis(url, args.concurrency, args.concurrency, Path(folder) / "warm-up.sqlite")
            runs["scheduler, aiohttp, store"] = synthesis(
                url, args.calls, args.concurrency, Path(folder) / "calls.sqlite"
            )
        if importlib.util.find_spec("openai") and not args.no_openai:
            runs["AsyncOpenAI alone"] = plain_openai(url, args.calls, args.concurrency)
    finally:
        server.terminate()
    table = Table(
        title=f"{args.calls} calls, {args.concurrency} at once, replies of {args.words} words after {args.delay:g} s"
    )
    for column in ("", "calls/s", "ms of processor per call", "share of a core at 100 calls/s", "target"):
        table.add_column(column, justify="right" if column else "left")
    result = {"calls": args.calls, "concurrency": args.concurrency, "delay_s": args.delay, "target": TARGET, "runs": {}}
    for name, (wall, cpu) in runs.items():
        cpu_s = cpu / args.calls
        result["runs"][name] = {
            "calls_a_second": args.calls / wall,
            "cpu_ms_a_call": cpu_s * 1e3,
            "core_at_100": cpu_s * 100,
        }
        target = f"under {TARGET:.0%}" if name.startswith("scheduler") else ""
        table.add_row(name, f"{args.calls / wall:.0f}", f"{cpu_s * 1e3:.2f}", f"{cpu_s * 100:.1%}", target)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
