"""What every stage of synthesis works with: how it asks, and who keeps the accounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.synth.asks import CUT_OFF, Ask, Outcome
from ultrafuser.synth.checks import Case
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.parsing import Unreadable
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import DomainRecipe, SynthRecipe

Look = Callable[[Sequence[Ask]], Mapping[str, Outcome]]
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

    def ask(
        self, stage: str, domain: DomainRecipe, item: str, prompt: str, values: Mapping[str, Any], **more: Any
    ) -> Ask:
        """A question of a stage, asked as the recipe says."""
        asked_as = self.recipe.asked_as(stage, prompt)
        call, role = self.recipe.call(asked_as), self.recipe.role(asked_as, domain)
        messages = self.prompts.messages(prompt, domain=domain, **values)
        return Ask(stage, domain.name, item, role, messages, temperature=call.temperature, max_tokens=call.max_tokens,
                   model=self.recipe.model(role).served, **more)  # fmt: skip

    def read(self, ask: Ask, outcome: Outcome | None, wanted: int = 1) -> str | None:
        """The reply; None where there is none, which the ledger then knows. Also counts what is asked for."""
        self.ledger.ask(ask.stage, ask.domain, wanted)
        if outcome is None:
            self.ledger.leave_open(ask.stage, ask.domain, wanted)
        elif outcome.status == "failed":
            self.ledger.reject(ask.stage, ask.domain, f"call failed: {outcome.kind}", outcome.reason, wanted)
        else:
            return ask.whole(outcome.text)
        return None

    def texts(self, asks: Sequence[Ask], read: Callable[[str], str | Unreadable]) -> Iterator[str | None]:
        """The text in each reply, of stages where a question asks for one text; it is not counted as kept yet."""
        outcomes = self.look(asks)
        for ask in asks:
            outcome = outcomes.get(ask.key)
            reply = self.read(ask, outcome)
            if reply is None or outcome is None:
                yield None
                continue
            text = read(reply)
            if isinstance(text, Unreadable):
                self.ledger.reject(ask.stage, ask.domain, text.reason, reply)
            elif outcome.reason == CUT_OFF:
                self.ledger.reject(ask.stage, ask.domain, "cut off", reply)
            else:
                yield text
                continue
            yield None
