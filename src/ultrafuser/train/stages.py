"""The stages: the gate alone over frozen specialists, then the gate and the specialists together.

Source: algorithm 1 and appendix B of arXiv 2403.08281. Stage 1b, which trains the gate by right answers, is in `outcome`.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.data.files import atomic_file, disk_errors, write_json
from ultrafuser.data.packed import SampledRows, domains_of, lengths_of
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.parallel import AbsentGroup, SpecialistMesh
from ultrafuser.progress import Progress
from ultrafuser.recipe import GateStage, JointStage, OutcomeStage, Recipe, StageRecipe
from ultrafuser.specialists import pick_device
from ultrafuser.train.calibrate import TEMPERATURES, calibrate
from ultrafuser.train.callbacks import SaveEvery
from ultrafuser.train.checkpoints import last_checkpoint
from ultrafuser.train.checks import check_stage
from ultrafuser.train.features import FeatureStore, Precision, estimate_size_bytes, holds_features
from ultrafuser.train.memory import checkpointing_pays, device_bytes, memory_errors
from ultrafuser.train.metrics import METRICS_FILE, truncate_metrics
from ultrafuser.train.outcome import train_outcome
from ultrafuser.train.plan import fit_rows
from ultrafuser.train.preemption import Preemption
from ultrafuser.train.reference import ReferenceTrainer
from ultrafuser.train.sharding import is_sharded, shard_weights
from ultrafuser.train.trainer import FusionTrainer, Rows, load_weights, save_trainable, trained_weights

VALIDATIONS = 5  # of a stage that keeps the best checkpoint
FINISHED, MEASURED, ROWS = "finished.safetensors", "temperatures.json", "rows-per-device.json"
# The cache pays if rows are drawn more than once. Its size is bounded, so that a large run does not fill the disk.
_CACHE_LIMIT_BYTES = 200 << 30


@dataclass
class StageRun:
    """One stage of a run.

    Attributes:
        model: trained in place.
        rows, validation: rendered rows.
        folder: of this stage. Checkpoints in it are resumed, and the metrics are beside it.
        features: folder of the feature cache, by default beside the stage's.
        trainer: a subclass may add a term to the loss.
        renderer: of the questions of a stage 'outcome', which no other stage needs.
        preemption: how the run learns that it must stop.
    """

    model: UltraFuserForCausalLM
    stage: StageRecipe
    recipe: Recipe
    rows: Sequence[Rendered]
    validation: Sequence[Rendered]
    folder: Path
    features: Path | None = None
    progress: Progress = field(default_factory=Progress)
    trainer: type[FusionTrainer] = FusionTrainer
    renderer: Renderer | None = None
    preemption: Preemption = field(default_factory=Preemption)

    @property
    def rows_per_step(self) -> int:
        """The number of rows in a global batch."""
        return self.stage.samples_per_domain * len(set(domains_of(self.rows)))

    @property
    def mesh(self) -> SpecialistMesh | None:
        """Of the processes that share the specialists, if they do."""
        return None if self.model.share is None else self.model.share.mesh

    @property
    def metrics_file(self) -> Path:
        """Of all stages."""
        return self.folder.parent / METRICS_FILE


def run_stage(run: StageRun) -> None:
    """Train one stage in place, or load its weights when it is finished already."""
    model, stage = run.model, run.stage
    if (run.folder / FINISHED).is_file():
        load_stage(model, stage, run.folder, run.recipe.seed)
        run.progress.log(f"stage {stage.name}: finished before")
        return
    with _prepared(model, stage, run.recipe.seed) as dtypes:
        halves = [stage.trains_all_weights and dtype == torch.bfloat16 for dtype in dtypes]  # trained in float32
        if run.mesh is not None and run.mesh.shards:
            on_cpu, half = pick_device(run.recipe.device) == "cpu", torch.bfloat16
            shard_weights(model, run.mesh, [half if trained and not on_cpu else None for trained in halves])
            halves = []  # gathered layers are cast, which autocast would keep
        if isinstance(stage, GateStage) and stage.calibrate:
            _set_temperatures(run)
        if isinstance(stage, OutcomeStage):
            _train_by_outcomes(run, stage)
            return
        if stage.rows_per_device == "auto":
            run.stage = stage.model_copy(update={"rows_per_device": _choose_rows(run, stage)})
        args = training_arguments(run, autocast=any(halves))
        train_rows, validation_rows = _training_rows(run, args)
        with _checkpointing(run):
            train_stage(run, args, train_rows, validation_rows)


def load_stage(model: UltraFuserForCausalLM, stage: StageRecipe, folder: Path, seed: int) -> None:
    """Load the weights of a finished stage.

    Args:
        folder: of the stage.
        seed: of the run.
    """
    with _prepared(model, stage, seed):
        if isinstance(stage, GateStage) and stage.calibrate:
            model.config.set_temperatures(json.loads((folder / MEASURED).read_text(encoding="utf-8")))
        load_weights(model, folder / FINISHED)


@contextmanager
def _prepared(model: UltraFuserForCausalLM, stage: StageRecipe, seed: int) -> Iterator[list[torch.dtype]]:
    """In the block the weights that a stage trains require gradients, in the type that it trains them in.

    Yields the types of the groups before. Weights that were divided in the block keep the type.
    """
    dtypes = [group.model.dtype for group in model.local_groups]
    torch.manual_seed(seed)
    if isinstance(stage, JointStage):
        prepare_joint(model, stage, seed)
    else:
        prepare_gate(model)
    yield dtypes
    if stage.trains_all_weights and not is_sharded(model):
        for group, dtype in zip(model.local_groups, dtypes, strict=True):
            group.to(dtype)


def _train_by_outcomes(run: StageRun, stage: OutcomeStage) -> None:
    """Train the gate by right answers from the last finished step, and write its weights."""
    assert run.renderer is not None
    run.model.place(training_arguments(run, autocast=False).device)
    checkpoint = run.folder / "step.pt"
    train_outcome(
        run.model,
        run.renderer,
        stage,
        seed=run.recipe.seed,
        checkpoint=checkpoint,
        metrics_file=run.metrics_file,
        progress=run.progress,
    )
    with atomic_file(run.folder / FINISHED, force=True) as draft:
        save_trainable(run.model, draft, trained_weights(run.model))
    checkpoint.unlink()


def train_stage(run: StageRun, args: TrainingArguments, train_rows: Rows, validation_rows: Rows) -> None:
    """Train from the last checkpoint, if there is one, and write the trained weights."""
    stage, recipe = run.stage, run.recipe
    assert not isinstance(stage, OutcomeStage) and stage.rows_per_device != "auto"
    sampler = BalancedBatchSampler(
        domains_of(run.rows),
        stage.samples_per_domain,
        stage.steps,
        rows_per_device=stage.rows_per_device,
        num_ranks=args.world_size if run.mesh is None else run.mesh.data_size,
        lengths=lengths_of(run.rows),
        seed=recipe.seed,
        balanced=recipe.balanced,
    )
    args.per_device_train_batch_size = sampler.micro_size
    args.gradient_accumulation_steps = sampler.num_accumulation
    callbacks: list[TrainerCallback] = [run.preemption]
    if recipe.save_every and args.load_best_model_at_end:
        callbacks.append(SaveEvery(recipe.save_every))
    if recipe.early_stop_patience and run.validation:
        callbacks.append(EarlyStoppingCallback(recipe.early_stop_patience))
    make_trainer: Callable[..., FusionTrainer] = run.trainer
    if isinstance(stage, JointStage) and stage.kl_coef:
        make_trainer = partial(ReferenceTrainer, kl_coef=stage.kl_coef)
    trainer = make_trainer(
        run.model,
        args,
        train_rows,
        validation_rows or None,
        sampler,
        stage=stage.name,
        metrics_file=run.metrics_file,
        specialist_lr=stage.specialist_lr if isinstance(stage, JointStage) else None,
        tokens_per_device=stage.tokens_per_device,
        progress=run.progress,
        callbacks=callbacks,
    )
    checkpoint = last_checkpoint(run.folder, run.progress)
    truncate_metrics(run.metrics_file, int(checkpoint.rpartition("-")[2]) if checkpoint else 0, stage.name)
    with memory_errors(stage):
        trainer.train(resume_from_checkpoint=checkpoint)
    if args.load_best_model_at_end:
        best = trainer.state.best_metric
        run.progress.log(
            f"stage {stage.name}: kept step {trainer.state.best_global_step} of {trainer.state.global_step}, validation loss {best:.4f}"
        )
    writes = run.mesh is not None or trainer.is_world_process_zero()  # those that divide weights gather them together
    weights = trained_weights(run.model) if writes else {}
    if run.mesh is not None and run.mesh.rank and not run.mesh.data_rank:
        with disk_errors(run.folder / FINISHED):
            save_trainable(run.model, run.folder / FINISHED, weights)
    trainer.accelerator.wait_for_everyone()  # the main process writes last what makes a stage finished
    if trainer.is_world_process_zero():
        with atomic_file(run.folder / FINISHED, force=True) as draft:
            save_trainable(run.model, draft, weights)
    trainer.accelerator.wait_for_everyone()


def _choose_rows(run: StageRun, stage: GateStage | JointStage) -> int:
    """The rows of one forward pass that fit on the devices of all processes, or with which this stage began."""
    file, source = run.folder / ROWS, "as before"
    rows = from_main(partial(_read_json, file))
    if rows is None:
        memory = device_bytes(run.model)
        fitting = fit_rows(
            run.model,
            run.recipe,
            stage,
            memory=memory,
            processes=PartialState().num_processes,
            num_domains=len(set(domains_of(run.rows))),
            length=max(lengths_of(run.rows)),
        )
        rows, source = min(gather_object([fitting])), f"estimated for {memory / 2**30:.1f} GiB"
        if PartialState().is_main_process:
            write_json(file, rows)
    run.progress.log(f"stage {stage.name}: {rows} row{'s' * (rows > 1)} in a forward pass ({source})")
    return rows


def from_main(compute: Callable[[], Any]) -> Any:
    """What the main process computes. Other nodes may not see its files."""
    return broadcast_object_list([compute() if PartialState().is_main_process else None])[0]


def _read_json(file: Path) -> Any:
    """What a file of this stage holds. None: it is not there yet."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def _set_temperatures(run: StageRun) -> None:
    """Measure the specialists' temperatures, or read those that this stage began with."""
    config, file = run.model.config, run.folder / MEASURED

    def measure() -> list[float]:
        return calibrate(run.model, run.rows, seed=run.recipe.seed, progress=run.progress)

    measured = from_main(partial(_read_json, file))
    if measured is None and run.model.share is not None:
        temperatures = measure()
        local = [temperatures[k] for k in run.model.share.indices]
        columns = torch.tensor(local, dtype=torch.float64, device=run.model.device)
        measured = [round(temperature, 3) for temperature in run.model.share.gather(columns).tolist()]
    elif measured is None:
        measured = from_main(measure)
    if PartialState().is_main_process and not file.is_file():
        write_json(file, measured)
    config.set_temperatures(measured)
    pairs = list(zip(config.names, config.temperatures, strict=True))
    run.progress.log("temperatures: " + ", ".join(f"{name} {temperature:.2f}" for name, temperature in pairs))
    if limits := [name for name, temperature in pairs if temperature in (TEMPERATURES[0], TEMPERATURES[-1])]:
        run.progress.log(
            f"{', '.join(limits)}: at the limit of the temperatures tried. If the specialists wrote these rows or were "
            "trained on them, set stages.gate.calibrate=false"
        )


def prepare_gate(model: UltraFuserForCausalLM) -> None:
    """Stage 1: the gate alone learns."""
    model.requires_grad_(False)
    model.gate.requires_grad_(True)


def prepare_joint(model: UltraFuserForCausalLM, stage: JointStage, seed: int = 0) -> None:
    """Stage 2: the gate and the specialists learn: their adapters (new ones where they have none), or all weights.

    Args:
        seed: of new adapters. They start alike whichever process holds them, and whether the stage before ran now or in
            an earlier run.

    Raises:
        TrainingError: see `check_stage`.
    """
    check_stage(model, stage)
    prepare_gate(model)
    for g, group in enumerate(model.groups):
        if isinstance(group, AbsentGroup):
            continue
        torch.manual_seed(seed + g)
        if stage.specialists == "full":
            group.float()  # AdamW's small steps vanish in bfloat16, and run_stage casts back
            group.requires_grad_(True)
            continue
        if not group.loras:
            group.new_adapters(stage.lora.r, stage.lora.alpha, stage.lora.dropout, stage.lora.target_modules)
        for lora in group.loras.values():
            lora.dropout.p = stage.lora.dropout
        for parameter in group.adapter_parameters():
            parameter.data = parameter.data.float()  # AdamW's small steps vanish in bfloat16
            parameter.requires_grad_(True)


def training_arguments(run: StageRun, *, autocast: bool) -> TrainingArguments:
    """The settings of the Trainer. The sizes of its batches are set by `train_stage`.

    Args:
        autocast: run passes on a GPU in bfloat16, because all weights of bfloat16 models are trained in float32.
    """
    stage, recipe, validates = run.stage, run.recipe, bool(run.validation)
    keeps_best = recipe.keep_best and validates
    every = recipe.eval_every or (math.ceil(stage.steps / VALIDATIONS) if keeps_best else stage.steps)
    on_cpu = pick_device(recipe.device) == "cpu"
    return TrainingArguments(
        output_dir=str(run.folder),
        max_steps=stage.steps,
        learning_rate=stage.lr,
        lr_scheduler_type={"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}[stage.schedule],
        warmup_steps=round(stage.warmup_ratio * stage.steps),
        weight_decay=stage.weight_decay,
        optim=stage.optim if isinstance(stage, JointStage) else "adamw_torch",
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
        use_cache=True,  # the Trainer writes it into the model's configuration and so into the checkpoint
        ddp_find_unused_parameters=False,
        ddp_timeout=recipe.ddp_timeout,
    )


@contextmanager
def _checkpointing(run: StageRun) -> Iterator[None]:
    """Gradient checkpointing in the block, if the stage asks for it or needs it."""
    stage = run.stage
    if not isinstance(stage, JointStage) or not _wants_checkpointing(run, stage):
        yield
        return
    offload = stage.gradient_checkpointing == "offload" and pick_device(run.recipe.device) != "cpu"
    host = ", with the inputs of the layers in the host's memory" if offload else ""
    run.progress.log(f"stage {stage.name}: gradient checkpointing is on{host}")
    _set_checkpointing(run.model, True, offload)
    try:
        yield
    finally:
        _set_checkpointing(run.model, False)


def _wants_checkpointing(run: StageRun, stage: JointStage) -> bool:
    if stage.gradient_checkpointing != "auto":
        return bool(stage.gradient_checkpointing)
    is_possible = all(group.model.supports_gradient_checkpointing for group in run.model.local_groups)
    assert stage.rows_per_device != "auto"
    longest = max(lengths_of(run.rows))
    tokens = max(longest, stage.tokens_per_device or longest * (stage.rows_per_device or run.rows_per_step))
    return is_possible and checkpointing_pays(run.model, tokens)


def _set_checkpointing(model: UltraFuserForCausalLM, enabled: bool, offload: bool = False) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer releases of transformers have other names for these
        for group in model.local_groups:
            if enabled:
                group.model.gradient_checkpointing_enable({"use_reentrant": False}, offload=offload)
            else:
                group.model.gradient_checkpointing_disable()


def _training_rows(run: StageRun, args: TrainingArguments) -> tuple[Rows, Rows]:
    """Training and validation rows: their cached features where the specialists are frozen and a cache pays."""
    rows, validation = run.rows, run.validation
    if isinstance(run.stage, GateStage) and run.stage.features_per_row:
        rows = SampledRows(rows, run.stage.features_per_row, run.recipe.seed)
    if isinstance(run.stage, JointStage):
        if not run.stage.kl_coef:
            return rows, validation
        validation = []  # no reference is needed there
    elif not _caching_pays(run, rows):
        return rows, validation
    folder = run.features or run.folder.parent / "features"
    run.model.place(args.device)  # reading the device also starts the process group, where there is one
    rank, num_ranks, local_rank = args.process_index, args.world_size, args.local_process_index
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    if run.mesh is not None:  # the processes that hold the same specialists fill one cache
        folder = folder / str(run.mesh.rank) if run.mesh.size > 1 else folder
        rank, num_ranks = run.mesh.data_rank, run.mesh.data_size
        local_rank, num_local_ranks = local_rank // run.mesh.size, max(1, num_local_ranks // run.mesh.size)
    build = partial(
        FeatureStore.build,
        run.model,
        rank=rank,
        num_ranks=num_ranks,
        local_rank=local_rank,
        num_local_ranks=num_local_ranks,
        barrier=PartialState().wait_for_everyone,
        precision=_precision(run.stage),
        progress=run.progress,
    )
    name = "train"
    if isinstance(run.stage, JointStage) and not from_main(partial(holds_features, folder / name, run.model, rows)):
        name = "reference"  # beside the cache of the gate's stage, which another run may need
    train_rows = build(rows, folder / name)
    return train_rows, build(validation, folder / "validation") if validation else run.validation


def _caching_pays(run: StageRun, rows: Sequence[Rendered]) -> bool:
    if run.recipe.cache_features != "auto":
        return bool(run.recipe.cache_features)
    drawn = run.stage.steps * run.rows_per_step
    pays = drawn > len(rows) and estimate_size_bytes(run.model, rows, _precision(run.stage)) < _CACHE_LIMIT_BYTES
    if run.mesh is None:
        return pays
    votes = run.mesh.sum_(torch.tensor(int(pays), device=run.model.device))  # the states of some may be wider
    return int(votes) == run.mesh.size


def _precision(stage: StageRecipe) -> Precision:
    """Of the cached states. The reference of a joint stage keeps that of the specialists."""
    return stage.feature_dtype if isinstance(stage, GateStage) else "auto"
