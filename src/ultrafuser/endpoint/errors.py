"""Why an endpoint did not answer: the kinds of failure, what each means for a retry, and what to do about it."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from ultrafuser.endpoint.recipe import EndpointRecipe

# What endpoints write when prompt and reply together are too long.
_OVERFLOW = ("context length", "context window", "context size", "context_length_exceeded", "prompt is too long")
_SCHEMA = ("response_format", "json_schema", "json schema", "structured", "guided", "schema")
_FILTERED = ("content_filter", "content_policy_violation")
_SPENT = ("insufficient_quota", "billing_hard_limit_reached")
MALFORMED = "malformed"  # our code of a reply that is no chat completion

Kind = Literal[
    "unusable",  # no key, no such model or address, nothing left to spend: every request would fail
    "unreachable",  # no connection could be made
    "busy",  # the endpoint has too much to do, which is no fault of the request
    "transient",  # a timeout, a cut connection, an unreadable reply, a server error: worth a retry
    "overflow",  # prompt and reply are longer than the model's context
    "filtered",  # a content filter objects to the prompt
    "too long",  # the reply has more bytes than any useful one
    "refused",  # the endpoint does not accept this request
]


class Failure(Exception):
    """One attempt that brought no reply.

    Attributes:
        kind: what the failure means, and so whether to retry.
        billed: whether the endpoint may charge for the attempt.
        status: of the response, if there was one.
        code: the endpoint's machine-readable code or type, if it sends one.
        retry_after_s: seconds that the endpoint asks to wait. None: it does not say.
    """

    def __init__(
        self,
        kind: Kind,
        problem: str,
        *,
        billed: bool = False,
        status: int | None = None,
        code: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(problem)
        self.kind, self.billed, self.status, self.code = kind, billed, status, code
        self.retry_after_s = retry_after_s

    @property
    def is_spent(self) -> bool:
        """Whether the account has no money left."""
        return self.status == 402 or self.code in _SPENT

    @property
    def is_about_schema(self) -> bool:
        """Whether the endpoint has no structured output, or not for this schema."""
        return self.status in (400, 404, 422, 501) and _mentions(f"{self.code} {self}", _SCHEMA)


def next_step(failure: Failure, recipe: EndpointRecipe) -> str:
    """What the user can do about a failure, as a sentence without its full stop."""
    if failure.kind == "unreachable":
        return "Check the address and that the server runs"
    if failure.kind in ("overflow", "too long"):
        return "Lower `max_tokens`, shorten the answers, or take a model with a longer context"
    if failure.code == MALFORMED:
        return (
            "Check that `base_url` is the address of a chat completions API, see the server's log, or raise `retries`"
        )
    if failure.status is None or failure.kind in ("transient", "busy"):
        return "See the server's log, lower `concurrency`, or raise `timeout_s` or `retries`"
    if failure.is_spent:
        return "This account has nothing left to spend. Top it up and run again"
    if access := recipe.next_step(failure.status):
        return access
    if 300 <= failure.status < 400:
        return "The endpoint has moved. Set `base_url` to its new address"
    return "The endpoint does not accept such requests. `max_tokens_key`, `temperature` and `extra_body` change what is sent"


def read_failure(status: int, body: bytes, headers: Mapping[str, str] | None = None) -> Failure:
    """The failure that a response of another status than 200 stands for, in the endpoint's own words.

    They come in one of the usual shapes, or as the beginning of a page.
    """
    text = body.decode("utf-8", "replace")
    try:
        tree: Any = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    message, code = _words(tree, text)
    return Failure(
        _kind(status, code, message),
        f"status {status}: {message}",
        billed=status == 504,  # a gateway's timeout: the model was at work
        status=status,
        code=code,
        retry_after_s=retry_after_s(headers or {}),
    )


def read_error(tree: dict[str, Any]) -> Failure:
    """The failure that an error in a response of status 200 stands for. Its code may be a status."""
    message, code = _words(tree, json.dumps(tree.get("error") or tree, ensure_ascii=False))
    status = int(code) if re.fullmatch("[45][0-9]{2}", code) else None
    kind = _kind(status or 400, code, message)
    if status is None and kind == "refused":
        kind = "transient"
    return Failure(
        kind, f"the reply is no chat completion (no message in it: {message})", billed=True, status=status, code=code
    )


def _words(tree: Any, text: str) -> tuple[str, str]:
    """The endpoint's own words in one of the usual shapes, and its code. Without any, the beginning of the text."""
    error = (tree.get("error") or tree) if isinstance(tree, dict) else None
    fields = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else None}
    message = one_line(str(fields.get("message") or fields.get("detail") or text or "no words"))
    return message, str(fields.get("code") or fields.get("type") or "")


def _kind(status: int, code: str, message: str) -> Kind:
    if status in (401, 402) or code in _SPENT or 300 <= status < 400:
        return "unusable"
    if status in (429, 503, 529):
        return "busy"
    if status == 413 or (status < 500 and _mentions(f"{code} {message}", _OVERFLOW)):
        return "overflow"
    if code in _FILTERED:
        return "filtered"
    if status == 404:
        return "unusable"
    return "transient" if status in (408, 409) or status >= 500 else "refused"


def _mentions(text: str, signs: tuple[str, ...]) -> bool:
    return any(sign in text.lower() for sign in signs)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait: milliseconds, seconds or a date. None: it does not say."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if seconds == seconds:  # not NaN
            return max(seconds, 0.0)
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):  # no header, or in no known form
        return None


def one_line(text: str) -> str:
    """The beginning of a text as one line of at most 300 characters."""
    line = " ".join(text[:2000].split())
    return line if len(line) <= 300 else line[:297] + "..."
