"""Requests to the models of a synthesis, their responses, and the protocol of the clients that send them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

STAGES = ("meta_topics", "sub_topics", "instructions", "expand", "complex", "responses", "samples", "judge", "turns")
# Stages that a run may stop after, in the order of STAGES. `checks` includes the samples.
STOPS = ("meta_topics", "sub_topics", "instructions", "expand", "complex", "responses", "checks", "judge", "turns")
CUT_OFF = "length"  # reason of an `ok` response whose text ends at the token limit


@dataclass(frozen=True)
class Request:
    """One request to a model.

    Attributes:
        stage: one of `STAGES`, or `probe`: a test whether the model can be reached.
        item: id of the item that the request is for.
        role: name of the model in the recipe.
        model: name of the served model, or the folder. Empty: the role.
        messages: (role, content) pairs. The last one is the user's, or the assistant's: the start of the reply.
        sample: index of repeated samples of the same prompt.
        schema: JSON schema of the reply, for endpoints with structured output.
        temperature: sampling temperature. None: the endpoint's default, or greedy decoding for a local model.
        max_tokens: limit of the reply.
    """

    stage: str
    domain: str
    item: str
    role: str
    messages: tuple[tuple[str, str], ...]
    sample: int = 0
    schema: dict[str, Any] | None = field(default=None, compare=False)
    temperature: float | None = field(default=None, compare=False)
    max_tokens: int = field(default=1024, compare=False)
    model: str = ""

    @cached_property
    def key(self) -> str:
        """Hash of stage, model, messages and sample. Sampling settings are not part of it."""
        facts = json.dumps([self.stage, self.model or self.role, self.messages, self.sample])
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def reply_start(self) -> str:
        """The start of the reply that the prompt gives, or empty. A response holds only what the model wrote after it."""
        role, content = self.messages[-1]
        return content if role == "assistant" else ""

    def full_reply(self, text: str) -> str:
        """The text of a response with the start of the reply, which some endpoints repeat."""
        return text if text.startswith(self.reply_start) else self.reply_start + text

    def chat(self) -> list[dict[str, str]]:
        """The messages in the form that endpoints and chat templates take."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Response:
    """A reply, or a final failure.

    Attributes:
        reason: for a failure `KIND: DETAIL`, such as `context overflow: ...`. For a reply that reached the token limit
            `length`. Otherwise empty.
        cost_usd: cost of all tries, including those that broke off.
    """

    status: Literal["ok", "failed"]
    text: str = ""
    reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0

    @property
    def kind(self) -> str:
        """The reason without its detail, to count by."""
        return self.reason.partition(":")[0]


class CallContext(Protocol):
    """The run that a client works for.

    Attributes:
        sent: keys of the requests that were sent and may be billed.
        stopping: whether the run stops, so that nothing more should be sent.
    """

    sent: set[str]

    @property
    def stopping(self) -> bool: ...

    async def wait(self, seconds: float) -> bool:
        """Sleep. False: the run stops, so nothing should be retried."""

    def log(self, text: str) -> None:
        """Print one line beside the progress bar."""

    def reserve_retry(self, request: Request) -> bool:
        """Count the last try as spent, and set as much aside for another one. False: the budget may not last."""


class ModelClient(Protocol):
    """One model, used from one event loop at a time.

    Attributes:
        concurrency: number of calls of `answer` that may be under way at once.
        batch_size: number of requests per call.
    """

    concurrency: int
    batch_size: int

    def ceiling_usd(self, request: Request) -> float:
        """Dollars that one try of a request may cost at most."""

    async def open(self) -> None:
        """Open connections, inside the event loop."""

    async def close(self) -> None:
        """Close what `open` opened."""

    async def answer(self, requests: Sequence[Request], run: CallContext) -> Sequence[Response | None]:
        """The response to each request. None: it has to be sent again later.

        Raises:
            EndpointError: the model cannot answer any request.
        """
