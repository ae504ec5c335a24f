"""ASGI middleware that adds the extension of the OpenAI API to vLLM's own server.

`vllm serve --middleware ultrafuser.serve.vllm_middleware.FusedAPI`: gate weights, specialists per request, limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.limits import read_json
from ultrafuser.serve.vllm_answers import AnswerExtension, as_json
from ultrafuser.serve.vllm_request import EXTENSION_FIELDS, AnswerPlan, check_fields, prepare
from ultrafuser.serve.vllm_weights import GateWeightsClient, WeightsUnavailable

logger = logging.getLogger(__name__)

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
PUBLIC_PATHS = ("/health", "/ping", "/version", "/load")  # without a key
LIMITS_VARIABLE = "ULTRAFUSER_SERVER_LIMITS"
RETRY_AFTER_S = 1
_EVENT_END = b"\n\n"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """What vLLM itself does not limit. It passes from `vllm_server.run` to the API processes in the environment.

    Attributes:
        max_body_bytes: of a request.
        max_new_tokens: the largest `max_tokens` of a request. None: what the context leaves.
        timeout_s: after which an answer is cut off. None: never.
        shutdown_s: how long running answers may take after SIGTERM.
        open_metrics: whether /metrics needs no key.
    """

    max_body_bytes: int = 8 * 1024**2
    max_new_tokens: int | None = None
    timeout_s: float | None = None
    shutdown_s: float = 30.0
    open_metrics: bool = False

    @classmethod
    def from_environment(cls) -> Limits:
        return cls(**json.loads(os.environ.get(LIMITS_VARIABLE, "{}")))

    def to_environment(self) -> None:
        os.environ[LIMITS_VARIABLE] = json.dumps(asdict(self))


class FusedAPI:
    """The middleware. vLLM puts it outside of its own, so it also checks the key before it reads a body."""

    def __init__(
        self, app: App, limits: Limits | None = None, known_fields: dict[str, Collection[str]] | None = None
    ) -> None:
        """
        Args:
            limits: default: from the environment.
            known_fields: the fields that vLLM knows, by path. Default: those of its request classes.
        """
        self.app = app
        self.limits = Limits.from_environment() if limits is None else limits
        self._known_fields = known_fields
        self._client: GateWeightsClient | None = None
        self._key_hashes: list[bytes] | None = None

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            self._finish_answers_on_sigterm(scope["app"])
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self.app(scope, receive, send)
            return
        try:
            await self._respond(scope, receive, send)
        except APIError as error:
            await error.response()(scope, receive, send)
        except WeightsUnavailable as error:
            await APIError(503, f"the engine does not answer: {error}").response()(scope, receive, send)

    async def _respond(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in PUBLIC_PATHS and not (path == "/metrics" and self.limits.open_metrics):
            self._check_key(scope)
        if scope["method"] == "GET" and path == MODELS:
            await self._list_models(scope, receive, send)
        elif scope["method"] == "POST":
            body = await self._read_body(scope, receive)
            if body is None:
                return  # the client is gone
            if path in (CHAT, COMPLETIONS) and isinstance(fields := read_json(body), dict):
                await self._answer(scope, fields, receive, send, path)
            else:
                fields = _read_fields(body)
                if used := next((field for field in EXTENSION_FIELDS if fields.get(field) is not None), None):
                    raise APIError(400, f"{used} works on {CHAT} and {COMPLETIONS}, not on {path}", param=used)
                await self.app(scope, _replay(body, receive), send)
        else:
            await self.app(scope, receive, send)

    # ---------------------------------------------------------------- answers

    async def _answer(
        self, scope: MutableMapping[str, Any], fields: dict[str, Any], receive: Receive, send: Send, path: str
    ) -> None:
        check_fields(fields, self._fields[path])
        self._check_max_tokens(fields)
        state = scope["app"].state
        client = self._connect(state.engine_client)
        names = await client.connect()
        fields, plan = prepare(fields, names, getattr(state.args, "enable_force_include_usage", False))
        body = as_json(fields)
        scope = {**scope, "headers": _with_length(scope["headers"], len(body))}
        extension = AnswerExtension(plan, client, names, state.engine_client.get_tokenizer())
        exchange = Exchange(
            scope, plan, extension, send, self.limits.timeout_s, lambda: bool(state.engine_client.errored)
        )
        try:
            await self.app(scope, exchange.receiver(body, receive), exchange.send)
            await exchange.finish()
        finally:
            if plan.key is not None:
                client.release(plan.key)

    def _connect(self, engine: Any) -> GateWeightsClient:
        if self._client is None:
            self._client = GateWeightsClient(engine)
        return self._client

    def _check_max_tokens(self, fields: dict[str, Any]) -> None:
        limit = self.limits.max_new_tokens
        for name in ("max_tokens", "max_completion_tokens"):
            if limit is not None and type(fields.get(name)) is int and fields[name] > limit:
                message = f"{name} is {fields[name]}, and this server answers with at most {limit} tokens. Lower it"
                raise APIError(400, message, param=name)

    @cached_property
    def _fields(self) -> dict[str, Collection[str]]:
        if self._known_fields is not None:
            return self._known_fields
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        fields: dict[str, Collection[str]] = {}
        for path, request in ((CHAT, ChatCompletionRequest), (COMPLETIONS, CompletionRequest)):
            fields[path] = set(request.model_fields) | {field.alias for field in request.model_fields.values()} - {None}
        return fields

    # ---------------------------------------------------------------- other paths

    async def _list_models(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        names = await self._connect(scope["app"].state.engine_client).connect()
        start: Message = {}
        parts: list[bytes] = []

        async def collect(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            parts.append(message.get("body", b""))
            if message.get("more_body"):
                return
            body = b"".join(parts)
            if start["status"] == 200:
                models = json.loads(body)
                for model in models["data"]:
                    model["specialists"] = list(names)
                body = as_json(models)
            await send({**start, "headers": _with_length(start["headers"], len(body))})
            await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, collect)

    # ---------------------------------------------------------------- keys, bodies, shutdown

    def _check_key(self, scope: MutableMapping[str, Any]) -> None:
        if self._key_hashes is None:  # vLLM's option comes before its variable
            keys = getattr(scope["app"].state.args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
            self._key_hashes = [hashlib.sha256(key.encode()).digest() for key in keys if key]
        if not self._key_hashes:
            return
        value = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = value.partition(b" ")
        hashed = hashlib.sha256(key).digest()
        matches = [secrets.compare_digest(hashed, known) for known in self._key_hashes]
        if scheme.lower() != b"bearer" or not any(matches):
            message = "the API key is missing or wrong. Send the header Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _read_body(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """The whole body. None if the client hung up."""
        limit = self.limits.max_body_bytes
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        parts, size = [], 0
        while True:
            too_large = size > limit or (length.isdigit() and int(length) > limit)
            if too_large:
                raise APIError(413, f"the body has more than {limit} bytes. Shorten the prompt")
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if not message.get("more_body") and size <= limit:
                return b"".join(parts)

    def _finish_answers_on_sigterm(self, app: Any) -> None:
        """Let running answers end before the engine does.

        vLLM stops its engine first, so an answer that ends then has lost its gate weights.
        """

        def stop() -> None:
            server = app.state.server
            server.config.timeout_graceful_shutdown = int(self.limits.shutdown_s)
            server.should_exit = True

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # no signals outside the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


class Exchange:
    """One request that vLLM answers, and the answer on its way to the client."""

    def __init__(
        self,
        scope: MutableMapping[str, Any],
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
        replay = _replay(body, receive)

        async def receive_in_time() -> Message:
            if self._deadline is None:
                return await replay()
            try:
                return await asyncio.wait_for(replay(), max(0.0, self._deadline - time.monotonic()))
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
            self._streams = _header(message["headers"], b"content-type").startswith(b"text/event-stream")
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
        await self._send_start({**start, "headers": _with_length(start["headers"], len(body))})
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


# ---------------------------------------------------------------- messages


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


def _read_fields(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object. vLLM tells what is wrong with other bodies."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read, and then what the server gives."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay


def _header(headers: Any, name: bytes) -> bytes:
    return next((bytes(value) for key, value in headers if bytes(key).lower() == name), b"")


def _with_length(headers: Any, length: int) -> list[tuple[bytes, bytes]]:
    kept = [(bytes(key), bytes(value)) for key, value in headers if bytes(key).lower() != b"content-length"]
    return [*kept, (b"content-length", b"%d" % length)]
