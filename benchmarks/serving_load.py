"""Clients of the serving benchmark: closed and open loads on an OpenAI-compatible server, and the paper's way of serving.

Times are in seconds. A request is streamed, and every event of the stream that carries text is one token.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

TIMEOUT = aiohttp.ClientTimeout(total=900)
CANDIDATES = 20  # log-probabilities per engine and token in the paper's way, the most that vLLM gives by default


@dataclass
class Timing:
    """One answered request: when it was sent, and when each of its tokens came."""

    start: float
    tokens: list[float] = field(default_factory=list)

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.tokens[0] - self.start

    @property
    def gaps_s(self) -> list[float]:
        """Times between tokens."""
        return [after - before for before, after in zip(self.tokens, self.tokens[1:], strict=False)]


class Served:
    """A model behind one OpenAI-compatible server."""

    def __init__(self, url: str, max_tokens: int) -> None:
        self.url, self.max_tokens = url, max_tokens
        self.model = ""

    async def prepare(self, session: aiohttp.ClientSession) -> None:
        """Ask for the name of the model."""
        async with session.get(f"{self.url}/v1/models") as reply:
            self.model = (await reply.json())["data"][0]["id"]

    async def tokens(self, session: aiohttp.ClientSession, prompt: list[int]) -> AsyncIterator[None]:
        """One event per token of the answer."""
        body = self._body(prompt) | {"max_tokens": self.max_tokens, "stream": True}
        async with session.post(f"{self.url}/v1/completions", json=body) as reply:
            if reply.status != 200:
                raise RuntimeError(f"{self.url}: {reply.status} {(await reply.text())[:500]}")
            async for line in reply.content:
                if line.startswith(b"data: {") and json.loads(line[6:]).get("choices"):
                    yield

    def _body(self, prompt: list[int]) -> dict[str, Any]:
        return {"model": self.model, "prompt": prompt, "temperature": 0, "ignore_eos": True}


class OneEngineEach(Served):
    """The paper's way: one engine for each specialist, and their predictions are mixed outside, token by token.

    This is the least that such a driver does: K requests per token that run at the same time, equal weights, and the
    most likely token of the mixture. The engines keep their states by prefix caching.
    """

    def __init__(self, urls: Sequence[str], max_tokens: int) -> None:
        super().__init__(urls[0], max_tokens)
        self.engines = [Served(url, max_tokens) for url in urls]

    async def prepare(self, session: aiohttp.ClientSession) -> None:
        for engine in self.engines:
            await engine.prepare(session)

    async def tokens(self, session: aiohttp.ClientSession, prompt: list[int]) -> AsyncIterator[None]:
        ids = list(prompt)
        for _ in range(self.max_tokens):
            tops = await asyncio.gather(*(self._candidates(session, engine, ids) for engine in self.engines))
            mixed: dict[int, float] = {}
            for top in tops:
                for token, logprob in top.items():
                    mixed[token] = mixed.get(token, 0.0) + math.exp(logprob) / len(tops)
            ids.append(max(mixed, key=lambda token: mixed[token]))
            yield

    async def _candidates(self, session: aiohttp.ClientSession, engine: Served, ids: list[int]) -> dict[int, float]:
        body = engine._body(ids) | {"max_tokens": 1, "logprobs": CANDIDATES, "return_tokens_as_token_ids": True}
        async with session.post(f"{engine.url}/v1/completions", json=body) as reply:
            [choice] = (await reply.json())["choices"]
        return {int(token.removeprefix("token_id:")): p for token, p in choice["logprobs"]["top_logprobs"][0].items()}


async def closed_load(server: Served, prompts: Sequence[list[int]], clients: int) -> dict[str, float]:
    """`clients` clients, each of which sends its next request when the last is answered."""
    queue = list(prompts)

    async def client(session: aiohttp.ClientSession) -> list[Timing]:
        timings = []
        while queue:
            timings.append(await _timed(server, session, queue.pop()))
        return timings

    async with _session() as session:
        start = time.perf_counter()
        batches = await asyncio.gather(*(client(session) for _ in range(clients)))
        return _summary([timing for batch in batches for timing in batch], time.perf_counter() - start)


async def open_load(server: Served, prompts: Sequence[list[int]], rate: float, seed: int) -> dict[str, float]:
    """Requests that arrive at random, `rate` per second on average (a Poisson process), whatever is still running."""
    draw = random.Random(seed)
    async with _session() as session:
        start = time.perf_counter()
        tasks = []
        for prompt in prompts:
            tasks.append(asyncio.create_task(_timed(server, session, prompt)))
            await asyncio.sleep(draw.expovariate(rate))
        return _summary(list(await asyncio.gather(*tasks)), time.perf_counter() - start)


def _session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(timeout=TIMEOUT, connector=aiohttp.TCPConnector(limit=0), read_bufsize=2**20)


async def _timed(server: Served, session: aiohttp.ClientSession, prompt: list[int]) -> Timing:
    timing = Timing(time.perf_counter())
    async for _ in server.tokens(session, prompt):
        timing.tokens.append(time.perf_counter())
    if not timing.tokens:
        raise RuntimeError(f"{server.url}: an answer without a token")
    return timing


def _summary(timings: Sequence[Timing], wall_s: float) -> dict[str, float]:
    """Throughput, and median and 95th percentile of both latencies."""
    first = sorted(timing.first_s for timing in timings)
    gaps = sorted(gap for timing in timings for gap in timing.gaps_s)
    return {
        "requests": len(timings),
        "tokens_per_s": sum(len(timing.tokens) for timing in timings) / wall_s,
        "first_token_s": statistics.median(first),
        "first_token_p95_s": _percentile(first, 0.95),
        "between_tokens_s": statistics.median(gaps),
        "between_tokens_p95_s": _percentile(gaps, 0.95),
    }


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
