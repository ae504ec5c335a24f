"""Further training of one ordinary causal model on response tokens, with the same balanced batches as fusion."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.data.collate import collate_rows
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import TrainingError
from ultrafuser.model.loss import label_log_prob
from ultrafuser.model.saving import atomic_directory
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.train.metrics import truncate_metrics

METRICS_FILE = "metrics.jsonl"
_SAMPLES = 64  # values of each tensor by which the weights at the start are told apart


def tune(
    model: PreTrainedModel,
    rows: Sequence[Rendered],
    folder: Path,
    *,
    steps: int,
    rows_per_domain: int,
    lr: float,
    seed: int = 0,
    template: int = 0,
    vocab_size: int | None = None,
    rows_per_pass: int = 8,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    save_every: int | None = None,
    stage: str = "tuned",
    extra_loss: Callable[[torch.Tensor], torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Train what requires gradients, in place: AdamW, a cosine without warm-up, gradients clipped.

    The balanced batches are those of fusion with the same rows and seed. A run that was interrupted goes on from its
    last checkpoint in `folder` and ends as the uninterrupted one; a finished one is loaded.

    Args:
        rows: as rendered for the specialists; the model reads them in the template number `template`.
        folder: of checkpoints and metrics.jsonl (loss and loss by domain, in nats a response token, of every step).
        vocab_size: rows of the output layer that count; by default all.
        rows_per_pass: rows that run at once; the others of a batch are accumulated.
        save_every: steps between checkpoints; by default one at the end.
        stage: name in the metrics.
        extra_loss: gives a loss to be added from the mask (B, T) of the tokens that are not padding.

    Raises:
        TrainingError: the folder holds another run, or the loss is not finite.
        DataError: no rows.
    """
    progress = progress or Progress()
    sampler = BalancedBatchSampler(
        [row.domain for row in rows],
        rows_per_domain,
        steps,
        rows_per_device=rows_per_pass,
        lengths=[row.num_tokens for row in rows],
        seed=seed,
    )
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, weight_decay=weight_decay)
    facts = {"steps": steps, "rows_per_domain": rows_per_domain, "lr": lr, "seed": seed, "template": template,
             "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "rows": _rows_hash(rows),
             "start": _weights_hash(trained)}  # fmt: skip
    done = _resume(folder, facts, trained, optimizer)
    group = SpecialistGroup(model, [stage])
    progress.start(f"{stage} trains", steps)
    progress.advance(done)
    model.train()
    batches = islice(sampler, done * sampler.num_accumulation, None)
    for step in range(done, steps):
        for setting in optimizer.param_groups:
            setting["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        parts = [[rows[i] for i in next(batches)] for _ in range(sampler.num_accumulation)]
        with torch.random.fork_rng():  # what dropout draws depends on the step alone
            torch.manual_seed(seed + step)
            nats = _backward(group, parts, template, vocab_size or model.config.vocab_size, extra_loss)
        row = {"stage": stage, "step": step + 1, **_by_domain(parts, nats), "learning_rate": setting["lr"]}
        if not math.isfinite(row["loss"]):
            ids = ", ".join(own.row_id for part in parts for own in part)
            raise TrainingError(
                f"{stage}, step {step + 1}: the loss is {row['loss']} on the rows {ids}; lower the learning rate"
            )
        torch.nn.utils.clip_grad_norm_(trained.values(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        _write_metrics(folder, row)
        progress.advance(1, f"loss {row['loss']:.3f}")
        if step + 1 == steps or (save_every and (step + 1) % save_every == 0):
            _save(folder, step + 1, facts, trained, optimizer if step + 1 < steps else None)
    progress.finish()
    return model.eval()


def _backward(
    group: SpecialistGroup,
    parts: Sequence[Sequence[Rendered]],
    template: int,
    vocab_size: int,
    extra_loss: Callable[[torch.Tensor], torch.Tensor] | None,
) -> list[list[float]]:
    """Gradients of one global batch; gives back the nats of every row."""
    total = sum(len(row.labels) for part in parts for row in part)
    out = []
    for part in parts:
        inputs = {key: value.to(group.device) for key, value in collate_rows(part).items()}
        ids, index = inputs["specialist_input_ids"][:, template], inputs["response_index"][:, template]
        states = group(ids[None])[0]  # (B, T, D)
        kept = inputs["labels"] != -100  # (B, R)
        flat = states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))[kept]  # (N, D)
        log_p = label_log_prob(flat, group.head(vocab_size), inputs["labels"][kept])  # (N,)
        loss = -log_p.sum() / total
        if extra_loss is not None:
            lengths = torch.tensor([[len(row.input_ids[template])] for row in part], device=ids.device)
            mask = torch.arange(ids.shape[1], device=ids.device) < lengths  # (B, T)
            loss = loss + extra_loss(mask) / len(parts)
        loss.backward()
        out.append([-own.sum().item() for own in log_p.detach().double().split([len(row.labels) for row in part])])
    return out


def _by_domain(parts: Sequence[Sequence[Rendered]], nats: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Nats a response token, of the batch and of each domain."""
    sums: dict[str, list[float]] = {}
    for part, own in zip(parts, nats, strict=True):
        for row, value in zip(part, own, strict=True):
            totals = sums.setdefault(row.domain, [0.0, 0.0])
            totals[0] += value
            totals[1] += len(row.labels)
    each = {f"loss/{domain}": value / tokens for domain, (value, tokens) in sorted(sums.items())}
    return {"loss": sum(v for v, _ in sums.values()) / sum(n for _, n in sums.values()), **each}


# ---------------------------------------------------------------- checkpoints


def _save(
    folder: Path,
    step: int,
    facts: Mapping[str, Any],
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """`checkpoint-<step>`, whole or not at all; earlier ones then go. The last one needs no optimizer."""
    tensors = {f"weight/{name}": parameter.detach().cpu().contiguous() for name, parameter in trained.items()}
    for name, parameter in trained.items() if optimizer is not None else ():
        for key, value in optimizer.state[parameter].items() if optimizer is not None else ():
            tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
    with atomic_directory(folder / f"checkpoint-{step}") as draft:
        save_file(tensors, draft / "state.safetensors")
        (draft / "facts.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    for earlier, number in _checkpoints(folder):
        if number < step:
            shutil.rmtree(earlier)


def _checkpoints(folder: Path) -> list[tuple[Path, int]]:
    """Checkpoints and their steps, in order."""
    found = [(path, int(path.name.rpartition("-")[2])) for path in folder.glob("checkpoint-*")]
    return sorted(found, key=lambda one: one[1])


def _resume(
    folder: Path,
    facts: Mapping[str, Any],
    trained: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> int:
    """Load the last checkpoint, if there is one; gives back its step."""
    found = _checkpoints(folder)
    if not found:
        truncate_metrics(folder / METRICS_FILE, 0)
        return 0
    path, step = found[-1]
    old = json.loads((path / "facts.json").read_text(encoding="utf-8"))
    if differs := sorted(key for key in facts if old.get(key) != facts[key]):
        raise TrainingError(
            f"{folder}: the run there differs in {', '.join(differs)}; delete the folder, or choose another one"
        )
    state = load_file(path / "state.safetensors")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(state[f"weight/{name}"])
            own = {key: state[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in state}
            if own:
                moved = {key: value if key == "step" else value.to(parameter.device) for key, value in own.items()}
                optimizer.state[parameter] = moved
    truncate_metrics(folder / METRICS_FILE, step)
    return step


def _write_metrics(folder: Path, row: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _rows_hash(rows: Sequence[Rendered]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.row_id, row.domain, row.input_ids, row.labels)).encode())
    return digest.hexdigest()


def _weights_hash(weights: Mapping[str, torch.Tensor]) -> str:
    """Of a sample of each tensor."""
    digest = hashlib.sha256()
    for name, tensor in weights.items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}{sample.tolist()}".encode())
    return digest.hexdigest()
