"""What an evaluation measures: suites, benchmarks, and the options of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ultrafuser.data.sources import OnBadRow
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import DataError
from ultrafuser.evaluate.lm.load import LoadOptions
from ultrafuser.evaluate.tasks import SUITES as TASK_SUITES
from ultrafuser.evaluate.tasks import TaskOptions

LOSSES = {"loss": ("text", "code", "math"), "mixed": ("mixed",)}  # with the domains of the zoo's test rows
JUDGED = ("alpaca_eval", "mt_bench")
SUITES = {
    "quick": ["loss"],
    **TASK_SUITES,
    "paper": [*TASK_SUITES["paper"], "alpaca_eval"],
    "mt-bench": ["mt_bench"],
}


@dataclass
class EvalOptions:
    """What to measure, and how.

    Attributes:
        benchmarks: `loss`, `mixed`, our tasks, `alpaca_eval`, `mt_bench`.
        required: benchmarks that were named one by one. An endpoint cannot score given text, so a benchmark that needs it
            is an error if it is required, and is skipped otherwise.
        data: files with the rows for `loss` and `mixed`. Empty: the zoo's test rows.
        on_bad_row: what to do with a row of `data` that cannot be used.
        limit: rows of each domain and documents of each task, the same for all models. None: all.
        seed: of the rows drawn for the limit, of sampling and of the intervals.
        judge: the endpoint that judges `alpaca_eval` and `mt_bench`.
    """

    benchmarks: Sequence[str]
    required: Sequence[str] = ()
    data: Sequence[str] = ()
    on_bad_row: OnBadRow = "stop"
    limit: int | None = None
    seed: int = 0
    judge: EndpointRecipe | None = None
    task_options: TaskOptions = field(default_factory=TaskOptions)
    load_options: LoadOptions = field(default_factory=LoadOptions)

    @property
    def tasks(self) -> list[str]:
        """The benchmarks that lm-eval runs."""
        return [name for name in self.benchmarks if name not in LOSSES and name not in JUDGED]


def select_benchmarks(suites: Sequence[str], tasks: Sequence[str], *, has_judge: bool) -> tuple[list[str], list[str]]:
    """The benchmarks of suites and tasks without repeats, and those skipped because there is no judge.

    Raises:
        DataError: an unknown suite, no benchmark at all, or a judged benchmark named in `tasks` without a judge.
    """
    for suite in suites:
        if suite not in SUITES:
            raise DataError(f"unknown suite {suite!r}. There are: {', '.join(SUITES)}")
    requested = list(dict.fromkeys([*(name for suite in suites for name in SUITES[suite]), *tasks]))
    if not requested:
        raise DataError("nothing to measure. Give --suite or --tasks")
    skipped = [] if has_judge else [name for name in requested if name in JUDGED]
    benchmarks = [name for name in requested if name not in skipped]
    if not benchmarks or any(name in tasks for name in skipped):
        raise DataError(f"{skipped[0]} needs a judge. Give --judge NAME@URL, any OpenAI-compatible endpoint")
    return benchmarks, skipped
