"""From a request of the API to the requests of an engine: prompts, sampling, and checks that need both."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ultrafuser.data.templates import Renderer
from ultrafuser.errors import DataError
from ultrafuser.serve.api_errors import APIError
from ultrafuser.serve.engine import Engine, Request, Sampling
from ultrafuser.serve.limits import Limits
from ultrafuser.serve.protocol import AnswerRequest, ChatRequest, CompletionRequest

_COMPLETION_TOKENS = 16  # of the OpenAI API
_SEEDS = 2**63
Prompts = Sequence[Sequence[int]]  # K sequences


class PromptWriter:
    """Writes the prompts of requests, one request at a time: tokenizers are not made for several threads."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._lock = asyncio.Lock()

    async def write(self, body: ChatRequest | CompletionRequest) -> list[Prompts]:
        """The prompts of a request, each as K sequences. Long ones take a while, so they are written in a thread.

        Raises:
            APIError: a template refuses the conversation, or a prompt has no tokens.
        """
        async with self._lock:
            if isinstance(body, ChatRequest):
                return [await asyncio.to_thread(self._chat, body)]
            return await asyncio.to_thread(self._plain, body)

    def _chat(self, body: ChatRequest) -> Prompts:
        chat = [
            {"role": "system" if message.role == "developer" else message.role, "content": message.text()}
            for message in body.messages
        ]
        try:
            return self._renderer.prompt(chat)
        except DataError as error:
            raise APIError(400, str(error), param="messages") from error

    def _plain(self, body: CompletionRequest) -> list[Prompts]:
        tokenizers = [chat_format.tokenizer for chat_format in self._renderer.formats]
        prompts: list[Prompts] = []
        for prompt in body.prompts():
            ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for tokenizer in tokenizers]
            if not all(ids):
                raise APIError(400, "the prompt has no tokens, so nothing can follow it", param="prompt")
            prompts.append(ids)
        return prompts


def engine_requests(
    body: ChatRequest | CompletionRequest, prompts: Sequence[Prompts], engine: Engine, limits: Limits
) -> list[Request]:
    """The requests of all choices. Choice i is answer `i % n` to prompt `i // n`.

    Raises:
        APIError: fields that do not go together, or that this model or this server cannot meet.
    """
    _check_fields(body, engine)
    samples = body.n or 1
    if len(prompts) * samples > limits.max_choices:
        raise APIError(
            400,
            f"{len(prompts)} prompts with {samples} answers each are {len(prompts) * samples} answers, expected at most "
            f"{limits.max_choices}. Send several requests",
            param="n" if samples > 1 else "prompt",
        )
    requests = []
    for ids in prompts:
        max_new_tokens = _max_new_tokens(body, max(map(len, ids)), engine.context_length, limits)
        for index in range(samples):
            sampling = _sampling(body, max_new_tokens, index)
            requests.append(Request(ids, sampling, keep_blanks=isinstance(body, CompletionRequest)))
    return requests


def _check_fields(body: ChatRequest | CompletionRequest, engine: Engine) -> None:
    if body.stream_options is not None and not body.stream:
        raise APIError(
            400, "stream_options needs stream: true. Add it or leave stream_options out", param="stream_options"
        )
    if body.specialist_logprobs and not body.gate_weights:
        message = "specialist_logprobs comes with the gate's weights. Add gate_weights: true"
        raise APIError(400, message, param="specialist_logprobs")
    if isinstance(body, ChatRequest):
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs: true. Add it", param="top_logprobs")
        if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
            message = "max_tokens is the old name of max_completion_tokens, but they differ. Leave out max_tokens"
            raise APIError(400, message, param="max_tokens")
    if unknown := [name for name in body.specialists or () if name not in engine.names]:
        message = f"specialists has {unknown[0][:60]!r}, which is none of {', '.join(engine.names)}"
        raise APIError(400, message, param="specialists")


def _max_new_tokens(
    body: ChatRequest | CompletionRequest, prompt_tokens: int, context_length: int, limits: Limits
) -> int:
    """The largest number of tokens of an answer: as requested, or what the context and the server leave.

    Raises:
        APIError: more than that.
    """
    remaining = context_length - prompt_tokens
    largest = min(remaining, limits.max_new_tokens or remaining)
    field, requested = body.token_limit()
    if remaining < 1 or (requested or 0) > remaining:
        raise _overflow(body, prompt_tokens, context_length)
    if requested and requested > largest:
        message = f"{field} is {requested}, and this server answers with at most {largest} tokens. Lower it"
        raise APIError(400, message, param=field)
    return requested or (largest if isinstance(body, ChatRequest) else min(largest, _COMPLETION_TOKENS))


def _overflow(body: ChatRequest | CompletionRequest, prompt_tokens: int, context_length: int) -> APIError:
    field, requested = body.token_limit()
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    step = "Shorten the prompt"
    if prompt_tokens < context_length:
        param, step = field, f"Lower {field} to at most {context_length - prompt_tokens}"
    answer = f" and {field} is {requested}" if requested else ""
    return APIError(
        400,
        f"this model's maximum context length is {context_length} tokens, but the prompt has {prompt_tokens} "
        f"tokens{answer}. {step}",
        param=param,
        code="context_length_exceeded",
    )


def _sampling(body: AnswerRequest, max_new_tokens: int, index: int) -> Sampling:
    """How choice `index` is drawn. Absent fields have the defaults of the OpenAI API."""
    fields = {
        "temperature": body.temperature,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
    }
    return Sampling(
        max_new_tokens,
        **{name: value for name, value in fields.items() if value is not None},
        top_k=max(0, body.top_k or 0),
        logit_bias={int(token): bias for token, bias in (body.logit_bias or {}).items()},
        seed=None if body.seed is None else (body.seed + index) % _SEEDS,
        stop=body.stop_texts(),
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.num_logprobs,
        specialist_logprobs=body.specialist_logprobs or 0,
        specialists=None if body.specialists is None else tuple(body.specialists),
    )
