"""A streaming reverse proxy to an OpenAI-compatible server, so that the page talks to its own origin alone."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from ultrafuser.errors import EndpointError, hide_logins

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

MAX_BODY_BYTES = 32 * 2**20
CONNECT_S = 10.0
SILENCE_S = 600.0  # the longest wait for the next bytes: a long prompt on a slow machine
REQUEST_HEADERS = ("accept", "authorization", "content-type")
RESPONSE_HEADERS = ("content-type", "retry-after", "x-request-id")


@dataclass(frozen=True)
class Upstream:
    """An OpenAI-compatible server.

    Attributes:
        url: its address without `/v1`.
        api_key: sent with every request, instead of what the browser sent. None: the browser's own key.
    """

    url: str
    api_key: str | None = None


def read_url(text: str) -> str:
    """The address of a server from what a user typed: with or without `/v1`.

    Raises:
        EndpointError: no http address.
    """
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise EndpointError(
            f"{hide_logins(text)}: expected the address of an OpenAI-compatible server, e.g. http://127.0.0.1:8000"
        )
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


async def read_body(request: Request, limit_bytes: int) -> bytes | None:
    """The body of a request. None if it is longer than the limit: the rest is not read."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit_bytes:
            return None
    return bytes(body)


def error_response(status: int, message: str, code: str | None = None) -> Response:
    """An error as the OpenAI API words it."""
    return JSONResponse(_error(status, message, code), status, headers={"cache-control": "no-store"})


async def forward(request: Request, upstream: Upstream, path: str) -> Response:
    """Send a request on, and the response back as it arrives.

    A client that disconnects closes the connection to the server, which stops its generation. A server that is lost
    in the middle of a stream ends it with an event whose error has the code `server_lost`.
    """
    import aiohttp

    if ".." in path.split("/") or not (path == "health" or path.startswith("v1/")):
        return error_response(404, f"{path!r} is not passed on, expected a path below v1/")
    body = await read_body(request, MAX_BODY_BYTES)
    if body is None:
        return error_response(413, f"a body of more than {MAX_BODY_BYTES:,} bytes")
    headers = {name: request.headers[name] for name in REQUEST_HEADERS if name in request.headers}
    if upstream.api_key is not None:
        headers["authorization"] = f"Bearer {upstream.api_key}"
    address = urlsplit(upstream.url)
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT_S, sock_read=SILENCE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=True,
    )
    try:
        response = await session.request(
            request.method,
            f"{upstream.url}/{path}",
            data=body or None,
            headers=headers,
            allow_redirects=False,
            proxy=None if proxy_bypass(address.netloc) else getproxies().get(address.scheme),
        )
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        await session.close()
        return error_response(502, _unreachable(upstream, error), "server_lost")
    kept_headers = {name: response.headers[name] for name in RESPONSE_HEADERS if name in response.headers}
    kept_headers["x-content-type-options"] = "nosniff"
    return StreamingResponse(_chunks(session, response, upstream), response.status, kept_headers)


async def _chunks(session: ClientSession, response: ClientResponse, upstream: Upstream) -> AsyncIterator[bytes]:
    import aiohttp

    try:
        async for chunk in response.content.iter_any():
            yield chunk
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        if response.content_type != "text/event-stream":
            raise
        event = _error(502, _unreachable(upstream, error), "server_lost")
        yield f"\n\ndata: {json.dumps(event)}\n\n".encode()
    finally:
        response.close()
        with suppress(OSError):
            await session.close()


def _unreachable(upstream: Upstream, error: BaseException) -> str:
    cause = hide_logins(str(error)) or type(error).__name__
    return f"the server {hide_logins(upstream.url)} cannot be reached ({cause}). Start it, then retry"


def _error(status: int, message: str, code: str | None) -> dict[str, dict[str, str | None]]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
