"""Branch-Train-MiX: the specialists' MLPs as a mixture of experts in one model, trained further."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from ultrafuser.compare.systems.trained import TrainedSystem

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace


class Btx(TrainedSystem):
    """The joint stage of the training recipe on all weights of the mixture."""

    kind_label: ClassVar[str] = "BTX"
    description: ClassVar[str] = (
        "Branch-Train-MiX: the specialists' feed-forward layers as experts of one mixture, trained further."
    )

    kind: Literal["btx"] = Field(description="Branch-Train-MiX.")

    @model_validator(mode="after")
    def _check_balanced(self) -> Btx:
        if any(override.startswith("balanced") for override in self.set):
            raise ValueError("kind 'btx' is always trained on balanced batches. Leave 'balanced' out")
        return self

    @property
    def stage_names(self) -> list[str] | None:
        return ["joint"]

    def build(self, workspace: Workspace) -> int:
        from ultrafuser.compare.systems.btx_model import as_fused, build_btx, save_btx, train_btx
        from ultrafuser.data.templates import Renderer

        folder, recipe = workspace.system_folder(self.id), self.run_recipe(workspace)
        specialists = [workspace.load_specialist(specialist) for specialist in recipe.specialists]
        renderer = specialists[0].renderer
        assert renderer is not None  # no endpoint
        tokenizer = renderer.tokenizer
        tokenizer.chat_template = renderer.chat_templates[0]  # it is trained in the first specialist's template
        models = [loaded.model.specialist(loaded.name) for loaded in specialists if loaded.model is not None]
        mixture = build_btx(models, seed=workspace.settings.seed)
        del specialists, models
        model = as_fused(mixture, self.id, vocab_size=len(tokenizer))
        rows = workspace.rows("train", Renderer(tokenizer, [tokenizer.chat_template], recipe.data.max_length))
        train_btx(model, recipe, rows, folder / "run", workspace.progress)
        save_btx(mixture, folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return sum(parameter.numel() for parameter in mixture.parameters())

    def load(self, workspace: Workspace) -> LoadedSystem:
        from transformers import AutoTokenizer

        from ultrafuser.compare.loaded import load_model
        from ultrafuser.compare.systems.btx_model import as_fused, load_btx
        from ultrafuser.specialists import pick_device

        folder = workspace.system_folder(self.id) / "model"
        mixture, tokenizer = load_btx(folder), AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        mixture.to(pick_device(workspace.settings.device))
        template = tokenizer.chat_template
        model = as_fused(mixture, self.id, vocab_size=len(tokenizer), chat_template=template, folder=str(folder))
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
        return load_model(workspace, workspace.load_model(model, tokenizer, self.id, folder), folder / "features")
