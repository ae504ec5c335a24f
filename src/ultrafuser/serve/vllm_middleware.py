"""ASGI middleware that adds the extension of the OpenAI API to vLLM's own server.

`vllm serve --middleware ultrafuser.serve.vllm_middleware.FusedAPI`: gate weights, specialists per request, limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Collection
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.keys import hash_key, key_refusal
from ultrafuser.serve.limits import read_body, read_json
from ultrafuser.serve.vllm_answers import AnswerExtension, as_json
from ultrafuser.serve.vllm_exchange import App, Exchange, Message, Receive, Scope, Send, header, replay, with_length
from ultrafuser.serve.vllm_request import EXTENSION_FIELDS, check_fields, prepare
from ultrafuser.serve.vllm_weights import GateWeightsClient, WeightsUnavailable

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
PUBLIC_PATHS = ("/health", "/ping", "/version", "/load")  # without a key
LIMITS_VARIABLE = "ULTRAFUSER_SERVER_LIMITS"
BODY_TIMEOUT_S = 60.0


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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
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

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in PUBLIC_PATHS and not (path == "/metrics" and self.limits.open_metrics):
            self._check_key(scope)
        if scope["method"] == "GET" and (path == MODELS or path.startswith(f"{MODELS}/")):
            await self._list_models(scope, receive, send, path[len(MODELS) + 1 :])
        elif scope["method"] == "POST":
            try:
                body = await read_body(Request(scope, receive), self.limits.max_body_bytes, BODY_TIMEOUT_S)
            except ClientDisconnect:
                return
            if path in (CHAT, COMPLETIONS) and isinstance(fields := read_json(body), dict):
                await self._answer(scope, fields, receive, send, path)
            else:
                fields = _read_fields(body)
                if used := next((field for field in EXTENSION_FIELDS if fields.get(field) is not None), None):
                    raise APIError(400, f"{used} works on {CHAT} and {COMPLETIONS}, not on {path}", param=used)
                await self.app(scope, replay(body, receive), send)
        else:
            await self.app(scope, receive, send)

    # ---------------------------------------------------------------- answers

    async def _answer(self, scope: Scope, fields: dict[str, Any], receive: Receive, send: Send, path: str) -> None:
        check_fields(fields, self._fields[path])
        if fields.get("messages") == []:
            raise APIError(400, "messages is empty, expected at least a user's", param="messages")
        self._check_max_tokens(fields)
        state = scope["app"].state
        client = self._connect(state.engine_client)
        names = await client.connect()
        fields, plan = prepare(fields, names, getattr(state.args, "enable_force_include_usage", False))
        body = as_json(fields)
        scope = {**scope, "headers": with_length(scope["headers"], len(body))}
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

    async def _list_models(self, scope: Scope, receive: Receive, send: Send, name: str) -> None:
        """vLLM's models with their specialists.

        Args:
            name: of the one to show. vLLM has no such path. Empty: all.
        """
        names = await self._connect(scope["app"].state.engine_client).connect()
        messages: list[Message] = []

        async def collect(message: Message) -> None:
            messages.append(message)

        await self.app({**scope, "path": scope.get("root_path", "") + MODELS}, receive, collect)
        start, *bodies = messages
        answer = json.loads(b"".join(message.get("body", b"") for message in bodies))
        for model in answer.get("data", []):
            model["specialists"] = list(names)
        if name:
            answer = next((model for model in answer["data"] if model["id"] == name), None)
            if answer is None:
                raise APIError(404, f"there is no model {name[:60]!r}", param="model", code="model_not_found")
        body = as_json(answer)
        await send({**start, "headers": with_length(start["headers"], len(body))})
        await send({"type": "http.response.body", "body": body})

    # ---------------------------------------------------------------- keys, bodies, shutdown

    def _check_key(self, scope: Scope) -> None:
        if self._key_hashes is None:  # vLLM's option comes before its variable
            keys = getattr(scope["app"].state.args, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
            self._key_hashes = [hash_key(key.encode()) for key in keys if key]
        if not self._key_hashes:
            return
        scheme, _, key = header(scope["headers"], b"authorization").partition(b" ")
        if refusal := key_refusal(scheme.decode("latin-1"), key, self._key_hashes):
            raise refusal

    def _finish_answers_on_sigterm(self, app: Any) -> None:
        """Let running answers end before the engine does.

        vLLM stops its engine first, so an answer that ends then has lost its gate weights.
        """

        def stop() -> None:
            server = app.state.server
            server.config.timeout_graceful_shutdown = int(self.limits.shutdown_s)
            server.force_exit = server.should_exit  # the second signal
            server.should_exit = True

        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):  # no signals outside the main thread
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)


def _read_fields(body: bytes) -> dict[str, Any]:
    """The fields of a JSON object. vLLM tells what is wrong with other bodies."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}
