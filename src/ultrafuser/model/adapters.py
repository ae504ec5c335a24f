"""Read PEFT adapters, tell plain LoRA from other kinds, and merge those with PEFT."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .errors import LOAD_ERRORS, CheckpointError, reason
from .files import ADAPTER_FILE, read_safetensors, refuse_pickles
from .hub import Access
from .manifest import SpecialistEntry, SpecialistSource
from .references import resolve
from .shared_base import AdapterWeights

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
# Plain LoRA is y = W x + scaling * B A x with one rank and scaling. These keys of PEFT's adapter_config.json keep it
# plain at any value: they describe the file, the training, or which layers are adapted, as the weights also show.
_PLAIN_LORA_KEYS = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("ensure_weight_tying", "eva_config", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "target_modules"),
    *("lora_alpha", "r", "use_rslora"),
}
# These keep it plain at these values: PiSSA, OLoRA and the like also change the base when they start.
_PLAIN_LORA_VALUES: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}


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


def read_adapter_config(
    source: SpecialistSource, folder: Path | None, name: str, access: Access | None = None
) -> tuple[Path, dict[str, Any]] | None:
    """Folder and configuration of the PEFT adapter of the specialist `name`, if it has one."""
    reference = source.get("adapter")
    if not reference:
        return None
    path = resolve(reference, folder, name)
    if not isinstance(path, Path):
        path = (access or Access()).adapter(path, source.get("adapter_revision"), name)
    if not (path / "adapter_config.json").is_file():
        raise CheckpointError(f"specialist {name!r}: {path} has no adapter_config.json. Expected a PEFT adapter")
    refuse_pickles(path, f"specialist {name!r}")
    return path, parse_adapter_config(path / "adapter_config.json", f"specialist {name!r}")


def is_plain_lora(adapter_config: Mapping[str, Any]) -> bool:
    """Whether an adapter can run beside others on one base. Other kinds are merged into a separate base.

    An option that is not known here and not off, such as one that PEFT adds later, counts as another kind.
    """
    targets = adapter_config.get("target_modules") or []
    if isinstance(targets, str):  # PEFT reads it as a regular expression over whole names
        outer = any(re.fullmatch(targets, name) for name in OUTER_LAYERS)
    else:
        outer = any(name.rpartition(".")[2] in OUTER_LAYERS for name in targets)
    is_lora = adapter_config.get("peft_type") == "LORA"
    return is_lora and not outer and all(_keeps_lora_plain(key, value) for key, value in adapter_config.items())


def _keeps_lora_plain(key: str, value: Any) -> bool:
    """Whether an option of an adapter's configuration leaves it a plain LoRA."""
    if key in _PLAIN_LORA_VALUES:
        return value in _PLAIN_LORA_VALUES[key]
    return key in _PLAIN_LORA_KEYS or not value


def read_adapter(
    spec: SpecialistEntry, folder: Path | None, dtype: torch.dtype, access: Access | None = None
) -> AdapterWeights | None:
    """A specialist's LoRA weights, by the names of the base's layers.

    Raises:
        CheckpointError: weights whose names are not LoRA's, or whose rank is not that of the configuration.
    """
    adapter = read_adapter_config(spec["source"], folder, spec["name"], access)
    if adapter is None:
        return None
    path, config = adapter
    tensors = read_safetensors(path / ADAPTER_FILE)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if half not in ("lora_A", "lora_B"):
            raise CheckpointError(f"specialist {spec['name']!r}: {path} holds {key!r}, which is no plain LoRA weight")
        halves.setdefault(name, {})[half] = tensor.to(dtype)
    if single := [name for name, pair in halves.items() if len(pair) < 2]:
        raise CheckpointError(
            f"specialist {spec['name']!r}: {path} holds one half of the adapter of {single[0]!r}. Copy the adapter again"
        )
    r, alpha = config["r"], config["lora_alpha"]
    for name, pair in halves.items():
        if (rank := pair["lora_A"].shape[0]) != r:  # it would be scaled wrongly
            raise CheckpointError(
                f"specialist {spec['name']!r}: the adapter in {path} has rank {rank} at {name!r}, but its adapter_config.json "
                f"has r: {r}. Copy the adapter again"
            )
    scaling = alpha / (r**0.5 if config.get("use_rslora") else r)
    return AdapterWeights({name: (pair["lora_A"], pair["lora_B"]) for name, pair in halves.items()}, scaling)


def merge_adapter(
    model: PreTrainedModel, spec: SpecialistEntry, folder: Path | None, access: Access
) -> PreTrainedModel:
    """Merge an adapter that is no plain LoRA into its own copy of the base, by PEFT."""
    adapter = read_adapter_config(spec["source"], folder, spec["name"], access)
    return model if adapter is None else merge_with_peft(model, adapter[0], f"specialist {spec['name']!r}")
