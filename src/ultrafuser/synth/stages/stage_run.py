"""The state that all stages share: how they make requests, get responses, and account for every item."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ultrafuser.synth.calls.request import CUT_OFF, Request, Response
from ultrafuser.synth.ledger import Ledger
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import DomainRecipe, SynthRecipe
from ultrafuser.synth.text.checks import Case
from ultrafuser.synth.text.parsing import Unreadable

T = TypeVar("T")
Lookup = Callable[[Sequence[Request]], Mapping[str, Response]]
TestRunner = Callable[[Sequence[Case]], Mapping[Case, str | None]]


@dataclass
class StageRun:
    """What every stage needs.

    Attributes:
        get_responses: requests -> their responses by key. A request without a response is left out.
        run_tests: answers with tests -> why each is rejected, None if the tests pass. A case without a verdict is left out.
        ledger: counts of the items that were asked for, kept and rejected.
    """

    recipe: SynthRecipe
    prompts: Prompts
    get_responses: Lookup
    run_tests: TestRunner
    ledger: Ledger = field(default_factory=Ledger)

    def request(
        self,
        stage: str,
        domain: DomainRecipe,
        item: str,
        prompt: str,
        values: Mapping[str, Any],
        *,
        sample: int = 0,
        schema: dict[str, Any] | None = None,
    ) -> Request:
        """A request of a stage, with the model and settings of the recipe."""
        call, role = self.recipe.settings(stage, prompt, domain)
        return Request(
            stage,
            domain.name,
            item,
            role,
            self.prompts.messages(prompt, domain=domain, **values),
            sample=sample,
            schema=schema,
            temperature=call.temperature,
            max_tokens=call.max_tokens,
            model=self.recipe.model(role).served,
        )

    def read(self, request: Request, response: Response | None, count: int = 1) -> str | None:
        """The text of a response. None: there is no text. The ledger counts the items asked for, and why there are none."""
        self.ledger.request(request.stage, request.domain, count)
        if response is None:
            self.ledger.mark_pending(request.stage, request.domain, count)
        elif response.status == "failed":
            self.ledger.reject(request.stage, request.domain, f"call failed: {response.kind}", response.reason, count)
        else:
            return request.full_reply(response.text)
        return None

    def texts(
        self,
        items: Sequence[T],
        requests: Sequence[Request],
        read: Callable[[str], str],
        check: Callable[[T, str], str | None] = lambda item, text: None,
    ) -> Iterator[tuple[T, str]]:
        """Each item with the text of its response, for stages with one text per request. Unusable texts are left out.

        Args:
            read: reply -> text.
            check: item, text -> why the text is rejected. None: it is kept.
        """
        responses = self.get_responses(requests)
        for item, request in zip(items, requests, strict=True):
            response = responses.get(request.key)
            reply = self.read(request, response)
            if reply is None or response is None:
                continue
            try:
                text = read(reply)
            except Unreadable as error:
                self.ledger.reject(request.stage, request.domain, str(error), reply)
                continue
            if response.reason == CUT_OFF:
                self.ledger.reject(request.stage, request.domain, "cut off", reply)
            elif self.ledger.settle(request.stage, request.domain, check(item, text), text):
                yield item, text
