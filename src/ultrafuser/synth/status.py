"""How far a synthesis is: items and yield of every stage, calls, money, time left. Reads the store and asks nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ultrafuser.synth.calls.store import CallStore
from ultrafuser.synth.output.dataset import DataSet
from ultrafuser.synth.pipeline import STORE, derive, stored, verdicts
from ultrafuser.synth.plan import PlannedStage, plan
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import SynthRecipe

PACE_WINDOW_S = 600.0  # of the calls that the time left is reckoned from


@dataclass(frozen=True)
class StageStatus:
    """A stage over all domains.

    Attributes:
        planned: calls that the recipe was to make if every reply could be used.
        answered, failed: calls so far.
        asked, kept, open, rejected: items so far; yield: kept of those decided.
    """

    stage: str
    planned: int
    answered: int
    failed: int
    asked: int
    kept: int
    open: int
    rejected: int
    reasons: dict[str, int]
    usd: float

    @property
    def share_kept(self) -> float | None:
        """Kept of those that are decided; None: none is."""
        decided = self.kept + self.rejected
        return self.kept / decided if decided else None


@dataclass(frozen=True)
class Status:
    """A synthesis so far.

    Attributes:
        rows: of each domain, if it ended now; near duplicates are not looked for.
        left_usd: what the planned calls that are missing may cost, estimated.
        left_s: until these are answered, at the pace of the last minutes; None where nothing was answered then.
    """

    stages: list[StageStatus]
    rows: dict[str, int]
    calls: int
    left_calls: int
    under_way: int
    spent_usd: float
    left_usd: float
    left_s: float | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Calls:
    """What the store alone says of a synthesis, at once however large it is; `a_second`: over the last minutes."""

    answered: int
    under_way: int
    spent_usd: float
    a_second: float | None


def calls(recipe: SynthRecipe) -> Calls:
    """The calls in the recipe's store.

    Raises:
        DataError: as of `status`.
    """
    with CallStore(Path(recipe.output) / STORE, shared=True) as store:
        return _calls(store)


def _calls(store: CallStore) -> Calls:
    answered = sum(count.calls for count in store.counts())
    return Calls(answered, store.under_way(), store.spent_usd(), store.calls_per_second(PACE_WINDOW_S))


def status(recipe: SynthRecipe) -> Status:
    """What is in the recipe's store; every item is derived from it, which takes minutes for hundreds of thousands of answers.

    Raises:
        DataError: there is no store yet, or it cannot be read.
    """
    prompts = Prompts(recipe.prompts)
    quick = recipe.filters.model_copy(update={"near_duplicates": None})  # sketches of all rows would take too long
    recipe = recipe.model_copy(update={"filters": quick})
    with CallStore(Path(recipe.output) / STORE, shared=True) as store:
        data = derive(recipe, prompts, stored(store), test=partial(verdicts, store), reviews=store.reviews.all())
        return _summary(plan(recipe, prompts), data, store)


def _summary(planned: Sequence[PlannedStage], data: DataSet, store: CallStore) -> Status:
    counts = store.counts()
    names = list(dict.fromkeys([one["stage"] for one in data.ledger.rows()] + [one.stage for one in planned]))
    stages = []
    left_calls, left_usd = 0, 0.0
    for name in names:
        own = [count for count in counts if count.stage == name]
        wanted = [one for one in planned if one.stage == name]
        entries = [entry for (stage, _), entry in data.ledger.entries.items() if stage == name]
        answered = sum(count.calls for count in own)
        calls = sum(one.calls for one in wanted)
        missing = max(0, calls - answered) if _is_open(name, data) else 0
        left_calls += missing
        left_usd += missing * sum(one.usd for one in wanted) / calls if calls else 0.0
        reasons = data.ledger.reasons(name)
        stages.append(StageStatus(
            name, calls, answered, sum(count.calls for count in own if count.status == "failed"),
            sum(one.asked for one in entries), sum(one.kept for one in entries), sum(one.open for one in entries),
            reasons.total(), dict(reasons.most_common()), sum(count.usd for count in own),
        ))  # fmt: skip
    so_far = _calls(store)
    return Status(
        stages=stages,
        rows=dict(sorted(Counter(row.domain for row in data.rows).items())),
        calls=so_far.answered,
        left_calls=left_calls,
        under_way=so_far.under_way,
        spent_usd=so_far.spent_usd,
        left_usd=left_usd,
        left_s=left_calls / so_far.a_second if so_far.a_second else None,
    )


def _is_open(stage: str, data: DataSet) -> bool:
    """Whether a stage may have calls left to make: it has open items, or a stage before it has."""
    seen_open = False
    for entry in data.ledger.rows():
        seen_open = seen_open or entry["open"] > 0
        if entry["stage"] == stage:
            return seen_open or entry["open"] > 0
    return data.ledger.open() > 0  # not reached yet
