"""Read the configuration of PEFT adapters, tell plain LoRA from other kinds, and merge those with PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .errors import LOAD_ERRORS, CheckpointError, reason
from .files import ADAPTER_FILE

# Kinds that add virtual tokens or layers of their own, which no merge can express.
_PROMPTS = {
    "PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "CARTRIDGE",
}
OUTER_LAYERS = ("lm_head", "embed_out", "embed_tokens", "embed_in", "wte")
_LORA_HALVES = (".lora_A.weight", ".lora_B.weight")


def parse_adapter_config(file: Path, owner: str) -> dict[str, Any]:
    """The fields of an adapter_config.json.

    Raises:
        CheckpointError: it is no JSON mapping of an adapter, or its kind or rank cannot be used.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{owner}: {file} is not JSON: {error}. Is it half copied? Copy the adapter again"
        ) from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(
            f"{owner}: {file} describes no PEFT adapter (expected a mapping with peft_type). Copy the adapter again"
        )
    if (kind := config["peft_type"]) in _PROMPTS:
        raise CheckpointError(
            f"{owner}: its adapter is of the kind {kind}, which cannot be merged into a model. Use a LoRA adapter"
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if kind == "LORA" and not (type(rank) is int and rank > 0 and type(alpha) in (int, float)):
        raise CheckpointError(
            f"{owner}: {file} has r: {rank!r} and lora_alpha: {alpha!r}. Expected a rank above 0 and a number"
        )
    targets = config.get("target_modules")
    try:
        valid = isinstance(targets, (list, type(None))) or bool(re.compile(targets))
    except (re.error, TypeError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{owner}: {file} has target_modules: {targets!r}. Expected names, or a regular expression"
        )
    return config


def adapter_tables(folder: Path, owner: str) -> tuple[bool, int | None]:
    """Whether an adapter's file holds LoRA weights alone, and the rows of the embedding table or output layer in it.

    PEFT also saves these two, without a word in the configuration, after tokens were added to the model.

    Raises:
        CheckpointError: the file cannot be read.
    """
    rows = None
    try:
        with safe_open(folder / ADAPTER_FILE, "pt") as file:
            others = [key for key in file.keys() if not key.endswith(_LORA_HALVES)]
            for key in others:
                layer, _, weight = key.replace(".base_layer.", ".").rpartition(".")
                if weight == "weight" and layer.endswith(OUTER_LAYERS):
                    rows = file.get_slice(key).get_shape()[0]
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{owner}: {folder / ADAPTER_FILE}: corrupted or half written: {error}") from error
    return not others, rows


def merge_with_peft(model: PreTrainedModel, folder: Path, owner: str) -> PreTrainedModel:
    """Merge an adapter into its own copy of the base. The base first gets as many tokens as the adapter has.

    Raises:
        CheckpointError: PEFT is not installed, or cannot merge it.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise CheckpointError(
            f"{owner}: its adapter is no plain LoRA, which needs PEFT. Run: pip install peft"
        ) from error
    _, rows = adapter_tables(folder, owner)
    try:
        if rows is not None and rows != model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except LOAD_ERRORS as error:
        raise CheckpointError(
            f"{owner}: PEFT cannot merge its adapter {folder} into its base: {reason(error)}"
        ) from error
