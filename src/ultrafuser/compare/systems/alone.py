"""Models that answer alone: the base, each specialist, any other. And the oracle, made of the specialists' numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ultrafuser.compare.systems.node import SystemNode, check_specialist
from ultrafuser.recipe import LocalPath, SpecialistRecipe

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace


class Base(SystemNode):
    """The model that the specialists were trained from."""

    kind_label: ClassVar[str] = "base"
    description: ClassVar[str] = "The model that the specialists were tuned from, untouched."
    reads_base: ClassVar[bool] = True

    kind: Literal["base"] = Field(description="The model below the adapters.")

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import load_model

        return load_model(workspace, workspace.load_specialist(workspace.base()), workspace.system_folder(self.id))


class Specialist(SystemNode):
    """One specialist, or each of them."""

    kind_label: ClassVar[str] = "specialist"
    description: ClassVar[str] = "A model tuned for one domain, by itself."

    kind: Literal["specialist"] = Field(description="One specialist alone.")
    specialist: str | None = Field(
        default=None, description="Its name in the training recipe. null: a system for each."
    )

    @model_validator(mode="after")
    def _check_names(self) -> Specialist:
        if self.specialist is None and {"name", "label"} & self.model_fields_set:
            raise ValueError(
                "kind 'specialist' stands for all of them. Name one by 'specialist' to give it a name or label"
            )
        return self

    @property
    def default_name(self) -> str:
        return self.specialist or self.kind

    def expand(self, specialists: Sequence[str]) -> list[Any]:
        if self.specialist is None:
            return [self.model_copy(update={"specialist": name, "name": name}) for name in specialists]
        check_specialist(self.specialist, specialists)
        return super().expand(specialists)

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import load_model

        specialists = {specialist.name: specialist for specialist in workspace.settings.training().specialists}
        model = workspace.load_specialist(specialists[str(self.specialist)])
        return load_model(workspace, model, workspace.system_folder(self.id))


class Model(SystemNode):
    """A model from elsewhere, such as one adapter that was trained on the rows of all domains."""

    kind_label: ClassVar[str] = "one model"
    description: ClassVar[str] = "A model that was trained elsewhere, by itself."

    kind: Literal["model"] = Field(description="A further model, which is no specialist of the recipe.")
    model: LocalPath | None = Field(default=None, description="Checkpoint. null: the model below the adapters.")
    adapter: LocalPath | None = Field(default=None, description="PEFT adapter on `model`.")

    @model_validator(mode="after")
    def _check_source(self) -> Model:
        if self.model is None and self.adapter is None:
            raise ValueError("kind 'model' names no model. Set 'model', or an 'adapter' on the specialists' base")
        return self

    @property
    def paths(self) -> list[str]:
        return [path for path in (self.model, self.adapter) if path is not None]

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import load_model

        first = workspace.settings.training().specialists[0]
        if self.model is None:
            model = workspace.base().model_copy(update={"name": self.id, "adapter": self.adapter})
        else:
            model = SpecialistRecipe(
                name=self.id, model=self.model, adapter=self.adapter, chat_template=first.chat_template
            )
        return load_model(workspace, workspace.load_specialist(model), workspace.system_folder(self.id) / "features")


class Oracle(SystemNode):
    """A bound: `compare.results` copies the numbers of the best specialist of each column. Nothing is built or loaded."""

    kind_label: ClassVar[str] = "oracle"
    description: ClassVar[str] = (
        "The best specialist of each domain or task, chosen after the fact: a mark to reach, not a system."
    )

    kind: Literal["oracle"] = Field(description="The best specialist of each column, which is a bound and no system.")
