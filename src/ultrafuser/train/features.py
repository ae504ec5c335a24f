"""The feature cache: the states of frozen specialists at the response tokens are computed once and reused.

With probability mixing a token is then K states and K log-probabilities, and training the gate runs no output layer.
Log-probabilities are at the model's temperatures. At other temperatures they are computed again from the same states.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ultrafuser.data.collate import collate_rows, length_batches, pad_labels, token_budget
from ultrafuser.data.files import allocate, disk_problem, write_json
from ultrafuser.data.packed import digest_of, label_counts_of, lengths_of
from ultrafuser.data.templates import Rendered
from ultrafuser.errors import DiskError, TrainingError
from ultrafuser.model.fingerprint import hash_weights
from ultrafuser.model.loss import Head, select_responses
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.train.sharding import whole

Precision = Literal["auto", "bfloat16", "int8"]


@dataclass(frozen=True)
class RowFeatures:
    """One row as the gate sees it.

    Attributes:
        states: K tensors (R, D_k), the last hidden states that predict the response tokens.
        log_probs: (R, K), log-probability of each response token under each specialist at its temperature, in nats.
    """

    row: Rendered
    states: list[torch.Tensor]
    log_probs: torch.Tensor


class Int8States:
    """States in 8 bits, with a scale for each BLOCK of a token's values, so that one large value costs its block alone.

    They are read and written as a tensor (N, D) of `dtype` would be.
    """

    BLOCK = 64

    def __init__(self, values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> None:
        """values: (N, D), int8. scales: (N, D / BLOCK rounded up), float32."""
        self.values, self.scales, self.dtype, self.shape = values, scales, dtype, values.shape

    def __getitem__(self, tokens: Any) -> torch.Tensor:
        scales = self.scales[tokens].repeat_interleave(self.BLOCK, -1)[..., : self.shape[1]]
        return (self.values[tokens] * scales).to(self.dtype)

    def __setitem__(self, tokens: Any, states: torch.Tensor) -> None:
        states = states.float()
        blocks = torch.nn.functional.pad(states, (0, -states.shape[-1] % self.BLOCK)).unflatten(-1, (-1, self.BLOCK))
        scales = blocks.abs().amax(-1) / 127
        rounded = (blocks / scales.clamp(min=1e-30)[..., None]).round()
        self.values[tokens] = rounded.flatten(-2)[..., : self.shape[1]].to(torch.int8)
        self.scales[tokens] = scales


class FeatureStore(Sequence[RowFeatures]):
    """Features of many rows in files that are mapped into memory. An interrupted computation is resumed.

    With `precision="auto"` the states keep the specialists' own, so losses are the same with and without the cache. Where
    several processes share the specialists, K counts those of this process, and each process has a store of its own.
    """

    def __init__(
        self, folder: Path, rows: Sequence[Rendered], heads: Sequence[Head], precision: Precision = "auto"
    ) -> None:
        def mapped(name: str, size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.from_file(str(folder / name), shared=True, size=size, dtype=dtype)

        self.folder, self.rows, self.precision = folder, rows, precision
        self.offsets = [0, *itertools.accumulate(label_counts_of(rows))]
        total, size = self.offsets[-1], len(heads)
        self.states: list[Any] = []  # (N, D_k) each, tensors or Int8States
        for k, head in enumerate(heads):
            width, dtype = head.weight.shape[1], _stored_type(head, precision)
            values = mapped(f"states-{k}.bin", total * width, dtype).view(total, width)
            if precision == "int8":
                blocks = math.ceil(width / Int8States.BLOCK)
                scales = mapped(f"scales-{k}.bin", total * blocks, torch.float32).view(total, blocks)
                self.states.append(Int8States(values, scales, head.weight.dtype))
            else:
                self.states.append(values)
        suffix = _temperatures(heads)
        self.log_probs = mapped(f"log-probs-{suffix}.bin", total * size, torch.float32).view(total, size)
        # which rows have states, which log-probabilities
        self.read = mapped("read.bin", len(rows), torch.uint8)
        self.scored = mapped(f"scored-{suffix}.bin", len(rows), torch.uint8)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        i = range(len(self))[i]
        tokens = slice(self.offsets[i], self.offsets[i + 1])
        return RowFeatures(self.rows[i], [states[tokens] for states in self.states], self.log_probs[tokens])

    @classmethod
    def build(
        cls,
        model: UltraFuserForCausalLM,
        rows: Sequence[Rendered],
        folder: Path,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        local_rank: int = 0,
        num_local_ranks: int = 1,
        barrier: Callable[[], None] = lambda: None,
        precision: Precision = "auto",
        progress: Progress | None = None,
    ) -> FeatureStore:
        """Compute the missing features, every rank its share. A node that does not see the files of the others computes all.

        Args:
            folder: of the files. Files of an earlier run are reused if they belong to the same specialists and rows, and
                replaced otherwise.
            rank, num_ranks: this process and the number of all.
            local_rank, num_local_ranks: the same among the processes of this machine.
            precision: of the states in the files. `auto`: that of the specialists.

        Raises:
            TrainingError: the features do not fit on the disk, or some are missing in the end.
        """
        identity = _identify(model, rows, precision)
        heads = model.heads()  # in all processes, as those that divide weights gather them together
        if rank == 0:
            _prepare_folder(folder, identity, rows, heads, precision)
        barrier()
        if local_rank == 0 and rank != 0 and not _is_identity(folder / "identity.json", identity):  # another disk
            _prepare_folder(folder, identity, rows, heads, precision)
        barrier()
        store = cls(folder, rows, heads, precision)
        for share in (range(rank, len(rows), num_ranks), range(local_rank, len(rows), num_local_ranks)):
            _compute(model, store, [i for i in share if not store.read[i]], progress or Progress())
            _score(model, store, [i for i in share if not store.scored[i]])
            barrier()
        if missing := len(rows) - int((store.read & store.scored).sum()):
            raise TrainingError(
                f"{folder}: the feature cache lacks {missing} of {len(rows)} rows after all processes have written theirs. "
                "Choose an output on a disk that all processes of a machine share, or set cache_features: false"
            )
        return store


def holds_features(folder: Path, model: UltraFuserForCausalLM, rows: Sequence[Rendered]) -> bool:
    """Whether a folder has features of these specialists on these rows, in the specialists' precision."""
    return _is_identity(folder / "identity.json", _identify(model, rows, "auto"))


def _identify(model: UltraFuserForCausalLM, rows: Sequence[Rendered], precision: Precision) -> str:
    """A fingerprint of the rows' tokens and of the specialists' weights (a sample of each tensor)."""
    weights = ((name, whole(weight)) for name, weight in model.groups.named_parameters())
    return hash_weights(weights, start=digest_of(rows)) + ("" if precision == "auto" else f"-{precision}")


def estimate_size_bytes(model: UltraFuserForCausalLM, rows: Sequence[Rendered], precision: Precision = "auto") -> int:
    """The size of the features of these rows in bytes."""
    return sum(label_counts_of(rows)) * token_bytes(model.heads(), precision)


def token_bytes(heads: Sequence[Head], precision: Precision = "auto") -> int:
    """The features of one response token in bytes: the states and the log-probabilities."""
    return sum(sum(_state_bytes(head, precision).values()) + 4 for head in heads)


def _state_bytes(head: Head, precision: Precision) -> dict[str, int]:
    """Bytes of one specialist's state at one token, by the file that holds them."""
    width = head.weight.shape[1]
    sizes = {"states": width * _stored_type(head, precision).itemsize}
    return sizes | ({"scales": 4 * math.ceil(width / Int8States.BLOCK)} if precision == "int8" else {})


def _stored_type(head: Head, precision: Precision) -> torch.dtype:
    return head.weight.dtype if precision == "auto" else getattr(torch, precision)


def _temperatures(heads: Sequence[Head]) -> str:
    return "-".join(f"{head.temperature:g}" for head in heads)


def _prepare_folder(
    folder: Path, identity: str, rows: Sequence[Rendered], heads: Sequence[Head], precision: Precision
) -> None:
    """Reuse the whole files of an earlier run on the same specialists and rows, and allocate the others."""
    facts, total, suffix = folder / "identity.json", sum(label_counts_of(rows)), _temperatures(heads)
    states = {
        f"{name}-{k}.bin": total * size
        for k, head in enumerate(heads)
        for name, size in _state_bytes(head, precision).items()
    } | {"read.bin": len(rows)}
    scores = {f"log-probs-{suffix}.bin": total * len(heads) * 4, f"scored-{suffix}.bin": len(rows)}
    if not _is_identity(facts, identity) or not _are_whole(folder, states):
        shutil.rmtree(folder, ignore_errors=True)
    if not _are_whole(folder, scores):  # values without their flags, or the other way round, are of no use
        for name in scores:
            (folder / name).unlink(missing_ok=True)
    missing = {name: size for name, size in (states | scores).items() if not (folder / name).is_file()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if sum(missing.values()) > shutil.disk_usage(folder).free:  # allocating would fill the disk first
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for name, size in missing.items():
            allocate(folder / name, size)
        write_json(facts, {"identity": identity})
    except (OSError, DiskError) as error:
        problem = error.problem if isinstance(error, DiskError) else disk_problem(error)
        if problem is None:
            raise
        for name in missing:
            (folder / name).unlink(missing_ok=True)
        raise TrainingError(
            f"{folder}: the feature cache needs {sum(missing.values()) / 1e9:.1f} GB: {problem}. Free space, choose another "
            "output, or set cache_features: false, and kl_coef: 0, in a training recipe"
        ) from error


def _is_identity(facts: Path, identity: str) -> bool:
    try:
        return json.loads(facts.read_bytes())["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):  # missing or torn
        return False


def _are_whole(folder: Path, sizes: Mapping[str, int]) -> bool:
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


@torch.no_grad()
def _compute(model: UltraFuserForCausalLM, store: FeatureStore, missing: Sequence[int], progress: Progress) -> None:
    """Run the specialists on the missing rows, in batches of similar length within the token budget."""
    lengths = lengths_of(store.rows)
    batches = length_batches([lengths[i] for i in missing], token_budget(model.device))
    batches = [[missing[j] for j in batch] for batch in batches]
    if model.share is not None:
        batches += [[0]] * model.share.mesh.missing_passes(
            len(batches)
        )  # a row again, because others still read theirs
    if not batches:
        return
    progress.start("specialists read the rows", sum(lengths[i] for i in missing))
    was_training = model.training
    model.eval()
    for indices in batches:
        rows = [store.rows[i] for i in indices]
        inputs = {key: value.to(model.device) for key, value in collate_rows(rows).items()}
        states = model.specialist_states(inputs["specialist_input_ids"])  # K x (B, T, D_k)
        labelled = inputs["labels"] != -100  # (B, R)
        index = inputs["response_index"][:, model.local_indices]
        selected = select_responses(states, index, labelled)  # K x (N, D_k)
        lengths_of_rows = [len(row.labels) for row in rows]
        slices = [slice(store.offsets[i], store.offsets[i + 1]) for i in indices]
        for k, (stored, values) in enumerate(zip(store.states, selected, strict=True)):
            for tokens, states in zip(slices, values.cpu().split(lengths_of_rows), strict=True):
                stored[tokens] = states
            if store.precision != "auto":  # so that a change of the temperatures alone gives the same
                selected[k] = torch.cat([stored[tokens] for tokens in slices]).to(values.device)
        log_probs = model.specialist_log_probs(selected, inputs["labels"][labelled])  # (N, K)
        for i, tokens, scores in zip(indices, slices, log_probs.cpu().split(lengths_of_rows), strict=True):
            store.log_probs[tokens] = scores
            store.read[i] = store.scored[i] = 1
        progress.advance(sum(row.num_tokens for row in rows))
    model.train(was_training)
    progress.finish()


def _score(model: UltraFuserForCausalLM, store: FeatureStore, missing: Sequence[int]) -> None:
    """Compute the missing log-probabilities of rows from their states."""
    for i in missing:
        item = store[i]
        labels = torch.tensor(item.row.labels, device=model.device)
        item.log_probs[:] = model.specialist_log_probs([state.to(model.device) for state in item.states], labels).cpu()
        store.scored[i] = 1


def response_states(
    group: SpecialistGroup, rows: Sequence[Rendered], template: int, active: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """One specialist's states that predict the response tokens of some rows, and these tokens: (N, D), (N,).

    Args:
        template: the index of the specialist whose rendering of the rows is read.
        active: the adapter of the group that runs. Empty: the bare base.
    """
    inputs = {key: value.to(group.device) for key, value in collate_rows(rows).items()}
    with group.only(active):
        states = group(inputs["specialist_input_ids"][:, template][None])  # (1, B, T, D)
    labelled = inputs["labels"] != -100  # (B, R)
    selected = select_responses(states, inputs["response_index"][:, [template]], labelled)[0]
    return selected, inputs["labels"][labelled]


def collate_features(items: Sequence[RowFeatures]) -> dict[str, Any]:
    """A batch for `UltraFuserForCausalLM.forward` in which no specialist needs to run."""
    longest = max(len(item.log_probs) for item in items)

    def pad(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        out = tensors[0].new_zeros(len(tensors), longest, tensors[0].shape[1])
        for b, tensor in enumerate(tensors):
            out[b, : len(tensor)] = tensor
        return out

    return {
        "specialist_hidden_states": [pad(states) for states in zip(*(item.states for item in items), strict=True)],
        "specialist_log_probs": pad([item.log_probs for item in items]),
        "labels": pad_labels([item.row for item in items]),
    }
