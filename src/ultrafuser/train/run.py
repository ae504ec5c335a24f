"""A whole training run: load what a recipe names, train its stages, save the fused checkpoint."""

from __future__ import annotations

import datetime
import gc
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase
from transformers.integrations import get_reporting_integration_callbacks

from ultrafuser import typed_yaml
from ultrafuser.data.files import disk_errors, disk_problem, next_step, run_folder, write_text
from ultrafuser.data.locking import exclusive_lock
from ultrafuser.data.sources import RowReader
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import DiskError, RecipeError, TrainingError
from ultrafuser.model.checkpoint import fused_folder, read_manifest
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.parallel import Share, SpecialistMesh
from ultrafuser.model.saving import WRITE_ERRORS, atomic_directory
from ultrafuser.progress import Progress
from ultrafuser.recipe import GateRecipe, Recipe, SourceRecipe, dump_recipe
from ultrafuser.specialists import fuse, load, make_renderer, pick_device
from ultrafuser.train.card import write_card
from ultrafuser.train.checks import check_optimizer, check_stage
from ultrafuser.train.metrics import METRICS_FILE, read_metrics, truncate_metrics
from ultrafuser.train.plan import describe_memory
from ultrafuser.train.preemption import Preemption
from ultrafuser.train.rows import BAD_ROWS_FILE, read_sources, share_rows
from ultrafuser.train.sharding import check_sharding, is_sharded, refuse_wrappers
from ultrafuser.train.stages import FINISHED, StageRun, load_stage, run_stage

RECIPE_FILE = "recipe.yaml"


def train(
    recipe: Recipe, *, resume: bool = False, features: Path | None = None, progress: Progress | None = None
) -> Path:
    """Run a recipe, from loading the specialists to the fused checkpoint.

    Args:
        resume: continue an interrupted run in `recipe.output`.
        features: folder of a feature cache that other runs on the same specialists and rows share. By default it is in
            the output and removed at the end.

    Returns:
        The folder of the fused checkpoint, `<output>/fused`.

    Raises:
        TrainingError: the folder holds another run, or none to resume, or the loss is not finite.
        Preempted: SIGTERM arrived. The step that ran is saved.
        DataError: no rows, or rows that do not fit.
    """
    progress = progress or Progress()
    refuse_wrappers()
    join_processes(recipe)
    recipe = settle(recipe, resume=resume)
    if recipe.early_stop_patience and not recipe.data.validation:
        raise TrainingError("early_stop_patience needs validation rows. Add sources under data.validation")
    _check_trackers(recipe.report_to)
    check_optimizer(recipe.stages)
    if recipe.device_map and (processes := PartialState().num_processes) > 1:
        raise TrainingError(
            f"device_map spreads the specialists of one process over all devices, but {processes} processes run. Start one, or "
            "leave device_map out"
        )
    mesh = _build_mesh(recipe)
    preemption = Preemption()
    with run_lock(Path(recipe.output)), preemption.listening():
        check_output(recipe, resume=resume)
        return _train(recipe, features, progress, preemption, mesh)


def join_processes(recipe: Recipe) -> None:
    """Start the process group, where there is one. The first state of accelerate does it, on a CPU only if it is told so."""
    timeout = datetime.timedelta(seconds=recipe.ddp_timeout)
    PartialState(cpu=pick_device(recipe.device) == "cpu", timeout=timeout)


@contextmanager
def run_lock(output: Path) -> Iterator[None]:
    """Make the output folder of a run and keep other runs out of it until the block ends.

    Raises:
        DataError: the folder cannot be written to, or another run is writing to it.
    """
    if not PartialState().is_main_process:
        yield
        return
    with run_folder(output), exclusive_lock(output, "training run", "train.lock"):
        yield


def _train(
    recipe: Recipe, features: Path | None, progress: Progress, preemption: Preemption, mesh: SpecialistMesh | None
) -> Path:
    output = Path(recipe.output)
    model, tokenizer = _load(recipe, progress, mesh)
    if recipe.fused is None:
        recipe = recipe.model_copy(update={"date": recipe.date or model.config.date})  # recorded for a resumed run
    for stage in recipe.stages:
        check_stage(model, stage)
    device = PartialState().device if recipe.parallel.shard else None
    if needs := describe_memory(model, recipe, processes=PartialState().num_processes, device=device):
        progress.log(needs)
    renderer = make_renderer(model, tokenizer, recipe.data.max_length)
    reader = RowReader(recipe.data.on_bad_row)

    def read(sources: list[SourceRecipe], purpose: str) -> Sequence[Rendered]:
        folder, workers = output / f"rows-{purpose}", recipe.data.workers
        return share_rows(
            lambda: read_sources(sources, renderer, progress, purpose, reader, folder=folder, workers=workers), folder
        )

    rows = read(recipe.data.train, "training")
    validation = read(recipe.data.validation, "validation") if recipe.data.validation else []
    if PartialState().is_main_process:  # from here on there is something to resume
        write_text(output / RECIPE_FILE, dump_recipe(recipe))
        reader.write_bad_rows(output / BAD_ROWS_FILE)
    truncate_metrics(output / METRICS_FILE)
    for index, stage in enumerate(recipe.stages, 1):
        stage_folder = output / f"{index}-{stage.name}"
        if is_sharded(model):  # the next stage changes types or adds adapters, which only whole weights allow
            del model
            model = _load_trained(recipe, index - 1, output, progress, mesh)
        run_stage(
            StageRun(
                model,
                stage,
                recipe,
                rows,
                validation,
                stage_folder,
                features,
                progress,
                renderer=renderer,
                preemption=preemption,
            )
        )
    if mesh is not None and PartialState().is_main_process:
        del model
        model = _load_trained(recipe, len(recipe.stages), output, progress)
    with progress.waiting("writing the fused folder"):
        folder = save_fused_folder(model, tokenizer, recipe, output)
    if PartialState().is_main_process:
        for folder_of_run in ("features", "rows-training", "rows-validation"):  # large, and quickly recomputed
            shutil.rmtree(output / folder_of_run, ignore_errors=True)
    return folder


def _load(
    recipe: Recipe, progress: Progress, mesh: SpecialistMesh | None = None
) -> tuple[UltraFuserForCausalLM, PreTrainedTokenizerBase]:
    """The model that a run starts from, and its tokenizer. Weights that are divided later are on the CPU at first."""
    share = (0, 1) if mesh is None else (mesh.rank, mesh.size)
    if mesh is not None and mesh.shards:
        recipe = recipe.model_copy(update={"device": "cpu"})
    if recipe.fused is None:
        with progress.waiting("loading the specialists"):
            model, tokenizer = fuse(recipe, share=share)
    else:
        options = {"dtype": recipe.dtype, "trust_remote_code": recipe.trusted_code, "share": share}
        with progress.waiting(f"loading {recipe.fused}"):
            model, renderer = load(recipe.fused, device_map=recipe.device_map or pick_device(recipe.device), **options)
        tokenizer = renderer.tokenizer
    if mesh is not None:
        model.share = Share(mesh, model.local_indices, len(model.config.specialists))
    return model, tokenizer


def _build_mesh(recipe: Recipe) -> SpecialistMesh | None:
    """The mesh of the processes that share the specialists or divide their weights, if the recipe asks for one.

    Raises:
        TrainingError: the number of processes does not fit, too few models, or a stage that does not run so.
    """
    size, shards, processes = recipe.parallel.specialist, recipe.parallel.shard, PartialState().num_processes
    if size == 1 and not shards:
        return None
    if any(stage.name == "outcome" for stage in recipe.stages):
        field = "parallel.shard" if shards else "parallel.specialist"
        raise TrainingError(f"stage outcome: it needs all specialists in each process. Leave {field} out")
    if processes % size:
        raise TrainingError(
            f"parallel.specialist is {size}, but {processes} process{'es run' if processes > 1 else ' runs'}. Start a multiple "
            f"of {size}, such as: torchrun --nproc-per-node {size} -m ultrafuser train RECIPE"
        )
    if shards and processes == size:
        raise TrainingError(
            f"parallel.shard divides weights among the processes that read different rows, but there is one such process. Start "
            f"at least {2 * size}, such as: torchrun --nproc-per-node {2 * size} -m ultrafuser train RECIPE"
        )
    if shards:
        check_sharding(recipe)
    return SpecialistMesh.build(size, PartialState().device.type, shards)


def _load_trained(
    recipe: Recipe, num_stages: int, output: Path, progress: Progress, mesh: SpecialistMesh | None = None
) -> UltraFuserForCausalLM:
    """The model on the CPU after its first stages, from their files. Whole, unless a mesh shares its specialists."""
    gc.collect()  # divided weights of the stage before are in cycles of references
    model, _ = _load(recipe.model_copy(update={"device": "cpu"}), progress, mesh)
    for index, stage in enumerate(recipe.stages[:num_stages], 1):
        load_stage(model, stage, output / f"{index}-{stage.name}", recipe.seed)
    return model


def save_fused_folder(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, output: Path
) -> Path:
    """Write the trained model of a run as `<output>/fused`.

    Raises:
        DiskError: the disk is full or not writable. The trained weights are in the folders of the stages.
        TrainingError: it cannot be written for another reason, and what was saved instead.
    """
    folder = output / "fused"
    if PartialState().is_main_process:
        try:
            write_fused_folder(model, tokenizer, recipe, folder, title=output.name, metrics=output / METRICS_FILE)
        except WRITE_ERRORS as error:
            rest = _save_the_rest(model, tokenizer, recipe, output)
            if error.__cause__ is not None and (problem := disk_problem(error.__cause__)):
                raise DiskError(folder, problem, f"{next_step(problem)}. {rest}") from error
            raise TrainingError(f"{folder}: could not be written: {str(error).rstrip('.')}. {rest}") from error
    PartialState().wait_for_everyone()
    return folder


def _save_the_rest(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, output: Path
) -> str:
    """Save the gate, and those specialists that can be written. Returns what was left out, and how to go on."""
    folder, left_out = output / "fused-partial", list[str]()
    remedy = "Remove the cause and run it again"
    if stages := ", ".join(str(file) for file in sorted(output.glob(f"*/{FINISHED}"))):
        remedy = f"All trained weights are in {stages}. Remove the cause, and --resume writes them without training"
    try:
        write_fused_folder(
            model, tokenizer, recipe, folder, title=output.name, metrics=output / METRICS_FILE, left_out=left_out
        )
    except WRITE_ERRORS:
        return remedy
    missing = f" without {', '.join(left_out)}" if left_out else ""
    return f"{folder} holds the trained gate and model{missing}. {remedy}"


def write_fused_folder(
    model: UltraFuserForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    folder: Path,
    *,
    title: str,
    metrics: Path | None = None,
    copy: bool = False,
    left_out: list[str] | None = None,
) -> None:
    """Write a checkpoint with its tokenizer, recipe and model card, all or nothing.

    Args:
        title: of the model card.
        metrics: file of the training. None: the gate is untrained, and the card has no section on training.
        copy: also copy the specialists that did not change.
        left_out: see `UltraFuserForCausalLM.save_pretrained`.
    """
    with atomic_directory(folder) as draft:
        model.save_pretrained(draft, copy=copy, left_out=left_out)
        with disk_errors(folder):
            tokenizer.save_pretrained(draft)
        (draft / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        if metrics and metrics.is_file():
            shutil.copy(metrics, draft)
        rows = read_metrics(metrics) if metrics else []
        write_card(draft, model.config, recipe if metrics else None, rows, title=title)


def settle(recipe: Recipe, *, resume: bool) -> Recipe:
    """A recipe with the settings of the fused folder that it starts from, and of the run that it resumes.

    Raises:
        RecipeError: the recipe sets one of them to another value.
        TrainingError: there is no run to resume.
    """
    saved = Path(recipe.output) / RECIPE_FILE
    if resume and not saved.is_file():
        raise TrainingError(f"{recipe.output}: no run to resume there (no {RECIPE_FILE}). Start it without --resume")
    if resume and recipe.date is None:  # the templates must see the day of the run's start
        fields = typed_yaml.parse(saved.read_text(encoding="utf-8"), str(saved))
        recipe = recipe.model_copy(update={"date": fields.get("date") and str(fields["date"])})
    if recipe.fused is None:
        return recipe
    config = read_manifest(fused_folder(recipe.fused))
    fixed = {
        "mixing": config.mixing,
        "share_base": config.share_base,
        "gate": GateRecipe.model_validate({"type": config.gate_type, "hidden_size": config.gate_hidden_size}),
    }
    for key in fixed.keys() & recipe.model_fields_set:
        if getattr(recipe, key) != fixed[key]:
            raise RecipeError(
                f"{key}: the fused folder {recipe.fused} has {fixed[key]}, the recipe says {getattr(recipe, key)}. Leave it "
                "out of the recipe, or fuse the specialists again"
            )
    return recipe.model_copy(update=fixed)


def _check_trackers(names: list[str]) -> None:
    """Fail before the training, not after it, if a tracker is unknown or not installed."""
    try:
        for tracker in get_reporting_integration_callbacks(names):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:  # transformers raises each of them
        raise TrainingError(f"report_to: {', '.join(names)}: {error}") from error


def _without_devices(fields: Any) -> dict[str, Any]:
    """A recipe's fields without how devices share the work, which a resumed run may change."""
    stages = [
        {key: value for key, value in stage.items() if key not in ("rows_per_device", "tokens_per_device")}
        for stage in fields.get("stages", [])
    ]
    return {key: value for key, value in fields.items() if key not in ("parallel", "device_map")} | {"stages": stages}


def _in_this_version(saved: Path) -> str:
    """The recipe that a run has saved, with the defaults of fields that its version did not have."""
    text = saved.read_text(encoding="utf-8")
    try:
        return dump_recipe(Recipe.model_validate(typed_yaml.parse(text, str(saved))))
    except ValidationError:  # it has a field that this version does not have
        return text


def check_output(recipe: Recipe, *, resume: bool) -> None:
    """Check that no run is overwritten, and that a resumed run has the same recipe.

    Args:
        recipe: from `settle`.

    Raises:
        TrainingError: it would be, or has another one.
    """
    if not PartialState().is_main_process:
        return
    output, saved = Path(recipe.output), Path(recipe.output) / RECIPE_FILE
    if not resume:
        if saved.exists():
            raise TrainingError(f"{output} holds a run already. Continue it with --resume, or choose another output=")
        return
    old, new = _in_this_version(saved), dump_recipe(recipe)
    before, now = typed_yaml.parse(old, str(saved)), typed_yaml.parse(new, "recipe")
    if _without_devices(before) != _without_devices(now):
        added = [line.strip() for line in new.splitlines() if line not in old.splitlines()]
        removed = [line.strip() for line in old.splitlines() if line not in new.splitlines()]
        raise TrainingError(
            f"{output}: the run there has another recipe (differs in: {', '.join((added or removed)[:3])}). Resume with the "
            "same one, or choose another output="
        )
