"""The settings of an OpenAI-compatible endpoint: a node of a recipe. Imports no client."""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import unquote, urlsplit

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    field_validator,
    model_validator,
)

from ultrafuser.errors import hide_logins
from ultrafuser.typed_yaml import FreeForm, Node

LOGINS = (
    "ULTRAFUSER_LOGINS"  # environment variable of child processes, which read saved recipes: JSON, login by address
)
OPENAI_URL = "https://api.openai.com/v1"


_ADDRESS = re.compile(r"(.*)@(https?://.*)", re.IGNORECASE | re.DOTALL)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MIN_SECRET_CHARS = 7  # shorter keys are placeholders such as EMPTY, which replies may hold


def _web_address(value: str) -> str:
    try:
        parts = urlsplit(value)
        # A port that is no number, a query and a fragment are ends of passwords with a slash, ? or #.
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        usable = usable and not parts.query and not parts.fragment
    except ValueError:  # unbalanced brackets, for example
        usable = False
    if not usable:
        hint = ". In a password, write / ? # @ as %2F %3F %23 %40" if "@" in value else ""
        raise ValueError(f"got {hide_logins(value)!r}, expected an address such as http://127.0.0.1:8000/v1{hint}")
    return value.rstrip("/")


@contextmanager
def logins_for_children(recipes: Iterable[EndpointRecipe]) -> Iterator[None]:
    """Let child processes know the logins of some endpoints."""
    os.environ[LOGINS] = json.dumps({recipe.base_url: recipe.login for recipe in recipes if recipe.login})
    try:
        yield
    finally:
        os.environ.pop(LOGINS, None)


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

    _login: str = PrivateAttr(default="")  # `user:password` of the address

    @field_validator("model")
    @classmethod
    def _check_name(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(f"got {hide_logins(value)!r}, expected NAME or NAME@http://host/v1")
        return value

    @field_validator("api_key_env")
    @classmethod
    def _check_variable(cls, value: str) -> str:
        if not _VARIABLE.fullmatch(value):
            raise ValueError("got something else than the name of an environment variable. Set a variable to the key")
        return value

    @model_validator(mode="after")
    def _take_login(self) -> EndpointRecipe:
        """Move the login out of the address, so that no copy of the recipe, report, log or error can hold it."""
        parts = urlsplit(self.base_url)
        login, at, host = parts.netloc.rpartition("@")
        if at:
            user, _, password = login.partition(":")
            self._login = f"{unquote(user)}:{unquote(password)}"
            self.base_url = parts._replace(netloc=host).geturl()
        elif LOGINS in os.environ:
            self._login = json.loads(os.environ[LOGINS]).get(self.base_url, "")
        return self

    @property
    def login(self) -> str:
        """`user:password` of the address. It is no field, so it is never saved."""
        return self._login

    @property
    def key(self) -> str:
        """The key in the environment. Empty: there is none."""
        return os.environ.get(self.api_key_env, "").strip()

    def authorization(self) -> str:
        """The header of that name: the login of the address, or else the key. Empty: there is neither."""
        if self._login:
            return f"Basic {b64encode(self._login.encode()).decode()}"
        return f"Bearer {self.key}" if self.key else ""

    def secrets(self) -> list[str]:
        """Texts that may not be shown or saved, the longest first."""
        texts = {self.key, self._login, self._login.partition(":")[2], self.authorization().partition(" ")[2]}
        texts |= {json.dumps(text)[1:-1] for text in texts}
        texts |= {text.replace("/", "\\/") for text in texts}  # as some servers write JSON
        return sorted((text for text in texts if len(text) >= _MIN_SECRET_CHARS), key=len, reverse=True)

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
        name = fields["model"].removeprefix("openai:")
        if (match := _ADDRESS.fullmatch(name)) is None:
            return {**fields, "model": name}
        if "base_url" in fields:
            text = hide_logins(fields["model"])
            raise ValueError(f"got {text!r} and 'base_url', expected the address once. Remove one of them")
        return {**fields, "model": match[1], "base_url": match[2]}
