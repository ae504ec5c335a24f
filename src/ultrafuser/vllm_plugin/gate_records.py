"""The gate weights of running answers inside a vLLM worker, by the position of their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Names in the `vllm_xargs` of a request, all set by the server:
KEY = "ultrafuser_key"  # under which its gate weights are collected
MASK = "ultrafuser_mask"  # K numbers: 1 for each specialist that takes part, 0 for the others
TOP = "ultrafuser_top"  # how many of each specialist's most likely tokens are collected

MAX_RELEASED = 4096  # keys that are remembered: a request whose client has left may still reach the batch
MAX_FINISHED = 1024  # answers that ended and that nobody has fetched. The server fetches or releases each of its own
_FIRST_SLOTS, _FIRST_TOKENS = 8, 256

# Samples of one prompt are requests of their own in vLLM: `0_cmpl-...`, `1_cmpl-...`. A completion request has several
# prompts, whose number stands before the random suffix.
_SAMPLE = re.compile(r"(\d+)_(?=chatcmpl-|cmpl-)")
_PROMPT = re.compile(r"cmpl-.*-(\d+)-[0-9a-f]{8}")

Ranges = Mapping[str, Mapping[str, Sequence[int]]]  # key -> choice -> first position, and the one behind the last
# key -> choice -> `weights`, and with `TOP` also `top_ids` and `top_logprobs` -> float32 or int32 numbers
Fetched = dict[str, dict[str, dict[str, bytes]]]


def choice_of(request_id: str) -> str:
    """`PROMPT:SAMPLE` of a vLLM request: which of the choices of an HTTP request it generates."""
    sample = _SAMPLE.match(request_id)
    prompt = _PROMPT.fullmatch(request_id, sample.end() if sample else 0)
    return f"{prompt[1] if prompt else 0}:{sample[1] if sample else 0}"


@dataclass
class AnswerRecord:
    """What one request of vLLM asks of the gate.

    Attributes:
        key: of the HTTP request. None: nothing is collected.
        mask: (K) the specialists that take part. None: all.
        num_top: how many of each specialist's most likely tokens are collected.
        slot: of its weights. -1: none.
        tops: ids and log-probabilities (K, num_top), by position.
    """

    key: str | None
    choice: str
    mask: tuple[bool, ...] | None = None
    num_top: int = 0
    slot: int = -1
    tops: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


class GateRecords:
    """The records of all answers of a worker.

    An answer's record lives until the server releases its key, also while vLLM preempts its request. Of the answers that
    ended and were never released, the newest `MAX_FINISHED` are kept.
    """

    def __init__(self, num_specialists: int) -> None:
        self.num_specialists = num_specialists
        self._running: dict[str, AnswerRecord | None] = {}  # by the id of vLLM's request
        self._by_key: dict[str, dict[str, AnswerRecord]] = {}
        self._released: dict[str, None] = {}  # the newest last
        # (slots, tokens, K). A position that is computed again, such as that of a rejected draft token, is overwritten.
        self._weights = np.zeros((_FIRST_SLOTS, _FIRST_TOKENS, num_specialists), dtype=np.float32)
        self._free_slots = list(range(_FIRST_SLOTS))

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

    # ---------------------------------------------------------------- answers

    def find(self, request_id: str, arguments: Callable[[str], Mapping[str, Any] | None]) -> AnswerRecord | None:
        """The record of a request. None if it asks for nothing.

        Args:
            arguments: gives the `vllm_xargs` of a request that is seen for the first time.
        """
        if request_id not in self._running:
            self._running[request_id] = self._open(request_id, arguments(request_id) or {})
        return self._running[request_id]

    def _open(self, request_id: str, arguments: Mapping[str, Any]) -> AnswerRecord | None:
        key, numbers = arguments.get(KEY), arguments.get(MASK)
        key = None if key in self._released else key
        mask = None if numbers is None else tuple(map(bool, numbers))
        if mask is not None and (len(mask) != self.num_specialists or not any(mask)):
            mask = None  # the server never sends such a mask
        if key is None and mask is None:
            return None
        record = AnswerRecord(key, choice_of(request_id), mask, arguments.get(TOP, 0))
        if key is not None:
            if not self._free_slots:
                self._grow(slots=2 * len(self._weights))
            record.slot = self._free_slots.pop()
            self._by_key.setdefault(key, {})[record.choice] = record
        return record

    def forget_ended(self, alive: Collection[str]) -> None:
        """Forget the requests that vLLM no longer has, but for what has not been fetched."""
        self._running = {name: record for name, record in self._running.items() if name in alive}
        running = {record.key for record in self._running.values() if record is not None}
        ended = [key for key in self._by_key if key not in running]
        for key in ended[: max(0, len(ended) - MAX_FINISHED)]:
            self.release(key)

    def release(self, key: str) -> None:
        """Collect nothing more under a key, and forget what it has. Its requests may run for another step."""
        for record in self._by_key.pop(key, {}).values():
            self._free_slots.append(record.slot)
            record.key, record.slot, record.num_top, record.tops = None, -1, 0, {}
        self._released[key] = None
        if len(self._released) > MAX_RELEASED:
            del self._released[next(iter(self._released))]

    # ---------------------------------------------------------------- weights

    def write(self, slots: np.ndarray, positions: np.ndarray, weights: np.ndarray) -> None:
        """Slots (rows), positions (rows), weights (rows, K)."""
        if len(positions) and positions.max() >= self._weights.shape[1]:
            self._grow(tokens=max(int(positions.max()) + 1, 2 * self._weights.shape[1]))
        self._weights[slots, positions] = weights

    def _grow(self, slots: int = 0, tokens: int = 0) -> None:
        old = self._weights
        self._weights = np.zeros((max(slots, len(old)), max(tokens, old.shape[1]), old.shape[2]), dtype=old.dtype)
        self._weights[: len(old), : old.shape[1]] = old
        self._free_slots += range(len(old), len(self._weights))

    def take(self, ranges: Ranges) -> Fetched:
        """What was collected, as bytes. A choice that another engine runs is left out."""
        fetched: Fetched = {}
        for key, choices in ranges.items():
            records = self._by_key.get(key, {})
            fetched[key] = {
                choice: self._read(records[choice], first, end)
                for choice, (first, end) in choices.items()
                if choice in records
            }
        return fetched

    def _read(self, record: AnswerRecord, first: int, end: int) -> dict[str, bytes]:
        rows = {"weights": self._weights[record.slot, first:end].tobytes()}
        if record.num_top and (tops := [record.tops[i] for i in range(first, end) if i in record.tops]):
            rows["top_ids"] = np.stack([ids for ids, _ in tops]).astype(np.int32).tobytes()
            rows["top_logprobs"] = np.stack([logprobs for _, logprobs in tops]).astype(np.float32).tobytes()
        return rows
