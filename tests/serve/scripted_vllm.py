"""vLLM's OpenAI server as the middleware sees it: the same shapes, a scripted engine, the real records of gate weights."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ultrafuser.serve.vllm_middleware import CHAT, COMPLETIONS, FusedAPI, Limits
from ultrafuser.vllm_plugin.gate_records import GateRecords

NAMES = ("text", "code", "math")
FIELDS = {
    "model", "stream", "stream_options", "n", "echo", "use_beam_search", "logprobs", "prompt_logprobs", "vllm_xargs",
    "return_token_ids", "max_tokens", "max_completion_tokens", "skip_special_tokens", "temperature",
}  # fmt: skip
KNOWN_FIELDS = {CHAT: FIELDS | {"messages"}, COMPLETIONS: FIELDS | {"prompt"}}


class ScriptedEngine:
    """Answers every request with the same text, whose weights are drawn from its tokens' positions."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        self.ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        self.records = GateRecords(len(NAMES))
        self.errored = False
        self.failure: Exception | None = None
        self.calls: list[str] = []

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    async def collective_rpc(self, method: str, timeout: float | None = None, args: tuple = ()) -> list[Any]:
        self.calls.append(method)
        await asyncio.sleep(0)  # as between two steps
        if self.failure is not None:
            raise self.failure
        if method == "connect_gate":
            return [list(NAMES)]
        ranges, released = args
        fetched = self.records.take(ranges)
        for key in released:
            self.records.release(key)
        return [fetched, {}]

    def generate(self, kind: str, fields: dict[str, Any], prompt: int, sample: int) -> list[np.ndarray]:
        """Record the weights of one answer, as the workers do. Tokens behind its end are recorded too."""
        suffix = f"-{random.getrandbits(32):08x}"
        name = f"chatcmpl-abc{suffix}" if kind == "chat" else f"cmpl-abc-{prompt}{suffix}"
        name = f"{sample}_{name}" if (fields.get("n") or 1) > 1 else name
        record = self.records.find(name, lambda _: fields.get("vllm_xargs"))
        rows = [weights_of(prompt, sample, i) for i in range(len(self.ids))]
        for i, row in enumerate([*rows, rows[-1]]):
            if record is not None and record.key is not None:
                self.records.write(np.array([record.slot]), np.array([i]), row[None])
                top = np.tile(np.arange(record.num_top), (len(NAMES), 1))
                record.tops[i] = top + 3, -top
        return rows


def weights_of(prompt: int, sample: int, position: int) -> np.ndarray:
    """(K) weights that differ for every token of every choice."""
    scores = np.array([prompt + 1.0, sample + 2.0, position + 3.0])
    return (scores / scores.sum()).astype(np.float32)


class ScriptedVLLM:
    """The server. `requests` are the bodies that reached it."""

    def __init__(self, tokenizer: Any, text: str = "Déjà vu: 3 € for tea.", tokens_per_chunk: int = 1) -> None:
        self.engine = ScriptedEngine(tokenizer, text)
        self.tokens_per_chunk = tokens_per_chunk
        self.held = 0  # characters that are held back, as for a stop text
        self.requests: list[dict[str, Any]] = []
        self.status = 200
        self.waits = asyncio.Event()
        self.waits.set()
        self.disconnects = 0

    def app(self, limits: Limits | None = None, api_key: str | None = None) -> Starlette:
        app = Starlette(
            routes=[
                Route(CHAT, self.chat, methods=["POST"]),
                Route(COMPLETIONS, self.completions, methods=["POST"]),
                Route("/v1/responses", self.chat, methods=["POST"]),
                Route("/invocations", self.chat, methods=["POST"]),
                Route("/v1/models", self.models),
                Route("/health", lambda _: PlainTextResponse("")),
            ]
        )
        app.add_middleware(FusedAPI, limits=limits or Limits(), known_fields=KNOWN_FIELDS)
        app.state.engine_client = self.engine
        app.state.args = SimpleNamespace(api_key=[api_key] if api_key else None, enable_force_include_usage=False)
        return app

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "fused", "max_model_len": 64}]})

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat")

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, "completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        try:
            fields = json.loads(await request.body())
        except ValueError:
            return JSONResponse({"error": {"message": "JSON decode error", "code": 400}}, status_code=400)
        self.requests.append(fields)
        if self.status != 200:
            return JSONResponse({"error": {"message": "busy", "code": self.status}}, status_code=self.status)
        if fields.get("stream"):
            return StreamingResponse(self._stream(kind, fields), media_type="text/event-stream")
        if not await self._wait(request):
            return JSONResponse(None)  # as vLLM answers a client that is gone
        choices = []
        for prompt, sample in _choices(fields):
            self.engine.generate(kind, fields, prompt, sample)
            text = self.engine.text
            choice = {"index": len(choices), "finish_reason": "stop", "token_ids": None}
            choice |= {"message": {"role": "assistant", "content": text}} if kind == "chat" else {"text": text}
            if fields.get("return_token_ids"):
                choice["token_ids"] = self.engine.ids
            choices.append(choice)
        answer = {"id": "x", "choices": choices, "usage": self._usage(fields), "prompt_token_ids": None}
        if fields.get("return_token_ids"):
            answer["prompt_token_ids"] = [3, 4]
        return JSONResponse(answer)

    async def _wait(self, request: Request) -> bool:
        """False if the client went away first. vLLM aborts its request then."""
        gone = asyncio.create_task(_disconnected(request))
        ready = asyncio.create_task(self.waits.wait())
        done, pending = await asyncio.wait([gone, ready], return_when=asyncio.FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        self.disconnects += gone in done
        return ready in done

    async def _stream(self, kind: str, fields: dict[str, Any]) -> AsyncIterator[bytes]:
        has_usage = (fields.get("stream_options") or {}).get("include_usage")
        try:
            if kind == "chat":
                for index, _ in enumerate(_choices(fields)):
                    yield _event({"index": index, "delta": {"role": "assistant", "content": ""}}, ids=[3, 4])
            for event in self._chunks(kind, fields):
                yield event
                await self.waits.wait()
            if has_usage:
                yield _data({"id": "x", "choices": [], "usage": self._usage(fields)})
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.disconnects += 1
            raise

    def _chunks(self, kind: str, fields: dict[str, Any]) -> list[bytes]:
        chunks = []
        for index, (prompt, sample) in enumerate(_choices(fields)):
            self.engine.generate(kind, fields, prompt, sample)
            sent = 0
            for end in range(
                self.tokens_per_chunk, len(self.engine.ids) + self.tokens_per_chunk, self.tokens_per_chunk
            ):
                ids = self.engine.ids[end - self.tokens_per_chunk : end]
                text = self.engine.tokenizer.decode(self.engine.ids[:end], skip_special_tokens=True).rstrip("\ufffd")
                is_last = end >= len(self.engine.ids)
                stop = len(text) if is_last else max(sent, len(text) - self.held)
                delta, sent = text[sent:stop], stop
                choice: dict[str, Any] = {"index": index, "finish_reason": "stop" if is_last else None}
                choice |= {"delta": {"content": delta}} if kind == "chat" else {"text": delta}
                chunks.append(_event(choice | {"token_ids": ids if fields.get("return_token_ids") else None}))
        return chunks

    def _usage(self, fields: dict[str, Any]) -> dict[str, int]:
        return {"prompt_tokens": 2, "completion_tokens": len(self.engine.ids) * len(_choices(fields))}


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _choices(fields: dict[str, Any]) -> list[tuple[int, int]]:
    prompts = len(fields["prompt"]) if isinstance(fields.get("prompt"), list) else 1
    return [(prompt, sample) for prompt in range(prompts) for sample in range(fields.get("n") or 1)]


def _event(choice: dict[str, Any], ids: Sequence[int] | None = None) -> bytes:
    return _data({"id": "x", "choices": [choice]} | ({} if ids is None else {"prompt_token_ids": ids}))


def _data(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"
