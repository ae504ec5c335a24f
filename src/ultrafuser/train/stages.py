"""The two stages: the gate alone over frozen specialists, then the gate and the specialists together.

Source: algorithm 1 and appendix B of arXiv 2403.08281.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import get_last_checkpoint

from ultrafuser import typed_yaml
from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.data.writing import atomic_file, write_json
from ultrafuser.errors import DataError, RecipeError, TrainingError
from ultrafuser.model.checkpoint import fused_folder, read_manifest
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.saving import atomic_directory
from ultrafuser.progress import Progress
from ultrafuser.recipe import GateRecipe, GateStage, JointStage, Recipe, SourceRecipe, StageRecipe, dump_recipe
from ultrafuser.specialists import fuse, load, pick_device
from ultrafuser.train.calibrate import TEMPERATURES, calibrate
from ultrafuser.train.card import write_card
from ultrafuser.train.features import FeatureStore, estimate_size_bytes
from ultrafuser.train.trainer import FusionTrainer, Rows, SaveEvery, save_trainable

FINISHED, MEASURED = "finished.safetensors", "temperatures.json"
# The cache pays once rows come up again; its size is bounded so that a large run does not fill the disk by surprise.
_CACHE_LIMIT_BYTES = 200 << 30


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
    for number, stage in enumerate(recipe.stages, 1):
        home = output / f"{number}-{stage.name}"
        run_stage(model, stage, recipe, rows, validation, home, features=features, progress=progress)
    folder = save_fused_folder(model, tokenizer, recipe, output)
    if PartialState().is_main_process:
        shutil.rmtree(output / "features", ignore_errors=True)  # large, and quickly made again
    return folder


def save_fused_folder(
    model: UltraFuserForCausalLM, tokenizer: PreTrainedTokenizerBase, recipe: Recipe, output: Path
) -> Path:
    """The checkpoint with its tokenizer, recipe, metrics and model card, all or nothing, as `<output>/fused`."""
    folder = output / "fused"
    if PartialState().is_main_process:
        with atomic_directory(folder) as draft:
            model.save_pretrained(draft)
            tokenizer.save_pretrained(draft)
            (draft / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
            if (output / "metrics.jsonl").is_file():
                shutil.copy(output / "metrics.jsonl", draft)
            write_card(draft, model.config, recipe, read_metrics(output / "metrics.jsonl"), title=output.name)
    PartialState().wait_for_everyone()
    return folder


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def load_source(source: SourceRecipe) -> list[Row]:
    """The rows of one source of a recipe.

    Raises:
        DataError: see `load_rows`.
    """
    return load_rows(
        source.path,
        domain=source.domain,
        split=source.split,
        limit=source.limit,
        revision=source.revision,
        config=source.config,
    )


def read_sources(sources: Sequence[SourceRecipe], renderer: Renderer, progress: Progress, what: str) -> list[Rendered]:
    """Rows of all sources as token sequences.

    Raises:
        DataError: no sources, or a domain of which no row fits.
    """
    if not sources:
        raise DataError(f"the recipe names no {what} data; add sources under data.train")
    rows = [row for source in sources for row in load_source(source)]
    rendered, stats = renderer.render_all(rows)
    counts = {domain: sum(row.domain == domain for row in rendered) for domain in sorted({r.domain for r in rows})}
    for domain, count in counts.items():
        if count == 0:
            raise DataError(
                f"domain {domain!r} has no {what} row left: the prompts alone fill max_length={renderer.max_length} "
                "tokens; raise data.max_length"
            )
    progress.log(f"{what} rows: " + ", ".join(f"{count} {domain}" for domain, count in counts.items()) + f" ({stats})")
    return rendered


def run_stage(
    model: UltraFuserForCausalLM,
    stage: StageRecipe,
    recipe: Recipe,
    rows: Sequence[Rendered],
    validation: Sequence[Rendered],
    folder: Path,
    *,
    features: Path | None = None,
    progress: Progress | None = None,
) -> None:
    """Train one stage in place, or load what it gave when it is finished already.

    Args:
        rows, validation: rendered rows.
        folder: of this stage; checkpoints in it are resumed from.
        features: folder of the feature cache; by default beside the stage's.
    """
    progress, features = progress or Progress(), features or folder.parent / "features"
    dtypes = [group.model.dtype for group in model.groups]
    torch.manual_seed(recipe.seed)  # new adapters start alike whether the stage before ran now or in an earlier run
    if isinstance(stage, JointStage):
        prepare_joint(model, stage)
    else:
        prepare_gate(model)
    if isinstance(stage, GateStage) and stage.calibrate:
        _set_temperatures(model, rows, folder, recipe.seed, progress)
    if (folder / FINISHED).is_file():
        model.load_state_dict(load_file(folder / FINISHED), strict=False)
        progress.log(f"stage {stage.name}: finished before")
    else:
        autocast = stage.trains_all_weights and torch.bfloat16 in dtypes
        args = _arguments(stage, recipe, folder, validates=bool(validation), autocast=autocast)
        train_rows: Rows = rows
        validation_rows: Rows = validation
        if stage.name == "gate" and _caching_pays(model, stage, recipe, rows):
            train_rows = _store(model, rows, features / "train", args, progress)
            if validation:
                validation_rows = _store(model, validation, features / "validation", args, progress)
        _train_stage(model, stage, recipe, train_rows, validation_rows, folder, args, progress)
    if stage.trains_all_weights:
        for group, dtype in zip(model.groups, dtypes, strict=True):
            group.to(dtype)


def _train_stage(
    model: UltraFuserForCausalLM,
    stage: StageRecipe,
    recipe: Recipe,
    rows: Rows,
    validation: Rows,
    folder: Path,
    args: TrainingArguments,
    progress: Progress,
) -> None:
    plain = rows.rows if isinstance(rows, FeatureStore) else rows
    sampler = BalancedBatchSampler(
        [row.domain for row in plain],
        stage.samples_per_domain,
        stage.steps,
        rows_per_device=stage.rows_per_device,
        num_ranks=args.world_size,
        lengths=[row.num_tokens for row in plain],
        seed=recipe.seed,
        balanced=recipe.balanced,
    )
    args.per_device_train_batch_size = sampler.micro_size
    args.gradient_accumulation_steps = sampler.num_accumulation
    patience, callbacks = recipe.early_stop_patience, []
    if recipe.save_every and args.load_best_model_at_end:
        callbacks.append(SaveEvery(recipe.save_every))
    if patience and validation:
        callbacks.append(EarlyStoppingCallback(patience))
    trainer = FusionTrainer(
        model, args, rows, validation or None, sampler,
        stage=stage.name,
        metrics_file=folder.parent / "metrics.jsonl",
        specialist_lr=stage.specialist_lr if stage.name == "joint" else None,
        progress=progress,
        callbacks=callbacks,
    )  # fmt: skip
    last = _last_checkpoint(folder)
    truncate_metrics(folder.parent / "metrics.jsonl", int(last.rpartition("-")[2]) if last else 0, stage.name)
    trainer.train(resume_from_checkpoint=last)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if trainer.is_world_process_zero():
        save_trainable(model, folder / FINISHED, state)
    trainer.accelerator.wait_for_everyone()


def _set_temperatures(
    model: UltraFuserForCausalLM, rows: Sequence[Rendered], folder: Path, seed: int, progress: Progress
) -> None:
    """Measure the specialists' temperatures, or take those that this stage began with."""
    file = folder / MEASURED
    if PartialState().is_main_process and not file.is_file():
        write_json(file, calibrate(model, rows, seed=seed, progress=progress))
    PartialState().wait_for_everyone()
    model.config.set_temperatures(json.loads(file.read_text(encoding="utf-8")))
    pairs = list(zip(model.config.names, model.config.temperatures, strict=True))
    progress.log("temperatures: " + ", ".join(f"{name} {temperature:.2f}" for name, temperature in pairs))
    if limits := [name for name, temperature in pairs if temperature in (TEMPERATURES[0], TEMPERATURES[-1])]:
        progress.log(f"{', '.join(limits)}: at the limit of what is tried; if the specialists wrote these rows or were trained on "
                     "them, set stages.gate.calibrate=false")  # fmt: skip


def prepare_gate(model: UltraFuserForCausalLM) -> None:
    """Stage 1: nothing but the gate learns, and the specialists stay in eval mode."""
    model.requires_grad_(False)
    model.gate.requires_grad_(True)


def prepare_joint(model: UltraFuserForCausalLM, stage: JointStage) -> None:
    """Stage 2: the gate and the specialists learn: their adapters (new ones where they have none), or all weights.

    Raises:
        TrainingError: `specialists: full` where several specialists share one base.
    """
    model.requires_grad_(False)
    model.gate.requires_grad_(True)
    for group in model.groups:
        if stage.specialists == "full":
            if group.size > 1:
                raise TrainingError(
                    f"specialists {', '.join(group.names)} share one base, so training all its weights would tie them; "
                    "use stages.joint.specialists=lora, or share_base=false"
                )
            group.float()  # AdamW's small steps vanish in bfloat16; run_stage casts back
            group.requires_grad_(True)
            continue
        if not group.loras:
            group.new_adapters(stage.lora.r, stage.lora.alpha, stage.lora.dropout, stage.lora.target_modules)
        for lora in group.loras.values():
            lora.dropout.p = stage.lora.dropout
        for parameter in group.adapter_parameters():
            parameter.data = parameter.data.float()  # AdamW's small steps vanish in bfloat16
            parameter.requires_grad_(True)


def _arguments(
    stage: StageRecipe, recipe: Recipe, folder: Path, *, validates: bool, autocast: bool
) -> TrainingArguments:
    every = recipe.eval_every or stage.steps
    keeps_best = recipe.keep_best and validates
    on_cpu = recipe.device == "cpu" or (recipe.device == "auto" and not torch.cuda.is_available())
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=stage.steps,
        learning_rate=stage.lr,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[stage.schedule],
        warmup_steps=round(stage.warmup_ratio * stage.steps),
        weight_decay=stage.weight_decay,
        max_grad_norm=stage.max_grad_norm,
        logging_strategy="steps",
        logging_steps=recipe.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validates else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every if keeps_best else recipe.save_every or stage.steps,
        save_total_limit=2,
        load_best_model_at_end=keeps_best,
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False if validates else None,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        report_to=recipe.report_to or "none",
        seed=recipe.seed,
        use_cpu=on_cpu,
        bf16=autocast and not on_cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        use_cache=True,  # the Trainer writes it into the model's configuration, and so into the checkpoint
        ddp_find_unused_parameters=False,
    )


def _caching_pays(model: UltraFuserForCausalLM, stage: StageRecipe, recipe: Recipe, rows: Sequence[Rendered]) -> bool:
    if recipe.cache_features != "auto":
        return bool(recipe.cache_features)
    drawn = stage.steps * stage.samples_per_domain * len({row.domain for row in rows})
    return drawn > len(rows) and estimate_size_bytes(model, rows) < _CACHE_LIMIT_BYTES


def _store(
    model: UltraFuserForCausalLM, rows: Sequence[Rendered], folder: Path, args: TrainingArguments, progress: Progress
) -> FeatureStore:
    device = args.device  # also starts the process group, where there is one
    model.to(device)
    barrier = PartialState().wait_for_everyone
    return FeatureStore.build(
        model,
        rows,
        folder,
        rank=args.process_index,
        num_ranks=args.world_size,
        barrier=barrier,
        progress=progress,
    )


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
    kept, text = output / "recipe.yaml", dump_recipe(recipe)
    if not resume:
        if kept.exists():
            raise TrainingError(f"{output} holds a run already; go on with it by --resume, or choose another output=")
    elif not kept.is_file():
        raise TrainingError(f"{output}: no run to resume there (no recipe.yaml); start it without --resume")
    elif typed_yaml.parse(kept.read_text(encoding="utf-8"), str(kept)) != typed_yaml.parse(text, "recipe"):
        old, new = kept.read_text(encoding="utf-8").splitlines(), text.splitlines()
        changed = [line.strip() for line in new if line not in old][:3] or [
            line.strip() for line in old if line not in new
        ][:3]
        raise TrainingError(
            f"{output}: the run there has another recipe (differs in: {'; '.join(changed)}); resume with the same one, or "
            "choose another output="
        )


def _last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a stage; one whose saving was interrupted lacks the state that is written last."""
    for draft in folder.glob("checkpoint-*"):
        if PartialState().is_main_process and not (draft / "trainer_state.json").is_file():
            shutil.rmtree(draft)
    PartialState().wait_for_everyone()
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None


def truncate_metrics(file: Path, step: int, stage: str | None = None) -> None:
    """Drop the metrics of steps that will be trained again, of one stage or of all."""
    if PartialState().is_main_process and file.is_file():
        rows = [row for row in read_metrics(file) if stage not in (None, row["stage"]) or row["step"] <= step]
        with atomic_file(file, force=True) as draft:
            draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
