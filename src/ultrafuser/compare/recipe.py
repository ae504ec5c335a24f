"""The recipe of a comparison: its settings and its systems. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field, model_validator

from ultrafuser import typed_yaml
from ultrafuser.compare.settings import CompareSettings
from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.errors import RecipeError
from ultrafuser.recipe import Identifier, Recipe, load_node


class CompareRecipe(CompareSettings):
    """A comparison: specialists, training data, test data, and the systems."""

    systems: list[SystemRecipe] = Field(description="The systems to compare, in the order of the report.")
    main: Identifier | None = Field(
        default=None, description="The system that the report is about. null: the last of kind `fused`."
    )

    @model_validator(mode="after")
    def _check(self) -> CompareRecipe:
        if not self.systems:
            raise ValueError("'systems' is empty, expected at least one")
        if not self.test and not self.tasks:
            raise ValueError("nothing to measure. List rows under 'test', or benchmarks under 'tasks'")
        for system in self.systems:
            if unknown := [task for task in system.tasks or [] if task not in self.tasks]:
                raise ValueError(f"system {system.id!r} runs {unknown[0]!r}, which is not among the comparison's tasks")
        if self.judge is None and any(system.asks_judge for system in self.systems):
            raise ValueError("a 'best_of' system chooses by judge, but there is no 'judge'. Name an endpoint")
        return self

    def system(self, name: str) -> SystemRecipe:
        """The system of a name."""
        return next(system for system in self.systems if system.id == name)

    def tasks_of(self, system: SystemRecipe) -> list[str]:
        """The benchmarks that a system runs, in the order of the comparison."""
        return [task for task in self.tasks if system.tasks is None or task in system.tasks]


def load_compare_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> CompareRecipe:
    """Read a comparison recipe. `kind: specialist` without a name becomes one system for each specialist.

    Raises:
        RecipeError: a file, key, value or override that cannot be used, or a name that repeats or does not exist.
    """
    recipe = load_node(CompareRecipe, source, overrides)
    training = recipe.training()
    specialists = [specialist.name for specialist in training.specialists]
    if training.fused is not None or len(specialists) < 2:
        raise RecipeError(f"{recipe.recipe}: a comparison needs a training recipe that lists at least two specialists")
    systems: list[SystemRecipe] = [system for entry in recipe.systems for system in entry.expand(specialists)]
    _check_systems(systems, recipe)
    main = recipe.main or next((system.id for system in reversed(systems) if system.kind == "fused"), None)
    return recipe.model_copy(update={"systems": systems, "main": main})


def _check_systems(systems: Sequence[SystemRecipe], recipe: CompareRecipe) -> None:
    """Check the names, the training recipe of each system, and what each system continues."""
    names = [system.id for system in systems]
    known = ", ".join(names)
    if repeated := [name for name in names if names.count(name) > 1]:
        raise RecipeError(f"systems: two are named {repeated[0]!r}. Give one of them a 'name' of its own")
    if recipe.main is not None and recipe.main not in names:
        raise RecipeError(f"main: no system {recipe.main!r}. There are: {known}")
    fused: dict[str, Recipe] = {}  # the training recipes of the systems that others can continue
    for system in systems:
        location, previous = f"systems: {system.name!r}", system.predecessor
        if previous is not None and previous not in fused:
            raise RecipeError(f"{location} comes after {previous!r}, which is no 'fused' system listed before it")
        if system.versus is not None and system.versus not in names:
            raise RecipeError(f"{location} has versus {system.versus!r}, which is no system. There are: {known}")
        training = system.training(recipe)  # an override that does not fit is an error now, not after hours
        if previous is not None:
            for field in ("specialists", "mixing", "gate", "share_base"):
                if getattr(training, field) != getattr(fused[previous], field):
                    raise RecipeError(
                        f"{location} continues {previous!r}, which has fixed {field!r}. Leave it as it is there, or leave "
                        "'after' out"
                    )
            if {stage.name for stage in training.stages} <= {stage.name for stage in fused[previous].stages}:
                raise RecipeError(f"{location} has no stage left to train after {previous!r}")
        if system.kind == "fused":
            fused[system.id] = training


def dump_compare_recipe(recipe: CompareRecipe) -> str:
    """The whole recipe as YAML, defaults included."""
    tree = recipe.model_dump()
    tree["systems"] = [system.model_dump(exclude_unset=True) | {"name": system.name} for system in recipe.systems]
    return typed_yaml.dump(tree)
