"""What every request passes: its id, the API key, the shutdown, the access log and the metrics."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ultrafuser.printing import printable
from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.keys import hash_key, key_refusal
from ultrafuser.serve.metrics import Metrics

access_log = logging.getLogger("ultrafuser.access")
RECORD = "ultrafuser.record"  # key of the record in the scope of a request
CLIENT_LEFT = 499  # as nginx logs it. No client gets it
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
_OPEN_IN_SHUTDOWN = ("/health", "/metrics")
_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
_MAX_PATH = 100  # characters of an unknown path in the log
_RETRY_AFTER_S = 5
_POLL_INTERVAL_S = 0.05


@dataclass
class RequestRecord:
    """What the log says of a request. The text of prompts and answers, the query and the key are never in it.

    Attributes:
        status: of the response. 499 if the client left before its end.
        error: why a response that had begun was not completed.
    """

    request_id: str
    start: float = field(default_factory=time.monotonic)
    status: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_s: float | None = None
    error: str | None = None

    def line(self, method: str, path: str, seconds: float) -> str:
        words = [self.request_id, method, path, str(self.status)]
        if self.prompt_tokens is not None:
            words.append(f"prompt={self.prompt_tokens} tokens={self.completion_tokens or 0}")
        words.append(f"ms={1000 * seconds:.0f}")
        if self.first_token_s is not None:
            words.append(f"first_ms={1000 * self.first_token_s:.0f}")
        return " ".join([*words, f"error={self.error}"] if self.error else words)


@dataclass
class Traffic:
    """The requests on their way, and whether new ones are accepted."""

    metrics: Metrics
    num_running: int = 0
    is_draining: bool = False
    mean_answer_s: float = 1.0  # of the last answers, roughly

    def finish(self, record: RequestRecord, route: str, seconds: float) -> None:
        self.metrics.request(route, record.status, seconds)
        if record.completion_tokens:
            self.mean_answer_s += 0.1 * (seconds - self.mean_answer_s)

    @property
    def retry_after_s(self) -> int:
        """When a full queue has probably moved."""
        return max(1, min(60, round(self.mean_answer_s)))

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests, and wait for the running ones. Whether all of them ended in time."""
        self.is_draining = True
        deadline = time.monotonic() + grace_s
        while self.num_running and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_INTERVAL_S)
        return not self.num_running


class Access:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, traffic: Traffic, api_key: str | None, open_metrics: bool) -> None:
        """
        Args:
            open_metrics: serve /metrics without the key.
        """
        self._app, self._traffic = app, traffic
        self._key_hash = None if api_key is None else hash_key(api_key.encode())
        self._open_metrics = open_metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        record = scope[RECORD] = RequestRecord(_request_id(headers))

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = record.status or message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = record.request_id
            await send(message)

        self._traffic.num_running += 1
        try:
            if error := self._refusal(scope["path"], headers):
                await error.response()(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except Exception:
            record.status = 500  # the error page is written outside of this middleware
            raise
        finally:
            record.status = record.status or 500  # cancelled before it began
            self._traffic.num_running -= 1
            self._finish(record, scope)

    def _refusal(self, path: str, headers: Headers) -> APIError | None:
        if self._key_hash and self._needs_key(path):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if refusal := key_refusal(scheme, key.strip().encode("latin-1"), [self._key_hash]):
                return refusal
        if self._traffic.is_draining and path not in _OPEN_IN_SHUTDOWN:
            headers_of_answer = {"Retry-After": str(_RETRY_AFTER_S), "Connection": "close"}
            return APIError(503, "the server is shutting down", code="shutting_down", headers=headers_of_answer)
        return None

    def _needs_key(self, path: str) -> bool:
        return path.startswith("/v1/") or (path == "/metrics" and not self._open_metrics)

    def _finish(self, record: RequestRecord, scope: Scope) -> None:
        seconds = time.monotonic() - record.start
        path = scope["path"]
        self._traffic.finish(record, path if path in ROUTES else "other", seconds)
        access_log.info(record.line(scope["method"], printable(path[:_MAX_PATH]), seconds))


def _request_id(headers: Headers) -> str:
    """The client's id if it can stand in a header and a log, or a new one."""
    request_id = headers.get("x-request-id", "")
    return request_id if _REQUEST_ID.fullmatch(request_id) else f"req-{uuid.uuid4().hex}"
