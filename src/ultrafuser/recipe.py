"""What a run does: one typed tree, read from YAML and command-line overrides; imports no torch."""

from __future__ import annotations

import copy
import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ultrafuser import typed_yaml
from ultrafuser.errors import RecipeError
from ultrafuser.typed_yaml import DiscriminatedBy, FreeForm, Node

CHAT_TEMPLATES = ("chatml", "plain", "inst", "alpaca")  # the built-in names; their text is in templates.py


def _own_name(data: dict[str, Any]) -> str:
    """its name"""
    return data["name"]


def _identifier(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value):
        raise ValueError(f"got {value!r}, expected a letter followed by letters, digits, '_' or '-'")
    return value


def _beside(value: Any) -> Any:
    """A path in a YAML file that exists beside the file is made absolute; any other is left as it is."""
    folder = getattr(value, "folder", None)
    if folder is None or not value or value in CHAT_TEMPLATES or not os.path.exists(folder / value):
        return value
    return str(folder / value)


def _beside_glob(value: Any) -> Any:
    folder = getattr(value, "folder", None)
    if folder is None or not any(glob.iglob(value, root_dir=folder, recursive=True)):
        return value
    return str(folder / value)


Identifier = Annotated[str, AfterValidator(_identifier)]
LocalPath = Annotated[str, BeforeValidator(_beside)]
LocalGlob = Annotated[str, BeforeValidator(_beside_glob)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Root = TypeVar("Root", bound=Node)


class SpecialistRecipe(Node):
    """One specialist: where its weights come from and how they are loaded."""

    name: Identifier = Field(description="Name of the specialist, unique in the recipe.")
    domain: str = Field(default_factory=_own_name, description="The domain it is best at.")
    model: LocalPath = Field(description="Checkpoint: a hub id, a local folder or `package:MODULE/FILE`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of `model` on the hub.")
    gguf_file: str | None = Field(default=None, description="The GGUF file to read inside `model`.")
    adapter: LocalPath | None = Field(
        default=None,
        description="PEFT adapter on `model`: hub id, local folder or `package:MODULE/FOLDER`.",
    )
    adapter_revision: str | None = Field(default=None, description="Branch, tag or commit of `adapter` on the hub.")
    chat_template: LocalPath | None = Field(
        default=None,
        description="`chatml`, `plain`, `inst`, `alpaca`, a Jinja file or Jinja text; null: the tokenizer's.",
    )
    dtype: Dtype | None = Field(default=None, description="Type of its weights; null: the run's `dtype`.")
    device_map: str | FreeForm | None = Field(default=None, description="Passed to transformers as `device_map`.")
    quantization: FreeForm | None = Field(default=None, description="Passed to transformers as `quantization_config`.")


class GateRecipe(Node):
    """The network that turns hidden states into token weights."""

    type: Literal["mlp", "static"] = Field(
        default="mlp",
        description="`mlp`: the paper's, weights at each token; `static`: the same weights at all tokens.",
    )
    hidden_size: PositiveInt = Field(default=512, description="Width of the gate's hidden layer (`mlp`).")


class SourceRecipe(Node):
    """Rows to read; a bare string is its path."""

    shorthand: ClassVar[str | None] = "path"

    path: LocalGlob = Field(description="A file, a glob, a folder or a hub data set.")
    domain: str | None = Field(default=None, description="Domain of all its rows; null: each row's own.")
    split: str = Field(default="train", description="Split to read of a hub data set.")
    limit: PositiveInt | None = Field(default=None, description="Rows to read at most; null: all.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub data set.")
    config: str | None = Field(default=None, description="Configuration of a hub data set, such as `main`.")


class DataRecipe(Node):
    """What is trained and validated on."""

    train: list[SourceRecipe] = Field(default=[], description="Sources of the training rows.")
    validation: list[SourceRecipe] = Field(default=[], description="Sources of the validation rows.")
    max_length: PositiveInt = Field(default=1024, description="Tokens kept of a row, prompt and response together.")


class LoraRecipe(Node):
    """The adapters that the joint stage trains when its specialists are `lora`."""

    r: PositiveInt = Field(default=16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(default=32.0, description="Scale: an adapter's output is multiplied by alpha / r.")
    dropout: Fraction = Field(default=0.0, description="Dropout before the adapters.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="The layers that get an adapter, by name."
    )


# How much a stage trains; each stage has its own default.
Steps = Annotated[PositiveInt, Field(description="Optimizer steps.")]
SamplesPerDomain = Annotated[PositiveInt, Field(description="Rows of each domain in one global batch.")]
LearningRate = Annotated[PositiveFloat, Field(description="Peak learning rate.")]


class _Stage(Node):
    """What both training stages take; a bare string is the name of a stage."""

    shorthand: ClassVar[str | None] = "name"

    name: str
    steps: Steps
    samples_per_domain: SamplesPerDomain
    rows_per_device: PositiveInt | None = Field(
        default=8,
        description="Rows in one forward pass of a device; gradients are accumulated. null: as many as fit.",
    )
    lr: LearningRate
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Decay of the learning rate."
    )
    warmup_ratio: Fraction = Field(default=0.0, description="Share of the steps over which the learning rate rises.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Weight decay of AdamW.")
    max_grad_norm: NonNegativeFloat = Field(default=1.0, description="Clip gradients to this norm; 0: never.")


class GateStage(_Stage):
    """Stage 1: the gate learns, and the specialists are frozen."""

    name: Literal["gate"] = Field(description="Train the gate alone.")
    steps: Steps = 400
    samples_per_domain: SamplesPerDomain = 64
    # The paper's gate lr, 2e-5, is meant for far larger batches and hardly moves a gate in 400 small ones.
    lr: LearningRate = 1e-3
    calibrate: bool = Field(
        default=True,
        description="First fit a temperature to each specialist's logits, on training rows of its domain. Set it to false "
        "if the specialists wrote these rows or were trained on them.",
    )

    @property
    def trains_all_weights(self) -> bool:
        """False: the specialists are frozen."""
        return False


class JointStage(_Stage):
    """Stage 2: the gate and the specialists learn together."""

    name: Literal["joint"] = Field(description="Train the gate and the specialists.")
    steps: Steps = 1000
    samples_per_domain: SamplesPerDomain = 32
    lr: LearningRate = 2e-5
    specialist_lr: PositiveFloat | None = Field(
        default=None, description="Peak learning rate of the specialists; null: `lr`."
    )
    specialists: Literal["lora", "full"] = Field(
        default="lora", description="Train adapters of the specialists, or all their weights."
    )
    lora: LoraRecipe = Field(default_factory=LoraRecipe, description="The adapters.")

    @property
    def trains_all_weights(self) -> bool:
        """Whether all weights of the specialists are trained, not only adapters."""
        return self.specialists == "full"


StageRecipe = Annotated[GateStage | JointStage, DiscriminatedBy("name")]


def _both_stages() -> list[StageRecipe]:
    return [GateStage(name="gate"), JointStage(name="joint")]


class Recipe(Node):
    """What a run does."""

    specialists: list[SpecialistRecipe] = Field(default=[], description="The models to fuse.")
    fused: LocalPath | None = Field(
        default=None, description="A fused folder to start from, in place of `specialists`."
    )
    mixing: Literal["logits", "probabilities"] = Field(
        default="probabilities", description="What the gate's weights mix; a `fused` folder keeps its own."
    )
    gate: GateRecipe = Field(
        default_factory=GateRecipe, description="Shape of the gate; a `fused` folder keeps its own."
    )
    share_base: bool = Field(default=True, description="Load a base once for all adapters on it.")
    dtype: Dtype = Field(default="auto", description="Type of the weights; `auto`: each checkpoint's own.")
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or another torch device.")
    data: DataRecipe = Field(default_factory=DataRecipe, description="Training and validation rows.")
    stages: list[StageRecipe] = Field(
        default_factory=_both_stages,
        description="The training stages, in order.",
    )
    balanced: bool = Field(default=True, description="Put equally many rows of each domain in every batch.")
    cache_features: Literal["auto"] | bool = Field(
        default="auto",
        description="Compute the specialists' states once for the whole gate stage; `auto`: when it pays.",
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of initialisation, sampling and dropout.")
    output: str = Field(default="runs/ultrafuser", description="Folder of the run, seen from the working folder.")
    eval_every: PositiveInt | None = Field(
        default=None, description="Steps between validations; null: at each stage's end."
    )
    save_every: PositiveInt | None = Field(
        default=None,
        description="Steps between saves; null: at each stage's end. With `keep_best` and validation rows, validations are saved.",
    )
    keep_best: bool = Field(default=True, description="Keep the checkpoint with the lowest validation loss.")
    log_every: PositiveInt = Field(default=1, description="Steps between rows of metrics.")
    report_to: list[str] = Field(default=[], description="Trackers of the metrics, e.g. `tensorboard`, `wandb`.")
    early_stop_patience: PositiveInt | None = Field(
        default=None, description="Validations without a lower loss after which a stage stops; null: never."
    )

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.fused is not None and self.specialists:
            raise ValueError("got both 'specialists' and 'fused', expected one of them; remove the other")
        if self.fused is None and not self.specialists:
            raise ValueError("no specialists; list at least one under 'specialists' or give a 'fused' folder")
        if not self.stages:
            raise ValueError("'stages' is empty, expected at least one of gate and joint")
        for key in ("specialists", "stages"):
            names = [item.name for item in getattr(self, key)]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key!r} has two items named {twice[0]!r}; names must differ")
        return self


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: defaults, then the YAML file (or mapping), then overrides such as `stages.0.lr=2e-5`.

    List items that have a name can be addressed by it: `stages.gate.steps=10`. Relative paths in a YAML file
    that exist beside it resolve against its folder.

    Raises:
        RecipeError: a file, key, value or override that cannot be used.
    """
    return load_node(Recipe, source, overrides, {"stages": ["gate", "joint"]})  # there for overrides to address


def load_node(
    root: type[Root],
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Root:
    """Read a typed tree of any kind, as `load_recipe` does.

    Raises:
        RecipeError: a file, key, value or override that cannot be used.
    """
    if isinstance(source, Mapping):
        where, tree = "recipe", copy.deepcopy(dict(source))
    else:
        where, tree = str(source), _read(Path(source))
    tree = {**(defaults or {}), **tree}
    applied = {typed_yaml.apply_override(root, tree, override): override for override in overrides}
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        path, problem = typed_yaml.explain(root, error)
        cause = [override for key, override in applied.items() if f"{path}.".startswith(f"{key}.")]
        if cause:
            where = f"override {cause[-1]!r}"
        elif any(key.startswith(path) for key in applied):  # a check of a whole mapping, overrides included
            where = f"{where} with {' '.join(overrides)}"
        raise RecipeError(": ".join(filter(None, (where, path, problem)))) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file, expected a YAML recipe") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: byte {error.start} is not UTF-8 text, expected a YAML recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}), expected a YAML recipe") from None
    tree = typed_yaml.parse(text, str(path), path.parent.resolve())
    if not isinstance(tree, dict | None):
        raise RecipeError(f"{path}: expected a mapping at the top, such as 'specialists: [...]'")
    return tree or {}


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe as YAML, defaults included; `load_recipe` reads it back exactly."""
    return typed_yaml.dump(recipe.model_dump())
