"""Ask a model behind an OpenAI-compatible endpoint: several requests at once, retries, errors that say what to do."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.endpoint.recipe import OVERFLOW, EndpointRecipe
from ultrafuser.errors import ContextOverflowError, EndpointError, MissingExtraError, RequestError

MAX_FAILURES = 5  # requests in a row that were not served, retries included: then the endpoint counts as dead
MAX_WAIT_S = 60.0  # between two tries, unless the endpoint asks for another time
MAX_RETRY_AFTER_S = 600.0


class _Malformed(Exception):
    """A reply that is no chat completion."""


@dataclass(frozen=True)
class Request:
    """One question: messages, and what differs from the recipe's own settings."""

    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)  # fields of a chat completion; None: not sent


@dataclass(frozen=True)
class Reply:
    """What came back; `refusal` is what the endpoint itself says to that, `finish_reason` why the text ends."""

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Usage:
    """What was asked of an endpoint so far."""

    requests: int = 0
    replies: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class _Run:
    """One call of `ask_all`: whether to stop, and why."""

    stop: threading.Event = field(default_factory=threading.Event)
    fatal: EndpointError | None = None


class Endpoint:
    """A model behind an endpoint. May be asked from several threads.

    Raises:
        MissingExtraError: the `openai` package is not installed.
        EndpointError: the key holds what no header can.
    """

    def __init__(self, recipe: EndpointRecipe) -> None:
        try:
            import openai
        except ImportError:
            raise MissingExtraError("openai", "openai", "an OpenAI-compatible endpoint") from None
        self.recipe, self.usage = recipe, Usage()
        self.where = f"endpoint {recipe.base_url}, model {recipe.model!r}"
        self._client = openai.OpenAI(
            base_url=recipe.base_url,
            api_key=self._key() or "none",  # a local server wants none, the client wants one
            timeout=recipe.timeout_s,
            max_retries=0,
        )
        self._lock = threading.Lock()
        self._failures = 0  # in a row, over all calls

    def _key(self) -> str:
        name = self.recipe.api_key_env
        key = os.environ.get(name, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise self._error(EndpointError, f"the environment variable {name} holds blanks or letters that no key has",
                              "set it again")  # fmt: skip
        return key

    def ask(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Reply:
        """One question, one reply.

        Raises:
            EndpointError: the endpoint cannot be used: no such host or model, no access, nothing left to spend.
            RequestError: it did not serve this request: too long, refused as malformed, or unanswered after all retries.
        """
        reply = self._ask(Request(messages, options), threading.Event())
        assert reply is not None  # nobody stops it
        return reply

    def ask_all(self, requests: Sequence[Request]) -> Iterator[tuple[int, Reply | RequestError]]:
        """(index, reply or what went wrong) of each request, as they come, `concurrency` at a time.

        When the endpoint cannot be used, or `MAX_FAILURES` requests in a row were left unanswered, no more are asked;
        those under way still come, then the error is raised.
        """
        run = _Run()
        with ThreadPoolExecutor(self.recipe.concurrency) as pool:
            futures = {pool.submit(self._outcome, request, run): i for i, request in enumerate(requests)}
            try:
                for future in as_completed(futures):
                    if (outcome := future.result()) is not None:
                        yield futures[future], outcome
            finally:  # also when the caller goes no further, or is interrupted
                run.stop.set()
        if run.fatal is not None:
            raise run.fatal

    def _outcome(self, request: Request, run: _Run) -> Reply | RequestError | None:
        """What came of a request; None where it was given up because no more are asked."""
        try:
            outcome: Reply | EndpointError | None = self._ask(request, run.stop)
        except EndpointError as error:
            outcome = error
        if outcome is None:
            return None
        with self._lock:
            if fatal := self._fatal(outcome):
                run.fatal = run.fatal or fatal
                run.stop.set()
        return outcome if isinstance(outcome, Reply | RequestError) else None

    def _fatal(self, outcome: Reply | EndpointError) -> EndpointError | None:
        """The reason to ask no more, if there is one."""
        if isinstance(outcome, Reply | ContextOverflowError):  # it answers
            self._failures = 0
            return None
        if not isinstance(outcome, RequestError):
            return outcome
        self._failures += 1
        if self._failures < MAX_FAILURES:
            return None
        return EndpointError(f"{outcome}; {self._failures} requests in a row failed, so no more are asked")

    # ---------------------------------------------------------------- one request

    def _ask(self, request: Request, stop: threading.Event) -> Reply | None:
        """The reply; None when stopped before there was one."""
        import openai

        problem, wait_s = "", 0.0
        for number in range(self.recipe.retries + 1):
            if stop.wait(wait_s):
                return None
            try:
                return self._once(request)
            except openai.APIStatusError as error:
                if error.code == "content_filter":  # of the question; one of the reply comes as a finish reason
                    return Reply("", "content_filter")
                if error.status_code not in (408, 409, 429) and error.status_code < 500 or _is_spent(error):
                    raise self._status_error(error) from error
                problem, wait_s = f"status {error.status_code}: {_excerpt(error)}", self._wait_s(number, error.response)
            except openai.APITimeoutError:
                problem, wait_s = f"no reply within {self.recipe.timeout_s:g} s", self._wait_s(number)
            except openai.APIConnectionError as error:
                if self.usage.replies == 0 and _is_unreachable(error):
                    raise self._error(EndpointError, f"cannot be reached ({_cause(error)})", "check the address and that "
                                      "the server runs") from error  # fmt: skip
                problem, wait_s = f"the connection broke ({_cause(error)})", self._wait_s(number)
            except (openai.APIResponseValidationError, json.JSONDecodeError, _Malformed) as error:
                problem, wait_s = f"the reply is no chat completion ({_excerpt(error)})", self._wait_s(number)
        tries = f"{number + 1} {'try' if number == 0 else 'tries'}"
        raise self._error(RequestError, f"{problem}, after {tries}", "see the server's log, lower `concurrency`, or raise "
                          "`timeout_s` or `retries`")  # fmt: skip

    def _once(self, request: Request) -> Reply:
        recipe = self.recipe
        with self._lock:
            self.usage.requests += 1
        options = {"max_tokens": recipe.max_tokens, "temperature": recipe.temperature, **request.options}
        options[recipe.max_tokens_key] = options.pop("max_tokens")
        options["extra_body"] = {**recipe.extra_body, **options.get("extra_body", {})} or None
        messages: Any = list(request.messages)
        completion = self._client.chat.completions.create(
            model=recipe.model,
            messages=messages,
            **{key: value for key, value in options.items() if value is not None},
        )
        reply = _reply(completion)
        with self._lock:
            self.usage.replies += 1
            self.usage.prompt_tokens += reply.prompt_tokens
            self.usage.completion_tokens += reply.completion_tokens
        return reply

    def _wait_s(self, number: int, response: Any = None) -> float:
        """Seconds until the next try: what the endpoint asks for, or exponential back-off with jitter."""
        asked = "" if response is None else response.headers.get("retry-after", "")
        try:
            return min(max(float(asked), 0.0), MAX_RETRY_AFTER_S)
        except ValueError:  # none, or a date
            longest = min(self.recipe.backoff_s * 2**number, MAX_WAIT_S)
            return random.uniform(longest / 2, longest)

    # ---------------------------------------------------------------- errors in words

    def _status_error(self, error: Any) -> EndpointError:
        status, text = error.status_code, _excerpt(error)
        what = f"status {status}: {text}"
        if next_step := self.recipe.next_step(status):
            return self._error(EndpointError, what, next_step)
        if status == 429:
            return self._error(EndpointError, what, "this account has nothing left to spend; top it up and run again")
        if status == 413 or any(sign in f"{error.code} {text}".lower() for sign in OVERFLOW):
            return self._error(ContextOverflowError, f"context overflow, {what}", "lower `max_tokens`, shorten the "
                               "answers, or take a model with a longer context")  # fmt: skip
        return self._error(RequestError, what, "the endpoint does not take this request; `max_tokens_key`, `temperature` "
                           "and `extra_body` change what is sent")  # fmt: skip

    def _error(self, kind: type[EndpointError], what: str, next_step: str) -> EndpointError:
        return kind(f"{self.where}: {what}; {next_step}")


def _reply(completion: Any) -> Reply:
    """The first choice of a completion, checked: servers send all kinds of things with status 200."""
    choices = getattr(completion, "choices", None)
    choice = choices[0] if isinstance(choices, list) and choices else None
    message: Any = getattr(choice, "message", None)
    if not hasattr(message, "content"):
        raise _Malformed("it has no message")
    text = message.content or ""
    if not isinstance(text, str):
        raise _Malformed("its content is no text")
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half an emoji, where a limit cut it
    usage = getattr(completion, "usage", None)
    return Reply(
        text,
        getattr(choice, "finish_reason", None),
        getattr(message, "refusal", None) or None,
        getattr(usage, "prompt_tokens", None) or 0,
        getattr(usage, "completion_tokens", None) or 0,
    )


def _is_spent(error: Any) -> bool:
    return error.code == "insufficient_quota"


def _is_unreachable(error: BaseException) -> bool:
    """Whether no connection could be made at all (unknown host, refused, no route, bad certificate)."""
    return type(error.__cause__).__name__ == "ConnectError"  # of httpx, in whichever version the client uses


def _cause(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error.__cause__ or error).__name__


def _excerpt(error: Any) -> str:
    """The endpoint's own words, as one short line."""
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, Mapping) else None
    line = " ".join(str(text or getattr(error, "message", None) or error).split())
    return line if len(line) <= 300 else line[:297] + "..."
