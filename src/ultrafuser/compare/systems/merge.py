"""Weights merged by mergekit, which runs as a program: averages, task arithmetic, TIES and DARE."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import yaml
from pydantic import Field, PositiveFloat

from ultrafuser.compare.systems.node import SystemNode
from ultrafuser.errors import MissingExtraError, UltraFuserError
from ultrafuser.recipe import Fraction

if TYPE_CHECKING:
    from ultrafuser.compare.loaded import LoadedSystem
    from ultrafuser.compare.workspace import Workspace

PROGRAM = "mergekit-yaml"
RECIPE_FILE = "merge.yaml"
LINEAR = "linear"  # every other method starts from a base and adds differences to it
SPARSE = {"ties", "dare_linear", "dare_ties"}  # these leave some of the differences out
DEFAULT_DENSITY = 0.6  # share of the differences that TIES and DARE keep
DEFAULT_WEIGHT = 0.6  # of each specialist's difference in task arithmetic, TIES and DARE
_ERROR_LINES = 6


class Merge(SystemNode):
    """One ordinary checkpoint, merged from those of the specialists."""

    kind_label: ClassVar[str] = "merged"
    description: ClassVar[str] = "One model made from the weights of the specialists."
    reads_base: ClassVar[bool] = True

    kind: Literal["merge"] = Field(description="The weights merged by mergekit.")
    method: Literal["linear", "task_arithmetic", "ties", "dare_linear", "dare_ties"] = Field(
        default="linear", description="mergekit's method."
    )
    weight: PositiveFloat | None = Field(
        default=None, description="Weight of each specialist. null: 1/K for `linear`, 0.6 otherwise."
    )
    density: Fraction = Field(default=DEFAULT_DENSITY, description="Share of the changes that TIES and DARE keep.")

    @property
    def default_name(self) -> str:
        return self.method

    def check(self) -> None:
        find_program()

    def build(self, workspace: Workspace) -> int:
        checkpoints = workspace.checkpoints()
        merge(
            list(checkpoints.specialists.values()),
            checkpoints.base,
            self.method,
            workspace.system_folder(self.id) / "model",
            weight=DEFAULT_WEIGHT if self.weight is None and self.method != LINEAR else self.weight,
            density=self.density,
            seed=workspace.settings.seed,
        )
        return 0

    def load(self, workspace: Workspace) -> LoadedSystem:
        from ultrafuser.compare.loaded import load_model

        folder = workspace.system_folder(self.id)
        source = dict.fromkeys(("adapter", "gguf_file", "revision", "adapter_revision"))
        source |= {"model": str(folder / "model"), "name": self.id}
        merged = workspace.settings.training().specialists[0].model_copy(update=source)
        return load_model(workspace, workspace.load_specialist(merged), folder / "features")


def merge(
    sources: Sequence[Path],
    base: Path | None,
    method: str,
    output: Path,
    *,
    weight: float | None = None,
    density: float = DEFAULT_DENSITY,
    seed: int = 0,
) -> Path:
    """Merge ordinary checkpoints of one architecture into one, unless `output` is that merge already.

    With theta_0 the base, d_k = theta_k - theta_0 and w the weight:

    - linear: sum w theta_k / sum w.
    - task_arithmetic: theta_0 + sum w d_k.
    - ties: keep the share `density` of each d_k with the largest magnitude, and add the weighted mean of the values that
      agree with the elected sign.
    - dare_linear, dare_ties: keep a random share `density` of each d_k and rescale it, then add as task_arithmetic or by
      the elected sign.

    Args:
        sources: folders of the K specialists.
        base: folder of the model that they were trained from. `linear` does not use it.
        weight: of every source. Default: 1 / K.
        density: for ties and DARE, in (0, 1].
        seed: of DARE's random choice.

    Returns:
        `output`: a checkpoint with tokenizer, and the recipe that made it.

    Raises:
        UltraFuserError: the method needs a base and there is none, or mergekit's own error.
        MissingExtraError: mergekit is not installed.
    """
    from ultrafuser.model.saving import atomic_directory

    recipe = _recipe(sources, base, method, weight, density)
    facts = yaml.safe_dump({**recipe, "seed": seed}, sort_keys=False)
    recipe_file = output / RECIPE_FILE
    is_merged = (output / "config.json").is_file() and recipe_file.is_file()
    if is_merged and recipe_file.read_text(encoding="utf-8") == facts:
        return output
    program = find_program()
    with atomic_directory(output) as draft:
        _run_mergekit(program, recipe, draft, seed)
        (draft / RECIPE_FILE).write_text(facts, encoding="utf-8")
    return output


def _recipe(
    sources: Sequence[Path], base: Path | None, method: str, weight: float | None, density: float
) -> dict[str, Any]:
    """The recipe that mergekit reads."""
    if method != LINEAR and base is None:
        raise UltraFuserError(
            f"{method} adds differences to the model that the specialists were trained from. Name it as `base`"
        )
    parameters = {"weight": float(weight or 1 / len(sources))} | ({"density": density} if method in SPARSE else {})
    config = json.loads((sources[0] / "config.json").read_text(encoding="utf-8"))
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": _reference(source), "parameters": dict(parameters)} for source in sources],
        "dtype": "float32",  # sums of differences in half precision lose the small ones
        "out_dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
    }
    if method != LINEAR and base is not None:
        recipe["base_model"] = _reference(base)
    return recipe


def _reference(folder: Path) -> dict[str, Any]:
    """A folder as mergekit names it. As plain text, a `+` or `@` in the path would be read as an adapter or revision."""
    return {"model": {"path": str(folder.absolute())}}


def _run_mergekit(program: str, recipe: dict[str, Any], folder: Path, seed: int) -> None:
    """Write the merged checkpoint into a folder."""
    file = folder / "mergekit.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [program, str(file), str(folder), "--random-seed", str(seed), "--no-write-model-card"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0 or not (folder / "config.json").is_file():
        lines = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        sources = ", ".join(Path(entry["model"]["model"]["path"]).name for entry in recipe["models"])
        raise UltraFuserError(
            f"mergekit could not make the {recipe['merge_method']} merge of {sources} (exit status "
            f"{result.returncode}):\n" + "\n".join(lines[-_ERROR_LINES:])
        )
    file.unlink()


def find_program() -> str:
    """mergekit's program beside this Python, or on the PATH.

    Raises:
        MissingExtraError: there is none.
    """
    beside = Path(sys.executable).parent / PROGRAM
    program = str(beside) if beside.is_file() else shutil.which(PROGRAM)
    if program is None:
        raise MissingExtraError("mergekit", "merge", "merging weights")
    return program
