"""The specialists' outputs mixed with the same weights at every token, uniform or searched on the training rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ultrafuser.compare.settings import CompareSettings
from ultrafuser.compare.systems.node import SPECIALISTS
from ultrafuser.compare.systems.trained import TrainedSystem

if TYPE_CHECKING:
    from ultrafuser.compare.workspace import Workspace

LR = 0.05  # K scores have further to go than a gate's weights: AdamW moves each by about lr a step


class Static(TrainedSystem):
    """A fused model whose gate is K numbers."""

    kind_label: ClassVar[str] = "static"
    description: ClassVar[str] = "The specialists mixed with the same weights at every token."

    kind: Literal["static"] = Field(description="The outputs mixed with constant weights.")
    mixing: Literal["logits", "probabilities"] | None = Field(
        default=None, description="What is mixed. null: as in the training recipe."
    )
    weights: Literal["uniform", "searched"] = Field(
        default="uniform", description="Equal weights, or the weights with the lowest loss on the training rows."
    )

    @property
    def default_name(self) -> str:
        return f"{self.weights}-{self.mixing or 'mixing'}"

    @property
    def depends_on(self) -> frozenset[str]:
        return SPECIALISTS | {"mixing"} if self.weights == "uniform" else super().depends_on

    @property
    def overrides(self) -> list[str]:
        lr = [f"stages.gate.lr={LR}"] if self.weights == "searched" else []
        mixing = [f"mixing={self.mixing}"] if self.mixing is not None else []
        return ["gate.type=static", *lr, *mixing]

    @property
    def stage_names(self) -> list[str] | None:
        return ["gate"] if self.weights == "searched" else None

    def has_frozen_specialists(self, settings: CompareSettings) -> bool:
        return True

    def build(self, workspace: Workspace) -> int:
        if self.weights == "searched":
            return super().build(workspace)
        from ultrafuser.specialists import fuse
        from ultrafuser.train.run import save_fused_folder

        recipe = self.run_recipe(workspace)
        model, tokenizer = fuse(recipe)  # an untrained static gate has equal weights
        save_fused_folder(model, tokenizer, recipe, Path(recipe.output))
        return 0
