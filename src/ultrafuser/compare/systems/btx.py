"""Branch-Train-MiX: the specialists' MLPs as a mixture of experts in one model, trained further."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

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
            raise ValueError("kind 'btx' is trained on balanced batches always; leave 'balanced' out")
        return self

    @property
    def stage_names(self) -> list[str] | None:
        return ["joint"]

    def build(self, workspace: Workspace) -> int:
        from ultrafuser.compare.systems.btx_model import build_btx, save_btx, train_btx
        from ultrafuser.compare.workspace import only_model
        from ultrafuser.data.templates import Renderer

        folder, recipe = workspace.system_folder(self.id), self.run_recipe(workspace)
        stage: Any = recipe.stages[0]
        specialists = [workspace.load_specialist(specialist) for specialist in recipe.specialists]
        renderer: Any = specialists[0].renderer
        first = Renderer(renderer.tokenizer, renderer.chat_templates[:1], recipe.data.max_length)
        model = build_btx([only_model(loaded) for loaded in specialists], seed=workspace.settings.seed)
        del specialists
        dtype = model.dtype
        model.float()  # AdamW's small steps vanish in bfloat16
        train_btx(
            model, workspace.rows("train", first), folder / "run",
            steps=stage.steps, rows_per_domain=stage.samples_per_domain, lr=stage.specialist_lr or stage.lr,
            rows_per_pass=stage.rows_per_device or 8, seed=workspace.settings.seed, vocab_size=len(renderer.tokenizer),
            weight_decay=stage.weight_decay, max_grad_norm=stage.max_grad_norm or float("inf"),
            save_every=recipe.save_every, progress=workspace.progress,
        )  # fmt: skip
        save_btx(model.to(dtype), folder / "model")
        renderer.tokenizer.chat_template = renderer.chat_templates[0]  # the one that it was trained in
        renderer.tokenizer.save_pretrained(folder / "model")
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def load(self, workspace: Workspace) -> LoadedSystem:
        from transformers import AutoTokenizer

        from ultrafuser.compare.loaded import load_model
        from ultrafuser.compare.systems.btx_model import load_btx, wrap_btx
        from ultrafuser.evaluate.lm.parameters import count_parameters
        from ultrafuser.specialists import pick_device

        folder = workspace.system_folder(self.id) / "model"
        model, tokenizer = load_btx(folder), AutoTokenizer.from_pretrained(folder)
        model.to(pick_device(workspace.settings.device))
        fused = wrap_btx(model, tokenizer, self.id, folder)
        loaded = load_model(workspace, workspace.load_model(fused, tokenizer, self.id, folder), folder / "features")
        loaded.parameters, loaded.traces = count_parameters(model), None
        return loaded
