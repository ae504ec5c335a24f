"""What every stage of synthesis works with: how it asks, and who keeps the accounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.synth.calls.request import CUT_OFF, Request, Response
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import DomainRecipe, SynthRecipe
from ultrafuser.synth.text.checks import Case
from ultrafuser.synth.text.parsing import Unreadable

Look = Callable[[Sequence[Request]], Mapping[str, Response]]
Test = Callable[[Sequence[Case]], Mapping[Case, str | None]]


@dataclass
class Run:
    """What every stage needs.

    Attributes:
        look: questions -> their outcomes by key; one that has none yet is left out.
        test: answers with tests -> why each is left out, None where the tests pass; one without a verdict yet is left out.
        ledger: what became of everything that was asked for.
    """

    recipe: SynthRecipe
    prompts: Prompts
    look: Look
    test: Test
    ledger: Ledger = field(default_factory=Ledger)

    def request(
        self, stage: str, domain: DomainRecipe, item: str, prompt: str, values: Mapping[str, Any], **more: Any
    ) -> Request:
        """A question of a stage, asked as the recipe says."""
        asked_as = self.recipe.asked_as(stage, prompt)
        call, role = self.recipe.call(asked_as), self.recipe.role(asked_as, domain)
        messages = self.prompts.messages(prompt, domain=domain, **values)
        return Request(stage, domain.name, item, role, messages, temperature=call.temperature, max_tokens=call.max_tokens,
                   model=self.recipe.model(role).served, **more)  # fmt: skip

    def read(self, request: Request, outcome: Response | None, wanted: int = 1) -> str | None:
        """The reply; None where there is none, which the ledger then knows. Also counts what is asked for."""
        self.ledger.request(request.stage, request.domain, wanted)
        if outcome is None:
            self.ledger.leave_open(request.stage, request.domain, wanted)
        elif outcome.status == "failed":
            self.ledger.reject(request.stage, request.domain, f"call failed: {outcome.kind}", outcome.reason, wanted)
        else:
            return request.whole(outcome.text)
        return None

    def texts(self, requests: Sequence[Request], read: Callable[[str], str | Unreadable]) -> Iterator[str | None]:
        """The text in each reply, of stages where a question asks for one text; it is not counted as kept yet."""
        outcomes = self.look(requests)
        for request in requests:
            outcome = outcomes.get(request.key)
            reply = self.read(request, outcome)
            if reply is None or outcome is None:
                yield None
                continue
            text = read(reply)
            if isinstance(text, Unreadable):
                self.ledger.reject(request.stage, request.domain, text.reason, reply)
            elif outcome.reason == CUT_OFF:
                self.ledger.reject(request.stage, request.domain, "cut off", reply)
            else:
                yield text
                continue
            yield None
