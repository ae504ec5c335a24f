"""An OpenAI-compatible server on this machine for hundreds of requests at once. It can go away and come back."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fake_endpoint import Step, failing, fine
from ultrafuser.synth.recipe import ServedModel


class FakeAsyncEndpoint:
    """The running server.

    Attributes:
        reply: (question, earlier requests for it) -> response. The question is the last message.
        delay_s: seconds per response.
        bodies, headers, times: of all requests so far. Times are in seconds of `time.monotonic`.
        most_in_flight: largest number of requests in flight.
    """

    def __init__(self, reply: Callable[[str, int], Step] | None = None, delay_s: float = 0.0) -> None:
        self.reply = reply or (lambda question, attempt: fine(f"re: {question}"))
        self.delay_s = delay_s
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.in_flight = self.most_in_flight = 0
        self.port = 0
        self._asked: Counter[str] = Counter()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def hits(self) -> int:
        """Requests so far."""
        return len(self.bodies)

    @property
    def asked(self) -> Counter[str]:
        """How often each question came."""
        return Counter(self._asked)

    def recipe(self, name: str = "m", **changes: Any) -> ServedModel:
        """A model behind it. `endpoint_*` changes the endpoint's fields."""
        endpoint = {
            "model": "writer",
            "base_url": self.url,
            "timeout_s": 5,
            "retries": 2,
            "backoff_s": 0,
            "concurrency": 4,
        }
        endpoint |= {
            key.removeprefix("endpoint_"): value for key, value in changes.items() if key.startswith("endpoint_")
        }
        rest = {key: value for key, value in changes.items() if not key.startswith("endpoint_")}
        return ServedModel.model_validate({"name": name, "endpoint": endpoint, **rest})

    # ---------------------------------------------------------------- up and down

    def start(self) -> None:
        self._thread.start()
        self.up()

    def up(self) -> None:
        """Listen, on the same port as before."""
        self._wait_for(self._up())

    def down(self) -> None:
        """Go away: connections break, and new ones are refused."""
        self._wait_for(self._down())

    def stop(self) -> None:
        self.down()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _up(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        for writer in list(self._writers):
            writer.transport.abort()
        me = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not me]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---------------------------------------------------------------- requests

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._request(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):  # either side went away
            pass
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request. False where the connection must not be used again."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {key.lower(): value for key, value in (line.split(": ", 1) for line in lines if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        if " /v1/chat/completions " not in first:
            step = failing(404, f"no {first.split()[1]}")
        else:
            step = self._step(body, headers)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await asyncio.sleep(60 if step.hangs else self.delay_s)
            finally:
                self.in_flight -= 1
        writer.write(_http(step))
        await writer.drain()
        return not step.cut

    def _step(self, body: dict[str, Any], headers: Mapping[str, str]) -> Step:
        question = body["messages"][-1]["content"]
        self.bodies.append(body)
        self.headers.append(dict(headers))
        self.times.append(time.monotonic())
        self._asked[question] += 1
        return self.reply(question, self._asked[question] - 1)


def _http(step: Step) -> bytes:
    data = step.data
    headers = {"content-type": "application/json", **step.headers, "content-length": str(len(data))}
    head = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    response = f"HTTP/1.1 {step.status} x\r\n{head}\r\n".encode() + data
    return response[: -len(data) // 2] if step.cut else response


@contextmanager
def fake_async_endpoint(
    reply: Callable[[str, int], Step] | None = None, delay_s: float = 0.0
) -> Iterator[FakeAsyncEndpoint]:
    """A server for the length of a test."""
    endpoint = FakeAsyncEndpoint(reply, delay_s)
    endpoint.start()
    try:
        yield endpoint
    finally:
        endpoint.stop()
