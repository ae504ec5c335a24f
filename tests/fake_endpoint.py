"""An OpenAI-compatible server on this machine that answers by its script and records the requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ultrafuser.endpoint.recipe import EndpointRecipe


@dataclass(frozen=True)
class Step:
    """One response of the server."""

    body: str | bytes = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs: bool = False  # until the server closes
    cut: bool = False  # the connection, in the middle of the body
    endless: bool = False  # the body is sent again and again
    pause_s: float = 0.0  # between the bytes of the body

    @property
    def data(self) -> bytes:
        """The body as bytes."""
        return self.body if isinstance(self.body, bytes) else self.body.encode()


def fine(text: str | None, finish_reason: str = "stop", refusal: str | None = None) -> Step:
    """A chat completion of 7 prompt tokens and 3 completion tokens."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice], "usage": usage}
    return Step(json.dumps(body))


def failing(status: int, message: str = "no", code: str | None = None, **headers: str) -> Step:
    """An error as the API words it."""
    error = {"message": message, "type": "error", "param": None, "code": code}
    return Step(json.dumps({"error": error}), status, {key.replace("_", "-"): value for key, value in headers.items()})


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n"


def chunk(text: str | None, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """One event of a streamed chat completion, with fields of its choice such as `gate_weights`."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason, **fields}
    return {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "judge", "choices": [choice]}


def streamed(*chunks: Any, done: bool = True, **options: Any) -> Step:
    """A streamed chat completion."""
    first = {**chunk(None), "choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
    body = "".join(map(event, [first, *chunks])) + (event("[DONE]") if done else "")
    return Step(body, headers={"content-type": "text/event-stream; charset=utf-8"}, **options)


def listed(*models: Mapping[str, Any]) -> Step:
    """The response of `/v1/models`."""
    entries = [{"object": "model", "created": 0, "owned_by": "x", **model} for model in models]
    return Step(json.dumps({"object": "list", "data": entries}))


def weighted(tokens: Sequence[str], weights: Sequence[Sequence[float]], finish_reason: str | None = None) -> dict:
    """A chunk of tokens with their gate weights, as ultrafuser's server sends it."""
    names = [f"s{k}" for k in range(len(weights[0]))]
    fields = {"specialists": names, "tokens": list(tokens), "weights": [list(row) for row in weights]}
    return chunk("".join(tokens), finish_reason, gate_weights=fields)


HANG = Step(hangs=True)
CUT = Step(fine("[[A]]").body, cut=True)
NOT_JSON = Step('{"choices": [')
HTML = Step("<html>welcome</html>", headers={"content-type": "text/html"})
UNUSABLE = {  # what a client should try again after
    "429": failing(429, "slow down", retry_after="0"),
    "500": failing(500),
    "503": Step("busy", 503),
    "hang": HANG,
    "cut": CUT,
    "malformed JSON": NOT_JSON,
    "a page": HTML,
    "no choices": Step('{"choices": []}'),
    "null choices": Step('{"choices": null}'),
    "no message": Step('{"choices": [{"index": 0, "message": "hello"}]}'),
    "content that is no text": Step('{"choices": [{"message": {"role": "assistant", "content": {"a": 1}}}]}'),
}


class FakeEndpoint:
    """The running server.

    Attributes:
        script: responses to the first requests, in order. Then `reply` answers.
        reply: question (the last message) -> answer.
        models: the response to `GET /v1/models`.
        requests: bodies of all requests so far.
        headers: their headers.
    """

    def __init__(self) -> None:
        self.script: list[Step] = []
        self.reply: Callable[[str], Step] = lambda _: fine("ok")
        self.models = failing(404, "no /v1/models")
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.closing = threading.Event()
        self._lock = threading.Lock()

    @property
    def hits(self) -> int:
        """Requests so far."""
        return len(self.requests)

    @property
    def questions(self) -> list[str]:
        """The last message of each request."""
        return [request["messages"][-1]["content"] for request in self.requests]

    def next_step(self, body: dict[str, Any], headers: Mapping[str, str]) -> Step:
        """The response to this request."""
        with self._lock:
            self.requests.append(body)
            self.headers.append({key.lower(): value for key, value in headers.items()})
            if self.script:
                return self.script.pop(0)
        return self.reply(body["messages"][-1]["content"])

    def recipe(self, **changes: Any) -> EndpointRecipe:
        """How to reach it, with waits short enough for tests."""
        fields = {
            "model": "judge",
            "base_url": self.url,
            "timeout_s": 5,
            "retries": 2,
            "backoff_s": 0,
            "concurrency": 1,
        }
        return EndpointRecipe.model_validate(fields | changes)


@contextmanager
def fake_endpoint(script: Sequence[Step] = ()) -> Iterator[FakeEndpoint]:
    """A server for the length of a test."""
    endpoint = FakeEndpoint()
    endpoint.script = list(script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path != "/v1/chat/completions":
                step = failing(404, f"no {self.path}")
            else:
                step = endpoint.next_step(body, self.headers)
            self.respond(step)

        def do_GET(self) -> None:
            self.respond(endpoint.models if self.path == "/v1/models" else failing(404, f"no {self.path}"))

        def respond(self, step: Step) -> None:
            if step.hangs:
                endpoint.closing.wait(30)
                return
            data = step.data
            self.send_response(step.status)
            for key, value in {"content-type": "application/json", **step.headers}.items():
                self.send_header(key, value)
            if not step.endless:
                self.send_header("content-length", str(len(data)))
            self.end_headers()
            with suppress(ConnectionError):  # the client went away
                self.send_body(data[: len(data) // 2] if step.cut else data, step)

        def send_body(self, data: bytes, step: Step) -> None:
            if step.pause_s:
                for i in range(len(data)):
                    self.wfile.write(data[i : i + 1])
                    if endpoint.closing.wait(step.pause_s):
                        return
            else:
                self.wfile.write(data)
            while step.endless and not endpoint.closing.is_set():
                self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


class MemoryStore(dict[tuple[str, str], Any]):
    """A store of judgements in memory that outlives its judge."""

    def get(self, kind: str, key: str) -> Any:  # type: ignore[override]
        return super().get((kind, key))

    def put(self, kind: str, key: str, value: Any) -> None:
        self[kind, key] = value
