"""A whole training run: load what a recipe names, train its stages, save the fused checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks

from ultrafuser import typed_yaml
from ultrafuser.data.templates import Renderer
from ultrafuser.data.writing import atomic_file
from ultrafuser.errors import RecipeError, TrainingError
from ultrafuser.model.checkpoint import fused_folder, read_manifest
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import atomic_directory
from ultrafuser.progress import Progress
from ultrafuser.recipe import GateRecipe, Recipe, dump_recipe
from ultrafuser.specialists import fuse, load, pick_device
from ultrafuser.train.card import write_card
from ultrafuser.train.metrics import METRICS_FILE, read_metrics
from ultrafuser.train.rows import read_sources
from ultrafuser.train.stages import StageRun, run_stage


def train(
    recipe: Recipe, *, resume: bool = False, features: Path | None = None, progress: Progress | None = None
) -> Path:
    """Everything a recipe says, from loading to the fused checkpoint.

    Args:
        resume: go on with an interrupted run in `recipe.output`.
        features: folder of a feature cache that other runs on the same specialists and rows share; by default one in
            the output, removed at the end.

    Returns:
        The folder of the fused checkpoint, `<output>/fused`.

    Raises:
        TrainingError: there is a run in the folder already, or nothing to resume, or the loss is not finite.
        DataError: no rows, or rows that do not fit.
    """
    progress = progress or Progress()
    recipe = _settle(recipe)
    output = Path(recipe.output)
    if recipe.early_stop_patience and not recipe.data.validation:
        raise TrainingError("early_stop_patience needs validation rows; add sources under data.validation")
    _check_trackers(recipe.report_to)
    _check_output(output, recipe, resume)
    model, tokenizer = _build(recipe)
    max_length = min(recipe.data.max_length, model.config.max_position_embeddings)
    renderer = Renderer(tokenizer, model.config.chat_templates, max_length)
    rows = read_sources(recipe.data.train, renderer, progress, "training")
    validation = (
        read_sources(recipe.data.validation, renderer, progress, "validation") if recipe.data.validation else []
    )
    if PartialState().is_main_process:  # from here on there is something to resume
        output.mkdir(parents=True, exist_ok=True)
        with atomic_file(output / "recipe.yaml", force=True) as draft:
            draft.write_text(dump_recipe(recipe), encoding="utf-8")
    for index, stage in enumerate(recipe.stages, 1):
        stage_folder = output / f"{index}-{stage.name}"
        run_stage(StageRun(model, stage, recipe, rows, validation, stage_folder, features, progress))
    folder = save_fused_folder(model, tokenizer, recipe, output)
    if PartialState().is_main_process:
        shutil.rmtree(output / "features", ignore_errors=True)  # large, and quickly made again
    return folder


def save_fused_folder(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, output: Path
) -> Path:
    """Write the trained model of a run as `<output>/fused`."""
    folder = output / "fused"
    if PartialState().is_main_process:
        write_fused_folder(model, tokenizer, recipe, folder, title=output.name, metrics=output / METRICS_FILE)
    PartialState().wait_for_everyone()
    return folder


def write_fused_folder(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    *,
    title: str,
    metrics: Path | None = None,
    copy: bool = False,
) -> None:
    """Write a checkpoint with its tokenizer, recipe and model card, all or nothing.

    Args:
        title: of the model card.
        metrics: file of the training; None: the gate is untrained, and the card says nothing of a training.
        copy: also copy the specialists that did not change.
    """
    with atomic_directory(folder) as draft:
        model.save_pretrained(draft, copy=copy)
        tokenizer.save_pretrained(draft)
        (draft / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if metrics is None:
            write_card(draft, model.config, None, [], title=title)
        else:
            if metrics.is_file():
                shutil.copy(metrics, draft)
            write_card(draft, model.config, recipe, read_metrics(metrics), title=title)


def _settle(recipe: Recipe) -> Recipe:
    """A recipe that starts from a fused folder, with what that folder has fixed.

    Raises:
        RecipeError: the recipe asks for something else.
    """
    if recipe.fused is None:
        return recipe
    config = read_manifest(fused_folder(recipe.fused, {}))
    own = {
        "mixing": config.mixing,
        "share_base": config.share_base,
        "gate": GateRecipe.model_validate({"type": config.gate_type, "hidden_size": config.gate_hidden_size}),
    }
    for key in own.keys() & recipe.model_fields_set:
        if getattr(recipe, key) != own[key]:
            raise RecipeError(
                f"{key}: the fused folder {recipe.fused} has {own[key]}, the recipe says {getattr(recipe, key)}; leave it "
                "out of the recipe, or fuse anew from the specialists"
            )
    return recipe.model_copy(update=own)


def _build(recipe: Recipe) -> tuple[UltraFuserForCausalLM, PreTrainedTokenizerBase]:
    if recipe.fused is None:
        return fuse(recipe)
    model, renderer = load(recipe.fused, dtype=recipe.dtype, device_map=pick_device(recipe.device))
    return model, renderer.tokenizer


def _check_trackers(names: list[str]) -> None:
    """Find out before the work, not after it, that a tracker is unknown or not installed."""
    try:
        for tracker in get_reporting_integration_callbacks(names):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:  # transformers raises each of them
        raise TrainingError(f"report_to: {', '.join(names)}: {error}") from error


def _check_output(output: Path, recipe: Recipe, resume: bool) -> None:
    """Check that no run is overwritten, and that the one to be resumed has the same recipe."""
    if not PartialState().is_main_process:
        return
    saved, text = output / "recipe.yaml", dump_recipe(recipe)
    if not resume:
        if saved.exists():
            raise TrainingError(f"{output} holds a run already; go on with it by --resume, or choose another output=")
    elif not saved.is_file():
        raise TrainingError(f"{output}: no run to resume there (no recipe.yaml); start it without --resume")
    elif typed_yaml.parse(saved.read_text(encoding="utf-8"), str(saved)) != typed_yaml.parse(text, "recipe"):
        old, new = saved.read_text(encoding="utf-8").splitlines(), text.splitlines()
        changed = [line.strip() for line in new if line not in old][:3] or [
            line.strip() for line in old if line not in new
        ][:3]
        raise TrainingError(
            f"{output}: the run there has another recipe (differs in: {'; '.join(changed)}); resume with the same one, or "
            "choose another output="
        )
