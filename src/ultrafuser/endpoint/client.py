"""The client of OpenAI-compatible endpoints: asynchronous for synthesis, synchronous for evaluation.

Plain requests by aiohttp: the `openai` package takes six times the processor time per call
(benchmarks/synth_throughput.py), which does not matter for a judge and does for a million replies.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ultrafuser.endpoint.errors import Failure, next_step, read_failure
from ultrafuser.endpoint.messages import Reply, Request, read_reply
from ultrafuser.endpoint.pace import retry_wait_s
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import ContextOverflowError, EndpointError, MissingExtraError, RequestError, hide_logins

MAX_REPLY_BYTES = 16 * 2**20  # a longer reply is of no use
MAX_FAILURES = 5  # requests in a row that were not served, retries included: then the endpoint counts as dead


@dataclass
class Usage:
    """Totals of an endpoint so far."""

    requests: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class AsyncEndpoint:
    """A model behind an endpoint, inside one event loop. Whoever calls it decides whether to retry.

    Raises:
        MissingExtraError: aiohttp is not installed.
        EndpointError: the key has characters that no header can hold.
    """

    def __init__(self, recipe: EndpointRecipe, *, extra: str = "endpoint", usage: Usage | None = None) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError:
            raise MissingExtraError("aiohttp", extra, "a model behind an endpoint") from None
        self.recipe, self.usage = recipe, usage or Usage()
        self.name = f"endpoint {recipe.base_url}, model {recipe.model!r}"
        self._url = f"{recipe.base_url}/chat/completions"
        address = urlsplit(self._url)
        self._proxy = None if proxy_bypass(address.netloc) else getproxies().get(address.scheme)
        self._headers = {"content-type": "application/json"}
        if not (recipe.key.isascii() and recipe.key.isprintable()):
            raise EndpointError(
                f"{self.name}: the environment variable {recipe.api_key_env} holds blanks or letters that no key has. "
                "Set it again"
            )
        if authorization := recipe.authorization():
            self._headers["authorization"] = authorization
        self._secrets = recipe.secrets()

    async def open(self) -> None:
        """Open the session, inside the event loop."""
        import aiohttp

        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300),
            timeout=aiohttp.ClientTimeout(total=self.recipe.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
        )

    async def close(self) -> None:
        """Close the session."""
        await self._session.close()

    async def send(self, request: Request) -> Reply:
        """Send a request once.

        Raises:
            Failure: there was no reply. Its kind says why, and whether a retry may help.
        """
        import aiohttp

        self.usage.requests += 1
        try:
            status, headers, body = await self._post(request.body(self.recipe))
        except asyncio.TimeoutError:
            raise Failure("transient", f"no reply within {self.recipe.timeout_s:g} s", billed=True) from None
        except aiohttp.ClientConnectorError as error:
            state = "any more " if self.usage.replies else ""
            raise Failure("unreachable", f"cannot be reached {state}({self._cause(error)})") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Failure("transient", f"the connection broke ({self._cause(error)})", billed=True) from error
        if status != 200:
            raise read_failure(status, body, headers)
        reply = read_reply(body)
        self.usage.replies += 1
        self.usage.prompt_tokens += reply.prompt_tokens or 0
        self.usage.completion_tokens += reply.completion_tokens or 0
        return reply

    async def _post(self, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers and body. Redirects are not followed, and a long body is not read to its end."""
        async with self._session.post(self._url, data=body, proxy=self._proxy, allow_redirects=False) as response:
            content = bytearray()
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > MAX_REPLY_BYTES:
                    response.close()
                    raise Failure("too long", f"a reply of more than {MAX_REPLY_BYTES:,} bytes", billed=True)
            text = bytes(content).decode("utf-8", "surrogateescape")
            return response.status, response.headers, self._without_secrets(text).encode("utf-8", "surrogateescape")

    def _cause(self, error: Exception) -> str:
        return self._without_secrets(hide_logins(str(error))) or type(error).__name__

    def _without_secrets(self, text: str) -> str:
        """What an endpoint sends is saved and shown, and some endpoints send the key back."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def error(
        self, failure: Failure, kind: type[EndpointError] = EndpointError, *, prefix: str = "", suffix: str = ""
    ) -> EndpointError:
        """A failure in words: the endpoint, the problem, and the next step."""
        problem = str(failure).rstrip(".")
        return kind(f"{self.name}: {prefix}{problem}{suffix}. {next_step(failure, self.recipe)}")


class Endpoint:
    """The synchronous face: sends many requests at once, and retries.

    Each call runs an event loop in a thread of its own, so that it also works inside a loop, as in a notebook.

    Raises:
        MissingExtraError: aiohttp is not installed.
        EndpointError: the key has characters that no header can hold.
    """

    def __init__(self, recipe: EndpointRecipe) -> None:
        self.recipe, self.usage = recipe, Usage()
        self.failures = 0  # in a row, over all calls
        self.name = self.client().name

    def client(self) -> AsyncEndpoint:
        """A client for one event loop."""
        return AsyncEndpoint(self.recipe, usage=self.usage)

    def ask_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | RequestError]]:
        """(index, reply or error) of each request as they come, `concurrency` at a time.

        When the endpoint cannot be used, or `MAX_FAILURES` requests in a row were left unanswered, no more are sent.
        Those in flight are still yielded, then the error is raised. A `RequestError` means that this request was not
        served: too long, refused, or unanswered after all retries.

        Raises:
            EndpointError: the endpoint cannot be used: no such host or model, no access, nothing left to spend.
        """
        batch = _Batch(self, requests)
        with ThreadPoolExecutor(1) as pool:
            finished = pool.submit(asyncio.run, batch.run())
            finished.add_done_callback(lambda _: batch.outcomes.put(None))
            try:
                while (outcome := batch.outcomes.get()) is not None:
                    yield outcome
                finished.result()
            finally:  # also when the caller goes no further, or is interrupted
                batch.cancel()


class _Batch:
    """One call of `ask_all`: its requests and outcomes, and whether to stop.

    Attributes:
        outcomes: (index, reply or error) for the thread that waits. None: the end.
    """

    def __init__(self, endpoint: Endpoint, requests: Sequence[Request]) -> None:
        self.endpoint, self.recipe, self.requests = endpoint, endpoint.recipe, requests
        self.outcomes: SimpleQueue[tuple[int, Reply | RequestError] | None] = SimpleQueue()
        self._started = threading.Event()
        self._stop = asyncio.Event()
        self._fatal: EndpointError | None = None

    async def run(self) -> None:
        """Ask all requests.

        Raises:
            EndpointError: the endpoint cannot be used, or is dead.
        """
        task = asyncio.current_task()
        assert task is not None
        self._loop, self._task = asyncio.get_running_loop(), task
        self._started.set()
        waiting = iter(enumerate(self.requests))
        client = self.endpoint.client()
        await client.open()
        try:
            workers = min(self.recipe.concurrency, len(self.requests))
            await asyncio.gather(*(self._work(client, waiting) for _ in range(workers)))
        finally:
            await client.close()
        if self._fatal is not None:
            raise self._fatal

    def cancel(self) -> None:
        """Give up what is in flight. Called from another thread, also after the end."""
        self._started.wait()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._task.cancel)

    async def _work(self, client: AsyncEndpoint, waiting: Iterator[tuple[int, Request]]) -> None:
        for index, request in waiting:
            if self._stop.is_set() or (outcome := await self._complete(client, request)) is None:
                return
            if fatal := self._fatal_error(outcome):
                self._fatal = self._fatal or fatal
                self._stop.set()
            if isinstance(outcome, Reply | RequestError):
                self.outcomes.put((index, outcome))

    async def _complete(self, client: AsyncEndpoint, request: Request) -> Reply | EndpointError | None:
        """The reply, or the error after all retries. None: stopped before there was either."""
        for attempt in range(1, self.recipe.retries + 2):
            try:
                return await client.send(request)
            except Failure as error:
                failure = error
            if outcome := _final_outcome(client, failure):
                return outcome
            if attempt <= self.recipe.retries:
                wait_s = retry_wait_s(self.recipe.backoff_s, attempt, failure.retry_after_s)
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), wait_s)
                    return None
        return client.error(failure, RequestError, suffix=f", after {attempt} {'try' if attempt == 1 else 'tries'}")

    def _fatal_error(self, outcome: Reply | EndpointError) -> EndpointError | None:
        """The reason to send no more, if there is one."""
        if isinstance(outcome, Reply | ContextOverflowError):  # it answers
            self.endpoint.failures = 0
            return None
        if not isinstance(outcome, RequestError):
            return outcome
        self.endpoint.failures += 1
        if self.endpoint.failures < MAX_FAILURES:
            return None
        return EndpointError(f"{outcome}. {self.endpoint.failures} requests in a row failed, so no more are sent")


def _final_outcome(client: AsyncEndpoint, failure: Failure) -> Reply | EndpointError | None:
    """What a failure amounts to. None: worth a retry."""
    served = client.usage.replies > 0
    if failure.kind == "filtered":  # the prompt. A filtered reply has it as its finish reason
        return Reply("", "content_filter")
    if failure.kind == "overflow":
        return client.error(failure, ContextOverflowError, prefix="context overflow, ")
    if failure.kind == "unusable" or (failure.kind == "unreachable" and not served):
        return client.error(failure)
    if failure.kind == "refused":
        return client.error(failure, EndpointError if failure.status == 403 and not served else RequestError)
    return client.error(failure, RequestError) if failure.kind == "too long" else None
