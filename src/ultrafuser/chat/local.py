"""A fused model in this process, by the embedded engine: a turn reads only what it adds to the chat."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ultrafuser.chat.model import LONG_CHAT, Question
from ultrafuser.data.templates import Renderer
from ultrafuser.endpoint.stream import Piece
from ultrafuser.errors import ContextOverflowError
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.serve.embedded import EmbeddedEngine
from ultrafuser.serve.engine import Request, Sampling

MAX_NEW_TOKENS = 512


class LocalModel:
    """A `ChatModel` on the embedded engine.

    Args:
        name: the folder or hub id that it was loaded from.
    """

    def __init__(self, name: str, model: UltraFuserForCausalLM, renderer: Renderer) -> None:
        self.name = name
        self.specialists = tuple(model.config.names)
        self._renderer = renderer
        # One request at a time: nothing waits for a long prompt, and the cache may hold one chat of the whole context.
        self._engine = EmbeddedEngine(
            model,
            renderer,
            max_batch_size=1,
            max_cached_tokens=model.config.max_position_embeddings,
            prefill_tokens=1024,
        )

    async def stream(self, question: Question) -> AsyncGenerator[Piece, None]:
        """
        Raises:
            ContextOverflowError: the chat is longer than the context.
            UltraFuserError: the templates refuse the messages, or the engine cannot run the request.
        """
        prompts = self._renderer.prompt(question.messages)
        longest, context = max(map(len, prompts)), self._engine.context_length
        if longest >= context:
            raise ContextOverflowError(
                f"the {longest} tokens of this chat do not fit into its context of {context}. {LONG_CHAT}"
            )
        settings = question.settings
        sampling = Sampling(
            max_new_tokens=min(settings.max_new_tokens or MAX_NEW_TOKENS, context - longest),
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
            presence_penalty=settings.presence_penalty,
            frequency_penalty=settings.frequency_penalty,
            seed=settings.seed,
            stop=tuple(settings.stop),
            specialists=question.specialists,
        )
        tokens = self._engine.stream(Request(prompts, sampling))
        try:
            async for token in tokens:
                yield Piece(token.text, token.weights, token.finish_reason)
        finally:
            await tokens.aclose()

    async def close(self) -> None:
        await self._engine.close()
