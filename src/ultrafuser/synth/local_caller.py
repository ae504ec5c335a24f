"""A model run in this process, asked in batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.errors import CheckpointError, DataError, RecipeError
from ultrafuser.model.references import PACKAGE, resolve
from ultrafuser.synth.asks import CUT_OFF, Ask, Outcome
from ultrafuser.synth.callers import Run
from ultrafuser.synth.recipe import ModelRecipe

if TYPE_CHECKING:
    from ultrafuser.evaluate.models import Served

# Models take turns: torch has one random state for the process, from which two that sample at once would draw in no
# order, and transformers loads one model at a time, or finds weights missing.
_TURN = threading.Lock()


def check_files(model: ModelRecipe) -> None:
    """See that a model in this process is there, before anything is asked; what may be a hub id is left to the loading.

    Raises:
        RecipeError: no such file or folder.
    """
    if (text := model.model) is None:  # behind an endpoint
        return
    for part in [text] if Path(text).exists() else text.split("+"):
        try:
            resolve(part, None, model.name)
        except CheckpointError as error:
            problem = str(error) if part.startswith(PACKAGE) else f"no file or folder {part}, and no hub id"
            raise RecipeError(
                f"model {model.name!r}: {problem}; set models.{model.name}.model to a folder, a hub id, BASE+ADAPTER or a "
                "fused folder; `ultrafuser synth join RECIPE` writes what was answered before without a model"
            ) from error


class LocalCaller:
    """Any model that `ultrafuser eval` takes; it is loaded when it is first asked, and costs nothing."""

    concurrency = 1

    def __init__(self, model: ModelRecipe) -> None:
        self.recipe, self.batch_size = model, model.batch_size
        self._served: Served | None = None

    def ceiling_usd(self, ask: Ask) -> float:
        return 0.0

    async def open(self) -> None:
        """Nothing: the weights stay from one run to the next."""

    async def close(self) -> None:
        """Nothing."""

    async def answer(self, asks: Sequence[Ask], run: Run) -> list[Outcome | None]:
        return list(await asyncio.to_thread(self._in_turn, asks))  # so that leases are renewed meanwhile

    def _in_turn(self, asks: Sequence[Ask]) -> list[Outcome]:
        with _TURN:
            return self._answer(asks)

    def _answer(self, asks: Sequence[Ask]) -> list[Outcome]:
        served = self._served = self._served or self._load()
        outcomes: dict[int, Outcome] = {}
        prompt_tokens, room = [0] * len(asks), [0] * len(asks)
        for i, ask in enumerate(asks):
            try:
                prompt_tokens[i], room[i] = _sizes(served, ask)
            except DataError as error:  # the template takes no such messages
                outcomes[i] = Outcome("failed", reason=f"refused: {error}")
                continue
            if room[i] < 1:
                reason = f"context overflow: a prompt of {prompt_tokens[i]} tokens leaves no room for a reply"
                outcomes[i] = Outcome("failed", reason=reason)
        asked = [i for i in range(len(asks)) if i not in outcomes]
        texts = self._generate(served, [asks[i] for i in asked], [room[i] for i in asked])
        for i, text in zip(asked, texts, strict=True):
            written = min(len(served.lm.tokenizer.encode(text, add_special_tokens=False)), room[i])
            if not text.strip():
                outcomes[i] = Outcome("failed", "", "empty: the model wrote nothing", prompt_tokens[i], written)
            else:
                reason = CUT_OFF if written >= room[i] else ""
                outcomes[i] = Outcome("ok", text, reason, prompt_tokens[i], written)
        return [outcomes[i] for i in range(len(asks))]

    def _generate(self, served: Served, asks: Sequence[Ask], room: Sequence[int]) -> list[str]:
        from lm_eval.api.instance import Instance

        if not asks:
            return []
        # Sampled batches differ in their number alone: taken from the questions, it is no other one after a restart.
        served.lm.draws = int(asks[0].key[:12], 16)
        requests = [
            Instance("generate_until", {}, (served.lm.apply_chat_template(ask.chat()), self._options(ask, tokens)), i)
            for i, (ask, tokens) in enumerate(zip(asks, room, strict=True))
        ]
        return served.lm.generate_until(requests)

    def _options(self, ask: Ask, max_tokens: int) -> dict[str, Any]:
        options: dict[str, Any] = {"until": [], "do_sample": bool(ask.temperature), "max_gen_toks": max_tokens}
        if ask.temperature:
            options["temperature"] = ask.temperature
        return options | self.recipe.generation

    def _load(self) -> Served:
        from ultrafuser.evaluate.models import serve

        own = self.recipe
        assert own.model is not None
        return serve(own.model, chat_template=own.chat_template, dtype=own.dtype, device=own.device,
                     batch_size=own.batch_size)  # fmt: skip


def _sizes(served: Served, ask: Ask) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest reply that its limit and the model's context allow.

    Raises:
        DataError: the template refuses the messages.
    """
    assert served.renderer is not None and served.model is not None
    prompt = max(map(len, served.renderer.prompt(ask.chat())))
    return prompt, min(ask.max_tokens, served.model.config.max_position_embeddings - prompt)
