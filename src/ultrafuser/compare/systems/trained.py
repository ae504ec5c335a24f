"""What systems that run stages of the training recipe share: overrides, stages, training and loading."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from ultrafuser.compare.settings import CompareSettings
from ultrafuser.compare.systems.node import TRAINING, SystemNode
from ultrafuser.errors import RecipeError
from ultrafuser.recipe import Recipe

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace


class TrainedSystem(SystemNode):
    """A system that varies the training recipe and trains in its own folder."""

    set: list[str] = Field(default=[], description="Overrides of the training recipe, such as `balanced=false`.")

    @property
    def depends_on(self) -> frozenset[str]:
        return TRAINING

    @property
    def overrides(self) -> list[str]:
        """Overrides of the training recipe that the fields of this kind stand for."""
        return []

    @property
    def stage_names(self) -> list[str] | None:
        """Names of the stages to run. None: all stages of the training recipe."""
        return None

    def has_frozen_specialists(self, settings: CompareSettings) -> bool:
        """Whether the specialists stay as they are, so that all such systems share their states on the test rows."""
        return all(stage.name != "joint" for stage in self.training(settings).stages)

    def training(self, settings: CompareSettings) -> Recipe:
        recipe = settings.training([*self.overrides, *self.set])
        if self.stage_names is None:
            return recipe
        stages = [stage for stage in recipe.stages if stage.name in self.stage_names]
        if len(stages) != len(self.stage_names):
            known = ", ".join(stage.name for stage in recipe.stages)
            raise RecipeError(
                f"system {self.name!r} needs the stages {', '.join(self.stage_names)}, but the training recipe has {known}"
            )
        return recipe.model_copy(update={"stages": stages})

    def build(self, workspace: Workspace) -> int:
        return self.train(workspace, self.run_recipe(workspace))

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import load_model
        from ultrafuser.evaluate.lm.load import LoadOptions
        from ultrafuser.evaluate.lm.load import load_model as load_checkpoint

        folder, settings = workspace.system_folder(self.id), workspace.settings
        checkpoint = folder / "run" / "fused"
        training = settings.training()
        options = LoadOptions(device=settings.device, dtype=training.dtype, trust_remote_code=training.trusted_code)
        fused = load_checkpoint(str(checkpoint), options)
        assert fused.model is not None and fused.renderer is not None  # no endpoint
        loaded = workspace.load_model(fused.model, fused.renderer.tokenizer, self.id, checkpoint)
        is_frozen = self.has_frozen_specialists(settings)
        features = workspace.folder / "features" / "test" if is_frozen else folder / "features"
        return load_model(workspace, loaded, features)

    def run_recipe(self, workspace: Workspace) -> Recipe:
        """The training recipe of the run in this system's folder."""
        output = str(workspace.system_folder(self.id) / "run")
        return self.training(workspace.settings).model_copy(update={"output": output})

    def train(self, workspace: Workspace, recipe: Recipe) -> int:
        """Run or resume a training recipe. Returns the number of parameters that its last stage trains."""
        from ultrafuser.evaluate.lm.load import LoadOptions, load_model
        from ultrafuser.train.run import train

        resume = (Path(recipe.output) / "recipe.yaml").is_file()
        is_single = len(recipe.specialists) == 1  # one specialist reads the rows, so the shared features do not fit
        features = None if is_single else workspace.folder / "features"
        folder = train(recipe, resume=resume, features=features, progress=workspace.progress)
        options = LoadOptions(device=recipe.device, dtype=recipe.dtype, trust_remote_code=recipe.trusted_code)
        model = load_model(str(folder), options).model
        assert model is not None  # no endpoint
        gate_size = sum(p.numel() for p in model.gate.parameters()) if len(model.config.names) > 1 else 0
        stage = recipe.stages[-1]
        if stage.name != "joint":
            return gate_size
        return gate_size + sum(
            parameter.numel()
            for group in model.groups
            for parameter in (group.model.parameters() if stage.trains_all_weights else group.adapter_parameters())
        )
