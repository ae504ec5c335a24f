"""The gate weights of running answers inside a vLLM worker, by the position of their tokens."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Names in the `vllm_xargs` of a request, all set by the server:
KEY = "ultrafuser_key"  # under which its gate weights are collected
MASK = "ultrafuser_mask"  # K numbers: 1 for each specialist that takes part, 0 for the others
TOP = "ultrafuser_top"  # how many of each specialist's most likely tokens are collected

MAX_FINISHED = 1024  # answers that ended and that nobody has fetched. The server fetches or releases each of its own
_FIRST_CAPACITY = 64  # tokens

# Samples of one prompt are requests of their own in vLLM: `0_cmpl-...`, `1_cmpl-...`. A completion request has several
# prompts, whose number stands before the random suffix.
_SAMPLE = re.compile(r"(\d+)_(?=chatcmpl-|cmpl-)")
_PROMPT = re.compile(r"cmpl-.*-(\d+)-[0-9a-f]{8}")

Ranges = Mapping[str, Mapping[str, Sequence[int]]]  # key -> choice -> first position, and the one behind the last
Fetched = dict[str, dict[str, dict[str, bytes]]]  # key -> choice -> name of an array -> its rows


def choice_of(request_id: str) -> str:
    """`PROMPT:SAMPLE` of a vLLM request: which of the choices of an HTTP request it generates."""
    sample = _SAMPLE.match(request_id)
    prompt = _PROMPT.fullmatch(request_id, sample.end() if sample else 0)
    return f"{prompt[1] if prompt else 0}:{sample[1] if sample else 0}"


@dataclass
class AnswerRecord:
    """What one request of vLLM asks of the gate, and what the gate gave for its tokens so far.

    Attributes:
        key: of the HTTP request. None: nothing is collected.
        mask: (K) the specialists that take part. None: all.
        num_top: how many of each specialist's most likely tokens are collected.
        arrays: `weights` (capacity, K), and with `num_top` also `top_ids` and `top_logprobs` (capacity, K, num_top). Row p
            belongs to the p-th token of the answer. A position that is computed again, such as that of a rejected draft
            token, is overwritten.
    """

    key: str | None
    choice: str
    mask: tuple[bool, ...] | None
    num_top: int
    num_specialists: int
    arrays: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        size, top = self.num_specialists, self.num_top
        self.arrays = {"weights": np.zeros((_FIRST_CAPACITY, size), dtype=np.float32)}
        if top:
            self.arrays["top_ids"] = np.zeros((_FIRST_CAPACITY, size, top), dtype=np.int32)
            self.arrays["top_logprobs"] = np.zeros((_FIRST_CAPACITY, size, top), dtype=np.float32)

    def write(self, position: int, rows: Mapping[str, np.ndarray]) -> None:
        for name, array in self.arrays.items():
            if position >= len(array):
                grown = np.zeros((max(position + 1, 2 * len(array)), *array.shape[1:]), dtype=array.dtype)
                grown[: len(array)] = array
                array = self.arrays[name] = grown
            array[position] = rows[name]


class GateRecords:
    """The records of all answers of a worker.

    An answer's record lives until the server releases its key, also while vLLM preempts its request. Of the answers that
    ended and were never released, the newest `MAX_FINISHED` are kept.
    """

    def __init__(self, num_specialists: int) -> None:
        self.num_specialists = num_specialists
        self._running: dict[str, AnswerRecord | None] = {}  # by the id of vLLM's request
        self._by_key: dict[str, dict[str, AnswerRecord]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_key.values()))

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
        mask = None if numbers is None else tuple(map(bool, numbers))
        if mask is not None and (len(mask) != self.num_specialists or not any(mask)):
            mask = None  # the server never sends such a mask
        if key is None and mask is None:
            return None
        record = AnswerRecord(key, choice_of(request_id), mask, arguments.get(TOP, 0), self.num_specialists)
        if key is not None:
            self._by_key.setdefault(key, {})[record.choice] = record
        return record

    def forget_ended(self, alive: Collection[str]) -> None:
        """Forget the requests that vLLM no longer has, but for what has not been fetched."""
        self._running = {name: record for name, record in self._running.items() if name in alive}
        running = {record.key for record in self._running.values() if record is not None}
        ended = [key for key in self._by_key if key not in running]
        for key in ended[: max(0, len(ended) - MAX_FINISHED)]:
            del self._by_key[key]

    def take(self, ranges: Ranges, released: Iterable[str]) -> Fetched:
        """Rows of the arrays as bytes. Then the released keys are forgotten.

        A choice that another engine runs is left out.
        """
        fetched: Fetched = {}
        for key, choices in ranges.items():
            records = self._by_key.get(key, {})
            fetched[key] = {
                choice: {name: array[first:end].tobytes() for name, array in records[choice].arrays.items()}
                for choice, (first, end) in choices.items()
                if choice in records
            }
        for key in released:
            for record in self._by_key.pop(key, {}).values():
                record.key = None  # its request may run for another step
        return fetched
