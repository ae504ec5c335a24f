"""One specialist trained further on all training rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ultrafuser.compare.systems.node import check_specialist
from ultrafuser.compare.systems.trained import TrainedSystem

if TYPE_CHECKING:
    from ultrafuser.compare.workspace import Workspace


class Tuned(TrainedSystem):
    """The joint stage of the training recipe on one specialist."""

    kind_label: ClassVar[str] = "tuned"
    description: ClassVar[str] = "One model trained further on the data that the fused model is trained on."

    kind: Literal["tuned"] = Field(description="One specialist trained on all data.")
    specialist: str = Field(description="The specialist to train.")

    @property
    def default_name(self) -> str:
        return f"tuned-{self.specialist}"

    @property
    def stage_names(self) -> list[str] | None:
        return ["joint"]

    def expand(self, specialists: Sequence[str]) -> list[Any]:
        check_specialist(self.specialist, specialists)
        return super().expand(specialists)

    def build(self, workspace: Workspace) -> int:
        recipe = self.run_recipe(workspace)
        specialists = [specialist for specialist in recipe.specialists if specialist.name == self.specialist]
        stages = [stage.model_copy(update={"kl_coef": 0.0}) for stage in recipe.stages]  # it has no others to rely on
        return self.train(workspace, recipe.model_copy(update={"specialists": specialists, "stages": stages}))
