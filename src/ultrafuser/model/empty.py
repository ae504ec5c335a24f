"""Specialists without weights, on torch's meta device, from their configurations and adapters alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .adapters import read_adapter
from .configuration_ultrafuser import UltraFuserConfig, specialist_config
from .errors import LOAD_ERRORS, CheckpointError, reason
from .hub import Access
from .manifest import SpecialistEntry
from .shared_base import AdapterWeights, SpecialistGroup


def empty_groups(
    config: UltraFuserConfig, folder: Path | None, dtype: str = "auto", access: Access | None = None
) -> list[SpecialistGroup]:
    """The specialists without weights, on torch's meta device: shapes, types and adapters as `load_groups` gives them.

    Only configurations and adapters are read.

    Raises:
        CheckpointError: an adapter does not fit its base, or a model's own code would have to run.
    """
    groups = []
    for indices in config.groups():
        specs = [config.specialists[k] for k in indices]
        described = specialist_config(specs[0]["config"])
        kind = specs[0].get("dtype") or dtype
        declared = (getattr(described, "dtype", None) or torch.float32) if kind == "auto" else kind
        number = getattr(torch, declared) if isinstance(declared, str) else declared
        adapters: list[AdapterWeights | None] = []
        if not specs[0].get("separate"):
            adapters = [read_adapter(spec, folder, number, access) for spec in specs]
        groups.append(SpecialistGroup(empty_model(specs[0], number), [spec["name"] for spec in specs], adapters))
    return groups


def empty_model(spec: SpecialistEntry, dtype: torch.dtype) -> PreTrainedModel:
    """A specialist's base without weights, on torch's meta device."""
    try:
        with torch.device("meta"):
            config = specialist_config(spec["config"])
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False).to(dtype)
    except LOAD_ERRORS as error:
        raise CheckpointError(f"specialist {spec['name']!r}: cannot be built: {reason(error)}") from error
