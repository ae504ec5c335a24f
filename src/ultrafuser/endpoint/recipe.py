"""The settings of an OpenAI-compatible endpoint: a node of a recipe. Imports no client."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ultrafuser.typed_yaml import FreeForm, Node

OPENAI_URL = "https://api.openai.com/v1"


def _web_address(value: str) -> str:
    try:
        usable = value.startswith(("http://", "https://")) and urlsplit(value).hostname
    except ValueError:  # unbalanced brackets, for example
        usable = False
    if not usable:
        raise ValueError(f"got {value!r}, expected an address such as http://127.0.0.1:8000/v1")
    return value.rstrip("/")


class EndpointRecipe(Node):
    """One model behind an OpenAI-compatible endpoint. A bare string is `NAME` or `NAME@http://host/v1`."""

    shorthand: ClassVar[str | None] = "model"

    model: str = Field(
        min_length=1, description="Name of the model at the endpoint. `NAME@URL` sets `base_url` as well."
    )
    base_url: Annotated[str, AfterValidator(_web_address)] = Field(
        default=OPENAI_URL, description="Address of the endpoint, including `/v1`."
    )
    api_key_env: str = Field(
        default="OPENAI_API_KEY", description="Environment variable that holds the key. Unset: the endpoint needs none."
    )
    timeout_s: PositiveFloat = Field(default=120.0, description="Seconds that a request may take before it is retried.")
    retries: NonNegativeInt = Field(
        default=5, description="Retries of a request after 429, 5xx, a timeout or a cut connection."
    )
    backoff_s: NonNegativeFloat = Field(
        default=1.0,
        description="Maximum delay before the first retry, in seconds. It doubles with each retry, up to a minute.",
    )
    concurrency: PositiveInt = Field(default=4, description="Number of requests in flight.")
    max_tokens: PositiveInt = Field(default=1024, description="Maximum length of a reply, in tokens.")
    max_tokens_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        default="max_tokens", description="Name of that limit in a request."
    )
    temperature: NonNegativeFloat | None = Field(
        default=0.0, description="Sampling temperature. null: not sent, for models that refuse it."
    )
    extra_body: FreeForm = Field(default={}, description="Further fields of each request. They override all others.")

    def next_step(self, status: int) -> str | None:
        """The next step after a refusal of access, or of an unknown model. None: the refusal is about something else."""
        if status in (401, 403):
            name = self.api_key_env
            state = "is set, but its key was not accepted" if os.environ.get(name) else "is not set"
            return (
                f"The environment variable {name} {state}. Set it to a key of this endpoint, or name another variable in "
                "`api_key_env`"
            )
        if status == 404:
            return (
                f"No such model or address. {self.base_url}/models lists the models, and an address usually ends in /v1"
            )
        return None

    @model_validator(mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """`[openai:]NAME@URL` as model and address."""
        fields = {"model": value} if isinstance(value, str) else value
        if not isinstance(fields, Mapping) or not isinstance(fields.get("model"), str):
            return value
        name, separator, url = fields["model"].removeprefix("openai:").rpartition("@http")
        if not separator:
            return {**fields, "model": fields["model"].removeprefix("openai:")}
        if "base_url" in fields:
            raise ValueError(f"got {fields['model']!r} and 'base_url', expected the address once. Remove one of them")
        return {**fields, "model": name, "base_url": f"http{url}"}
