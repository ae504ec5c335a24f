"""The app: routes of the OpenAI API over any engine."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.security import HTTPBearer
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response

from ultrafuser import __version__
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import UltraFuserError
from ultrafuser.serve import api_errors
from ultrafuser.serve.access import CLIENT_LEFT, RECORD, Access, RequestRecord, Traffic
from ultrafuser.serve.api_errors import APIError, as_api_error
from ultrafuser.serve.engine import Engine, Token
from ultrafuser.serve.engine_requests import PromptWriter, engine_requests
from ultrafuser.serve.limits import Limits, checked_route
from ultrafuser.serve.metrics import CONTENT_TYPE, Metrics
from ultrafuser.serve.protocol import ChatRequest, CompletionRequest
from ultrafuser.serve.responses import ChatAnswer, CompletionAnswer, ErrorAnswer, Health, ModelCard, ModelList
from ultrafuser.serve.streaming import (
    COMMENT,
    DONE,
    ClientDisconnected,
    EventStream,
    MergedStreams,
    event,
    open_streams,
    unless_disconnected,
)
from ultrafuser.serve.token_text import TokenTexts
from ultrafuser.serve.writers import AnswerWriter, ChatWriter, CompletionWriter, TokenCounts

_ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
_EVENTS: dict[str, Any] = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}


@dataclass(frozen=True)
class Settings:
    """How an app serves its engine.

    Attributes:
        model_name: in requests and answers.
        api_key: that requests must send. None: no key.
        open_metrics: serve /metrics without the key.
        cors_origins: of web pages that may use the server. `*`: all.
    """

    model_name: str
    api_key: str | None = None
    open_metrics: bool = False
    cors_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


def build_app(engine: Engine, renderer: Renderer, settings: Settings) -> FastAPI:
    """The app. More routers can be added to it: those below /v1/ need the key.

    `app.state.traffic` knows the running requests and can refuse new ones.
    """
    app = FastAPI(title="ultrafuser", version=__version__, docs_url=None, redoc_url=None)
    app.state.traffic = Traffic(Metrics(engine))
    app.add_middleware(Access, traffic=app.state.traffic, api_key=settings.api_key, open_metrics=settings.open_metrics)
    if settings.cors_origins:  # outside of the access check: browsers send no key with their preflights
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    api_errors.install(app)
    service = AnswerService(engine, renderer, settings, app.state.traffic)
    key = [Security(HTTPBearer(auto_error=False))] if settings.api_key else []  # for the schema: `Access` checks it
    app.include_router(_answer_routes(service, settings.limits), dependencies=key)
    app.include_router(_model_routes(engine, settings), dependencies=key)
    app.include_router(_state_routes(app.state.traffic))
    return app


class AnswerService:
    """Answers requests by an engine."""

    def __init__(self, engine: Engine, renderer: Renderer, settings: Settings, traffic: Traffic) -> None:
        self._engine, self._settings, self._traffic = engine, settings, traffic
        self._prompts = PromptWriter(renderer)
        self._texts = TokenTexts(renderer)

    async def answer(self, body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """
        Raises:
            APIError: the request cannot be answered.
        """
        check_model(body.model, self._settings)
        limits = self._settings.limits
        record: RequestRecord = request.scope[RECORD]
        prompts = await self._prompts.write(body)
        try:
            requests = engine_requests(body, prompts, self._engine, limits)
            streams = await open_streams(self._engine, requests)
        except UltraFuserError as error:
            raise as_api_error(error, self._traffic.retry_after_s) from error
        counts = TokenCounts(self._engine.names, sum(max(map(len, ids)) for ids in prompts))
        record.prompt_tokens = counts.prompt_tokens
        self._traffic.metrics.prompt(counts.prompt_tokens)
        answer = RunningAnswer(MergedStreams(streams, limits.timeout_s), counts, record, self._traffic.metrics)
        kind: type[ChatWriter] | type[CompletionWriter] = (
            ChatWriter if isinstance(body, ChatRequest) else CompletionWriter
        )
        writer = kind(body, self._settings.model_name, self._engine.names, self._texts)
        if body.stream:
            has_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = answer.events(writer, len(requests), has_usage)
            return EventStream(events, limits.timeout_s, answer.end_stream)
        return await answer.response(writer, len(requests), request)


class RunningAnswer:
    """The answers to one request while they are generated."""

    def __init__(self, tokens: MergedStreams, counts: TokenCounts, record: RequestRecord, metrics: Metrics) -> None:
        self._tokens, self._counts, self._record, self._metrics = tokens, counts, record, metrics
        self._last_token: dict[int, float] = {}  # when each choice got its last token

    async def response(self, writer: AnswerWriter, num_choices: int, request: Request) -> Response:
        """All answers at once.

        Raises:
            APIError: one of them failed.
        """
        try:
            choices = await unless_disconnected(self._collect(num_choices), request.receive)
        except ClientDisconnected:
            self._record.status = CLIENT_LEFT
            return Response(status_code=CLIENT_LEFT)
        except UltraFuserError as error:
            raise as_api_error(error) from error
        finally:
            await self._tokens.close()
        return Response(writer.whole(choices, self._counts.usage()), media_type="application/json")

    async def _collect(self, num_choices: int) -> list[list[Token]]:
        choices: list[list[Token]] = [[] for _ in range(num_choices)]
        async for item in self._tokens:
            if item is not None:
                index, token = item
                self._count(index, token)
                choices[index].append(token)
        return choices

    async def events(self, writer: AnswerWriter, num_choices: int, has_usage: bool) -> AsyncGenerator[bytes, None]:
        """The answers as server-sent events, token by token. An error is the last event."""
        for chunk in writer.opening(num_choices):
            yield event(chunk)
        try:
            async for item in self._tokens:
                if item is None:
                    yield COMMENT
                    continue
                self._count(*item)
                if (token_chunk := writer.chunk(*item)) is not None:
                    yield event(token_chunk)
        except UltraFuserError as error:
            problem = as_api_error(error)
            self._record.error = problem.code or "invalid_request"
            yield event(problem.body())
            return
        if has_usage:
            yield event(writer.usage_chunk(self._counts.usage()))
        yield DONE

    async def end_stream(self, is_complete: bool) -> None:
        """Cancel what still runs. A stream that its client did not read to the end is logged as such."""
        if not is_complete:
            self._record.status = CLIENT_LEFT
        await self._tokens.close()

    def _count(self, index: int, token: Token) -> None:
        now = time.monotonic()
        is_first = index not in self._last_token
        self._metrics.token(token, now - self._last_token.get(index, self._record.start), is_first)
        self._last_token[index] = now
        self._counts.add(token)
        self._record.completion_tokens = self._counts.completion_tokens
        if self._record.first_token_s is None:
            self._record.first_token_s = now - self._record.start


# ---------------------------------------------------------------- routes


def _answer_routes(service: AnswerService, limits: Limits) -> APIRouter:
    router = APIRouter(route_class=checked_route(limits), responses=_ERRORS)

    @router.post("/v1/chat/completions", responses={200: {"model": ChatAnswer, **_EVENTS}})
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await service.answer(body, request)

    @router.post("/v1/completions", responses={200: {"model": CompletionAnswer, **_EVENTS}})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts of plain text or token ids."""
        return await service.answer(body, request)

    return router


def _model_routes(engine: Engine, settings: Settings) -> APIRouter:
    router = APIRouter(responses=_ERRORS)
    card = ModelCard(
        id=settings.model_name,
        created=int(time.time()),
        specialists=list(engine.names),
        max_model_len=engine.context_length,
    )

    @router.get("/v1/models")
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[card])

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> ModelCard:
        """The served model, by its name."""
        check_model(model, settings)
        return card

    return router


def _state_routes(traffic: Traffic) -> APIRouter:
    router = APIRouter(responses=_ERRORS)

    @router.get("/health")
    async def health() -> Health:
        """Whether the server takes requests."""
        if traffic.is_draining:
            raise APIError(503, "the server is shutting down", code="shutting_down")
        return Health(status="ok")

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and times, for Prometheus."""
        return Response(traffic.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    return router


def check_model(name: str | None, settings: Settings) -> None:
    """Raises APIError: another model than the served one."""
    if name is not None and name != settings.model_name:
        message = f"the model {name[:100]!r} does not exist. Served: {settings.model_name!r}"
        raise APIError(404, message, param="model", code="model_not_found")
