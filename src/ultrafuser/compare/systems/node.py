"""What every system of a comparison is: an entry of the recipe that can be built and loaded. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ultrafuser.compare.settings import CompareSettings
from ultrafuser.errors import RecipeError
from ultrafuser.recipe import Identifier, Recipe
from ultrafuser.typed_yaml import Node

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace

# Fields of the training recipe on which a system can depend.
SPECIALISTS = frozenset({"specialists", "share_base", "dtype", "device"})
TRAINING = SPECIALISTS | {
    "mixing",
    "gate",
    "data",
    "stages",
    "balanced",
    "seed",
    "eval_every",
    "save_every",
    "keep_best",
    "early_stop_patience",
}


class SystemNode(Node):
    """One system. A bare string in the recipe is its kind.

    A kind is a subclass with `kind: Literal[...]`, the fields that it adds, `build` and `load`. Modules that import
    torch are imported inside these two, since recipes are read without torch.

    Attributes:
        kind_label: what the report calls the kind.
        description: what a system of this kind is, in one sentence, for the report's glossary.
        reads_base: whether the comparison's `base` changes the system.
    """

    shorthand: ClassVar[str | None] = "kind"
    kind_label: ClassVar[str]
    description: ClassVar[str]
    reads_base: ClassVar[bool] = False

    kind: str
    name: Identifier | None = Field(
        default=None, description="Unique name. null: a name made from its kind and settings."
    )
    label: str | None = Field(default=None, description="Name in tables and figures. null: `name`.")
    tasks: list[str] | None = Field(
        default=None, description="Which of the comparison's benchmarks it runs. null: all of them."
    )
    versus: Identifier | None = Field(
        default=None,
        description="A further system for its paired differences, such as the system of which it is an ablation.",
    )

    @property
    def id(self) -> str:
        """Its name, or one made from its settings."""
        return self.name or self.default_name

    @property
    def default_name(self) -> str:
        """The name of a system that the recipe does not name."""
        return self.kind

    def expand(self, specialists: Sequence[str]) -> list[Any]:
        """The systems that this entry of the recipe stands for, each with a name.

        Raises:
            RecipeError: it names a specialist that does not exist.
        """
        return [self.model_copy(update={"name": self.id})]

    def training(self, settings: CompareSettings) -> Recipe:
        """The training recipe as this system uses it.

        Raises:
            RecipeError: an override does not fit, or a stage is missing.
        """
        return settings.training()

    @property
    def depends_on(self) -> frozenset[str]:
        """The fields of the training recipe that change the result."""
        return SPECIALISTS

    @property
    def paths(self) -> list[str]:
        """Local files and folders, or hub ids, that change the result and are no part of the training recipe."""
        return []

    @property
    def predecessor(self) -> str | None:
        """The system from whose result this one starts."""
        return None

    @property
    def asks_judge(self) -> bool:
        """Whether it needs the comparison's judge to answer."""
        return False

    def check(self) -> None:
        """Raise a MissingExtraError, before anything runs, if one of its programs is not installed."""

    def build(self, workspace: Workspace) -> int:
        """Make what it needs in `workspace.system_folder(self.id)`. An interrupted build is resumed.

        Returns:
            The number of trained parameters.
        """
        return 0

    def load(self, workspace: Workspace) -> LoadedSystem:
        """Load the built system."""
        raise NotImplementedError


def check_specialist(name: str, specialists: Sequence[str]) -> None:
    """Raise a RecipeError if there is no specialist of this name."""
    if name not in specialists:
        raise RecipeError(f"systems: no specialist {name!r}. There are: {', '.join(specialists)}")
