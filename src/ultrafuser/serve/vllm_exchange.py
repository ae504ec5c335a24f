"""One request on its way through vLLM's server: in time, and with the extended answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.vllm_answers import AnswerExtension, as_json
from ultrafuser.serve.vllm_request import AnswerPlan

RETRY_AFTER_S = 1
_EVENT_END = b"\n\n"

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Exchange:
    """One request that vLLM answers, and the answer on its way to the client."""

    def __init__(
        self,
        scope: Scope,
        plan: AnswerPlan,
        extension: AnswerExtension,
        send: Send,
        timeout_s: float | None,
        is_broken: Callable[[], bool],
    ) -> None:
        """
        Args:
            is_broken: whether the engine failed. vLLM gives status 503 then, and also if its queue is full.
        """
        self._scope = scope
        self._plan, self._extension, self._send, self._is_broken = plan, extension, send, is_broken
        self._timeout_s = timeout_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timed_out = False
        self._start: Message = {}
        self._streams = self._started = False
        self._buffer = b""

    def receiver(self, body: bytes, receive: Receive) -> Receive:
        """Gives vLLM the body, and tells it that the client is gone when the time is over: it then aborts the request."""
        receive_again = replay(body, receive)

        async def receive_in_time() -> Message:
            if self._deadline is None:
                return await receive_again()
            try:
                return await asyncio.wait_for(receive_again(), max(0.0, self._deadline - time.monotonic()))
            except asyncio.TimeoutError:
                self._timed_out = True
                return {"type": "http.disconnect"}

        return receive_in_time

    async def send(self, message: Message) -> None:
        """What vLLM sends."""
        if self._timed_out:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self._streams = header(message["headers"], b"content-type").startswith(b"text/event-stream")
            if self._streams:
                await self._send_start(message)
        elif self._streams:
            await self._send_events(message)
        else:
            self._buffer += message.get("body", b"")
            if not message.get("more_body"):
                await self._send_whole(self._buffer)

    async def finish(self) -> None:
        """End an answer that ran out of time."""
        if not self._timed_out:
            return
        limit = f"{self._timeout_s:g} s, the limit of this server. Lower max_tokens"
        error = APIError(504, f"the answer was not complete after {limit}", code="timeout")
        if self._started:
            event = b"data: " + error.body().encode() + _EVENT_END
            await self._send({"type": "http.response.body", "body": event})
        else:
            await error.response()(self._scope, _nothing, self._send)

    async def _send_start(self, message: Message) -> None:
        self._started = True
        await self._send(message)

    async def _send_whole(self, body: bytes) -> None:
        start = self._start
        if start["status"] == 200 and self._plan.key is not None:
            answer = json.loads(body)
            if isinstance(answer, dict):  # vLLM answers null to a client that is gone
                await self._extension.extend_whole(answer)
                body = as_json(answer)
        elif start["status"] == 503 and not self._is_broken():
            self._started = True
            retry = {"Retry-After": str(RETRY_AFTER_S)}
            error = APIError(429, "the queue is full. Try again later", code="queue_full", headers=retry)
            await error.response()(self._scope, _nothing, self._send)
            return
        await self._send_start({**start, "headers": with_length(start["headers"], len(body))})
        await self._send({"type": "http.response.body", "body": body})

    async def _send_events(self, message: Message) -> None:
        """Pass events on as they become complete."""
        body = message.get("body", b"")
        if self._plan.key is not None:
            *events, self._buffer = (self._buffer + body).split(_EVENT_END)
            if not message.get("more_body") and self._buffer:
                events.append(self._buffer)
            body = b"".join([await self._extended(event) + _EVENT_END for event in events])
        if body or not message.get("more_body"):
            await self._send({**message, "body": body})

    async def _extended(self, event: bytes) -> bytes:
        needed = self._plan.gate_weights or self._plan.adds_token_ids or b'"usage":' in event
        if not needed or not event.startswith(b"data: {"):
            return event
        chunk = json.loads(event[len(b"data: ") :])
        if "choices" not in chunk:  # an error
            return event
        await self._extension.extend_chunk(chunk)
        return b"data: " + as_json(chunk)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and then what the server gives."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def header(headers: Any, name: bytes) -> bytes:
    return next((bytes(value) for key, value in headers if bytes(key).lower() == name), b"")


def with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(bytes(key), bytes(value)) for key, value in headers if bytes(key).lower() != b"content-length"]
    return [*kept, (b"content-length", b"%d" % length)]
