"""What the server asks of a vLLM worker: `vllm serve --worker-extension-cls ultrafuser.vllm_plugin.gate_worker.GateWorker`.

vLLM samples with logits alone, so a gate's weights have no way out of its workers, and a request has no way to the gate.
This extension is that way. It follows the batch of vLLM's model runner, so it also works with speculation, where vLLM
refuses custom logits processors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ultrafuser.vllm_plugin.gate_records import AnswerRecord, Fetched, GateRecords, Ranges


@dataclass(frozen=True)
class Batch:
    """The requests of vLLM's batch, in its order. It stays the same for many steps.

    Attributes:
        states: vLLM's, which hold the tokens of the answers so far.
        records: None for requests that ask for nothing.
        slots: (requests) see `GateRecords`. -1 where nothing is collected.
        mask: (requests, K) the specialists that take part. None: all, in all requests.
    """

    states: Sequence[Any]
    records: Sequence[AnswerRecord | None]
    slots: np.ndarray
    mask: np.ndarray | None


@dataclass(frozen=True)
class Rows:
    """The rows of logits of one step.

    Attributes:
        requests: (rows) the index of the request in the batch.
        positions: (rows) of the token that each row predicts, in its answer.
    """

    requests: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True)
class Arrival:
    """Tensors on their way from the device.

    Attributes:
        event: when they are here. None: now.
        tensors: on the host: `weights` (rows, K), and perhaps `top_ids` and `top_logprobs` (rows, K, N).
    """

    event: Any
    tensors: Mapping[str, torch.Tensor]
    batch: Batch
    rows: Rows


class GateObserver:
    """Sets the mask of each row before the gate runs, and records the weights that it gave.

    vLLM's V1 model runner calls `update_state` once per step, before the forward pass, and then the model's
    `compute_logits` with one row per request, or one per draft token and one more with speculation. Later calls of
    the same step are for the log-probabilities of prompts.
    """

    def __init__(self, runner: Any, model: Any, num_specialists: int, records_weights: bool) -> None:
        """
        Args:
            runner: vLLM's `GPUModelRunner`, or its subclass for CPUs.
            model: the fused model, see `vllm_plugin.model`.
            records_weights: False on all but one of the workers that run the same batch.
        """
        self.runner, self.model, self.records_weights = runner, model, records_weights
        self.records = GateRecords(num_specialists)
        self._batch: Batch | None = None  # None: it has changed
        self._is_first_call = False
        self._arrivals: deque[Arrival] = deque()
        self._compute_logits: Callable[[torch.Tensor], torch.Tensor | None] = model.compute_logits
        model.compute_logits = self.compute_logits
        runner.input_batch.logitsprocs.argmax_invariant.append(self)

    # ---------------------------------------------------------------- called by vLLM

    def update_state(self, batch_update: Any) -> None:
        """A step begins. `batch_update` is None if the requests and their rows are those of the last step."""
        self._is_first_call = True
        if batch_update is not None:
            self._batch = None

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """vLLM's sampler calls it. There is nothing to change."""
        return logits

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The model's `compute_logits`, with the masks of the rows."""
        if not self._is_first_call:
            return self._compute_logits(hidden_states)
        self._is_first_call = False
        if hidden_states.device.type == "cpu":
            self._hold_generators()
        batch = self._batch = self._batch or self._read_batch()
        if not any(batch.records):
            return self._compute_logits(hidden_states)
        rows = self._rows(batch, len(hidden_states))
        if batch.mask is not None:
            self.model.gate_mask = torch.from_numpy(batch.mask[rows.requests]).to(hidden_states.device)
        num_top = max(record.num_top for record in batch.records if record is not None)
        self.model.record_specialists = num_top > 0
        logits = self._compute_logits(hidden_states)
        if self.records_weights and (batch.slots >= 0).any():
            self._record(batch, rows, num_top)
        return logits

    def _hold_generators(self) -> None:
        """Draw no seeded number for requests whose prompts are still being read.

        vLLM draws for them too, drops the token and rewinds the generator. Generators of a CPU cannot be rewound, and the
        error ends the engine.
        """
        generators, is_dropped = self.runner.input_batch.generators, self.runner.discard_request_mask.np
        for row, request_id in enumerate(self.runner.input_batch.req_ids):
            generator = self.runner.requests[request_id].generator
            if generator is not None and is_dropped[row]:
                generators.pop(row, None)
            elif generator is not None:
                generators[row] = generator

    # ---------------------------------------------------------------- called by the server

    def take(self, ranges: Ranges, released: Sequence[str]) -> Fetched:
        """What was collected, see `GateRecords.take`. Then the released keys are forgotten."""
        while self._arrivals:
            self._write(self._arrivals.popleft())
        fetched = self.records.take(ranges)
        for key in released:
            self.records.release(key)
        if released:
            self._batch = None
        return fetched

    # ---------------------------------------------------------------- rows

    def _read_batch(self) -> Batch:
        runner = self.runner
        self.records.forget_ended(runner.requests.keys())
        states = [runner.requests[request_id] for request_id in runner.input_batch.req_ids]
        records = [self.records.find(request_id, self._arguments) for request_id in runner.input_batch.req_ids]
        masks = [None if record is None else record.mask for record in records]
        everyone = (True,) * self.records.num_specialists
        return Batch(
            states,
            records,
            slots=np.array([-1 if record is None else record.slot for record in records], dtype=np.int64),
            mask=np.array([mask or everyone for mask in masks]) if any(masks) else None,
        )

    def _arguments(self, request_id: str) -> Mapping[str, Any] | None:
        parameters = self.runner.requests[request_id].sampling_params
        return None if parameters is None else parameters.extra_args

    def _rows(self, batch: Batch, num_rows: int) -> Rows:
        """
        Raises:
            RuntimeError: they are not the rows that vLLM computes.
        """
        size = len(batch.states)
        requests = np.arange(size)
        positions = np.array([len(state.output_token_ids) for state in batch.states])
        if self.runner.speculative_config is not None:
            counts = np.maximum(self.runner.num_decode_draft_tokens.np[:size], 0) + 1  # -1 drafts in the prefill
            firsts = np.cumsum(counts) - counts
            requests = np.repeat(requests, counts)
            positions = positions[requests] + np.arange(len(requests)) - firsts[requests]
        if len(requests) != num_rows:
            raise RuntimeError(
                f"vLLM computes logits for {num_rows} rows, but its batch of {size} requests has {len(requests)}. This version "
                "of vLLM is not supported with per-request specialists and gate weights"
            )
        return Rows(requests, positions)

    # ---------------------------------------------------------------- records

    def _record(self, batch: Batch, rows: Rows, num_top: int) -> None:
        tensors = {"weights": self.model.last_gate_weights}  # (rows, K)
        if num_top:
            tops = [z.log_softmax(-1).topk(num_top) for z in self.model.last_specialist_logits]  # K x (rows, num_top)
            tensors["top_ids"] = torch.stack([top.indices for top in tops], dim=1)  # (rows, K, num_top)
            tensors["top_logprobs"] = torch.stack([top.values for top in tops], dim=1)
        self._arrivals.append(Arrival(*_to_host(tensors), batch, rows))
        while self._arrivals and (self._arrivals[0].event is None or self._arrivals[0].event.query()):
            self._write(self._arrivals.popleft())

    def _write(self, arrival: Arrival) -> None:
        if arrival.event is not None:
            arrival.event.synchronize()
        requests, positions = arrival.rows.requests, arrival.rows.positions
        slots = arrival.batch.slots[requests]
        collected = slots >= 0
        weights = arrival.tensors["weights"].numpy()
        self.records.write(slots[collected], positions[collected], weights[collected])
        if "top_ids" not in arrival.tensors:
            return
        ids, logprobs = (arrival.tensors[name].numpy() for name in ("top_ids", "top_logprobs"))
        for row, (request, position) in enumerate(zip(requests, positions, strict=True)):
            record = arrival.batch.records[request]
            if record is not None and record.num_top:
                record.tops[int(position)] = ids[row, :, : record.num_top], logprobs[row, :, : record.num_top]


def _to_host(tensors: Mapping[str, torch.Tensor]) -> tuple[Any, dict[str, torch.Tensor]]:
    """Copies on the host, and the event after which they are there. The step does not wait for them."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return None, {name: tensor.clone() for name, tensor in tensors.items()}
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copies[name].copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return event, copies


class GateWorker:
    """vLLM mixes this class into its worker, so that `collective_rpc` reaches these methods."""

    gate_observer: GateObserver | None = None
    model_runner: Any

    def connect_gate(self) -> list[str]:
        """Begin to follow the batch. Returns the names of the specialists.

        Raises:
            RuntimeError: this model or this configuration of vLLM has no gate to follow.
        """
        from vllm.distributed import get_tensor_model_parallel_rank

        runner = self.model_runner
        model = runner.get_model()
        if not hasattr(model, "last_gate_weights"):
            raise RuntimeError("per-request specialists need a fused model, made by `ultrafuser fuse`")
        if not hasattr(getattr(runner, "input_batch", None), "logitsprocs"):
            raise RuntimeError("per-request specialists need vLLM's model runner V1: set VLLM_USE_V2_MODEL_RUNNER=0")
        if getattr(runner, "use_async_spec_decode", False):
            raise RuntimeError(
                "per-request specialists and gate weights need --no-async-scheduling when a draft model speculates"
            )
        names = list(model.config.names)
        if self.gate_observer is None:
            self.gate_observer = GateObserver(runner, model, len(names), get_tensor_model_parallel_rank() == 0)
        return names

    def take_gate_weights(self, ranges: Ranges, released: list[str]) -> Fetched:
        """See `GateRecords.take`. Workers that do not record return nothing."""
        assert self.gate_observer is not None
        fetched = self.gate_observer.take(ranges, released)
        return fetched if self.gate_observer.records_weights else {}

    def count_gate_records(self) -> int:
        """How many answers have records, for tests and for finding leaks."""
        return 0 if self.gate_observer is None else len(self.gate_observer.records)
