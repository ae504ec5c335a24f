"""Best of K: every specialist answers, and one of the answers is chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ultrafuser.compare.systems.node import SystemNode

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace


class BestOf(SystemNode):
    """All specialists, and a rule or a judge that chooses."""

    kind_label: ClassVar[str] = "best of n"
    description: ClassVar[str] = "Every specialist answers, and a judge picks an answer. It has no loss."

    kind: Literal["best_of"] = Field(description="All specialists answer, and one answer is chosen.")
    by: Literal["log_prob", "judge"] = Field(
        default="log_prob", description="Choose by mean log-probability, or by the judge."
    )

    @property
    def default_name(self) -> str:
        return f"best_of-{self.by}"

    @property
    def asks_judge(self) -> bool:
        return self.by == "judge"

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import LoadedSystem, recall_answers, specialist_sizes
        from ultrafuser.compare.systems.best_of_lm import BestOfLM, choices
        from ultrafuser.endpoint.client import Endpoint
        from ultrafuser.evaluate.judged.judge import Judge

        judge, settings = None, workspace.settings
        if self.asks_judge:
            assert settings.judge is not None  # checked as the recipe was read
            judge = Judge(Endpoint(settings.judge), workspace.answers("judgements"), seed=settings.seed)
        model, renderer = workspace.load_all()
        specialists, tokenizer = workspace.split(model, renderer), renderer.tokenizer
        chooser = judge.identity if judge is not None else "log-probability"
        fingerprint = f"best of {workspace.build_key(self.id)} by {chooser}"
        store = workspace.answers(fingerprint)
        total, _ = specialist_sizes(model)
        return LoadedSystem(
            lm=BestOfLM(recall_answers(workspace, specialists), tokenizer, judge, store),
            fingerprint=fingerprint,
            parameters={"total": total, "active": total},
            read_test_rows=None,  # a choice among answers gives no likelihood to a reference answer
            timed_lm=BestOfLM({name: loaded.lm for name, loaded in specialists.items()}, tokenizer, judge),
            chosen=lambda: choices(store),
        )
