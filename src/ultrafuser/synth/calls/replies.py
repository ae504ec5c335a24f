"""What an OpenAI-compatible endpoint sent back, read with care: servers send all kinds of things."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from ultrafuser.endpoint.recipe import OVERFLOW
from ultrafuser.synth.calls.request import CUT_OFF, Response

_SCHEMA = ("response_format", "json_schema", "json schema", "structured", "guided", "schema")


class Malformed(Exception):
    """A reply that is no chat completion."""


@dataclass(frozen=True)
class Completion:
    """A chat completion; tokens are None where the endpoint does not count them."""

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def outcome(self, prompt_tokens: int, completion_tokens: int, cost_usd: float) -> Response:
        """What it is for the data set."""
        if self.finish_reason == "content_filter":
            failure = "filtered: the reply"
        elif self.refusal and not self.text.strip():
            failure = f"refused: {_one_line(self.refusal)}"
        elif not self.text.strip():
            failure = f"empty: finish reason {self.finish_reason!r}"
        else:
            reason = CUT_OFF if self.finish_reason == "length" else ""
            return Response("ok", self.text, reason, prompt_tokens, completion_tokens, cost_usd)
        return Response("failed", "", failure, prompt_tokens, completion_tokens, cost_usd)


def read_completion(body: bytes) -> Completion:
    """The first choice of a completion.

    Raises:
        Malformed: it is none.
    """
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"no JSON: {_one_line(body.decode('utf-8', 'replace'))!r}") from error
    tree = tree if isinstance(tree, dict) else {}
    choices: Any = tree.get("choices")
    choice: Any = choices[0] if isinstance(choices, list) and choices else {}
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or "content" not in message:
        raise Malformed(f"no message in it: {_one_line(body.decode('utf-8', 'replace'))!r}")
    text, refusal = message["content"] or "", message.get("refusal")
    if not isinstance(text, str):
        raise Malformed("its content is no text")
    usage: Any = tree.get("usage") or {}
    usage = usage if isinstance(usage, dict) else {}
    return Completion(text, _text(choice.get("finish_reason")), _text(refusal), _number(usage.get("prompt_tokens")),
                      _number(usage.get("completion_tokens")))  # fmt: skip


@dataclass(frozen=True)
class Refusal:
    """An endpoint's answer with another status than 200, in its own words."""

    status: int
    message: str
    code: str

    def __str__(self) -> str:
        return f"status {self.status}: {self.message}"

    @property
    def is_overflow(self) -> bool:
        """Whether prompt and reply together are longer than the model's context."""
        return self.status == 413 or (self.status < 500 and self._speaks_of(OVERFLOW))

    @property
    def is_filter(self) -> bool:
        """Whether a content filter took exception to the question."""
        return self.code in ("content_filter", "content_policy_violation")

    @property
    def is_about_schema(self) -> bool:
        """Whether the endpoint has no structured output, or not for such a schema."""
        return self.status in (400, 404, 422, 501) and self._speaks_of(_SCHEMA)

    @property
    def is_spent(self) -> bool:
        """Whether the account has nothing left."""
        return self.status == 402 or self.code in ("insufficient_quota", "billing_hard_limit_reached")

    def _speaks_of(self, signs: tuple[str, ...]) -> bool:
        return any(sign in f"{self.code} {self.message}".lower() for sign in signs)


def read_refusal(status: int, body: bytes) -> Refusal:
    """The endpoint's words in whichever of the usual shapes, or the beginning of its page."""
    text = body.decode("utf-8", "replace")
    try:
        tree: Any = json.loads(text)
    except (ValueError, RecursionError):
        tree = None
    error = tree.get("error", tree) if isinstance(tree, dict) else None
    found = error if isinstance(error, dict) else {"message": error if isinstance(error, str) else None}
    message = found.get("message") or found.get("detail") or text or "no words"
    return Refusal(status, _one_line(str(message)), str(found.get("code") or found.get("type") or ""))


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to be left alone for; None: it does not say."""
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if seconds == seconds:  # no NaN
            return max(seconds, 0.0)
    try:
        return max(parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):  # none, or in no known form
        return None


def _one_line(text: str) -> str:
    line = " ".join(text[:2000].split())
    return line if len(line) <= 300 else line[:297] + "..."


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _number(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
