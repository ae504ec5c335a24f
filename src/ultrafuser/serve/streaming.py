"""Streams of tokens as one response: choices merged, sent as server-sent events, cancelled when the client is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ultrafuser.errors import UltraFuserError
from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.engine import Engine, Request, Token, TokenStream

DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"  # keeps proxies from closing a silent connection. Clients skip it
_COMMENT_INTERVAL_S = 15.0
_SEND_GRACE_S = 10.0  # for a client that reads slowly, after the time of its answer is over
Result = TypeVar("Result")
EndHandler = Callable[[bool], Awaitable[None]]


class ClientDisconnected(Exception):
    """Nobody waits for the response."""


async def open_streams(engine: Engine, requests: Sequence[Request]) -> list[TokenStream]:
    """The streams of all requests, or none.

    Raises:
        UltraFuserError: the engine refuses one of them.
    """
    streams: list[TokenStream] = []
    try:
        for request in requests:
            streams.append(engine.stream(request))
    except UltraFuserError:
        for stream in streams:
            await stream.aclose()
        raise
    return streams


class MergedStreams(AsyncIterator[tuple[int, Token] | None]):
    """The tokens of several streams as they come, with the index of the stream. None: nothing came for a while."""

    def __init__(self, streams: Sequence[TokenStream], timeout_s: float) -> None:
        self._streams = streams
        self._items: asyncio.Queue[tuple[int, Token] | Exception | None] = asyncio.Queue()
        self._timeout_s = timeout_s
        self._deadline = time.monotonic() + timeout_s
        self._num_open = len(streams)
        self._tasks = [asyncio.create_task(self._read(i, stream)) for i, stream in enumerate(streams)]

    async def _read(self, index: int, stream: TokenStream) -> None:
        try:
            async for token in stream:
                self._items.put_nowait((index, token))
            self._items.put_nowait(None)
        except Exception as error:  # noqa: BLE001 - whoever reads the merged tokens raises it
            self._items.put_nowait(error)

    async def __anext__(self) -> tuple[int, Token] | None:
        """
        Raises:
            APIError: the time is over.
        """
        while self._num_open:
            remaining_s = self._deadline - time.monotonic()
            try:
                item = await asyncio.wait_for(self._items.get(), max(0.0, min(remaining_s, _COMMENT_INTERVAL_S)))
            except asyncio.TimeoutError:
                if remaining_s > _COMMENT_INTERVAL_S:
                    return None
                raise APIError(
                    504,
                    f"the answer was not complete after {self._timeout_s:g} s, the limit of this server. Lower max_tokens",
                    code="timeout",
                    headers={"X-Should-Retry": "false"},  # the official client would try again
                ) from None
            if isinstance(item, Exception):
                raise item
            if item is not None:
                return item
            self._num_open -= 1
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancel the requests that still run."""
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)
        for stream in self._streams:
            await stream.aclose()


class EventStream(Response):
    """A response of server-sent events, whose work ends when the client disconnects."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], limit_s: float, on_end: EndHandler) -> None:
        """
        Args:
            events: complete events.
            limit_s: when to give up on a client that does not read.
            on_end: called with whether the client has got everything.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._limit_s, self._on_end = events, limit_s + _SEND_GRACE_S, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_complete = False
        try:
            await unless_disconnected(asyncio.wait_for(self._send_all(send), self._limit_s), receive)
            is_complete = True
        except (ClientDisconnected, asyncio.TimeoutError):
            pass
        finally:
            await self._events.aclose()
            await self._on_end(is_complete)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def event(data: str) -> bytes:
    """A server-sent event. JSON has no line breaks outside of escapes."""
    return b"data: " + data.encode() + b"\n\n"


async def unless_disconnected(work: Coroutine[Any, Any, Result], receive: Receive) -> Result:
    """The result of some work, which is cancelled when the client disconnects.

    Raises:
        ClientDisconnected: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnected
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
