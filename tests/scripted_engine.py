"""An engine that answers as a test tells it, and a running server around any engine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from ultrafuser.data.templates import Renderer
from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.app import Settings, build_app
from ultrafuser.serve.engine import (
    Engine,
    EngineBusyError,
    EngineClosedError,
    Request,
    Token,
    TokenLogprob,
)
from ultrafuser.serve.limits import Limits
from ultrafuser.serve.server import Server, bind, url

KEY = "sk-test"
QUESTION = [{"role": "user", "content": "Hi?"}]


@dataclass
class ScriptedEngine:
    """Answers every request with the same texts, one token each.

    Attributes:
        pause_s: before each token.
        capacity: requests at once. The next one is refused as by a full queue.
        refusal: raised at the call.
        failure: raised after the first token.
        requests: all that came.
        num_cancelled: requests that were closed before their end.
    """

    texts: Sequence[str] = ("a", "b", "c")
    pause_s: float = 0.0
    capacity: int = 1000
    refusal: UltraFuserError | None = None
    failure: Exception | None = None
    names: Sequence[str] = ("text", "code", "math")
    context_length: int = 128
    waiting: int = 0
    running: int = 0
    requests: list[Request] = field(default_factory=list)
    num_cancelled: int = 0
    is_closed: bool = False

    def stream(self, request: Request) -> ScriptedStream:
        if self.refusal:
            raise self.refusal
        if self.running >= self.capacity:
            raise EngineBusyError("the queue is full")
        self.requests.append(request)
        self.running += 1
        return ScriptedStream(self, request)

    def token(self, request: Request, index: int, is_last: bool) -> Token:
        top = tuple(TokenLogprob(4 + i, -1.0 - i) for i in range(request.sampling.logprobs or 0))
        return Token(
            token_id=4 + index,
            text=self.texts[index],
            weights=(0.5, 0.25, 0.25),
            logprob=-1.0,
            top=top,
            finish_reason=("stop" if len(self.texts) < request.sampling.max_new_tokens else "length")
            if is_last
            else None,
        )

    async def close(self, grace_s: float = 0.0) -> None:
        self.is_closed = True


class ScriptedStream(AsyncIterator[Token]):
    """The tokens of one request."""

    def __init__(self, engine: ScriptedEngine, request: Request) -> None:
        self._engine, self._request, self._count = engine, request, 0
        self._is_complete = self._is_closed = False

    async def __anext__(self) -> Token:
        if self._is_complete:
            raise StopAsyncIteration
        engine = self._engine
        await asyncio.sleep(engine.pause_s)
        if engine.is_closed:
            raise EngineClosedError("the engine was closed before the answer was complete")
        if engine.failure and self._count:
            raise engine.failure
        index, self._count = self._count, self._count + 1
        self._is_complete = self._count == min(len(engine.texts), self._request.sampling.max_new_tokens)
        return engine.token(self._request, index, self._is_complete)

    async def aclose(self) -> None:
        if not self._is_closed:
            self._engine.running -= 1
            self._engine.num_cancelled += not self._is_complete
        self._is_closed = True


@dataclass
class RunningServer:
    """A server in a thread, and a client that has its key."""

    url: str
    client: httpx.Client
    server: Server
    thread: threading.Thread

    def chat(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/chat/completions", json={"messages": QUESTION, **fields})

    def complete(self, **fields: Any) -> httpx.Response:
        return self.client.post("/v1/completions", json={"prompt": "Hi?", **fields})


@contextmanager
def serving(
    engine: Engine, renderer: Renderer, *, limits: Limits | None = None, **settings: Any
) -> Iterator[RunningServer]:
    """The app over an engine, on a port of its own."""
    app = build_app(engine, renderer, Settings("tiny", **{"api_key": KEY, **settings}, limits=limits or Limits()))
    listener = bind("127.0.0.1", 0)
    is_ready = threading.Event()
    server = Server(app, engine, grace_s=5.0, on_start=is_ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    assert is_ready.wait(30)
    address = url(listener)
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=address, headers=headers, timeout=30, trust_env=False) as client:
        try:
            yield RunningServer(address, client, server, thread)
        finally:
            server.should_exit = True
            thread.join(30)


def wait_for(condition: Any, timeout_s: float = 10.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
