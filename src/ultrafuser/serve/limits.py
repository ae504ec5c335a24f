"""The limits of the server, and requests whose bodies are within them and are JSON without surprises."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.routing import APIRoute
from starlette.requests import Request

from ultrafuser.data.json_text import LONE_SURROGATE, JsonProblem, check_depth, has_lone_surrogate
from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.protocol import MAX_CHOICES


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
        max_body_bytes: of a request.
        max_new_tokens: of one answer. None: what the context leaves.
        max_choices: answers to one request.
        timeout_s: from the request to the last token, waiting included.
        body_timeout_s: until the body has arrived.
    """

    max_body_bytes: int = 8 * 1024**2
    max_new_tokens: int | None = None
    max_choices: int = MAX_CHOICES
    timeout_s: float = 600.0
    body_timeout_s: float = 60.0


def checked_route(limits: Limits) -> type[APIRoute]:
    """A route whose bodies are checked before FastAPI reads their fields."""

    class CheckedRequest(Request):
        async def body(self) -> bytes:
            if not hasattr(self, "_body"):
                self._body = await read_body(self, limits.max_body_bytes, limits.body_timeout_s)
            return self._body

        async def json(self) -> Any:
            if not hasattr(self, "_json"):
                self._json = read_json(await self.body())
            return self._json

    class CheckedRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                if request.method == "POST":
                    check_content_type(request)
                return await handler(CheckedRequest(request.scope, request.receive))

            return handle

    return CheckedRoute


def check_content_type(request: Request) -> None:
    """Raises APIError: the body does not claim to be JSON. Web pages of other origins may send other types unasked."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise APIError(415, f"Content-Type is {kind[:60]!r}, expected 'application/json'. Add this header")


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """
    Raises:
        APIError: a body that is too long or takes too long.
        ClientDisconnect: the client left before its end.
    """
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise _too_large(max_bytes)
    try:
        return await asyncio.wait_for(_read_chunks(request, max_bytes), timeout_s)
    except asyncio.TimeoutError as error:
        raise APIError(408, f"the body did not arrive within {timeout_s:g} s") from error


async def _read_chunks(request: Request, max_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def read_json(body: bytes) -> Any:
    """
    Raises:
        APIError: not JSON, or JSON with numbers, texts or depths that nothing here can work with.
    """
    try:
        text = body.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant)
        check_depth(value)
        if "\\u" in text and has_lone_surrogate(value):
            raise JsonProblem(LONE_SURROGATE)
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not UTF-8: byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise APIError(400, f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise APIError(400, "the body is nested too deep") from error
    except JsonProblem as error:
        raise APIError(400, f"the body: {error}") from error
    except ValueError as error:  # more digits than Python reads
        raise APIError(400, f"the body has a number that cannot be read: {error}") from error
    return value


def _refuse_constant(name: str) -> Any:
    raise JsonProblem(f"{name} is no number of JSON")


def _too_large(max_bytes: int) -> APIError:
    return APIError(413, f"the body has more than {max_bytes} bytes. Shorten the prompt")
