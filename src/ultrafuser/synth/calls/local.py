"""A model run in this process, asked in batches."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.errors import CheckpointError, DataError, RecipeError
from ultrafuser.model.references import PACKAGE, resolve
from ultrafuser.synth.calls.request import CUT_OFF, CallContext, Request, Response
from ultrafuser.synth.recipe import LocalModel

if TYPE_CHECKING:
    from ultrafuser.evaluate.lm.load import LoadedModel

# Models take turns: torch has one random state for the process, from which two that sample at once would draw in no
# order, and transformers loads one model at a time, or finds weights missing.
_TURN = threading.Lock()


def check_files(model: LocalModel) -> None:
    """See that a model in this process is there, before anything is asked; what may be a hub id is left to the loading.

    Raises:
        RecipeError: no such file or folder.
    """
    text = model.model
    for part in [text] if Path(text).exists() else text.split("+"):
        try:
            resolve(part, None, model.name)
        except CheckpointError as error:
            problem = str(error) if part.startswith(PACKAGE) else f"no file or folder {part}, and no hub id"
            raise RecipeError(
                f"model {model.name!r}: {problem}; set models.{model.name}.model to a folder, a hub id, BASE+ADAPTER or a "
                "fused folder; `ultrafuser synth join RECIPE` writes what was answered before without a model"
            ) from error


class LocalClient:
    """Any model that `ultrafuser eval` takes; it is loaded when it is first asked, and costs nothing."""

    concurrency = 1

    def __init__(self, model: LocalModel) -> None:
        self.recipe, self.batch_size = model, model.batch_size
        self._served: LoadedModel | None = None

    def ceiling_usd(self, request: Request) -> float:
        return 0.0

    async def open(self) -> None:
        """Nothing: the weights stay from one run to the next."""

    async def close(self) -> None:
        """Nothing."""

    async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
        return list(await asyncio.to_thread(self._in_turn, requests))  # progress and Ctrl-C work meanwhile

    def _in_turn(self, requests: Sequence[Request]) -> list[Response]:
        with _TURN:
            return self._answer(requests)

    def _answer(self, requests: Sequence[Request]) -> list[Response]:
        served = self._served = self._served or self._load()
        outcomes: dict[int, Response] = {}
        prompt_tokens, room = [0] * len(requests), [0] * len(requests)
        for i, request in enumerate(requests):
            try:
                prompt_tokens[i], room[i] = _sizes(served, request)
            except DataError as error:  # the template takes no such messages
                outcomes[i] = Response("failed", reason=f"refused: {error}")
                continue
            if room[i] < 1:
                reason = f"context overflow: a prompt of {prompt_tokens[i]} tokens leaves no room for a reply"
                outcomes[i] = Response("failed", reason=reason)
        asked = [i for i in range(len(requests)) if i not in outcomes]
        texts = self._generate(served, [requests[i] for i in asked], [room[i] for i in asked])
        for i, text in zip(asked, texts, strict=True):
            written = min(len(served.lm.tokenizer.encode(text, add_special_tokens=False)), room[i])
            if not text.strip():
                outcomes[i] = Response("failed", "", "empty: the model wrote nothing", prompt_tokens[i], written)
            else:
                reason = CUT_OFF if written >= room[i] else ""
                outcomes[i] = Response("ok", text, reason, prompt_tokens[i], written)
        return [outcomes[i] for i in range(len(requests))]

    def _generate(self, served: LoadedModel, requests: Sequence[Request], room: Sequence[int]) -> list[str]:
        from lm_eval.api.instance import Instance

        if not requests:
            return []
        # Sampled batches differ in their number alone: taken from the questions, it is no other one after a restart.
        served.lm.draws = int(requests[0].key[:12], 16)
        instances = [
            Instance(
                "generate_until", {}, (served.lm.apply_chat_template(request.chat()), self._options(request, tokens)), i
            )
            for i, (request, tokens) in enumerate(zip(requests, room, strict=True))
        ]
        return served.lm.generate_until(instances)

    def _options(self, request: Request, max_tokens: int) -> dict[str, Any]:
        options: dict[str, Any] = {"until": [], "do_sample": bool(request.temperature), "max_gen_toks": max_tokens}
        if request.temperature:
            options["temperature"] = request.temperature
        return options | self.recipe.generation

    def _load(self) -> LoadedModel:
        from ultrafuser.evaluate.lm.load import LoadOptions, load_model

        recipe = self.recipe
        return load_model(
            recipe.model, LoadOptions(recipe.chat_template, recipe.dtype, recipe.device, recipe.batch_size)
        )


def _sizes(served: LoadedModel, request: Request) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest reply that its limit and the model's context allow.

    Raises:
        DataError: the template refuses the messages.
    """
    assert served.renderer is not None and served.model is not None
    prompt = max(map(len, served.renderer.prompt(request.chat())))
    return prompt, min(request.max_tokens, served.model.config.max_position_embeddings - prompt)
