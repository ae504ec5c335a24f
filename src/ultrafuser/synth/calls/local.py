"""A model that runs in this process and answers in batches."""

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

# Local models run one at a time: torch has one random state per process, so samples of two models would depend on their
# order. And transformers cannot load two models at once.
_ONE_AT_A_TIME = threading.Lock()


def check_files(model: LocalModel) -> None:
    """Check that the files of a local model exist, before the first request. A hub id is only checked when it is loaded.

    Raises:
        RecipeError: no such file or folder.
    """
    text = model.model
    for reference in [text] if Path(text).exists() else text.split("+"):
        try:
            resolve(reference, None, model.name)
        except CheckpointError as error:
            problem = str(error) if reference.startswith(PACKAGE) else f"no file or folder {reference}, and no hub id"
            raise RecipeError(
                f"model {model.name!r}: {problem}; set models.{model.name}.model to a folder, a hub id, BASE+ADAPTER or a "
                "fused folder; `ultrafuser synth join RECIPE` writes the stored answers without a model"
            ) from error


class LocalClient:
    """Any model that `ultrafuser eval` takes. It is loaded at the first request, and costs nothing."""

    concurrency = 1

    def __init__(self, model: LocalModel) -> None:
        self.recipe, self.batch_size = model, model.batch_size
        self._model: LoadedModel | None = None

    def ceiling_usd(self, request: Request) -> float:
        return 0.0

    async def open(self) -> None:
        """Nothing: the weights stay in memory from one stage to the next."""

    async def close(self) -> None:
        """Nothing."""

    async def answer(self, requests: Sequence[Request], run: CallContext) -> list[Response | None]:
        def answer_alone() -> list[Response | None]:
            with _ONE_AT_A_TIME:
                return list(self._answer(requests))

        return await asyncio.to_thread(answer_alone)  # progress and Ctrl-C work meanwhile

    def _answer(self, requests: Sequence[Request]) -> list[Response]:
        model = self._model = self._model or self._load()
        assert model.renderer is not None and model.model is not None
        context = model.model.config.max_position_embeddings
        responses: dict[int, Response] = {}
        prompt_tokens, max_tokens = [0] * len(requests), [0] * len(requests)
        # 1. Requests that do not fit fail without the model.
        for i, request in enumerate(requests):
            try:
                prompt_tokens[i] = max(map(len, model.renderer.prompt(request.chat())))
            except DataError as error:  # the template refuses the messages
                responses[i] = Response("failed", reason=f"refused: {error}")
                continue
            max_tokens[i] = min(request.max_tokens, context - prompt_tokens[i])
            if max_tokens[i] < 1:
                reason = f"context overflow: a prompt of {prompt_tokens[i]} tokens leaves no room for a reply"
                responses[i] = Response("failed", reason=reason)
        # 2. All others are one batch.
        batch = [i for i in range(len(requests)) if i not in responses]
        texts = self._generate(model, [requests[i] for i in batch], [max_tokens[i] for i in batch])
        for i, text in zip(batch, texts, strict=True):
            reply_tokens = min(len(model.lm.tokenizer.encode(text, add_special_tokens=False)), max_tokens[i])
            if not text.strip():
                reason = "empty: the model wrote nothing"
                responses[i] = Response("failed", "", reason, prompt_tokens[i], reply_tokens)
            else:
                reason = CUT_OFF if reply_tokens >= max_tokens[i] else ""
                responses[i] = Response("ok", text, reason, prompt_tokens[i], reply_tokens)
        return [responses[i] for i in range(len(requests))]

    def _generate(self, model: LoadedModel, requests: Sequence[Request], max_tokens: Sequence[int]) -> list[str]:
        from lm_eval.api.instance import Instance

        if not requests:
            return []
        # The seed of a sampled batch depends on its requests, so a restart draws the same.
        model.lm.draws = int(requests[0].key[:12], 16)
        instances = []
        for i, (request, tokens) in enumerate(zip(requests, max_tokens, strict=True)):
            prompt = model.lm.apply_chat_template(request.chat())
            options: dict[str, Any] = {"until": [], "do_sample": bool(request.temperature), "max_gen_toks": tokens}
            if request.temperature:
                options["temperature"] = request.temperature
            instances.append(Instance("generate_until", {}, (prompt, options | self.recipe.generation), i))
        return model.lm.generate_until(instances)

    def _load(self) -> LoadedModel:
        from ultrafuser.evaluate.lm.load import LoadOptions, load_model

        model = self.recipe
        options = LoadOptions(model.chat_template, model.dtype, model.device, model.batch_size, model.trust_remote_code)
        return load_model(model.model, options)
