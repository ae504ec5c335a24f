"""A model behind an OpenAI-compatible endpoint: hundreds of requests at once on little processor time.

Plain requests by aiohttp: the `openai` package, which `ultrafuser eval` uses, takes six times the processor time for each
call (benchmarks/synth_throughput.py), which does not matter for a judge and does for a million replies.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ultrafuser.errors import EndpointError, MissingExtraError
from ultrafuser.synth.calls.money import likely_prompt_tokens, most_prompt_tokens, prices_of
from ultrafuser.synth.calls.pace import MAX_BACKOFF_S, MAX_PAUSE_S, Health, Pace, Stopped
from ultrafuser.synth.calls.replies import Malformed, Refusal, read_completion, read_refusal, retry_after_s
from ultrafuser.synth.calls.request import CallContext, Request, Response
from ultrafuser.synth.recipe import ModelRecipe

PATIENCE_S = 600.0  # without a single reply, after which an endpoint that used to answer counts as dead
MAX_REPLY_BYTES = 16 * 2**20
_LONG_PAUSE_S = 5.0
_FULL = (429, 503, 529)  # the endpoint has too much to do: no fault of the request
PROBE = Request("probe", "", "", "", (("user", "Say ok."),), max_tokens=16)


class _Again(Exception):
    """A try that brought no reply; another may.

    Attributes:
        counts: whether it may be the request's own fault, so that it is not tried for ever.
        billed: whether it may be charged for all the same.
    """

    def __init__(self, problem: str, *, counts: bool = True, billed: bool = False, wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.counts, self.billed, self.wait_s = counts, billed, wait_s


class _Refused(Exception):
    """The endpoint does not take this request."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


class _TooLong(Exception):
    """A reply of more bytes than anything of use has."""


class EndpointClient:
    """One model behind an endpoint.

    A failure counts as the request's own only if the endpoint served others meanwhile, or serves a short question put
    to it then; otherwise the endpoint is at fault, and nothing is recorded of the request.

    Raises:
        MissingExtraError: aiohttp is not installed.
        EndpointError: the key holds what no header can.
    """

    batch_size = 1

    def __init__(
        self,
        model: ModelRecipe,
        health: Health | None = None,
        *,
        patience_s: float = PATIENCE_S,
        max_reply_bytes: int = MAX_REPLY_BYTES,
    ) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise MissingExtraError("aiohttp", "synth", "synthesis with a model behind an endpoint") from None
        assert model.endpoint != "local"
        self.recipe, self.prices = model.endpoint, prices_of(model)
        self.concurrency = model.endpoint.concurrency
        self.served = 0
        self._owed_usd = 0.0
        self._limits = (model.requests_per_minute, model.tokens_per_minute)
        self._health = health or Health(model.endpoint.backoff_s)
        self._structured = model.structured
        self._patience_s, self._max_reply_bytes = patience_s, max_reply_bytes
        self._where = f"endpoint {self.recipe.base_url}, model {self.recipe.model!r}"
        self._url = f"{self.recipe.base_url}/chat/completions"
        self._proxy = _proxy(self._url)
        self._headers = {"content-type": "application/json"}
        if key := self._key():
            self._headers["authorization"] = f"Bearer {key}"

    def ceiling_usd(self, request: Request) -> float:
        return self.prices.ceiling_usd(request)

    async def open(self) -> None:
        import aiohttp

        self._health.served()  # an earlier run's troubles are over, or come again
        self._pace = Pace(self.concurrency, self._health, *self._limits)
        self._probing = asyncio.Lock()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(total=self.recipe.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
        )

    async def close(self) -> None:
        await self._session.close()

    async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
        return [await self._answer(request, run) for request in requests]

    async def _answer(self, request: Request, run: CallContext) -> Response | None:
        try:
            return await self._tries(request, run)
        except Stopped:
            return None

    async def _tries(self, request: Request, run: CallContext) -> Response | None:
        """Tries until there is an outcome; None where the run ends, or the money does."""
        tries, at_start, served = 0, self.served, None
        while True:
            try:
                return await self._try(request, run)
            except _Refused as refused:
                problem = str(refused)
                if not await self._serves_others(at_start, run):
                    raise self._fatal(refused.refusal) from None
                return self._failed(f"refused: {problem}")
            except _Again as again:
                # since the first failure: what was served before it says nothing of the time after it
                served = self.served if served is None else served
                tries += again.counts
                problem, wait_s = str(again), again.wait_s
                if again.billed:
                    run.sent.discard(request.key)
                    if not run.reserve_retry(request):
                        return None
                if tries > self.recipe.retries:
                    if await self._serves_others(served, run):
                        return self._failed(f"unanswered: {problem}, after {tries} {'try' if tries == 1 else 'tries'}")
                    tries = 0  # the endpoint is at fault: wait for it, as long as patience lasts
                    self._leave_alone(problem, time.monotonic(), None, run)
            if not await run.wait(self._backoff_s(tries) if wait_s is None else min(wait_s, MAX_PAUSE_S)):
                return None

    # ---------------------------------------------------------------- one try

    async def _try(self, request: Request, run: CallContext) -> Response:
        """One request; `run.sent` holds the ask's key from when it is sent until it is clear that nothing is billed."""
        import aiohttp

        structured = self._structured and request.schema is not None and not request.begun
        thought = likely_prompt_tokens(request) + request.max_tokens
        body = self._body(request, structured)
        async with self._pace.turn(thought, lambda: run.stopping):
            sent_at = time.monotonic()
            run.sent.add(request.key)
            try:
                status, headers, data = await self._post(body)
            except asyncio.TimeoutError:
                raise self._again(f"no reply within {self.recipe.timeout_s:g} s", billed=True) from None
            except aiohttp.ClientConnectorError as error:
                run.sent.discard(request.key)
                if not self.served:
                    raise EndpointError(f"{self._where}: cannot be reached ({error}); check the address and that the "
                                        "server runs") from error  # fmt: skip
                problem = f"cannot be reached any more ({error})"
                self._leave_alone(problem, sent_at, None, run)
                raise self._again(problem, counts=False) from error
            except (aiohttp.ClientError, OSError) as error:
                cause = str(error) or type(error).__name__
                raise self._again(f"the connection broke ({cause})", billed=True) from error
            except _TooLong:
                cost_usd = self.ceiling_usd(request)
                reason = f"too long: a reply of more than {self._max_reply_bytes:,} bytes"
                return Response("failed", reason=reason, cost_usd=cost_usd)
        if status == 200:
            return self._outcome(request, data, thought)
        run.sent.discard(request.key)  # nobody bills for a refusal
        self._pace.settle(thought, 0)
        return self._refused(read_refusal(status, data), headers, sent_at, structured, run)

    def _outcome(self, request: Request, data: bytes, thought: int) -> Response:
        try:
            completion = read_completion(data)
        except Malformed as error:
            raise self._again(f"the reply is no chat completion ({error})", billed=True) from error
        self.served += 1
        self._pace.served()
        prompt, written = completion.prompt_tokens, completion.completion_tokens
        if prompt is None:  # not counted by the endpoint: the most that it can be
            prompt = most_prompt_tokens(request)
        if written is None:
            written = min(len(completion.text.encode("utf-8", "replace")), request.max_tokens)
        self._pace.settle(thought, prompt + written)
        return completion.outcome(prompt, written, self.prices.cost_usd(prompt, written))

    def _refused(
        self, refusal: Refusal, headers: Mapping[str, str], sent_at: float, structured: bool, run: CallContext
    ) -> Response:
        """The outcome of a request that was refused, where that is final; raises what may be done otherwise."""
        status = refusal.status
        if refusal.is_spent or status in (401, 402) or 300 <= status < 400:
            raise self._fatal(refusal)
        if status in _FULL:
            self._leave_alone(str(refusal), sent_at, retry_after_s(headers), run)
            raise self._again(str(refusal), counts=False, wait_s=0.0)  # the pause holds everyone back
        if structured and refusal.is_about_schema:
            self._structured = False
            raise _Again(str(refusal), counts=False, wait_s=0.0)
        if refusal.is_overflow:
            self._health.served()  # it works, and says so
            return Response("failed", reason=f"context overflow: {refusal}")
        if refusal.is_filter:
            self._health.served()
            return Response("failed", reason=f"filtered: {refusal}")
        if status == 404:
            raise self._fatal(refusal)
        if status in (408, 409) or status >= 500:
            raise self._again(str(refusal), billed=status == 504, wait_s=retry_after_s(headers) or None)
        raise _Refused(refusal)

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        async with self._session.post(self._url, data=body, proxy=self._proxy, allow_redirects=False) as response:
            data = bytearray()
            async for chunk in response.content.iter_any():
                data += chunk
                if len(data) > self._max_reply_bytes:
                    response.close()  # read no more
                    raise _TooLong
            return response.status, response.headers, bytes(data)

    def _body(self, request: Request, structured: bool) -> bytes:
        recipe = self.recipe
        fields: dict[str, Any] = {
            "model": recipe.model,
            "messages": request.chat(),
            recipe.max_tokens_key: request.max_tokens,
        }
        if recipe.temperature is not None:  # null: the model refuses one
            fields["temperature"] = recipe.temperature if request.temperature is None else request.temperature
        if request.begun:
            fields |= {"add_generation_prompt": False, "continue_final_message": True}
        if structured:
            form = {"name": request.stage, "schema": request.schema, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": form}
        return json.dumps({**fields, **recipe.extra_body}).encode()

    # ---------------------------------------------------------------- failures

    async def _serves_others(self, served: int, run: CallContext) -> bool:
        """Whether the endpoint has served anything since it had served so much, or serves a short question now."""
        async with self._probing:  # one at a time asks, the others then know
            if self.served > served:
                return True
            try:
                probe = await self._try(PROBE, run)
            except (_Again, _Refused):
                return False
            self._owed_usd += probe.cost_usd
            return True

    def _failed(self, reason: str) -> Response:
        """A final failure; it bears what the question put to the endpoint for its sake cost."""
        owed_usd, self._owed_usd = self._owed_usd, 0.0
        return Response("failed", reason=reason, cost_usd=owed_usd)

    def _again(self, problem: str, **how: Any) -> _Again:
        """A try that brought nothing; raises where this has gone on for too long."""
        self._health.failed()
        if (failing_s := self._health.failing_s()) > self._patience_s:
            raise EndpointError(f"{self._where}: no reply for {failing_s:.0f} s, at last {problem}; see the server's log, "
                                "and run again: what was answered is kept")  # fmt: skip
        return _Again(problem, **how)

    def _leave_alone(self, problem: str, sent_at: float, asked_s: float | None, run: CallContext) -> None:
        """Send nothing for a while, and say so where it is a long one."""
        if self._pace.full(sent_at, asked_s) and (pause_s := self._health.until - time.monotonic()) >= _LONG_PAUSE_S:
            run.log(f"{self._where}: {problem}; nothing is sent for {pause_s:.0f} s")

    def _backoff_s(self, tries: int) -> float:
        longest = min(self.recipe.backoff_s * 2 ** min(max(tries - 1, 0), 30), MAX_BACKOFF_S)
        return random.uniform(longest / 2, longest)

    def _fatal(self, refusal: Refusal) -> EndpointError:
        status = refusal.status
        if refusal.is_spent:
            next_step = "this account has nothing left to spend; top it up and run again: what was answered is kept"
        elif access := self.recipe.next_step(status):
            next_step = access
        elif 300 <= status < 400:
            next_step = "the endpoint has moved; set `base_url` to its new address"
        else:
            next_step = (
                "the endpoint does not take such requests; `max_tokens_key`, `temperature` and `extra_body` change what "
                "is sent"
            )
        return EndpointError(f"{self._where}: {refusal}; {next_step}")

    def _key(self) -> str:
        name = self.recipe.api_key_env
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise EndpointError(f"{self._where}: the environment variable {name} holds blanks or letters that no key "
                                "has; set it again")  # fmt: skip
        return key


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for an address."""
    parts = urlsplit(url)
    if proxy_bypass(parts.netloc):
        return None
    return getproxies().get(parts.scheme)
