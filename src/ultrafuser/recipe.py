"""The training recipe: one typed tree, read from YAML and command-line overrides. It imports no torch."""

from __future__ import annotations

import copy
import datetime
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

CHAT_TEMPLATES = ("chatml", "plain", "inst", "alpaca")  # the built-in names, whose text is in data/chat_format.py


def _specialist_name(data: dict[str, Any]) -> str:
    """its name"""
    return data["name"]


def _identifier(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", value):
        raise ValueError(f"got {value!r}, expected a letter followed by letters, digits, '_' or '-'")
    return value


def _beside(value: Any) -> Any:
    """Make a path absolute if it exists beside the YAML file. Any other path stays as it is."""
    folder = getattr(value, "folder", None)
    if folder is None or not value or value in CHAT_TEMPLATES or not os.path.exists(folder / value):
        return value
    return str(folder / value)


def _beside_glob(value: Any) -> Any:
    folder = getattr(value, "folder", None)
    if folder is None or not value:
        return value
    if not os.path.exists(folder / value) and not any(glob.iglob(value, root_dir=folder, recursive=True)):
        return value
    return str(folder / value)


def _day(value: Any) -> Any:
    """A day in ISO form. YAML reads one without quotes as a date."""
    if value is None:
        return None
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError as error:
        raise ValueError(f"{value!r} is no day. Expected YYYY-MM-DD") from error


Identifier = Annotated[str, AfterValidator(_identifier)]
LocalPath = Annotated[str, BeforeValidator(_beside)]
LocalGlob = Annotated[str, BeforeValidator(_beside_glob)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Root = TypeVar("Root", bound=Node)


class SpecialistRecipe(Node):
    """One specialist: the source of its weights, and how to load them."""

    name: Identifier = Field(description="Name of the specialist, unique in the recipe.")
    domain: str = Field(default_factory=_specialist_name, description="The domain that the specialist knows best.")
    model: LocalPath = Field(description="Checkpoint: a hub id, a local folder or `package:MODULE/FILE`.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of `model` on the hub.")
    gguf_file: str | None = Field(default=None, description="GGUF file to read inside `model`.")
    adapter: LocalPath | None = Field(
        default=None, description="PEFT adapter on `model`: a hub id, a local folder or `package:MODULE/FOLDER`."
    )
    adapter_revision: str | None = Field(default=None, description="Branch, tag or commit of `adapter` on the hub.")
    chat_template: LocalPath | None = Field(
        default=None,
        description="`chatml`, `plain`, `inst`, `alpaca`, a Jinja file or Jinja text. null: the template of the tokenizer.",
    )
    template_kwargs: FreeForm | None = Field(
        default=None, description="Further variables of the chat template, such as `{enable_thinking: false}`."
    )
    system: Literal["keep", "merge", "drop"] = Field(
        default="keep",
        description="System turns: `keep` passes them to the template, `merge` puts them before the first user turn, `drop` "
        "leaves them out.",
    )
    dtype: Dtype | None = Field(default=None, description="Type of its weights. null: the `dtype` of the recipe.")
    device_map: str | FreeForm | None = Field(default=None, description="Passed to transformers as `device_map`.")
    quantization: FreeForm | None = Field(default=None, description="Passed to transformers as `quantization_config`.")
    trust_remote_code: bool = Field(
        default=False, description="Run the code in the repositories of its model, tokenizer and adapter."
    )


class GateRecipe(Node):
    """The network that turns hidden states into token weights."""

    type: Literal["mlp", "static"] = Field(
        default="mlp",
        description="`mlp`: the gate of the paper, with weights for each token. `static`: constant weights for all tokens.",
    )
    hidden_size: PositiveInt = Field(default=512, description="Width of the gate's hidden layer (`mlp`).")


class SourceRecipe(Node):
    """Rows to read. A bare string is the path."""

    shorthand: ClassVar[str | None] = "path"

    path: LocalGlob = Field(description="A file, a glob, a folder or a hub data set.")
    domain: str | None = Field(
        default=None, description="Domain of all its rows. null: the domain that each row names."
    )
    split: str = Field(default="train", description="Split of a hub data set.")
    limit: PositiveInt | None = Field(default=None, description="Read at most this many rows. null: all.")
    revision: str | None = Field(default=None, description="Branch, tag or commit of a hub data set.")
    config: str | None = Field(default=None, description="Configuration of a hub data set, such as `main`.")


class DataRecipe(Node):
    """The rows to train and validate on."""

    train: list[SourceRecipe] = Field(default=[], description="Sources of the training rows.")
    validation: list[SourceRecipe] = Field(default=[], description="Sources of the validation rows.")
    max_length: PositiveInt = Field(
        default=1024, description="Maximum tokens of a row, prompt and response together. Longer rows are truncated."
    )
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop",
        description="What to do with a row that cannot be used. `skip`: leave it out, and list it in `bad_rows.jsonl` of the "
        "run.",
    )
    workers: PositiveInt | None = Field(
        default=None, description="Processes that render rows into tokens. null: one for each core."
    )


class LoraRecipe(Node):
    """The adapters that the joint stage trains if `specialists` is `lora`."""

    r: PositiveInt = Field(default=16, description="Rank of the adapters.")
    alpha: PositiveFloat = Field(
        default=32.0, description="Scale: the output of an adapter is multiplied by alpha / r."
    )
    dropout: Fraction = Field(default=0.0, description="Dropout before the adapters.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        default="all-linear", description="Names of the layers that get an adapter."
    )


# Each stage has its own defaults of these.
Steps = Annotated[PositiveInt, Field(description="Optimizer steps.")]
SamplesPerDomain = Annotated[PositiveInt, Field(description="Rows of each domain in one global batch.")]
LearningRate = Annotated[PositiveFloat, Field(description="Peak learning rate.")]


class _Stage(Node):
    """The fields of all training stages. A bare string is the name of a stage."""

    shorthand: ClassVar[str | None] = "name"

    name: str
    steps: Steps
    samples_per_domain: SamplesPerDomain
    lr: LearningRate
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="Decay of the learning rate."
    )
    warmup_ratio: Fraction = Field(default=0.0, description="Share of the steps over which the learning rate rises.")
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Weight decay of AdamW.")
    max_grad_norm: NonNegativeFloat = Field(default=1.0, description="Clip gradients to this norm. 0: never.")

    @property
    def trains_all_weights(self) -> bool:
        """Whether all weights of the specialists are trained, not only adapters."""
        return False


class _RowStage(_Stage):
    """A stage that trains on rows."""

    rows_per_device: Literal["auto"] | PositiveInt | None = Field(
        default=8,
        description="Rows of one forward pass on a device. Gradients are accumulated over the global batch. `auto`: as many as fit by the "
        "estimate of `ultrafuser plan`. null: the whole batch.",
    )
    tokens_per_device: PositiveInt | None = Field(
        default=None,
        description="Maximum tokens of one forward pass on a device, padding included, in place of `rows_per_device`. Short rows then "
        "share a pass with more others than long ones. A longer row has a pass of its own.",
    )

    @model_validator(mode="after")
    def _check_pass(self) -> _RowStage:
        if self.tokens_per_device is not None:
            if self.rows_per_device is not None and "rows_per_device" in self.model_fields_set:
                raise ValueError(
                    "got both 'rows_per_device' and 'tokens_per_device', expected one of them. Set the other to null"
                )
            self.rows_per_device = None
        return self


class GateStage(_RowStage):
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
    features_per_row: PositiveInt | None = Field(
        default=None,
        description="Response tokens of each row, drawn at random, that the feature cache keeps and the gate learns from. null: all.",
    )
    feature_dtype: Literal["auto", "bfloat16", "int8"] = Field(
        default="auto",
        description="Type of the states in the feature cache. `auto`: that of the specialists. `int8` has a scale for each 64 values.",
    )


class JointStage(_RowStage):
    """Stage 2: the gate and the specialists learn together."""

    name: Literal["joint"] = Field(description="Train the gate and the specialists.")
    steps: Steps = 1000
    samples_per_domain: SamplesPerDomain = 32
    lr: PositiveFloat = Field(
        default=2e-4, description="Peak learning rate. With `specialists: full` the default is the paper's 2e-5."
    )
    specialist_lr: PositiveFloat | None = Field(
        default=None, description="Peak learning rate of the specialists. null: `lr`."
    )
    specialists: Literal["lora", "full"] = Field(
        default="lora", description="Train adapters of the specialists, or all their weights."
    )
    lora: LoraRecipe = Field(default_factory=LoraRecipe, description="The adapters.")
    kl_coef: NonNegativeFloat = Field(
        default=0.0,
        description="Hold each specialist to its predictions from before the stage where they were right: the loss gains `kl_coef` times the mean "
        "over tokens of q(label) KL(q || p), with q its distribution before and p the present one. Labels with q below .01 are left out.",
    )
    optim: Literal["adamw_torch", "adafactor", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = Field(
        default="adamw_torch",
        description="Optimizer, by its name in transformers. `adamw_8bit` keeps 2 bytes for each trained number in place of 8, and a paged one "
        "moves to the host's memory when a GPU is full. Both need bitsandbytes. `adafactor` keeps sums of rows and columns alone, without a momentum.",
    )
    gradient_checkpointing: Literal["auto", "offload"] | bool = Field(
        default="auto",
        description="Compute activations again in the backward pass instead of keeping them. `auto`: if they would take more than half "
        "of the free memory. `offload`: and keep the inputs of the layers in the host's memory, which makes steps slower.",
    )

    @model_validator(mode="after")
    def _default_lr(self) -> JointStage:
        if self.trains_all_weights and "lr" not in self.model_fields_set:
            self.lr = 2e-5
        return self

    @property
    def trains_all_weights(self) -> bool:
        return self.specialists == "full"


class OutcomeStage(_Stage):
    """Stage 1b: the gate learns from which answers are right, and the specialists are frozen."""

    name: Literal["outcome"] = Field(description="Train the gate by right and wrong answers.")
    steps: PositiveInt = Field(default=20, description="Batches of questions, each with `updates` optimizer steps.")
    samples_per_domain: PositiveInt = Field(default=16, description="Questions of each domain in one step.")
    lr: LearningRate = 3e-4
    questions: str = Field(
        default="ultrafuser.zoo.exams.training:questions",
        description="Function that gives prompts and their checks by domain, as MODULE:FUNCTION. It is called with the seed.",
    )
    answers: int = Field(default=4, ge=2, description="Answers to sample to each question.")
    updates: PositiveInt = Field(default=4, description="Updates of the gate on the answers of one step.")
    clip: PositiveFloat = Field(
        default=0.2, description="An update does not move a token's probability further than by this share."
    )
    max_new_tokens: PositiveInt = Field(default=160, description="Maximum length of an answer in tokens.")


StageRecipe = Annotated[GateStage | JointStage | OutcomeStage, DiscriminatedBy("name")]


class ParallelRecipe(Node):
    """How the processes of a training share the work."""

    specialist: PositiveInt = Field(
        default=1,
        description="Processes that share the specialists of one model. They must be separate models, at least as many. The number of all "
        "processes is a multiple of it, and each group of processes reads rows of its own.",
    )
    shard: bool = Field(
        default=False,
        description="Divide the weights of each specialist, their gradients and optimizer states among the processes that read different rows "
        "(FSDP2). For specialists of which one alone is too large for a device.",
    )


class Recipe(Node):
    """The training recipe."""

    specialists: list[SpecialistRecipe] = Field(default=[], description="The models to fuse.")
    fused: LocalPath | None = Field(default=None, description="A fused folder to start from, instead of `specialists`.")
    mixing: Literal["logits", "probabilities"] = Field(
        default="probabilities",
        description="What the gate mixes: logits or probabilities. A `fused` folder keeps its setting.",
    )
    gate: GateRecipe = Field(
        default_factory=GateRecipe, description="Shape of the gate. A `fused` folder keeps its setting."
    )
    share_base: bool = Field(default=True, description="Load a base model once for all adapters on it.")
    dtype: Dtype = Field(default="auto", description="Type of the weights. `auto`: the type of each checkpoint.")
    device: str = Field(default="auto", description="`auto`, `cpu`, `cuda` or another torch device.")
    device_map: Literal["auto"] | None = Field(
        default=None,
        description="`auto`: spread the specialists over all devices that the process sees, in training too. If one is too large for each device, or has a "
        "`device_map` of its own, transformers divides the others. null: all are on `device`.",
    )
    date: Annotated[str | None, BeforeValidator(_day)] = Field(
        default=None,
        description="The day, as YYYY-MM-DD, that chat templates which read the clock see. null: the day of the run, which "
        "its recipe.yaml and the checkpoint record.",
    )
    trust_remote_code: bool = Field(
        default=False, description="Run the code in the repositories of all specialists, also of a `fused` folder."
    )
    data: DataRecipe = Field(default_factory=DataRecipe, description="Training and validation rows.")
    stages: list[StageRecipe] = Field(
        default=[GateStage(name="gate"), JointStage(name="joint")], description="The training stages, in order."
    )
    balanced: bool = Field(default=True, description="Draw the same number of rows of each domain into every batch.")
    cache_features: Literal["auto"] | bool = Field(
        default="auto",
        description="Compute the hidden states of the specialists once for the whole gate stage. `auto`: if that saves time.",
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of initialisation, sampling and dropout.")
    output: str = Field(default="runs/ultrafuser", description="Folder of the run, relative to the working folder.")
    eval_every: PositiveInt | None = Field(
        default=None,
        description="Steps between validations. null: five validations in each stage with `keep_best`, otherwise one at its end.",
    )
    save_every: PositiveInt | None = Field(
        default=None,
        description="Steps between checkpoints. null: save at the end of each stage. With `keep_best` and validation rows, every validation "
        "saves a checkpoint.",
    )
    ddp_timeout: PositiveInt = Field(
        default=7200,
        description="Seconds for which one process of several waits for the others, e.g. while one renders the rows.",
    )
    parallel: ParallelRecipe = Field(
        default_factory=ParallelRecipe, description="How the processes of one training share the work."
    )
    keep_best: bool = Field(default=True, description="Keep the checkpoint with the lowest validation loss.")
    log_every: PositiveInt = Field(default=1, description="Steps between rows of metrics.")
    report_to: list[str] = Field(
        default=[], description="Trackers that receive the metrics, e.g. `tensorboard`, `wandb`."
    )
    early_stop_patience: PositiveInt | None = Field(
        default=None, description="Stop a stage after this many validations without a lower loss. null: never."
    )

    @property
    def trusted_code(self) -> bool | list[str]:
        """Whose code may run: that of all specialists, or of those named."""
        return self.trust_remote_code or [each.name for each in self.specialists if each.trust_remote_code]

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.fused is not None and self.specialists:
            raise ValueError("got both 'specialists' and 'fused', expected one of them. Remove the other")
        if self.fused is None and not self.specialists:
            raise ValueError("no specialists. List at least one under 'specialists' or give a 'fused' folder")
        if self.parallel.shard and any(isinstance(stage, JointStage) and stage.kl_coef for stage in self.stages):
            raise ValueError("got both 'kl_coef' and 'parallel.shard', expected one of them. Set kl_coef to 0")
        if self.device_map and self.device != "auto":
            raise ValueError("got both 'device' and 'device_map', expected one of them. Leave one out")
        if self.device_map and (self.parallel.shard or self.parallel.specialist > 1):
            raise ValueError(
                "got both 'device_map' and 'parallel', expected one of them. The former spreads the specialists of one process"
            )
        if self.parallel.shard and any(
            isinstance(stage, JointStage) and stage.optim != "adamw_torch" for stage in self.stages
        ):
            raise ValueError("parallel.shard divides the states of 'adamw_torch' alone. Leave 'optim' out")
        if not self.stages:
            raise ValueError("'stages' is empty, expected at least one of gate and joint")
        for key in ("specialists", "stages"):
            names = [item.name for item in getattr(self, key)]
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key!r} has two items named {repeated[0]!r}, expected unique names")
        return self


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe: defaults, then the YAML file (or mapping), then overrides such as `stages.0.lr=2e-5`.

    An override may address a list item by its name: `stages.gate.steps=10`. A relative path in a YAML file is resolved
    against the folder of the file if it exists there.

    Raises:
        RecipeError: an invalid file, key, value or override.
    """
    return load_node(Recipe, source, overrides, {"stages": ["gate", "joint"]})  # so that overrides can address them


def load_node(
    root: type[Root],
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Root:
    """Read any typed tree, as `load_recipe` does.

    Raises:
        RecipeError: an invalid file, key, value or override.
    """
    if isinstance(source, Mapping):
        location, tree = "recipe", copy.deepcopy(dict(source))
    else:
        location, tree = str(source), _read(Path(source))
    tree = {**(defaults or {}), **tree}
    applied = {typed_yaml.apply_override(root, tree, override): override for override in overrides}
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        path, problem = typed_yaml.explain(root, error)
        causes = [override for key, override in applied.items() if f"{path}.".startswith(f"{key}.")]
        if causes:
            location = f"override {causes[-1]!r}"
        elif any(key.startswith(path) for key in applied):  # a check of a whole mapping, overrides included
            location = f"{location} with {' '.join(overrides)}"
        raise RecipeError(": ".join(filter(None, (location, path, problem)))) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            text = file.read(typed_yaml.MAX_CHARS + 1)  # of a device, the end would never come
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
    """The complete recipe as YAML, defaults included. `load_recipe` reads it back exactly."""
    return typed_yaml.dump(recipe.model_dump())
