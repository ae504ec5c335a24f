"""The embedded engine: answers of concurrent requests from transformers alone, as rows of one running batch.

One thread steps the model. Each step reads a piece of a waiting prompt and draws one token for every running row, so
requests join and leave at step boundaries.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

import torch

from ultrafuser.data.templates import Renderer
from ultrafuser.errors import UltraFuserError
from ultrafuser.model.configuration_ultrafuser import table_rows
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.serve.batch import Row, RunningBatch
from ultrafuser.serve.detokenizer import Detokenizer
from ultrafuser.serve.engine import EngineBusyError, EngineClosedError, GenerationError, Request, Sampling, Token
from ultrafuser.serve.prefix_cache import PrefixCache
from ultrafuser.serve.sampler import Sequenced, check_sampling

# Columns of a prompt that one step reads. More of them delay the running answers longer, fewer use the device worse.
_PREFILL_TOKENS = {"cpu": 64, "cuda": 512}
logger = logging.getLogger(__name__)


class _Answer:
    """One request on its way: what the thread and the reader share."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue[Token | UltraFuserError] = asyncio.Queue()  # of the loop alone
        self.is_cancelled = False


class AnswerStream(AsyncIterator[Token]):
    """The tokens of one answer. Closing or dropping it, or cancelling the task that reads it, cancels the request."""

    def __init__(self, answer: _Answer, changed: threading.Condition) -> None:
        self._answer, self._changed = answer, changed
        self._is_done = False

    async def __anext__(self) -> Token:
        if self._is_done:
            raise StopAsyncIteration
        try:
            item = await self._answer.items.get()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if isinstance(item, UltraFuserError):
            self._is_done = True
            raise item
        self._is_done = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """Cancel the request, unless its answer is complete. Its states are freed at the next step."""
        self._is_done = self._answer.is_cancelled = True
        with self._changed:
            self._changed.notify()

    def __del__(self) -> None:
        self._answer.is_cancelled = True


class EmbeddedEngine:
    """An `Engine` in this process.

    Models with recurrent layers run one request at a time and continue none, because their states cannot be aligned with
    those of other rows. All others run up to `max_batch_size` at once, sliding windows included.

    Memory: the states of the running rows, rows x the longest row <= `max_batch_tokens` columns, and those of at most
    `max_cached_tokens` columns that later requests may continue. A column is one token of each specialist. If answers grow
    past the limit, the request that joined last goes back to the queue and is read again later. One request alone always
    runs.

    Attributes:
        prompt_tokens, generated_tokens: totals since the start. A prompt counts with its longest sequence.
    """

    def __init__(
        self,
        model: UltraFuserForCausalLM,
        renderer: Renderer,
        *,
        max_batch_size: int = 16,
        max_waiting: int = 256,
        max_batch_tokens: int = 32768,
        max_cached_tokens: int = 4096,
        prefill_tokens: int | None = None,
    ) -> None:
        """
        Args:
            max_batch_size: requests that generate at once.
            max_waiting: requests that may wait beyond these.
            max_batch_tokens: columns of all running rows, the shorter ones padded to the longest.
            max_cached_tokens: columns of finished conversations and prompts that are kept. 0: none.
            prefill_tokens: columns of waiting prompts that one step reads. Default: 64 on a CPU, 512 elsewhere.
        """
        self._model = model
        self._renderer = copy.copy(renderer)  # a tokenizer must not be used by two threads at once
        self._renderer.tokenizer = copy.deepcopy(renderer.tokenizer)
        _ = self._renderer.answer_blanks, self._renderer.answer_context  # cached, before the thread starts
        self._prefixes = PrefixCache(max_cached_tokens)
        self._batch = RunningBatch(model, renderer.pad_id, self._prefixes)
        self._max_batch_size = max_batch_size if self._batch.can_join else 1
        self._max_waiting, self._max_batch_tokens = max_waiting, max_batch_tokens
        device = model.device.type
        self._prefill_tokens = prefill_tokens or _PREFILL_TOKENS.get(device, _PREFILL_TOKENS["cuda"])
        self._table_rows = [table_rows(specialist) for specialist in model.config.specialists]
        self.prompt_tokens = self.generated_tokens = 0
        self._waiting: deque[_Answer] = deque()
        self._reading: _Answer | None = None
        self._running: dict[Row, _Answer] = {}
        self._changed = threading.Condition()  # guards the two flags and the queue
        self._is_closing = self._is_stopped = False
        self._thread = threading.Thread(target=self._run, name="ultrafuser-engine", daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------- what servers use

    @property
    def names(self) -> Sequence[str]:
        """The K specialists."""
        return self._model.config.names

    @property
    def context_length(self) -> int:
        """The largest number of tokens of a prompt and its answer together."""
        return self._model.config.max_position_embeddings

    @property
    def running(self) -> int:
        """Requests that generate, or whose prompts are being read."""
        return len(self._running) + (self._reading is not None)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def cached_tokens(self) -> int:
        """Columns that later requests may continue."""
        return self._prefixes.tokens

    @property
    def reused_tokens(self) -> int:
        """Columns of prompts that were not read again, since the start."""
        return self._batch.reused_tokens

    def stream(self, request: Request) -> AnswerStream:
        """The tokens of one answer. The request is queued at once.

        Raises:
            UltraFuserError: the request cannot be run.
            EngineBusyError: too many requests wait.
            EngineClosedError: the engine was closed. Also while the tokens are read.
            GenerationError: while the tokens are read.
        """
        self._check(request)
        sampling = request.sampling
        prompt_tokens = [token for ids in request.prompts for token in ids] if sampling.repetition_penalty != 1 else []
        row = Row(
            request,
            Sequenced(sampling, prompt_tokens, source=random.Random(sampling.seed)),
            Detokenizer(self._renderer, sampling.stop, request.keep_blanks),
            [sampling.specialists is None or name in sampling.specialists for name in self.names],
        )
        answer = _Answer(row)
        with self._changed:
            if self._is_closing:
                raise EngineClosedError("the engine is shutting down and takes no more requests")
            if self.waiting + self.running >= self._max_batch_size + self._max_waiting:
                raise EngineBusyError(
                    f"{self.running} requests run and {self.waiting} wait, which is the limit. Try again later"
                )
            self._waiting.append(answer)
            self._changed.notify()
        return AnswerStream(answer, self._changed)

    async def close(self, grace_s: float = 0.0) -> None:
        """Take no more requests, finish the accepted ones within `grace_s` seconds, cancel the rest, end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        try:
            if grace_s > 0:
                await asyncio.to_thread(self._thread.join, grace_s)
        finally:
            with self._changed:
                self._is_stopped = True
                self._changed.notify()
        await asyncio.to_thread(self._thread.join)

    # ---------------------------------------------------------------- checks

    def _check(self, request: Request) -> None:
        """Raises UltraFuserError: the request cannot be run."""
        sampling, names = request.sampling, self.names
        if len(request.prompts) != len(names):
            raise UltraFuserError(
                f"the request has {len(request.prompts)} prompts, expected one for each of {len(names)} specialists"
            )
        for name, ids, rows in zip(names, request.prompts, self._table_rows, strict=True):
            if not len(ids):
                raise UltraFuserError(f"the prompt of specialist {name!r} is empty, expected at least one token")
            if not 0 <= min(ids) <= max(ids) < rows:
                token = min(ids) if min(ids) < 0 else max(ids)
                raise UltraFuserError(
                    f"the prompt of specialist {name!r} has the token {token}, expected tokens from 0 to {rows - 1}"
                )
        check_sampling(sampling, self._model.config.vocab_size)
        self._check_specialists(sampling)
        lengths = dict(zip(names, map(len, request.prompts), strict=True))
        longest = max(lengths, key=lambda name: lengths[name])
        room = self.context_length - lengths[longest]
        if sampling.max_new_tokens > room:
            step = f"Lower max_new_tokens to at most {room}" if room > 0 else "Shorten the prompt"
            raise UltraFuserError(
                f"the prompt of specialist {longest!r} has {lengths[longest]} tokens and max_new_tokens is "
                f"{sampling.max_new_tokens}, but the context is {self.context_length} tokens. {step}"
            )

    def _check_specialists(self, sampling: Sampling) -> None:
        known = ", ".join(self.names)
        if sampling.specialists is None:
            return
        if unknown := [name for name in sampling.specialists if name not in self.names]:
            raise UltraFuserError(f"no specialist {unknown[0]!r}. Known: {known}")
        if not sampling.specialists:
            raise UltraFuserError(f"no specialist takes part. Name at least one of: {known}")

    # ---------------------------------------------------------------- the thread

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait_for_work():
                    try:
                        self._step()
                    except Exception as error:  # noqa: BLE001 - whatever fails, later requests are served
                        self._fail_all(error)
        finally:
            self._is_closing = True
            closed = EngineClosedError("the engine was closed before the answer was complete")
            self._deliver([(answer, closed) for answer in [*self._accepted(), *self._waiting]])
            self._waiting.clear()
            self._running.clear()
            self._reading = None
            self._batch.clear()

    def _wait_for_work(self) -> bool:
        """Wait until there are requests. False if the thread has to end."""
        with self._changed:
            while not (self._waiting or self._accepted() or self._is_closing):
                self._changed.wait()
            return not self._is_stopped and bool(self._waiting or self._accepted())

    def _accepted(self) -> list[_Answer]:
        """The requests that have left the queue."""
        return [*self._running.values(), *([self._reading] if self._reading else [])]

    def _step(self) -> None:
        self._drop_cancelled()
        self._read_prompts()
        if self._running:
            self._generate()

    def _drop_cancelled(self) -> None:
        with self._changed:
            if any(answer.is_cancelled for answer in self._waiting):
                self._waiting = deque(answer for answer in self._waiting if not answer.is_cancelled)
        if self._reading and self._reading.is_cancelled:
            self._reading = None
        self._leave([row for row, answer in self._running.items() if answer.is_cancelled], is_finished=False)

    def _read_prompts(self) -> None:
        """Read waiting prompts one after another, up to the number of columns that a step may take."""
        budget = self._prefill_tokens
        while budget > 0 and (answer := self._next_prompt()):
            try:
                columns, item = self._batch.read(answer.row, budget)
            except Exception as error:  # noqa: BLE001 - the states of the running rows are not touched yet
                self._reading = None
                self._prefixes.clear()  # they may hold the memory that was missing
                self._report(1, error)
                self._deliver([(answer, _as_generation_error(error))])
                return
            budget -= columns
            if item is not None:
                if not _is_end(item):
                    self._batch.join(answer.row)
                    self._running[answer.row] = answer
                self._reading = None
                self._deliver([(answer, item)])

    def _next_prompt(self) -> _Answer | None:
        """The request whose prompts are being read, or the next one that the batch has room for."""
        if self._reading is None and len(self._running) < self._max_batch_size:
            with self._changed:
                if self._waiting and (not self._running or self._fits([*self._running, self._waiting[0].row])):
                    self._reading = self._waiting.popleft()
            if self._reading is not None and not self._reading.row.sequenced.answer:
                self.prompt_tokens += max(map(len, self._reading.row.request.prompts))
        return self._reading

    def _fits(self, rows: Sequence[Row]) -> bool:
        """Whether rows may take their next step together."""
        return len(rows) * (max(row.length for row in rows) + 1) <= self._max_batch_tokens

    def _make_room(self) -> None:
        """Send the requests that joined last back to the queue while the others need their room."""
        while len(self._running) > 1 and not self._fits(list(self._running)):
            row, answer = list(self._running.items())[-1]
            self._leave([row], is_finished=True)  # the prefix cache may spare reading it again
            with self._changed:
                self._waiting.appendleft(answer)

    def _generate(self) -> None:
        """Draw one token for every running row."""
        self._make_room()
        rows = list(self._batch.rows)
        items = self._batch.step()
        self._deliver([(self._running[row], item) for row, item in zip(rows, items, strict=True)])
        ended = [(row, item) for row, item in zip(rows, items, strict=True) if _is_end(item)]
        self._leave([row for row, item in ended if isinstance(item, Token)], is_finished=True)
        self._leave([row for row, item in ended if not isinstance(item, Token)], is_finished=False)

    def _leave(self, rows: Sequence[Row], is_finished: bool) -> None:
        for row in rows:
            del self._running[row]
        self._batch.leave(rows, is_finished)

    def _fail_all(self, error: Exception) -> None:
        """Fail the requests that have left the queue, and free their states. What failed may be half done in them."""
        answers = self._accepted()
        self._report(len(answers), error)
        self._running.clear()
        self._reading = None
        self._batch.clear()
        self._deliver([(answer, _as_generation_error(error)) for answer in answers])

    def _report(self, count: int, error: Exception) -> None:
        logger.error("a step failed, and %d requests with it", count, exc_info=error)

    # ---------------------------------------------------------------- delivery

    def _deliver(self, items: Sequence[tuple[_Answer, Token | UltraFuserError]]) -> None:
        """Hand items to their readers, by one call for each event loop."""
        self.generated_tokens += sum(isinstance(item, Token) for _, item in items)
        for loop in {answer.loop for answer, _ in items}:
            batch = [(answer, item) for answer, item in items if answer.loop is loop]
            try:
                loop.call_soon_threadsafe(_put_all, batch)
            except RuntimeError:  # the loop is closed, so nobody reads
                for answer, _ in batch:
                    answer.is_cancelled = True


def _put_all(items: Sequence[tuple[_Answer, Token | UltraFuserError]]) -> None:
    for answer, item in items:
        answer.items.put_nowait(item)


def _is_end(item: Token | UltraFuserError) -> bool:
    return not isinstance(item, Token) or item.finish_reason is not None


def _as_generation_error(error: Exception) -> UltraFuserError:
    """The error that the readers get. Their requests may be right, so it is never one that blames them."""
    if isinstance(error, GenerationError):
        return error
    message = str(error).strip().splitlines()
    return GenerationError(f"the forward pass failed: {type(error).__name__}: {message[0] if message else ''}")
