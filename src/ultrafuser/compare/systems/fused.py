"""The specialists mixed at every token by a trained gate: the model that this library is about."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ultrafuser.compare.systems.trained import TrainedSystem
from ultrafuser.recipe import Identifier, Recipe, load_recipe

if TYPE_CHECKING:
    from ultrafuser.compare.workspace import Workspace


class Fused(TrainedSystem):
    """The training recipe, or a variation of it."""

    kind_label: ClassVar[str] = "fused"
    description: ClassVar[str] = "The specialists mixed at every token by a trained gate."

    kind: Literal["fused"] = Field(description="The outputs mixed by the gate.")
    mixing: Literal["logits", "probabilities"] | None = Field(
        default=None, description="What is mixed. null: as in the training recipe."
    )
    stages: list[Literal["gate", "joint", "outcome"]] | None = Field(
        default=None, description="Which of the training recipe's stages to run. null: all of them."
    )
    after: Identifier | None = Field(
        default=None, description="Start from the result of this system, such as the joint stage after the gate's."
    )

    @property
    def predecessor(self) -> str | None:
        return self.after

    @property
    def overrides(self) -> list[str]:
        return [f"mixing={self.mixing}"] if self.mixing is not None else []

    @property
    def stage_names(self) -> list[str] | None:
        return None if self.stages is None else list(self.stages)

    def build(self, workspace: Workspace) -> int:
        recipe = self.run_recipe(workspace)
        if self.after is not None:
            # the stages that the previous run has not trained, starting from its fused folder
            previous = workspace.system_folder(self.after) / "run"
            trained = [stage.name for stage in load_recipe(previous / "recipe.yaml").stages]
            tree = recipe.model_dump(exclude={"specialists", "mixing", "gate", "share_base"})  # fixed by the folder
            tree["stages"] = [stage for stage in tree["stages"] if stage["name"] not in trained]
            recipe = Recipe.model_validate(tree | {"fused": str(previous / "fused")})
        return self.train(workspace, recipe)
