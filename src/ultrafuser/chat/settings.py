"""The settings of a chat, which `/set` changes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import Field, PositiveInt

from ultrafuser.errors import RecipeError
from ultrafuser.recipe import load_node
from ultrafuser.typed_yaml import Node


class ChatSettings(Node):
    """How answers are drawn. The names and meanings are those of the OpenAI API and vLLM."""

    max_new_tokens: PositiveInt | None = Field(
        default=None, description="Largest number of tokens of an answer. null: 512 here, or as a server likes."
    )
    temperature: float = Field(default=0.7, ge=0, description="Sampling temperature. 0: always the most likely token.")
    top_p: float = Field(
        default=0.9, gt=0, le=1, description="Sample from the most likely tokens of this total probability."
    )
    top_k: int = Field(default=0, ge=0, description="Sample from this many of the most likely tokens. 0: all.")
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Drop tokens below this share of the highest probability."
    )
    repetition_penalty: float = Field(
        default=1.0, gt=0, description="Above 1: tokens that occurred become less likely."
    )
    presence_penalty: float = Field(default=0.0, ge=-2, le=2, description="Subtracted from the logits of used tokens.")
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Subtracted from the logits for every use of a token."
    )
    seed: int | None = Field(
        default=None, description="Seed of the first answer. The next answers take the next. null: random."
    )
    stop: list[str] = Field(default=[], description="Texts that end an answer.")


def read_settings(settings: Mapping[str, Any], changes: str = "") -> ChatSettings:
    """Settings with changes such as `temperature=0.5 stop=[END]`.

    Raises:
        RecipeError: an unknown key, or a value that it does not take.
    """
    overrides = re.split(r"\s+(?=\w+=)", changes.strip()) if changes.strip() else []
    if wrong := [override for override in overrides if "=" not in override]:
        raise RecipeError(f"{wrong[0]!r}: expected KEY=VALUE, such as temperature=0.5")
    try:
        return load_node(ChatSettings, settings, overrides)
    except RecipeError as error:
        raise RecipeError(str(error).removeprefix("recipe: ")) from error
