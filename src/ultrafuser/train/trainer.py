"""transformers' Trainer with balanced batches, losses by domain, and checkpoints of the trained weights alone."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ultrafuser.data.balance import BalancedBatchSampler, TokenBatches
from ultrafuser.data.collate import TOKENS_PER_BATCH, collate_rows, length_batches
from ultrafuser.data.files import disk_errors
from ultrafuser.data.packed import domains_of, lengths_of
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import DiskError, TrainingError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM, UltraFuserOutput
from ultrafuser.progress import Progress
from ultrafuser.train.callbacks import StepBar
from ultrafuser.train.features import FeatureStore, RowFeatures, collate_features
from ultrafuser.train.metrics import append_metrics
from ultrafuser.train.sharding import divide_like, free_gathered, gather_state, whole

WEIGHTS = "model.safetensors"  # of a checkpoint
Rows = Sequence[Rendered] | FeatureStore


class FusionTrainer(Trainer):
    """Train the weights of a fused model that require gradients.

    Each logged step has the loss (nats per response token), the loss by domain, the mean gate weight of each
    specialist, the entropy of the gate (nats), and response tokens per second.
    """

    model: Any
    control: Any
    optimizer: Any

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        args: TrainingArguments,
        train_rows: Rows,
        validation_rows: Rows | None,
        sampler: BalancedBatchSampler,
        *,
        stage: str,
        metrics_file: Path,
        specialist_lr: float | None = None,
        tokens_per_device: int | None = None,
        progress: Progress | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        self.domains = sorted(
            {domain for rows in (train_rows, validation_rows or []) for domain in domains_of(_rows(rows))}
        )
        self.sampler, self.stage, self.metrics_file = sampler, stage, metrics_file
        self.specialist_lr, self.tokens_per_device = specialist_lr, tokens_per_device
        self._num_passes = args.gradient_accumulation_steps  # of a step
        self._mean_labels: Any = 1  # of its micro-batches
        self.mesh = None if model.share is None else model.share.mesh
        args._n_gpu = min(args.n_gpu, 1)  # DataParallel would copy every specialist to every GPU
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_rows,
            eval_dataset=validation_rows,
            data_collator=self._collate,
            callbacks=[StepBar(progress or Progress(), stage), *callbacks],
        )
        if self.mesh is not None:  # the processes hold different weights, which the usual wrapper would make equal
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = False  # our labels are at the positions that predict them
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self._reset_totals()

    # ---------------------------------------------------------------- batches

    def _collate(self, items: Sequence[Rendered] | Sequence[RowFeatures]) -> dict[str, Any]:
        rows = [_rendered(item) for item in items]
        features = [item for item in items if isinstance(item, RowFeatures)]
        batch: dict[str, Any] = {**(collate_features(features) if features else collate_rows(rows))}
        batch["domain_ids"] = torch.tensor([self.domains.index(row.domain) for row in rows])
        batch["row_ids"] = [row.row_id for row in rows]
        return batch

    def _collate_passes(self, passes: Sequence[Sequence[Any]]) -> dict[str, Any]:
        """A whole step as one batch of the Trainer, which counts its labels. `training_step` takes it apart."""
        batches = [self._collate(items) for items in passes]
        return {"passes": batches, "labels": torch.cat([batch["labels"].flatten() for batch in batches])}

    def _data_rank(self) -> tuple[int, int]:
        """Which of the processes that read different rows this is, and how many they are."""
        if self.mesh is None:
            return self.args.process_index, self.args.world_size
        return self.mesh.data_rank, self.mesh.data_size

    def get_train_dataloader(self) -> DataLoader:
        if self.tokens_per_device is not None:
            rank, num_ranks = self._data_rank()
            steps = TokenBatches(self.sampler, self.tokens_per_device, rank=rank, num_ranks=num_ranks)
            passes = DataLoader(_RowLists(self.train_dataset), batch_sampler=steps, collate_fn=self._collate_passes)
            return prepare_data_loader(passes, num_processes=1, process_index=0)
        loader = DataLoader(self.train_dataset, batch_sampler=self.sampler, collate_fn=self._collate)
        if self.mesh is None:
            return self.accelerator.prepare(loader)
        return prepare_data_loader(loader, num_processes=self.mesh.data_size, process_index=self.mesh.data_rank)

    # ---------------------------------------------------------------- loss and metrics

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        num_batches = self.accelerator.num_processes
        if self.mesh is not None:
            num_batches = self.mesh.data_size
            if num_items_in_batch is not None:
                num_items_in_batch = (
                    num_items_in_batch / self.mesh.size
                )  # every process of a group has counted its rows
        row_ids, domain_ids = inputs.pop("row_ids"), inputs.pop("domain_ids")
        for group in self.model.groups:  # the Trainer has put every module into training mode
            if not any(parameter.requires_grad for parameter in group.parameters()):
                group.eval()
        out = model(**inputs, output_gate_weights=True, num_items_in_batch=num_items_in_batch)
        if not torch.isfinite(out.loss):
            raise self._not_finite(out.loss.item(), inputs, row_ids)
        self._totals += domain_totals(inputs["labels"], domain_ids, out, len(self.domains)).cpu()
        loss = out.loss
        if num_items_in_batch is not None:
            loss = loss * num_batches  # ranks average their gradients, which must be summed
            self._mean_labels = num_items_in_batch / num_batches / self._num_passes
        extra = self.extra_loss(inputs, out)
        if extra is not None:  # its gradient alone, so that the logged loss stays nats per response token
            loss = loss + (extra - extra.detach()) / self._num_passes
        return (loss, out) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Forward and backward pass of a micro-batch, or of all those of a step where their tokens are bounded."""
        passes = inputs.get("passes", [inputs])
        self._num_passes = len(passes) * self.args.gradient_accumulation_steps
        losses = []
        for batch in passes[:-1]:
            with self.accelerator.no_sync(model=model):  # the last pass exchanges the gradients of all
                losses.append(super().training_step(model, batch, num_items_in_batch))
        loss = sum(losses, super().training_step(model, passes[-1], num_items_in_batch))
        if self.mesh is not None and self.accelerator.sync_gradients:
            self.mesh.reduce_gradients(self.model)
        return loss

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        if self.mesh is None:
            return super()._clip_grad_norm(model)
        return self.mesh.clip_gradients(self.model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        if self.mesh is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm)
        return self.mesh.clip_gradients(self.model, float("inf"))

    def extra_loss(self, inputs: dict[str, Any], out: UltraFuserOutput) -> torch.Tensor | None:
        """A further term of the training loss, for subclasses: the mean over the micro-batches of a step counts.

        Args:
            inputs: the micro-batch that the model has just read, as `collate_rows` made it.
            out: the model's output.
        """
        return None

    def _not_finite(self, loss: float, inputs: dict[str, Any], row_ids: Sequence[str]) -> TrainingError:
        file = Path(self.args.output_dir) / f"not-finite-step{self.state.global_step}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {key: value.cpu().contiguous() for key, value in inputs.items() if torch.is_tensor(value)}
        for k, states in enumerate(inputs.get("specialist_hidden_states") or []):
            tensors[f"specialist_hidden_states.{k}"] = states.cpu().contiguous()
        with disk_errors(file):
            save_file(tensors, file, metadata={"row_ids": json.dumps(list(row_ids))})
        return TrainingError(
            f"stage {self.stage!r}, step {self.state.global_step}: the loss is {loss} on the rows {', '.join(row_ids)}. "
            f"The batch is in {file}. Lower the learning rate, or look at those rows, then continue with --resume"
        )

    def _reset_totals(self) -> None:
        num_domains, num_specialists = len(self.domains), len(self.model.config.specialists)
        # sums over tokens: nats and tokens of each domain, weight of each specialist, entropy
        self._totals = torch.zeros(2 * num_domains + num_specialists + 1, dtype=torch.float64)
        self._since = time.monotonic()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            totals = self.accelerator.reduce(self._totals.to(self.args.device, torch.float32), "sum").cpu()
            elapsed = time.monotonic() - self._since
            means = read_totals(totals, self.domains, self.model.config.names)
            tokens = float(totals[1 : 2 * len(self.domains) : 2].sum()) / (1 if self.mesh is None else self.mesh.size)
            logs |= means | {"tokens_per_s": tokens / max(elapsed, 1e-9)}
            self._reset_totals()
        super().log(logs, start_time)
        if self.is_world_process_zero() and "train_runtime" not in logs:
            append_metrics(self.metrics_file, {"stage": self.stage, "step": self.state.global_step, **logs})

    # ---------------------------------------------------------------- validation

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss by domain on all validation rows. `eval_loss` is the mean over the domains."""
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        was_training = self.model.training
        self.model.eval()
        rank, num_ranks = self._data_rank()
        indices = range(rank, len(rows), num_ranks)
        totals = torch.zeros_like(self._totals)
        budget = TOKENS_PER_BATCH["cpu"]  # the small one on every device, beside the optimizer's states
        lengths = lengths_of(_rows(rows))
        batches = [[indices[j] for j in batch] for batch in length_batches([lengths[i] for i in indices], budget)]
        # a row again, and not counted, while others that divide weights with this process still read theirs
        extra = 0 if self.mesh is None else self.mesh.missing_passes(len(batches))
        for i, batch in enumerate(batches + [[0]] * extra):
            inputs = self._prepare_inputs(self._collate([rows[j] for j in batch]))
            inputs.pop("row_ids")
            domain_ids = inputs.pop("domain_ids")
            out = self.model(**inputs, output_gate_weights=True)
            if i < len(batches):
                totals += domain_totals(inputs["labels"], domain_ids, out, len(self.domains)).cpu()
        self.model.train(was_training)
        totals = self.accelerator.reduce(totals.to(self.args.device, torch.float32), "sum").cpu()
        means = read_totals(totals, self.domains, self.model.config.names)
        losses = [value for key, value in means.items() if key.startswith("loss/")]
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in means.items()}
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # ---------------------------------------------------------------- optimizer and checkpoints

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            free_gathered(self.model)
            trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
            # by name, so that a checkpoint can be read by processes that share the specialists in another way
            gate = [(name, p) for name, p in trained.items() if name.startswith("gate.")]
            rest = [(name, p) for name, p in trained.items() if not name.startswith("gate.")]
            groups = [{"params": gate, "lr": self.args.learning_rate}]
            if rest:
                groups.append({"params": rest, "lr": self.specialist_lr or self.args.learning_rate})
            make_optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = make_optimizer(groups, weight_decay=self.args.weight_decay, **settings)
        return self.optimizer

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint. One that does not fit on the disk is removed again."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with disk_errors(folder):
                if self.mesh is not None:
                    self._save_weights(folder)
                super()._save_checkpoint(*args, **kwargs)
        except DiskError:
            if self.is_world_process_zero():
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the trained weights alone, because the frozen ones are in their sources."""
        if self.mesh is None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_trainable(self.model, folder / WEIGHTS, trained_weights(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.mesh is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _save_weights(self, folder: Path) -> None:
        """Save the weights and the optimizer states of all processes, one file for each share of the specialists."""
        assert self.mesh is not None
        writes = not self.mesh.data_rank
        weights = trained_weights(self.model)
        if writes:
            folder.mkdir(parents=True, exist_ok=True)
            save_trainable(self.model, folder / WEIGHTS, weights)
        del weights  # before as many numbers again, twice, are gathered
        self.accelerator.wait_for_everyone()  # for as long as `ddp_timeout`, which gathering does not know
        states = gather_state(self.optimizer.state_dict(), keep=writes)
        if writes:
            torch.save(states, _share_file(folder / "optimizer.pt", self.mesh.rank))
        self.accelerator.wait_for_everyone()  # the main process writes last what makes a checkpoint complete

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        load_weights(self.model, Path(resume_from_checkpoint) / WEIGHTS)

    def _load_best_model(self) -> None:
        load_weights(self.model, Path(self.state.best_model_checkpoint or "") / WEIGHTS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        files = sorted(Path(checkpoint).glob("optimizer*.pt")) if checkpoint else []
        if self.mesh is None and len(files) < 2:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = [torch.load(file, map_location="cpu", weights_only=True, mmap=True) for file in files]
        if saved:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.optimizer.load_state_dict(_join_optimizers(self.optimizer.state_dict(), saved, parameters))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint or "") / "scheduler.pt", weights_only=True))


def trained_weights(model: UltraFuserForCausalLM) -> dict[str, torch.Tensor]:
    """The weights that require gradients by their names, whole and on the CPU.

    Processes that divide weights must all call it. It is empty in those that write none.
    """
    free_gathered(model)
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weight = whole(parameter.detach())
            if model.share is None or not model.share.mesh.data_rank:
                weights[name] = weight.cpu().contiguous()
    return weights


def save_trainable(model: UltraFuserForCausalLM, file: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write what `trained_weights` returned.

    Where several processes share the specialists, each writes its own beside `file`, and the main process the gate.
    """
    if model.share is not None and (rank := model.share.mesh.rank):
        file = _share_file(file, rank)
        weights = {name: weight for name, weight in weights.items() if not name.startswith("gate.")}
    save_file(dict(weights), file, metadata={"format": "pt"})


def load_weights(model: UltraFuserForCausalLM, file: Path) -> None:
    """Load the weights that `save_trainable` wrote in all processes, as far as this one holds them."""
    free_gathered(model)
    parameters = dict(model.named_parameters())
    for part in (file, *sorted(file.parent.glob(f"{file.stem}-*{file.suffix}"))):
        weights = {name: weight for name, weight in load_file(part).items() if name in parameters}
        divided = {name: divide_like(weight, parameters[name]) for name, weight in weights.items()}
        model.load_state_dict(divided, strict=False)  # the frozen weights are in their sources


def _share_file(file: Path, rank: int) -> Path:
    """The file of one share of the specialists. The first share has the plain name."""
    return file.with_stem(f"{file.stem}-{rank}") if rank else file


def _join_optimizers(
    state: dict[str, Any], saved: Sequence[dict[str, Any]], parameters: Sequence[torch.Tensor]
) -> dict[str, Any]:
    """The state of an optimizer, with what the saved states of several processes know of its parameters.

    Args:
        parameters: of the optimizer. Their states are divided as they are.

    Raises:
        TrainingError: they do not know all of them.
    """
    known = {
        name: part["state"][index]
        for part in saved
        for group in part["param_groups"]
        for index, name in zip(group["params"], group.get("param_names", []), strict=False)
        if index in part["state"]
    }
    for group, old in zip(state["param_groups"], saved[0]["param_groups"], strict=False):
        group |= {key: value for key, value in old.items() if key not in ("params", "param_names")}
        for index, name in zip(group["params"], group["param_names"], strict=True):
            if name not in known:
                raise TrainingError(
                    f"the checkpoint has no optimizer state for {name}. An older version wrote it: resume it with as many "
                    "processes as it was started with, and without parallel.specialist"
                )
            state["state"][index] = {
                key: divide_like(value, parameters[index]) if torch.is_tensor(value) else value
                for key, value in known[name].items()
            }
    return state


def domain_totals(labels: torch.Tensor, domain_ids: torch.Tensor, out: Any, num_domains: int) -> torch.Tensor:
    """Sums over tokens: nats and tokens of each domain, weight of each specialist, entropy of the gate."""
    labelled = labels != -100  # (B, R)
    totals = torch.zeros(num_domains, 2, dtype=torch.float64, device=labels.device)
    rows = torch.stack([out.token_loss.double().sum(1).to(labels.device), labelled.double().sum(1)], dim=1)  # (B, 2)
    totals.index_add_(0, domain_ids.to(labels.device), rows)
    w = out.gate_weights[labelled.to(out.gate_weights.device)].double()  # (N, K)
    entropy = torch.special.entr(w).sum()
    return torch.cat([totals.flatten(), w.sum(0).to(labels.device), entropy[None].to(labels.device)])


def read_totals(totals: torch.Tensor, domains: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """Means from the sums of `domain_totals`."""
    num = len(domains)
    by_domain, rest = totals[: 2 * num].view(num, 2).tolist(), totals[2 * num :].tolist()
    tokens = max(sum(count for _, count in by_domain), 1.0)
    out = {f"loss/{d}": nats / count for d, (nats, count) in zip(domains, by_domain, strict=True) if count}
    out |= {f"gate_weight/{name}": weight / tokens for name, weight in zip(names, rest[:-1], strict=True)}
    return out | {"gate_entropy": rest[-1] / tokens}


class _RowLists(Dataset[list[Any]]):
    """The rows at lists of indices."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Any) -> Any:
        return [self.rows[i] for i in indices]


def _rows(rows: Rows) -> Sequence[Rendered]:
    return rows.rows if isinstance(rows, FeatureStore) else rows


def _rendered(item: Rendered | RowFeatures) -> Rendered:
    return item.row if isinstance(item, RowFeatures) else item
