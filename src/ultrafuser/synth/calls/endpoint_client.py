"""A synthesis model behind an endpoint: the shared client with money, pauses for all, and blame for failures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from ultrafuser.endpoint.client import AsyncEndpoint
from ultrafuser.endpoint.errors import Failure, one_line
from ultrafuser.endpoint.messages import Reply
from ultrafuser.endpoint.messages import Request as EndpointRequest
from ultrafuser.endpoint.pace import Backoff, RateLimiter, Stopped, retry_wait_s
from ultrafuser.errors import EndpointError
from ultrafuser.synth.calls.money import likely_prompt_tokens, most_prompt_tokens, prices_of
from ultrafuser.synth.calls.request import CUT_OFF, CallContext, Request, Response
from ultrafuser.synth.recipe import ServedModel

PATIENCE_S = 600.0  # without a single reply, after which an endpoint that used to answer counts as dead
_LONG_PAUSE_S = 5.0  # from which on a pause is logged
PROBE = Request("probe", "", "", "", (("user", "Say ok."),), max_tokens=16)


class EndpointClient:
    """One model behind an endpoint.

    A failure counts as the request's own only if the endpoint served others meanwhile, or serves a short probe then.
    Otherwise the endpoint is at fault, and nothing is recorded for the request.

    Raises:
        MissingExtraError: aiohttp is not installed.
        EndpointError: the key has characters that no header can hold.
    """

    batch_size = 1

    def __init__(self, model: ServedModel, backoff: Backoff | None = None, *, patience_s: float = PATIENCE_S) -> None:
        self.recipe, self.prices = model.endpoint, prices_of(model)
        self.concurrency = model.endpoint.concurrency
        self.backoff = backoff or Backoff(model.endpoint.backoff_s)
        self._endpoint = AsyncEndpoint(model.endpoint, extra="synth")
        self._limits = (model.requests_per_minute, model.tokens_per_minute)
        self._structured = model.structured
        self._patience_s = patience_s
        self._probe_cost_usd = 0.0  # of probes that no response has been charged for yet

    @property
    def _served(self) -> int:
        return self._endpoint.usage.replies

    def ceiling_usd(self, request: Request) -> float:
        return self.prices.ceiling_usd(request)

    async def open(self) -> None:
        self.backoff.record_success()  # an earlier run's troubles are over, or come again
        self._limiter = RateLimiter(self.concurrency, self.backoff, *self._limits)
        self._probing = asyncio.Lock()
        await self._endpoint.open()

    async def close(self) -> None:
        await self._endpoint.close()

    async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
        return [await self._answer(request, run) for request in requests]

    async def _answer(self, request: Request, run: CallContext) -> Response | None:
        """The response after all retries. None where the run ends, or the money does."""
        try:
            return await self._retry(request, run)
        except Stopped:
            return None

    async def _retry(self, request: Request, run: CallContext) -> Response | None:
        tries, at_start, at_failure = 0, self._served, None
        while True:
            try:
                return await self._send(request, run)
            except Failure as error:
                failure = error
            if failure.kind == "refused":
                if not await self._serves_others(at_start, run):
                    raise self._endpoint.error(failure)
                return self._failed(f"refused: {failure}")
            # What was served before the first failure says nothing about the time after it.
            at_failure = self._served if at_failure is None else at_failure
            if failure.billed:
                run.sent.discard(request.key)
                if not run.reserve_retry(request):
                    return None
            if failure.kind != "transient":
                continue  # the pause holds all requests back
            tries += 1
            if tries > self.recipe.retries:
                if await self._serves_others(at_failure, run):
                    return self._failed(f"unanswered: {failure}, after {tries} {'try' if tries == 1 else 'tries'}")
                tries = 0  # the endpoint is at fault: wait for it, as long as patience lasts
                self._pause(failure, time.monotonic(), run)
            if not await run.wait(retry_wait_s(self.recipe.backoff_s, tries, failure.retry_after_s)):
                return None

    # ---------------------------------------------------------------- one attempt

    async def _send(self, request: Request, run: CallContext) -> Response:
        """Send a request once. `run.sent` holds its key from then until it is clear that nothing is billed.

        Raises:
            Failure: the request was refused, or a retry may help.
            EndpointError: no request would be answered.
        """
        structured = self._structured and request.schema is not None and not request.reply_start
        estimated_tokens = likely_prompt_tokens(request) + request.max_tokens
        outgoing = _endpoint_request(request, structured)
        async with self._limiter.slot(estimated_tokens, lambda: run.stopping):
            sent_at = time.monotonic()
            run.sent.add(request.key)
            try:
                reply = await self._endpoint.send(outgoing)
            except Failure as error:
                failure = error
            else:
                self._limiter.record_success()
                return self._response(request, reply, estimated_tokens)
        if not failure.billed or failure.status is not None:
            run.sent.discard(request.key)
            self._limiter.settle(estimated_tokens, 0)
        if structured and failure.is_about_schema:
            self._structured = False
            return await self._send(request, run)
        return self._without_reply(request, failure, sent_at, run)

    def _response(self, request: Request, reply: Reply, estimated_tokens: int) -> Response:
        """The response that a reply stands for, with its cost. Tokens that the endpoint does not count are the most possible."""
        prompt_tokens, written_tokens = reply.prompt_tokens, reply.completion_tokens
        if prompt_tokens is None:
            prompt_tokens = most_prompt_tokens(request)
        if written_tokens is None:
            written_tokens = min(len(reply.text.encode()), request.max_tokens)
        self._limiter.settle(estimated_tokens, prompt_tokens + written_tokens)
        cost_usd = self.prices.cost_usd(prompt_tokens, written_tokens)
        if failure := _failure_in(reply):
            return Response("failed", "", failure, prompt_tokens, written_tokens, cost_usd)
        reason = CUT_OFF if reply.finish_reason == "length" else ""
        return Response("ok", reply.text, reason, prompt_tokens, written_tokens, cost_usd)

    def _without_reply(self, request: Request, failure: Failure, sent_at: float, run: CallContext) -> Response:
        """The response to a request without a reply, where that is final. Raises as `_send` does."""
        if failure.kind == "unusable" or (failure.kind == "unreachable" and not self._served):
            raise self._endpoint.error(failure)
        if failure.kind == "too long":
            return Response("failed", reason=f"too long: {failure}", cost_usd=self.ceiling_usd(request))
        if failure.kind in ("overflow", "filtered"):
            self.backoff.record_success()  # it works, and says so
            kind = "context overflow" if failure.kind == "overflow" else "filtered"
            return Response("failed", reason=f"{kind}: {failure}")
        if failure.kind in ("busy", "unreachable"):
            self._pause(failure, sent_at, run)
        if failure.kind == "refused":
            raise failure
        self.backoff.record_failure()
        if (failing_s := self.backoff.failing_s()) > self._patience_s:
            raise EndpointError(
                f"{self._endpoint.name}: no reply for {failing_s:.0f} s, at last {failure}. See the server's log, and run "
                "again: answered requests are kept"
            )
        raise failure

    # ---------------------------------------------------------------- failures

    async def _serves_others(self, served: int, run: CallContext) -> bool:
        """Whether the endpoint has served anything since it had served so many, or serves a probe now."""
        async with self._probing:  # one at a time probes, then the others know
            if self._served > served:
                return True
            try:
                probe = await self._send(PROBE, run)
            except Failure:
                return False
            self._probe_cost_usd += probe.cost_usd
            return True

    def _failed(self, reason: str) -> Response:
        """A final failure. It bears the cost of the probes that it caused."""
        cost_usd, self._probe_cost_usd = self._probe_cost_usd, 0.0
        return Response("failed", reason=reason, cost_usd=cost_usd)

    def _pause(self, failure: Failure, sent_at: float, run: CallContext) -> None:
        """Send nothing for a while, and log a long pause."""
        is_new = self._limiter.record_busy(sent_at, failure.retry_after_s)
        if is_new and (pause_s := self.backoff.paused_until - time.monotonic()) >= _LONG_PAUSE_S:
            run.log(f"{self._endpoint.name}: {failure}. Nothing is sent for {pause_s:.0f} s")


def _endpoint_request(request: Request, structured: bool) -> EndpointRequest:
    fields: dict[str, Any] = {"max_tokens": request.max_tokens}
    if request.temperature is not None:
        fields["temperature"] = request.temperature
    if request.reply_start:
        fields |= {"add_generation_prompt": False, "continue_final_message": True}
    if structured:
        schema = {"name": request.stage, "schema": request.schema, "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return EndpointRequest(request.chat(), fields)


def _failure_in(reply: Reply) -> str:
    """Why a reply is of no use for the data set. Empty: it is of use."""
    if reply.finish_reason == "content_filter":
        return "filtered: the reply"
    if reply.text.strip():
        return ""
    return f"refused: {one_line(reply.refusal)}" if reply.refusal else f"empty: finish reason {reply.finish_reason!r}"
