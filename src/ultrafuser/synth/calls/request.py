"""What is asked of a model in synthesis, and what came of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

STAGES = ("meta_topics", "sub_topics", "instructions", "expand", "complex", "responses", "samples", "judge", "turns")
# Where a run may stop to be looked at: each after the stage of the same place; checks are over with the samples.
STOPS = ("meta_topics", "sub_topics", "instructions", "expand", "complex", "responses", "checks", "judge", "turns")
CUT_OFF = "length"  # the reason of an `ok` outcome whose text ends at the limit of tokens


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        stage: what it is for, one of `STAGES`, or `probe`: whether the model can be asked at all.
        item: id of the item that it is asked for.
        role: name in the recipe of the model that answers.
        model: what that name stood for when the question was asked: the model served, or the folder; empty: the role.
        messages: (role, content) pairs, the last one a user's, or the assistant's: the beginning of the reply.
        sample: the n-th draw of the same question.
        schema: a JSON schema of the reply, for endpoints that keep to one.
        temperature: of the sampling; None: the endpoint's; a local model then takes the likeliest token.
        max_tokens: of the reply at most.
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
        """The name of the question: equal questions to one model have equal keys, however it is set to answer."""
        facts = json.dumps([self.stage, self.model or self.role, self.messages, self.sample])
        return hashlib.sha256(facts.encode()).hexdigest()

    @property
    def begun(self) -> str:
        """The beginning of the reply, where the question gives one; an outcome holds what the model wrote after it."""
        role, content = self.messages[-1]
        return content if role == "assistant" else ""

    def whole(self, text: str) -> str:
        """The reply with its beginning, which some endpoints repeat."""
        return text if text.startswith(self.begun) else self.begun + text

    def chat(self) -> list[dict[str, str]]:
        """The messages as endpoints and chat templates take them."""
        return [{"role": role, "content": content} for role, content in self.messages]


@dataclass(frozen=True)
class Response:
    """What came of a question: a reply, or a failure that is final.

    Attributes:
        reason: of a failure, `KIND: DETAIL`, such as `context overflow: ...`; of a reply that reached the limit of
            tokens, `length`; otherwise empty.
        cost_usd: of all tries, those that broke off included.
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
    """What a caller may use of the run that it works for.

    Attributes:
        sent: keys of the asks that were sent and may be billed, whatever comes back.
        stopping: whether the run ends, so that nothing more should be sent.
    """

    sent: set[str]

    @property
    def stopping(self) -> bool: ...

    async def wait(self, seconds: float) -> bool:
        """Sleep; False: the run ends, so nothing should be tried again."""

    def log(self, text: str) -> None:
        """One line of news for whoever watches."""

    def reserve_retry(self, request: Request) -> bool:
        """Count what was sent as spent, and set as much aside for another try; False: the budget may not last."""


class ModelClient(Protocol):
    """One model, asked from within one event loop at a time.

    Attributes:
        concurrency: how many calls of `answer` may be under way at once.
        batch_size: asks that one such call takes.
    """

    concurrency: int
    batch_size: int

    def ceiling_usd(self, request: Request) -> float:
        """Dollars that one try of an ask may cost at most."""

    async def open(self) -> None:
        """Get ready, inside the event loop."""

    async def close(self) -> None:
        """Let go of what `open` took."""

    async def answer(self, requests: Sequence[Request], run: CallContext) -> Sequence[Response | None]:
        """What came of each; None where it has to be asked again later.

        Raises:
            EndpointError: no ask would be answered.
        """
