"""`ultrafuser serve` under many clients that leave at random: finished answers are right, nothing hangs, memory returns.

    python benchmarks/serve_soak.py my-fused --clients 64 --seconds 120

Each prompt is first answered alone. Then all clients send prompts until the time is over, streamed or whole, and leave a
part of their requests after a random time. Greedy answers must be those given alone. At the end nothing may run or wait,
the memory is compared with that after a first round of all clients, and SIGTERM must end the process with code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

PROMPTS = [
    f"{question} {number}" for question in ("Count to", "def add_", "What is 7 times") for number in (3, 11, 25, 40)
]
MAX_TOKENS = 48
LEAVING_SHARE = 0.4  # of the requests
MAX_STAY_S = 1.5  # of a client that leaves
HANG_S = 120.0
START_S = 180.0


@dataclass
class Report:
    """What happened.

    Attributes:
        wrong: answers that differ from those given alone.
        failed: other responses than 200, by status, and broken connections.
        memory_start_mib, memory_end_mib: of the server, after a first round of all clients, and at the end.
        exit_code: of the server after SIGTERM.
    """

    clients: int
    seconds: float
    finished: int = 0
    left: int = 0
    tokens: int = 0
    wrong: list[dict[str, str]] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    hung: int = 0
    left_running: int = 0
    memory_start_mib: float = 0.0
    memory_end_mib: float = 0.0
    exit_code: int | None = None

    def problems(self, max_growth_mib: float) -> list[str]:
        growth_mib = self.memory_end_mib - self.memory_start_mib
        return [
            *([f"{len(self.wrong)} answers differ from those given alone"] if self.wrong else []),
            *([f"failed requests: {dict(self.failed)}"] if self.failed else []),
            *([f"{self.hung} requests hung"] if self.hung else []),
            *([f"{self.left_running} answers still ran after all clients had left"] if self.left_running else []),
            *([f"memory grew by {growth_mib:.0f} MiB"] if growth_mib > max_growth_mib else []),
            *([f"the server ended with code {self.exit_code}"] if self.exit_code else []),
            *(["no answer was finished"] if not self.finished else []),
        ]


class Soak:
    """The clients of one server."""

    def __init__(self, session: aiohttp.ClientSession, pid: int, report: Report, seed: int) -> None:
        self.session, self.pid, self.report = session, pid, report
        self.random = random.Random(seed)
        self.expected: dict[str, str] = {}

    async def run(self) -> None:
        for prompt in PROMPTS:
            self.expected[prompt] = await self.ask(prompt, stream=False)
        await asyncio.gather(*(self.ask(self.random.choice(PROMPTS), stream=True) for _ in range(self.report.clients)))
        self.report.memory_start_mib = memory_mib(self.pid)
        deadline = time.monotonic() + self.report.seconds
        await asyncio.gather(*(self.client(deadline) for _ in range(self.report.clients)))
        self.report.left_running = await self.wait_until_idle()
        self.report.memory_end_mib = memory_mib(self.pid)

    async def client(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            prompt, stream = self.random.choice(PROMPTS), self.random.random() < 0.5
            stay_s = self.random.uniform(0, MAX_STAY_S) if self.random.random() < LEAVING_SHARE else None
            try:
                answer = await asyncio.wait_for(self.ask(prompt, stream), stay_s or HANG_S)
            except asyncio.TimeoutError:
                if stay_s is None:
                    self.report.hung += 1
                else:
                    self.report.left += 1
                continue
            except aiohttp.ClientResponseError as error:
                self.report.failed[str(error.status)] += 1
                continue
            except aiohttp.ClientError as error:
                self.report.failed[type(error).__name__] += 1
                continue
            self.report.finished += 1
            if answer != self.expected[prompt]:
                self.report.wrong.append({"prompt": prompt, "answer": answer, "alone": self.expected[prompt]})

    async def ask(self, prompt: str, stream: bool) -> str:
        body: dict[str, Any] = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": MAX_TOKENS,
            "temperature": 0,
            "stream": stream,
        }
        if stream:
            body["stream_options"] = {"include_usage": True}
        async with self.session.post("/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            if not stream:
                answer = await response.json()
                self.report.tokens += answer["usage"]["completion_tokens"]
                return answer["choices"][0]["message"]["content"]
            return await self.read_stream(response)

    async def read_stream(self, response: aiohttp.ClientResponse) -> str:
        text = ""
        async for line in response.content:
            if line == b"data: [DONE]\n":
                return text
            if line.startswith(b"data: "):
                chunk = json.loads(line.removeprefix(b"data: "))
                text += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                self.report.tokens += (chunk["usage"] or {}).get("completion_tokens", 0)
        raise aiohttp.ClientPayloadError("the stream ended without [DONE]")

    async def wait_until_idle(self) -> int:
        """The answers that still run or wait after 30 seconds."""
        remaining = 0
        for _ in range(300):
            async with self.session.get("/metrics") as response:
                counts = re.findall(r"^ultrafuser_answers_(?:running|waiting) (\d+)", await response.text(), re.M)
            remaining = sum(map(int, counts))
            if not remaining:
                return 0
            await asyncio.sleep(0.1)
        return remaining


def memory_mib(pid: int) -> float:
    """The resident memory of a process."""
    output = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True).stdout
    return int(output) / 1024


async def soak(folder: str, report: Report, seed: int) -> None:
    command = [sys.executable, "-m", "ultrafuser", "serve", folder, "--engine", "embedded", "--port", "0"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(command, stderr=log)
        try:
            url = wait_for_start(server, log)
            connector = aiohttp.TCPConnector(limit=0)
            async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(None)) as session:
                await Soak(session, server.pid, report, seed).run()
            server.send_signal(signal.SIGTERM)
            report.exit_code = server.wait(60)
        finally:
            server.kill()
            server.wait()


def wait_for_start(server: subprocess.Popen, log: Any) -> str:
    deadline = time.monotonic() + START_S
    while True:
        log.seek(0)
        text = log.read()
        if match := re.search(r"at (http://\S+)/v1 ", text):
            return match[1]
        if server.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the server did not start:\n{text}")
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a fused checkpoint")
    parser.add_argument("--clients", type=int, default=64, help="send requests from this many clients at once")
    parser.add_argument("--seconds", type=float, default=120, help="send requests for this long")
    parser.add_argument("--max-growth-mib", type=float, default=64, help="accept this growth of the server's memory")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers")
    parser.add_argument("--output", type=Path, help="write the report to this JSON file too")
    options = parser.parse_args()
    report = Report(options.clients, options.seconds)
    asyncio.run(soak(options.folder, report, options.seed))
    text = json.dumps(asdict(report), indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    if problems := report.problems(options.max_growth_mib):
        sys.exit("; ".join(problems))


if __name__ == "__main__":
    main()
