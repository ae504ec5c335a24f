"""Tiny fused models behind the embedded engine, and what they answer one request at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from tiny_models import fuse, tiny, tokens
from ultrafuser.data.collate import pad_prompts
from ultrafuser.data.templates import Renderer
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.serve.embedded import EmbeddedEngine
from ultrafuser.serve.engine import Request, Sampling, Token

TEMPLATES = ["chatml", "plain", "inst"]
END = 1  # of the tiny tokenizer


def fused(tokenizer: PreTrainedTokenizerFast, kinds: Sequence[str] = ("llama",) * 3, **options: Any) -> Any:
    """Random specialists over the tokenizer's vocabulary, which clearly prefer some tokens."""
    models = [
        tiny(kind, seed, vocab_size=len(tokenizer), max_position_embeddings=192) for seed, kind in enumerate(kinds)
    ]
    return fuse(models, **options)


def renderer_of(tokenizer: PreTrainedTokenizerFast, count: int = 3) -> Renderer:
    from ultrafuser.data.chat_format import ChatFormat, resolve_template

    formats = [ChatFormat(tokenizer, resolve_template(name, tokenizer, name), name=name) for name in TEMPLATES[:count]]
    return Renderer(tokenizer, formats, end_token_id=END, vocab_size=len(tokenizer))


def prompts(seed: int, lengths: Sequence[int], high: int = 320) -> list[list[int]]:
    """One prompt for each specialist, of these lengths."""
    return [tokens(1, n, seed=100 * seed + k, low=4, high=high)[0].tolist() for k, n in enumerate(lengths)]


def alone(model: UltraFuserForCausalLM, request: Request, **options: Any) -> list[int]:
    """The oracle: what `generate` answers to one request, with the end."""
    inputs = pad_prompts([request.prompts], 2)
    options = {"do_sample": False, "max_new_tokens": request.sampling.max_new_tokens} | options
    out = model.generate(**inputs, **options)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def greedy(new: int = 12, **changes: Any) -> Sampling:
    return Sampling(new, temperature=0.0, **changes)


async def collect(engine: EmbeddedEngine, request: Request) -> list[Token]:
    return [token async for token in engine.stream(request)]


def ids(answer: Sequence[Token]) -> list[int]:
    return [token.token_id for token in answer]


def text(answer: Sequence[Token]) -> str:
    return "".join(token.text for token in answer)


@asynccontextmanager
async def running(model: Any, renderer: Renderer, **options: Any) -> AsyncIterator[EmbeddedEngine]:
    """An engine that is closed at the end."""
    engine = EmbeddedEngine(model, renderer, **options)
    try:
        yield engine
    finally:
        await engine.close()


def run(main: Callable[[], Coroutine[Any, Any, Any]] | Coroutine[Any, Any, Any], timeout_s: float = 60) -> Any:
    """Run a coroutine to its end, and fail instead of hanging."""
    return asyncio.run(asyncio.wait_for(main if asyncio.iscoroutine(main) else main(), timeout_s))


def answers(model: Any, renderer: Renderer, requests: Sequence[Request], **options: Any) -> list[list[Token]]:
    """The answers of requests that all come at once."""

    async def main() -> list[list[Token]]:
        async with running(model, renderer, **options) as engine:
            return await asyncio.gather(*(collect(engine, request) for request in requests))

    with torch.no_grad():
        return run(main)
