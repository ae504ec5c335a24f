"""Fetch gate weights from the workers of a vLLM engine. Concurrent answers share one call."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ultrafuser.errors import UltraFuserError
from ultrafuser.vllm_plugin.gate_records import Fetched

logger = logging.getLogger(__name__)

CALL_TIMEOUT_S = 60.0  # a call waits for the step that runs. A prompt of many tokens takes seconds on a CPU


class WeightsUnavailable(UltraFuserError):
    """The engine did not give the weights of an answer, such as because it ends."""


@dataclass(frozen=True)
class TokenWeights:
    """What the gate gave for some tokens of an answer.

    Attributes:
        weights: (tokens, K)
        top_ids, top_logprobs: (tokens, K, N) of each specialist. N is 0 if the request did not ask for them.
    """

    weights: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(frozen=True)
class _Order:
    """Tokens of one answer that somebody waits for."""

    key: str
    ranges: Mapping[str, tuple[int, int]]
    future: asyncio.Future[dict[str, TokenWeights]]


class GateWeightsClient:
    """Calls `GateWorker` in the engine's workers.

    A call reaches the workers between two steps. While one runs, the orders of other answers wait, and go out together
    with the next one: at most one call per step, however many answers are streamed.
    """

    def __init__(self, engine: Any) -> None:
        """
        Args:
            engine: vLLM's `AsyncLLM`.
        """
        self._engine = engine
        self._orders: list[_Order] = []
        self._released: list[str] = []
        self._task: asyncio.Task[None] | None = None
        self._names: tuple[str, ...] | None = None
        self._connecting = asyncio.Lock()

    async def connect(self) -> tuple[str, ...]:
        """The names of the specialists. The first call begins the collection in the workers.

        Raises:
            WeightsUnavailable: the engine stopped, or its workers refuse.
        """
        async with self._connecting:
            if self._names is None:
                try:
                    self._names = tuple((await self._call("connect_gate"))[0])
                except Exception as error:  # vLLM passes a worker's error on as a plain Exception
                    raise WeightsUnavailable(str(error)) from error
        return self._names

    async def take(self, key: str, ranges: Mapping[str, tuple[int, int]]) -> dict[str, TokenWeights]:
        """What the gate gave for some tokens of an answer, by choice (`PROMPT:SAMPLE`).

        Args:
            ranges: by choice, the position of the first token and that behind the last.

        Raises:
            WeightsUnavailable: the engine stopped, or has not recorded them all.
        """
        order = _Order(key, ranges, asyncio.get_running_loop().create_future())
        self._orders.append(order)
        self._start()
        return await order.future

    def release(self, key: str) -> None:
        """Forget an answer's weights in the workers, also those that are still to come."""
        self._released.append(key)
        self._start()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._work())

    async def _work(self) -> None:
        while self._orders or self._released:
            orders, self._orders = self._orders, []
            released, self._released = self._released, []
            ranges = _merged(orders)
            try:
                results = await asyncio.wait_for(self._call("take_gate_weights", ranges, released), CALL_TIMEOUT_S)
            except Exception as error:  # noqa: BLE001 - each answer that waits gets it, whatever vLLM raised
                logger.warning("gate weights could not be fetched: %s", error)
                results = [str(error)]
            for order in orders:
                if order.future.done():  # its client is gone
                    continue
                try:
                    order.future.set_result(self._select(order, ranges, results))
                except WeightsUnavailable as error:
                    order.future.set_exception(error)

    def _select(self, order: _Order, merged: Mapping[str, Mapping[str, tuple[int, int]]], results: list[Any]) -> Any:
        """The tokens of one order in the results of all workers."""
        if isinstance(results[0], str):
            raise WeightsUnavailable(results[0])
        fetched: list[Fetched] = results
        selected = {}
        for choice, (first, end) in order.ranges.items():
            data = next((result[order.key][choice] for result in fetched if choice in result.get(order.key, {})), {})
            start = first - merged[order.key][choice][0]
            arrays = {name: rows[start:][: end - first] for name, rows in self._arrays(data).items()}
            if len(arrays["weights"]) != end - first:
                raise WeightsUnavailable(
                    f"{len(arrays['weights'])} of the {end - first} tokens from {first} on are recorded"
                )
            selected[choice] = TokenWeights(**arrays)
        return selected

    def _arrays(self, data: Mapping[str, bytes]) -> dict[str, np.ndarray]:
        """See `TokenWeights`."""
        size = len(self._names or ())
        weights = np.frombuffer(data.get("weights", b""), dtype=np.float32).reshape(-1, size)
        arrays: dict[str, np.ndarray] = {"weights": weights}
        for name, kind in (("top_ids", np.int32), ("top_logprobs", np.float32)):
            values = np.frombuffer(data.get(name, b""), dtype=kind)
            num_top = values.size // max(1, weights.size)
            arrays[name] = values.reshape(len(weights), size, num_top)
        return arrays

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """The results of all workers, of all data-parallel engines."""
        core: Any = getattr(self._engine, "engine_core", None)
        if len(getattr(core, "core_engines", ())) > 1:
            engines = await core.call_utility_all_async("collective_rpc", method, None, args, {})
            return [result for results in engines for result in results]
        return list(await self._engine.collective_rpc(method, args=args))


def _merged(orders: list[_Order]) -> dict[str, dict[str, tuple[int, int]]]:
    """One range per choice that covers those of all orders."""
    ranges: dict[str, dict[str, tuple[int, int]]] = {}
    for order in orders:
        choices = ranges.setdefault(order.key, {})
        for choice, (first, end) in order.ranges.items():
            known = choices.get(choice, (first, end))
            choices[choice] = (min(first, known[0]), max(end, known[1]))
    return ranges
