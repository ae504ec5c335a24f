"""What all systems of a comparison share: specialists, data, benchmarks, seed and device. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, NonNegativeInt, PositiveInt

from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.recipe import LocalPath, Recipe, SourceRecipe, load_recipe
from ultrafuser.typed_yaml import Node


class DecodeRecipe(Node):
    """How speed and memory are measured."""

    prompts: PositiveInt = Field(default=4, description="Test prompts to answer.")
    new_tokens: PositiveInt = Field(default=32, description="Tokens of each answer.")
    repeats: PositiveInt = Field(default=3, description="Number of timed runs. The median is reported.")


class CompareSettings(Node):
    """The settings of a comparison, without its systems."""

    title: str = Field(default="Fuse, merge, route or fine-tune?", description="Heading of the report.")
    recipe: LocalPath = Field(description="Training recipe: the specialists, the training rows, the stages.")
    set: list[str] = Field(default=[], description="Overrides of the training recipe, for all systems.")
    base: LocalPath | None = Field(
        default=None,
        description="The model from which full specialists were trained, for `base` and for merges of differences. "
        "null: the model below the adapters.",
    )
    test: list[SourceRecipe] = Field(
        default=[], description="Rows on which the loss is measured. Nothing is trained on them."
    )
    tasks: list[str] = Field(
        default=[], description="Benchmarks to run, by their names in docs/tasks.md and docs/judged.md."
    )
    data_dir: LocalPath | None = Field(default=None, description="Folder of the benchmarks' files. null: the hub.")
    limit: PositiveInt | None = Field(default=None, description="Documents to draw of each benchmark. null: all.")
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="Maximum length of an answer in tokens. null: each task's own."
    )
    unsafe_code: bool = Field(default=False, description="Run generated code without a sandbox.")
    batch_size: PositiveInt = Field(default=8, description="Requests to answer in one batch.")
    judge: EndpointRecipe | None = Field(
        default=None, description="The judge of `best_of` and of the judged benchmarks."
    )
    decode: DecodeRecipe = Field(default_factory=DecodeRecipe, description="How speed and memory are measured.")
    seed: NonNegativeInt = Field(
        default=0,
        description="Seed of training (in place of the training recipe's), of drawing documents and of sampling.",
    )
    device: str = Field(
        default="auto", description="`auto`, `cpu`, `cuda` or another torch device, in place of the training recipe's."
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the code in the repositories of all models. The training recipe may trust some."
    )
    output: str = Field(default="runs/compare", description="Folder of the comparison, relative to the working folder.")

    def training(self, overrides: Sequence[str] = ()) -> Recipe:
        """The training recipe with the overrides of all systems, then further ones.

        Raises:
            RecipeError: the recipe cannot be read, or an override does not fit.
        """
        from ultrafuser.model.references import PACKAGE, package_path

        path = str(package_path(self.recipe)) if self.recipe.startswith(PACKAGE) else self.recipe
        trust = ["trust_remote_code=true"] if self.trust_remote_code else []
        return load_recipe(path, [f"seed={self.seed}", f"device={self.device}", *trust, *self.set, *overrides])
