"""One recipe with several values of some fields: a run for each combination, over one feature cache."""

from __future__ import annotations

import gc
import hashlib
import itertools
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from ultrafuser import typed_yaml
from ultrafuser.data.files import write_json
from ultrafuser.errors import DiskError, Preempted, RecipeError, TrainingError, UltraFuserError
from ultrafuser.progress import Progress
from ultrafuser.recipe import Recipe, dump_recipe, load_recipe
from ultrafuser.train.metrics import METRICS_FILE, read_metrics
from ultrafuser.train.run import RECIPE_FILE, check_output, join_processes, run_lock, settle, train
from ultrafuser.train.stages import from_main

SWEEP_FILE = "sweep.json"
_NAME_LIMIT = 120  # characters of a run's folder


@dataclass
class SweepRun:
    """One combination of a sweep.

    Attributes:
        overrides: `FIELD=VALUE`, in the order of the sweep.
        folder: output of the run.
        stage: its last stage.
        loss: nats per response token of the saved weights, by domain and `mean`: on the validation rows, or on the rows
            since the last logged step if there are none. None: the stage has logged no loss.
        error: the reason for a missing loss.
    """

    overrides: list[str]
    folder: str
    stage: str | None = None
    loss: dict[str, float] | None = None
    error: str | None = None


def sweep(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    fields: Sequence[str],
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> list[SweepRun]:
    """Train a recipe with every combination of the values of some fields.

    Args:
        source, overrides: of the recipe, as for `load_recipe`.
        fields: `FIELD=VALUE,VALUE,...`. A value with commas is in quotes or brackets, as in a YAML list.
        resume: continue an interrupted sweep. Finished runs are kept.

    Returns:
        The runs, in the order of the combinations. They are in `<output>/sweep.json`, too, and the folder of each run is
        `<output>/<its overrides>`. The runs share the feature cache, which is removed at the end.

    Raises:
        RecipeError: a field without values, two equal combinations, or one that is no recipe. No run has begun then.
        TrainingError: the folder holds another run or another sweep, or none to resume, or every run has failed.
    """
    progress = progress or Progress()
    base = load_recipe(source, overrides)
    join_processes(base)
    output = Path(base.output)
    runs = _plan(output, fields)
    recipes = [load_recipe(source, [*overrides, *run.overrides, f"output={run.folder}"]) for run in runs]
    _check_different(runs, recipes)
    if (output / SWEEP_FILE).is_file() != resume or (output / RECIPE_FILE).is_file():
        raise TrainingError(
            f"{output}: no sweep to resume there (no {SWEEP_FILE}). Start it without --resume"
            if resume
            else f"{output} holds a run already. Continue a sweep with --resume, or choose another output="
        )
    for recipe in recipes:
        if (Path(recipe.output) / RECIPE_FILE).is_file():
            check_output(settle(recipe, resume=True), resume=True)
    PartialState().wait_for_everyone()  # all have looked before the first one writes
    with run_lock(output):
        for index, (run, recipe) in enumerate(zip(runs, recipes, strict=True), 1):
            _write(output, runs)
            progress.log(f"run {index} of {len(runs)}: {' '.join(run.overrides)}")
            _train(run, recipe, output / "features", progress)
            gc.collect()  # the Trainer's cycles of references hold the model
        _write(output, runs)
        if PartialState().is_main_process:
            shutil.rmtree(output / "features", ignore_errors=True)
    if all(run.error for run in runs):
        raise TrainingError(f"{output}: every run of the sweep has failed. The first one: {runs[0].error}")
    return runs


def over_seeds(runs: Sequence[SweepRun]) -> list[tuple[list[str], list[float]]]:
    """The mean losses of runs that differ in `seed` alone: (their other overrides, one loss for each seed)."""
    groups: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        others = tuple(override for override in run.overrides if not override.startswith("seed="))
        if run.loss is not None and len(others) < len(run.overrides):
            groups.setdefault(others, []).append(run.loss["mean"])
    return [(list(others), losses) for others, losses in groups.items()]


def _plan(output: Path, fields: Sequence[str]) -> list[SweepRun]:
    """A run for each combination of the values."""
    choices = []
    for field in fields:
        key, _, text = field.partition("=")
        values = typed_yaml.parse(f"[{text}]", f"--sweep {field!r}")
        if not key.strip() or not values:
            raise RecipeError(f"--sweep {field!r}: expected FIELD=VALUE,VALUE,..., e.g. stages.gate.lr=1e-3,3e-4")
        choices.append([f"{key.strip()}={_text(value)}" for value in values])
    keys = [options[0].partition("=")[0] for options in choices]
    if repeated := [key for key in keys if keys.count(key) > 1 or key == "output"]:
        raise RecipeError(
            f"--sweep {repeated[0]}: expected each field once, and not 'output'. Give all its values together"
        )
    return [
        SweepRun(list(combination), str(output / _folder_name(",".join(combination))))
        for combination in itertools.product(*choices)
    ]


def _folder_name(text: str) -> str:
    """The overrides as the name of a folder. A digest tells shortened or changed ones apart."""
    name = re.sub(r"[^\w.,=+-]", "_", text)[:_NAME_LIMIT]
    return name if name == text else f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    """A value as an override has it."""
    if value is None:
        return "null"
    if isinstance(value, str):
        return str(value)
    return yaml.safe_dump(typed_yaml.as_yaml_value(value), default_flow_style=True, width=10**6).strip()


def _check_different(runs: Sequence[SweepRun], recipes: Sequence[Recipe]) -> None:
    """
    Raises:
        RecipeError: two combinations give the same recipe.
    """
    seen: dict[str, SweepRun] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        other = seen.setdefault(dump_recipe(recipe.model_copy(update={"output": ""})), run)
        if other is not run:
            raise RecipeError(
                f"--sweep: {' '.join(other.overrides)} and {' '.join(run.overrides)} are the same recipe. Leave out repeated values, and "
                "fields that another one sets"
            )


def _train(run: SweepRun, recipe: Recipe, features: Path, progress: Progress) -> None:
    """Train one run, unless it is finished, and read its losses."""
    folder = Path(run.folder)
    try:
        if not (folder / "fused").is_dir():
            train(recipe, resume=(folder / RECIPE_FILE).is_file(), features=features, progress=progress)
    except (Preempted, DiskError):
        raise
    except UltraFuserError as error:
        if PartialState().num_processes > 1:  # the other processes wait for this one
            raise
        run.error = str(error)
        progress.log(f"failed: {error}")
        return
    run.stage = recipe.stages[-1].name
    run.loss = from_main(partial(_read_loss, folder, run.stage, recipe.keep_best))


def _read_loss(folder: Path, stage: str, keep_best: bool) -> dict[str, float] | None:
    """The loss of a stage's saved weights by domain, and the mean. None: it has logged none."""
    rows = [row for row in read_metrics(folder / METRICS_FILE) if row["stage"] == stage]
    validations = [row for row in rows if "eval_loss" in row]
    logged = validations or [row for row in rows if any(key.startswith("loss/") for key in row)]
    if not logged:
        return None
    best = min(validations, key=lambda row: row["eval_loss"]) if validations and keep_best else logged[-1]
    loss = {key.partition("/")[2]: value for key, value in best.items() if key.startswith(("loss/", "eval_loss/"))}
    return loss | {"mean": statistics.mean(loss.values())}


def _write(output: Path, runs: Sequence[SweepRun]) -> None:
    if PartialState().is_main_process:
        write_json(output / SWEEP_FILE, [asdict(run) for run in runs])
