"""A model behind an OpenAI-compatible endpoint: with weights where the server is ours, without them elsewhere."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any
from urllib.parse import urlsplit

from ultrafuser.chat.model import LONG_CHAT, Question
from ultrafuser.chat.settings import ChatSettings
from ultrafuser.endpoint.errors import Failure
from ultrafuser.endpoint.messages import Request
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.endpoint.stream import Piece, ServedModel, StreamingEndpoint
from ultrafuser.errors import ContextOverflowError, EndpointError, RecipeError
from ultrafuser.recipe import load_node

# Fields that every server has. The others are sent if they differ from their defaults, because many servers refuse them.
_ALWAYS = ("temperature", "top_p")


class RemoteModel:
    """A `ChatModel` at a URL. `open` connects it."""

    def __init__(self, client: StreamingEndpoint, served: ServedModel) -> None:
        self.name = served.name
        self.specialists = served.specialists
        self._client = client

    @classmethod
    async def open(cls, url: str, *, model: str | None = None, api_key_env: str = "OPENAI_API_KEY") -> RemoteModel:
        """
        Args:
            url: of the server, with or without `/v1`.
            model: its name at the server. None: the only one there is.
            api_key_env: the environment variable that holds the key, if the server needs one.

        Raises:
            MissingExtraError: aiohttp is not installed.
            RecipeError: the address or the variable cannot be used.
            EndpointError: the server cannot be reached, refuses access, or has no such model.
        """
        client = StreamingEndpoint(_recipe(url, model, api_key_env))
        client.name = f"endpoint {client.recipe.base_url}"
        await client.open()
        try:
            served = await _choose(client, model)
        except BaseException:
            await client.close()
            raise
        client.recipe = client.recipe.model_copy(update={"model": served.name})
        client.name = f"endpoint {client.recipe.base_url}, model {served.name!r}"
        return cls(client, served)

    async def stream(self, question: Question) -> AsyncGenerator[Piece, None]:
        """
        Raises:
            ContextOverflowError: the chat is longer than the context.
            EndpointError: there is no answer, or it broke off.
        """
        fields = _fields(question.settings) | {"stream": True}
        if self.specialists:
            fields["gate_weights"] = True
        if question.specialists is not None:
            fields["specialists"] = list(question.specialists)
        try:
            async with aclosing(self._client.stream(Request(question.messages, fields))) as pieces:
                async for piece in pieces:
                    yield piece
        except Failure as failure:
            raise _error(self._client, failure) from failure

    async def close(self) -> None:
        await self._client.close()


def _recipe(url: str, model: str | None, api_key_env: str) -> EndpointRecipe:
    fields = {"model": model or "unknown", "base_url": url, "api_key_env": api_key_env}
    try:
        recipe = load_node(EndpointRecipe, fields)
    except RecipeError as error:
        key = "base_url" if "base_url" in str(error) else "api_key_env"
        option = "the address" if key == "base_url" else "--api-key-env"
        raise RecipeError(str(error).replace(f"recipe: {key}", option)) from error
    if urlsplit(recipe.base_url).path:
        return recipe
    return recipe.model_copy(update={"base_url": f"{recipe.base_url}/v1"})


async def _choose(client: StreamingEndpoint, model: str | None) -> ServedModel:
    """The model of that name, or the only one."""
    try:
        models = await client.models()
    except Failure as failure:
        if model is not None and failure.status in (404, 405):  # servers without a list have models all the same
            return ServedModel(model)
        raise _error(client, failure) from failure
    names = ", ".join(served.name for served in models[:20]) or "none"
    if model is None and len(models) == 1:
        return models[0]
    for served in models:
        if served.name == model:
            return served
    problem = "which model? Name one with --model" if model is None else f"no model {model!r}. Choose another --model"
    raise EndpointError(f"{client.name}: {problem}. It has: {names}")


def _fields(settings: ChatSettings) -> dict[str, Any]:
    """The fields of a request."""
    defaults = ChatSettings()
    fields = {
        key: value
        for key in ChatSettings.model_fields
        if (value := getattr(settings, key)) != getattr(defaults, key) or key in _ALWAYS
    }
    return fields | {"max_tokens": fields.pop("max_new_tokens", None)}


def _error(client: StreamingEndpoint, failure: Failure) -> EndpointError:
    """A failure in the server's own words, with the next step in a chat."""
    kind = ContextOverflowError if failure.kind == "overflow" else EndpointError
    return kind(f"{client.name}: {str(failure).rstrip('.')}. {_next_step(client.recipe, failure)}")


def _next_step(recipe: EndpointRecipe, failure: Failure) -> str:
    if failure.kind == "overflow":
        return f"{LONG_CHAT}, /set max_new_tokens=N leaves room for more"
    if failure.kind == "unreachable":
        return "Check the address and that the server runs"
    if failure.kind == "busy":
        return "The server has too much to do. Try again later"
    if failure.status is not None and (access := recipe.next_step(failure.status)):
        return access.replace("in `api_key_env`", "with --api-key-env")
    if failure.status is not None and 300 <= failure.status < 400:
        return "The server has moved. Take its new address"
    if failure.kind == "transient":
        return "See the server's log"
    return "The server does not accept this request. /set shows what is sent"
