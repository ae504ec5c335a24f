"""A server with the API of a fused model that answers by its script, for tests of the page."""

from __future__ import annotations

import asyncio
import json
import math
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

NAMES = ("text", "code", "math")
ANSWER = """Compound interest means that you earn interest on interest. After n years a sum P grows to P(1 + r)^n.

```python
def balance(amount, rate, years):
    return amount * (1 + rate) ** years
```

For 1000 at 5 % this gives 1276.28 after 5 years, so waiting pays."""


@dataclass
class Script:
    """What the server says, and what it was sent.

    Attributes:
        answer: question -> text.
        pause_s: between two tokens.
        names: the specialists. Empty: an ordinary model.
        key: the API key that it asks for.
        has_candidates: whether `specialist_logprobs` is supported.
        requests: bodies of the chat requests.
    """

    answer: Callable[[str], str] = lambda question: ANSWER
    pause_s: float = 0.0
    names: tuple[str, ...] = NAMES
    key: str = ""
    model: str = "my-fused"
    has_candidates: bool = True
    requests: list[dict[str, Any]] = field(default_factory=list)

    def tokens(self, text: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Pieces of a text with weights: code leads in code, math at numbers, text elsewhere."""
        taking = body.get("specialists") or self.names
        pieces, in_code = re.findall(r"\n|```|\d+| ?[^\W\d]+| ?[^\w\s]+|\s", text), False
        rows = []
        for index, piece in enumerate(pieces):
            in_code ^= piece == "```"
            lead = "code" if in_code or piece == "```" else "math" if re.search(r"\d|[P^=%]", piece) else "text"
            wave = 0.5 + 0.45 * math.sin(index / 3)
            weights = {name: 0.4 + 0.6 * wave if name == lead else 0.3 * (1 - wave) for name in self.names}
            row = [weights[name] if name in taking else 0.0 for name in self.names]
            shares = [round(weight / sum(row), 4) for weight in row]
            rows.append({"text": piece, "weights": shares, "top": [_candidates(piece, name, lead) for name in NAMES]})
        return rows

    def shares(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        return {name: sum(row["weights"][k] for row in rows) / len(rows) for k, name in enumerate(self.names)}

    def app(self) -> Starlette:
        """The application, without the playground."""
        chat = Route("/v1/chat/completions", self._chat, methods=["POST"])
        return Starlette(routes=[chat, Route("/v1/models", self._models), Route("/health", self._health)])

    async def _health(self, request: Request) -> Response:
        return Response()

    async def _models(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        model = {"id": self.model, "object": "model", "max_model_len": 8192}
        return JSONResponse({"data": [model | ({"specialists": self.names} if self.names else {})]})

    async def _chat(self, request: Request) -> Response:
        if refusal := self._refusal(request):
            return refusal
        body = await request.json()
        self.requests.append(body)
        if "specialist_logprobs" in body and not (self.names and self.has_candidates):
            return _error(400, "specialist_logprobs is not supported", "specialist_logprobs")
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[str]:
        rows = self.tokens(self.answer(body["messages"][-1]["content"]), body)[: body.get("max_tokens", 10**6)]
        yield _event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
        for row in rows:
            choice: dict[str, Any] = {"index": 0, "delta": {"content": row["text"]}, "finish_reason": None}
            if body.get("gate_weights"):
                gate = {"specialists": self.names, "tokens": [row["text"]], "weights": [row["weights"]]}
                choice["gate_weights"] = gate | ({"top": [row["top"]]} if body.get("specialist_logprobs") else {})
            yield _event({"choices": [choice]})
            await asyncio.sleep(self.pause_s)
        yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": len(rows), "total_tokens": 5 + len(rows)}
        if self.names:
            usage["specialist_shares"] = self.shares(rows)
        yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"

    def _refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "no valid API key")
        return None


class Running:
    """An application on a port of this machine, until it is stopped. It can be started again on the same port."""

    def __init__(self, app: Any) -> None:
        self.app = app
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        config = uvicorn.Config(
            self.app, host="127.0.0.1", port=self.port, log_level="critical", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    @property
    def num_streams(self) -> int:
        """Requests that are not answered to their end."""
        return len(self._server.server_state.tasks)

    def stop(self) -> None:
        """Cut all connections and close the port."""
        self._server.should_exit = self._server.force_exit = True
        for connection in list(self._server.server_state.connections):
            with suppress(AttributeError):
                connection.transport.get_loop().call_soon_threadsafe(connection.transport.abort)
        self._thread.join(10)


def _candidates(piece: str, name: str, lead: str) -> list[dict[str, Any]]:
    """The most likely tokens of a specialist. The one that leads is surer of the drawn token."""
    words = {"text": (" the", " and"), "code": ("(", "\n"), "math": (" =", "1")}[name]
    chances = (0.8, 0.1, 0.05) if name == lead else (0.35, 0.2, 0.15)
    tokens = (piece, *words) if name == lead or len(piece) % 2 else (words[0], piece, words[1])
    return [{"token": token, "logprob": math.log(chance)} for token, chance in zip(tokens, chances, strict=True)]


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _error(status: int, message: str, param: str | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": param, "code": None}
    return JSONResponse({"error": error}, status)
