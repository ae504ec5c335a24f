"""What goes to an endpoint and what comes back: requests, and replies read with care."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ultrafuser.endpoint.errors import MALFORMED, Failure, one_line, read_error
from ultrafuser.endpoint.recipe import EndpointRecipe

_TEXT_TYPES = ("text", "output_text")
_MAX_TOKENS = 2**31  # a larger count is not a count


@dataclass(frozen=True)
class Request:
    """One request: messages, and the fields that differ from the recipe's settings."""

    messages: Sequence[Mapping[str, Any]]
    fields: Mapping[str, Any] = field(default_factory=dict)  # of a chat completion. None: not sent

    def body(self, recipe: EndpointRecipe) -> bytes:
        """The JSON to send. The recipe's `extra_body` overrides everything else."""
        fields = {"max_tokens": recipe.max_tokens, "temperature": recipe.temperature, **self.fields}
        if recipe.temperature is None:  # the model refuses one
            del fields["temperature"]
        fields[recipe.max_tokens_key] = fields.pop("max_tokens")
        sent = {key: value for key, value in fields.items() if value is not None}
        return json.dumps(
            {"model": recipe.model, "messages": list(self.messages), **sent, **recipe.extra_body}
        ).encode()


@dataclass(frozen=True)
class Reply:
    """The first choice of a chat completion.

    Attributes:
        finish_reason: why the text ends, such as `stop`, `length` or `content_filter`.
        refusal: the endpoint's own words for why it refuses.
        prompt_tokens, completion_tokens: None where the endpoint does not count them.
    """

    text: str
    finish_reason: str | None = None
    refusal: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def read_reply(body: bytes) -> Reply:
    """The reply in a response of status 200. Servers send all kinds of things with it, so each field is checked.

    Raises:
        Failure: the body is not a chat completion.
    """
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _malformed(f"no JSON: {_excerpt(body)}") from error
    tree = tree if isinstance(tree, dict) else {}
    choices: Any = tree.get("choices")
    choice: Any = choices[0] if isinstance(choices, list) and choices else {}
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) and tree.get("error"):
        raise read_error(tree)
    if not isinstance(message, dict) or "content" not in message:
        raise _malformed(f"no message in it: {_excerpt(body)}")
    text = _joined_text(message["content"])
    usage: Any = tree.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    return Reply(
        without_surrogates(text),
        _text(choice.get("finish_reason")),
        _text(message.get("refusal")),
        _count(usage.get("prompt_tokens")),
        _count(usage.get("completion_tokens")),
    )


def _joined_text(content: Any) -> str:
    """The text of a message: a string, or the texts of its items. Items of other types, such as reasoning, are left out."""
    if content is None:
        return ""
    if isinstance(content, list) and all(isinstance(item, dict) and "type" in item for item in content):
        texts = [item.get("text") for item in content if item["type"] in _TEXT_TYPES]
        return "".join(text for text in texts if isinstance(text, str))
    if not isinstance(content, str):
        raise _malformed("its content is not text")
    return content


def _malformed(problem: str) -> Failure:
    return Failure("transient", f"the reply is no chat completion ({problem})", billed=True, code=MALFORMED)


def _excerpt(body: bytes) -> str:
    return repr(one_line(body.decode("utf-8", "replace")))


def without_surrogates(text: str) -> str:
    """The text with lone surrogates replaced: a limit of tokens may cut an emoji in two."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _text(value: Any) -> str | None:
    return without_surrogates(value) if isinstance(value, str) and value else None


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_TOKENS else None
