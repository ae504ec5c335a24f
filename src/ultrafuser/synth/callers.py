"""Who answers: what the scheduler wants of a model, and how a recipe's models become that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ultrafuser.synth.asks import Ask, Outcome
from ultrafuser.synth.recipe import ModelRecipe


class Run(Protocol):
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

    def say(self, text: str) -> None:
        """One line of news for whoever watches."""

    def pay_again(self, ask: Ask) -> bool:
        """Count what was sent as spent, and set as much aside for another try; False: the budget may not last."""


class Caller(Protocol):
    """One model, asked from within one event loop at a time.

    Attributes:
        concurrency: how many calls of `answer` may be under way at once.
        batch_size: asks that one such call takes.
    """

    concurrency: int
    batch_size: int

    def ceiling_usd(self, ask: Ask) -> float:
        """Dollars that one try of an ask may cost at most."""

    async def open(self) -> None:
        """Get ready, inside the event loop."""

    async def close(self) -> None:
        """Let go of what `open` took."""

    async def answer(self, asks: Sequence[Ask], run: Run) -> Sequence[Outcome | None]:
        """What came of each; None where it has to be asked again later.

        Raises:
            EndpointError: no ask would be answered.
        """


def make_callers(models: Iterable[ModelRecipe]) -> dict[str, Caller]:
    """Callers by the models' names; those behind one address and key are left alone together when it asks for that.

    Raises:
        MissingExtraError: a package is not installed.
        EndpointError: a key holds what no header can.
    """
    from ultrafuser.synth.endpoint_caller import EndpointCaller
    from ultrafuser.synth.local_caller import LocalCaller
    from ultrafuser.synth.pace import Health

    out: dict[str, Caller] = {}
    health: dict[Any, Health] = {}
    for model in models:
        if model.endpoint == "local":
            out[model.name] = LocalCaller(model)
        else:
            place = (model.endpoint.base_url, model.endpoint.api_key_env)
            out[model.name] = EndpointCaller(model, health.setdefault(place, Health(model.endpoint.backoff_s)))
    return out
