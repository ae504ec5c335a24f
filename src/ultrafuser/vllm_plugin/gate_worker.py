"""What the server asks of a vLLM worker: `vllm serve --worker-extension-cls ultrafuser.vllm_plugin.gate_worker.GateWorker`.

vLLM samples with logits alone, so a gate's weights have no way out of its workers, and a request has no way to the gate.
This extension is that way. It follows the batch of vLLM's model runner, so it also works with speculation, where vLLM
refuses custom logits processors.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ultrafuser.vllm_plugin.gate_records import AnswerRecord, Fetched, GateRecords, Ranges


class BatchRow(NamedTuple):
    """One row of logits.

    Attributes:
        record: None if its request asks for nothing.
        position: of the token that it predicts, in the answer.
    """

    record: AnswerRecord | None
    position: int


class Arrival(NamedTuple):
    """Tensors on their way from the device.

    Attributes:
        event: when they are here. None: now.
        tensors: by name, on the host.
        rows: of the batch. Those without a record are not written.
    """

    event: Any
    tensors: dict[str, torch.Tensor]
    rows: list[BatchRow]


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
        self._batch: list[AnswerRecord | None] | None = None  # of each request. None: the batch has changed
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
        rows = self._rows(len(hidden_states))
        if not rows:
            return self._compute_logits(hidden_states)
        self.model.gate_mask = self._mask(rows, hidden_states.device)
        self.model.record_specialists = any(record is not None and record.num_top for record, _ in rows)
        logits = self._compute_logits(hidden_states)
        if self.records_weights:
            self._record(rows)
        return logits

    # ---------------------------------------------------------------- called by the server

    def take(self, ranges: Ranges, released: Sequence[str]) -> Fetched:
        """See `GateRecords.take`."""
        while self._arrivals:
            self._write(self._arrivals.popleft())
        return self.records.take(ranges, released)

    # ---------------------------------------------------------------- rows

    def _rows(self, num_rows: int) -> list[BatchRow]:
        """The rows of this step. Empty if no request asks for anything.

        Raises:
            RuntimeError: they are not the rows that vLLM computes.
        """
        runner = self.runner
        request_ids = runner.input_batch.req_ids
        if self._batch is None:
            self.records.forget_ended(runner.requests.keys())
            self._batch = [self.records.find(request_id, self._arguments) for request_id in request_ids]
        if not any(self._batch):
            return []
        drafts = [0] * len(request_ids)
        if runner.speculative_config is not None:  # -1 in the prefill
            drafts = [max(0, int(count)) for count in runner.num_decode_draft_tokens.np[: len(request_ids)]]
        rows = []
        for request_id, record, num_drafts in zip(request_ids, self._batch, drafts, strict=True):
            position = len(runner.requests[request_id].output_token_ids) if record is not None else 0
            rows += [BatchRow(record, position + i) for i in range(num_drafts + 1)]
        if len(rows) != num_rows:
            raise RuntimeError(
                f"vLLM computes logits for {num_rows} rows, but its batch of {len(request_ids)} requests has {len(rows)}. This "
                "version of vLLM is not supported with per-request specialists and gate weights"
            )
        return rows

    def _arguments(self, request_id: str) -> Mapping[str, Any] | None:
        parameters = self.runner.requests[request_id].sampling_params
        return None if parameters is None else parameters.extra_args

    def _mask(self, rows: Sequence[BatchRow], device: torch.device) -> torch.Tensor | None:
        """(rows, K) True for the specialists that take part. None if all do, in all rows."""
        masks = [None if record is None else record.mask for record, _ in rows]
        if not any(masks):
            return None
        everyone = (True,) * self.records.num_specialists
        return torch.tensor([mask or everyone for mask in masks], device=device)

    # ---------------------------------------------------------------- records

    def _record(self, rows: list[BatchRow]) -> None:
        rows = [row if row.record is not None and row.record.key is not None else BatchRow(None, 0) for row in rows]
        num_top = max((record.num_top for record, _ in rows if record is not None), default=-1)
        if num_top < 0:
            return  # they only have masks
        tensors = {"weights": self.model.last_gate_weights}  # (rows, K)
        if num_top:
            tops = [z.log_softmax(-1).topk(num_top) for z in self.model.last_specialist_logits]  # K x (rows, num_top)
            tensors["top_logprobs"] = torch.stack([top.values for top in tops], dim=1)  # (rows, K, num_top)
            tensors["top_ids"] = torch.stack([top.indices for top in tops], dim=1).int()
        self._arrivals.append(Arrival(*_to_host(tensors), rows))
        while self._arrivals and (self._arrivals[0].event is None or self._arrivals[0].event.query()):
            self._write(self._arrivals.popleft())

    def _write(self, arrival: Arrival) -> None:
        if arrival.event is not None:
            arrival.event.synchronize()
        arrays = {name: tensor.numpy() for name, tensor in arrival.tensors.items()}
        for i, (record, position) in enumerate(arrival.rows):
            if record is not None:
                values = {name: array[i] for name, array in arrays.items()}
                if record.num_top:
                    values |= {name: values[name][:, : record.num_top] for name in ("top_ids", "top_logprobs")}
                record.write(position, values)


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
