"""Status of a synthesis: items and yield of every stage, calls, cost, time left. It reads the store and makes no requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ultrafuser.synth.calls.store import CallStore, Count
from ultrafuser.synth.output.dataset import DataSet
from ultrafuser.synth.pipeline import STORE, derive, stored_responses, stored_verdicts
from ultrafuser.synth.plan import PlannedStage, plan
from ultrafuser.synth.prompts import Prompts
from ultrafuser.synth.recipe import SynthRecipe

PACE_WINDOW_S = 600.0  # the time left is estimated from the calls of these seconds


@dataclass(frozen=True)
class StageStatus:
    """A stage over all domains.

    Attributes:
        planned: calls that the recipe makes if every reply is usable.
        answered, failed: calls so far.
        asked, kept, open, rejected: items so far. `open`: without a response.
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
        """Kept items as a share of kept and rejected ones. None: there are none."""
        decided = self.kept + self.rejected
        return self.kept / decided if decided else None


@dataclass(frozen=True)
class Status:
    """A synthesis so far.

    Attributes:
        rows: rows of each domain if the run ended now, near duplicates included.
        left_usd: estimated cost of the planned calls that are missing.
        left_s: estimated time for them, at the pace of the last minutes. None: nothing was answered then.
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
    """Totals of the store, which are fast to read at any size. `a_second`: over the last minutes."""

    answered: int
    under_way: int
    spent_usd: float
    a_second: float | None


def calls(recipe: SynthRecipe) -> Calls:
    """The calls in the recipe's store.

    Raises:
        DataError: as for `status`.
    """
    with CallStore(Path(recipe.output) / STORE, shared=True) as store:
        return _calls(store)


def _calls(store: CallStore) -> Calls:
    answered = sum(count.calls for count in store.counts())
    return Calls(answered, store.under_way(), store.spent_usd(), store.calls_per_second(PACE_WINDOW_S))


def status(recipe: SynthRecipe) -> Status:
    """Items and calls so far. Every item is derived again, which takes minutes for hundreds of thousands of responses.

    Raises:
        DataError: there is no store yet, or it cannot be read.
    """
    prompts = Prompts(recipe.prompts)
    filters = recipe.filters.model_copy(update={"near_duplicates": None})  # sketches of all rows take too long
    recipe = recipe.model_copy(update={"filters": filters})
    with CallStore(Path(recipe.output) / STORE, shared=True) as store:
        get_responses, run_tests = partial(stored_responses, store), partial(stored_verdicts, store)
        data = derive(recipe, prompts, get_responses, run_tests=run_tests, reviews=store.reviews.all())
        return _summary(plan(recipe, prompts), data, store)


def _summary(planned: Sequence[PlannedStage], data: DataSet, store: CallStore) -> Status:
    counts = store.counts()
    names = dict.fromkeys([row["stage"] for row in data.ledger.rows()] + [stage.stage for stage in planned])
    stages = []
    left_calls, left_usd = 0, 0.0
    for name in names:
        stage_plan = [stage for stage in planned if stage.stage == name]
        stage = _stage_status(name, stage_plan, data, [count for count in counts if count.stage == name])
        missing = max(0, stage.planned - stage.answered) if _may_have_calls_left(name, data) else 0
        left_calls += missing
        if stage.planned:
            left_usd += missing * sum(domain.usd for domain in stage_plan) / stage.planned
        stages.append(stage)
    rows = dict(sorted(Counter(row.domain for row in data.rows).items()))
    so_far = _calls(store)
    left_s = left_calls / so_far.a_second if so_far.a_second else None
    totals = (so_far.answered, left_calls, so_far.under_way, so_far.spent_usd)
    return Status(stages, rows, *totals, left_usd, left_s)


def _stage_status(name: str, planned: Sequence[PlannedStage], data: DataSet, counts: Sequence[Count]) -> StageStatus:
    entries = [entry for (stage, _), entry in data.ledger.entries.items() if stage == name]
    reasons = data.ledger.reasons(name)
    return StageStatus(
        stage=name,
        planned=sum(domain.calls for domain in planned),
        answered=sum(count.calls for count in counts),
        failed=sum(count.calls for count in counts if count.status == "failed"),
        asked=sum(entry.asked for entry in entries),
        kept=sum(entry.kept for entry in entries),
        open=sum(entry.pending for entry in entries),
        rejected=reasons.total(),
        reasons=dict(reasons.most_common()),
        usd=sum(count.usd for count in counts),
    )


def _may_have_calls_left(stage: str, data: DataSet) -> bool:
    """Whether the stage, or an earlier one, has pending items."""
    has_pending = False
    for row in data.ledger.rows():
        has_pending = has_pending or row["open"] > 0
        if row["stage"] == stage:
            break
    return has_pending
