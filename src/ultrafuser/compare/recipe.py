"""What a comparison does: one set of specialists, one set of data, and a line for each alternative; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from ultrafuser import typed_yaml
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import RecipeError
from ultrafuser.recipe import Fraction, Identifier, LocalPath, Recipe, SourceRecipe, load_node, load_recipe
from ultrafuser.typed_yaml import Node

Kind = Literal["base", "specialist", "oracle", "static", "merge", "tuned", "router", "best_of", "btx", "fused"]
STATIC_LR = 0.05  # K scores have further to go than a gate's weights: AdamW moves each by about lr a step
# the stages of the training recipe that a kind runs; `fused` runs all, or those that its line names
_STAGES: dict[str, list[str]] = {"static": ["gate"], "tuned": ["joint"], "btx": ["joint"]}
# the fields that a kind reads, besides those of all
_FIELDS: dict[str, tuple[str, ...]] = {
    "specialist": ("specialist",),
    "static": ("mixing", "weights", "set"),
    "merge": ("method", "weight", "density"),
    "tuned": ("specialist", "set"),
    "best_of": ("by",),
    "btx": ("set",),
    "fused": ("mixing", "stages", "after", "set"),
}


class SystemRecipe(Node):
    """One line of a comparison; a bare string is its kind."""

    shorthand: ClassVar[str | None] = "kind"

    kind: Kind = Field(
        description=(
            "`base`: the model below the adapters. `specialist`: one of them alone. `oracle`: the best specialist of each "
            "column, not a system. `static`: the outputs mixed with constant weights. `merge`: the weights merged by "
            "mergekit. `tuned`: one specialist trained on all data. `router`: a trained classifier sends each sample to "
            "one specialist. `best_of`: all answer, one answer is chosen. `btx`: Branch-Train-MiX. `fused`: the gate."
        )
    )
    name: Identifier | None = Field(
        default=None, description="Its name, unique; null: made from its kind and settings."
    )
    label: str | None = Field(default=None, description="What tables and figures call it; null: its name.")
    specialist: str | None = Field(
        default=None, description="`specialist`: null for each of them; `tuned`: which one is trained."
    )
    mixing: Literal["logits", "probabilities"] | None = Field(
        default=None, description="What is mixed; null: as in the training recipe."
    )
    weights: Literal["uniform", "searched"] = Field(
        default="uniform", description="`static`: equal weights, or those of lowest loss on the training rows."
    )
    method: Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = Field(
        default="linear", description="`merge`: mergekit's method."
    )
    weight: PositiveFloat | None = Field(
        default=None, description="`merge`: weight of each specialist; null: 1/K for `linear`, 0.6 otherwise."
    )
    density: Fraction = Field(default=0.6, description="`merge`: share of changes kept by TIES and DARE.")
    by: Literal["log_prob", "judge"] = Field(
        default="log_prob", description="`best_of`: choose by mean log-probability, or by the judge."
    )
    stages: list[Literal["gate", "joint"]] | None = Field(
        default=None, description="`fused`: which of the training recipe's stages to run; null: all of them."
    )
    after: Identifier | None = Field(
        default=None,
        description="`fused`: start from the result of this system, e.g. the joint stage after the gate's.",
    )
    set: list[str] = Field(default=[], description="Overrides of the training recipe, such as `balanced=false`.")
    tasks: list[str] | None = Field(
        default=None, description="Which of the comparison's benchmarks it runs; null: all of them."
    )
    versus: Identifier | None = Field(
        default=None,
        description="A system to which its paired differences are shown too, e.g. what it is an ablation of.",
    )

    @model_validator(mode="after")
    def _check(self) -> SystemRecipe:
        allowed = {"kind", "name", "label", "tasks", "versus", *_FIELDS.get(self.kind, ())}
        if odd := sorted(self.model_fields_set - allowed):
            raise ValueError(f"kind {self.kind!r} has no {odd[0]!r}; it takes {', '.join(sorted(allowed - {'kind'}))}")
        if self.kind == "specialist" and self.specialist is None and {"name", "label"} & self.model_fields_set:
            raise ValueError(
                "kind 'specialist' stands for all of them; name one by 'specialist' to give it a name or label"
            )
        if self.kind == "btx" and any(text.startswith("balanced") for text in self.set):
            raise ValueError("kind 'btx' is trained on balanced batches always; leave 'balanced' out")
        if self.kind == "tuned" and self.specialist is None:
            raise ValueError("kind 'tuned' needs 'specialist': which one is trained on all data")
        return self

    @property
    def own_name(self) -> str:
        """Its name, or one made from its settings."""
        made = {
            "specialist": self.specialist or "specialist",
            "static": f"{self.weights}-{self.mixing or 'mixing'}",
            "merge": self.method,
            "tuned": f"tuned-{self.specialist}",
            "best_of": f"best_of-{self.by}",
        }
        return self.name or made.get(self.kind, self.kind)


class DecodeRecipe(Node):
    """How speed and memory are measured."""

    prompts: PositiveInt = Field(default=4, description="Test prompts answered.")
    new_tokens: PositiveInt = Field(default=32, description="Tokens of each answer.")
    repeats: PositiveInt = Field(default=3, description="How often; the median counts.")


class CompareRecipe(Node):
    """A comparison: specialists and training data, test data, and the systems."""

    title: str = Field(default="Fuse, merge, route or fine-tune?", description="Heading of the report.")
    recipe: LocalPath = Field(description="Training recipe: the specialists, the training rows, the stages.")
    set: list[str] = Field(default=[], description="Overrides of the training recipe for all systems.")
    base: LocalPath | None = Field(
        default=None,
        description="The model that whole specialists were trained from, for `base` and for merges of differences; null: "
        "the one below the adapters.",
    )
    test: list[SourceRecipe] = Field(default=[], description="Rows whose loss is measured; nothing is trained on them.")
    tasks: list[str] = Field(default=[], description="Benchmarks, by the names of docs/tasks.md and docs/judged.md.")
    data_dir: LocalPath | None = Field(default=None, description="Folder of the benchmarks' files; null: the hub.")
    limit: PositiveInt | None = Field(default=None, description="Documents of each benchmark; null: all.")
    max_new_tokens: PositiveInt | None = Field(default=None, description="Tokens of an answer; null: each task's own.")
    unsafe_code: bool = Field(default=False, description="Run generated code without a sandbox.")
    batch_size: PositiveInt = Field(default=8, description="Requests answered at once.")
    judge: EndpointRecipe | None = Field(default=None, description="The judge of `best_of` and of judged benchmarks.")
    decode: DecodeRecipe = Field(default_factory=DecodeRecipe, description="How speed and memory are measured.")
    systems: list[SystemRecipe] = Field(description="What is compared, in the order of the report.")
    main: Identifier | None = Field(default=None, description="The system to judge; null: the last of kind `fused`.")
    seed: NonNegativeInt = Field(
        default=0,
        description="Seed of training, in place of the training recipe's, of the documents drawn and of sampling.",
    )
    device: str = Field(
        default="auto", description="`auto`, `cpu`, `cuda` or another torch device, in place of the training recipe's."
    )
    output: str = Field(default="runs/compare", description="Folder of the comparison, seen from the working folder.")

    @model_validator(mode="after")
    def _check(self) -> CompareRecipe:
        if not self.systems:
            raise ValueError("'systems' is empty, expected at least one")
        if not self.test and not self.tasks:
            raise ValueError("nothing to measure; list rows under 'test', or benchmarks under 'tasks'")
        for system in self.systems:
            if odd := [task for task in system.tasks or [] if task not in self.tasks]:
                raise ValueError(
                    f"system {system.own_name!r} runs {odd[0]!r}, which is not among the comparison's tasks"
                )
        if any(system.by == "judge" for system in self.systems) and self.judge is None:
            raise ValueError("a 'best_of' system chooses by judge, but there is no 'judge'; name an endpoint")
        return self

    def tasks_of(self, system: SystemRecipe) -> list[str]:
        """The benchmarks that a system runs, in the order of the comparison."""
        return [task for task in self.tasks if system.tasks is None or task in system.tasks]

    def training(self, system: SystemRecipe | None = None, extra: Sequence[str] = ()) -> Recipe:
        """The training recipe, with the overrides of all systems, of one, and further ones.

        Raises:
            RecipeError: it cannot be read, or an override does not fit.
        """
        shared = [f"seed={self.seed}", f"device={self.device}"]
        if system is None:
            return load_recipe(_local(self.recipe), [*shared, *self.set, *extra])
        first = ["gate.type=static"] if system.kind == "static" else []
        if system.kind == "static" and system.weights == "searched":
            first.append(f"stages.gate.lr={STATIC_LR}")
        if system.mixing is not None:
            first.append(f"mixing={system.mixing}")
        recipe = load_recipe(_local(self.recipe), [*shared, *self.set, *first, *system.set, *extra])
        wanted = _STAGES.get(system.kind, []) if system.kind != "fused" else system.stages
        if wanted is None:
            return recipe
        stages = [stage for stage in recipe.stages if stage.name in wanted]
        if len(stages) != len(wanted) and not (system.kind == "static" and system.weights == "uniform"):
            have = ", ".join(stage.name for stage in recipe.stages)
            raise RecipeError(
                f"system {system.name!r} needs the stages {', '.join(wanted)}, but the training recipe has {have}"
            )
        return recipe.model_copy(update={"stages": stages})


def _local(reference: str) -> str:
    from ultrafuser.model.references import PACKAGE, package_path

    return str(package_path(reference)) if reference.startswith(PACKAGE) else reference


def load_compare_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> CompareRecipe:
    """Read a comparison recipe; `kind: specialist` without a name becomes one system for each specialist.

    Raises:
        RecipeError: a file, key, value or override that cannot be used, names that repeat or are not there.
    """
    recipe = load_node(CompareRecipe, source, overrides)
    training = recipe.training()
    names = [specialist.name for specialist in training.specialists]
    if training.fused is not None or len(names) < 2:
        raise RecipeError(f"{recipe.recipe}: a comparison needs a training recipe that lists at least two specialists")
    systems: list[SystemRecipe] = []
    for system in recipe.systems:
        if system.specialist is not None and system.specialist not in names:
            raise RecipeError(f"systems: no specialist {system.specialist!r}; there are: {', '.join(names)}")
        if system.kind == "specialist" and system.specialist is None:
            systems += [system.model_copy(update={"specialist": name, "name": name}) for name in names]
        else:
            systems.append(system.model_copy(update={"name": system.own_name}))
    _check_names(systems, recipe.main)
    found = {
        system.name: recipe.training(system) for system in systems
    }  # what does not fit is found now, not after hours
    for system in systems:
        if system.after is not None:
            _check_heir(system, found[system.name], found[system.after])
    main = recipe.main or next((s.name for s in reversed(systems) if s.kind == "fused"), None)
    return recipe.model_copy(update={"systems": systems, "main": main})


def _check_heir(system: SystemRecipe, recipe: Recipe, before: Recipe) -> None:
    """A system that goes on from another one has that one's specialists and gate, and a stage of its own left."""
    for part in ("specialists", "mixing", "gate", "share_base"):
        if getattr(recipe, part) != getattr(before, part):
            raise RecipeError(
                f"systems: {system.name!r} goes on from {system.after!r}, which has fixed {part!r}; leave it as it is "
                "there, or leave 'after' out"
            )
    if {stage.name for stage in recipe.stages} <= {stage.name for stage in before.stages}:
        raise RecipeError(f"systems: {system.name!r} has no stage left to train after {system.after!r}")


def _check_names(systems: Sequence[SystemRecipe], main: str | None) -> None:
    names = [system.name for system in systems]
    if twice := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"systems: two are named {twice[0]!r}; give one of them a 'name' of its own")
    before: list[str | None] = []
    for system in systems:
        if system.after is not None and system.after not in before:
            raise RecipeError(
                f"systems: {system.name!r} comes after {system.after!r}, which is no 'fused' system listed before it"
            )
        before.append(system.name if system.kind == "fused" else None)
    for system in systems:
        if system.versus is not None and system.versus not in names:
            known = ", ".join(map(str, names))
            raise RecipeError(
                f"systems: {system.name!r} has versus {system.versus!r}, which is no system; there are: {known}"
            )
    if main is not None and main not in names:
        raise RecipeError(f"main: no system {main!r}; there are: {', '.join(map(str, names))}")


def dump_compare_recipe(recipe: CompareRecipe) -> str:
    """The whole recipe as YAML, defaults included."""
    tree = recipe.model_dump()
    tree["systems"] = [system.model_dump(exclude_unset=True) | {"name": system.name} for system in recipe.systems]
    return typed_yaml.dump(tree)
