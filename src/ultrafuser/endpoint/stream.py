"""The streaming client of an OpenAI-compatible endpoint: a chat answer as it is written, and what the server says about its model."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from ultrafuser.endpoint.client import MAX_REPLY_BYTES, AsyncEndpoint
from ultrafuser.endpoint.errors import Failure, one_line, read_failure
from ultrafuser.endpoint.messages import Request, read_reply, without_surrogates
from ultrafuser.endpoint.recipe import EndpointRecipe

_DONE = "[DONE]"


@dataclass(frozen=True)
class Piece:
    """Text of an answer: one token where the server gives weights, else whatever one event holds.

    Attributes:
        weights: (K) the gate's weights of this token. None: the server gives none.
        finish_reason: why the answer ends with this piece, on the last one alone.
    """

    text: str
    weights: tuple[float, ...] | None = None
    finish_reason: str | None = None


@dataclass(frozen=True)
class ServedModel:
    """One entry of `/models`.

    Attributes:
        specialists: of a fused model. Empty: it has none, or the server does not say.
        context_length: in tokens. None: the server does not say.
    """

    name: str
    specialists: tuple[str, ...] = ()
    context_length: int | None = None


class StreamingEndpoint(AsyncEndpoint):
    """An endpoint that is read while it answers. `timeout_s` is the longest silence, not the length of an answer."""

    def __init__(self, recipe: EndpointRecipe, *, extra: str = "endpoint") -> None:
        super().__init__(recipe, extra=extra)
        self._models_url = f"{recipe.base_url}/models"

    async def models(self) -> list[ServedModel]:
        """The models that the endpoint lists.

        Raises:
            Failure: the endpoint does not list them.
        """
        async with self._response("GET", self._models_url) as response:
            body = self._without_secrets((await _whole(response)).decode("utf-8", "replace"))
        try:
            entries = json.loads(body)["data"]
            return [model for entry in entries if (model := _served_model(entry))]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise Failure("transient", f"its list of models cannot be read: {one_line(body)!r}") from error

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The pieces of one answer. Closing the iterator closes the connection, at which servers stop generating.

        Raises:
            Failure: there was no answer, or it broke off. Its kind says why.
        """
        self.usage.requests += 1
        async with self._response("POST", self._url, request.body(self.recipe)) as response:
            if "event-stream" not in response.headers.get("content-type", ""):  # the server does not stream
                reply = read_reply(self._without_secrets((await _whole(response)).decode("utf-8", "replace")).encode())
                yield Piece(reply.text, finish_reason=reply.finish_reason or "stop")
                return
            finished = False
            async for data in _events(response):
                if data == _DONE:
                    break
                for piece in _pieces(self._without_secrets(data)):
                    finished = finished or piece.finish_reason is not None
                    yield piece
            if not finished:
                raise Failure("transient", "the answer broke off", billed=True)
        self.usage.replies += 1

    @asynccontextmanager
    async def _response(self, method: str, url: str, body: bytes | None = None) -> AsyncIterator[Any]:
        """A response of status 200. Redirects are not followed.

        Raises:
            Failure: another status, no connection, or a connection that breaks while the response is read.
        """
        import aiohttp

        limit_s = self.recipe.timeout_s
        timeout = aiohttp.ClientTimeout(total=None, connect=limit_s, sock_read=limit_s)
        options: dict[str, Any] = {"data": body, "proxy": self._proxy, "allow_redirects": False, "timeout": timeout}
        # A connection that waits between two turns may be closed by the server at the moment it is used again.
        options["headers"] = {"connection": "close"}
        try:
            async with self._session.request(method, url, **options) as response:
                if response.status != 200:
                    text = self._without_secrets((await _whole(response)).decode("utf-8", "replace"))
                    raise read_failure(response.status, text.encode(), response.headers)
                yield response
        except asyncio.TimeoutError:
            raise Failure("transient", f"silent for {limit_s:g} s", billed=True) from None
        except aiohttp.ClientConnectorError as error:
            raise Failure("unreachable", f"cannot be reached ({self._cause(error)})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failure("transient", f"the connection broke ({self._cause(error)})", billed=True) from error


async def _whole(response: Any) -> bytes:
    """The body of a response that is no stream.

    Raises:
        Failure: it is too long to be of use.
    """
    body = bytearray()
    async for chunk in response.content.iter_any():
        body += chunk
        if len(body) > MAX_REPLY_BYTES:
            raise Failure("too long", f"a response of more than {MAX_REPLY_BYTES:,} bytes", billed=True)
    return bytes(body)


async def _events(response: Any) -> AsyncIterator[str]:
    """The data of server-sent events. Comments and other fields are skipped."""
    data: list[str] = []
    async for line in _lines(response):
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            yield "\n".join(data)
            data.clear()
    if data:  # the last event without its blank line
        yield "\n".join(data)


async def _lines(response: Any) -> AsyncIterator[str]:
    """
    Raises:
        Failure: the stream is too long to be an answer.
    """
    rest, size = b"", 0
    async for block in response.content.iter_any():
        size += len(block)
        if size > MAX_REPLY_BYTES:
            raise Failure("too long", f"an answer of more than {MAX_REPLY_BYTES:,} bytes", billed=True)
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.rstrip(b"\r").decode("utf-8", "replace")
    yield rest.decode("utf-8", "replace")


def _pieces(data: str) -> list[Piece]:
    """The pieces of one event. Events without text, such as the first and the one with the usage, have none.

    Raises:
        Failure: the event is an error, or no JSON.
    """
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Failure("transient", f"an event of the stream is no JSON: {one_line(data)!r}", billed=True) from error
    event = event if isinstance(event, dict) else {}
    if event.get("error"):
        failure = read_failure(400, data.encode())
        raise Failure(
            failure.kind if failure.kind == "overflow" else "transient",
            str(failure).removeprefix("status 400: "),
            billed=True,
        )
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    text = delta.get("content") if isinstance(delta, dict) else None
    pieces = _weighted(choice.get("gate_weights"), without_surrogates(text) if isinstance(text, str) else "")
    reason = choice.get("finish_reason")
    if isinstance(reason, str):
        last = pieces.pop() if pieces else Piece("")
        pieces.append(Piece(last.text, last.weights, reason))
    return pieces


def _weighted(gate_weights: Any, text: str) -> list[Piece]:
    """The text of an event as its tokens, each with its weights. Without sound weights it is one piece."""
    fields: Mapping[str, Any] = gate_weights if isinstance(gate_weights, dict) else {}
    tokens, rows = fields.get("tokens"), fields.get("weights")
    if isinstance(tokens, list) and isinstance(rows, list) and len(tokens) == len(rows):
        is_whole = all(isinstance(token, str) for token in tokens) and "".join(tokens) == text
        if is_whole and all(map(_is_distribution, rows)):
            return [Piece(token, tuple(map(float, row))) for token, row in zip(tokens, rows, strict=True)]
    return [Piece(text)] if text else []


def _is_distribution(row: Any) -> bool:
    is_numbers = isinstance(row, list) and all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in row)
    return is_numbers and abs(sum(row) - 1) < 0.01  # the server rounds


def _served_model(entry: Any) -> ServedModel | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return None
    names, length = entry.get("specialists"), entry.get("max_model_len")
    names = names if isinstance(names, list) and all(isinstance(name, str) for name in names) else []
    return ServedModel(entry["id"], tuple(names), length if isinstance(length, int) and length > 0 else None)
