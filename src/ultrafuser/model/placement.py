"""Which accelerator holds which specialists, where one process sees several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .configuration_ultrafuser import UltraFuserConfig
from .empty import empty_groups
from .errors import CheckpointError
from .hub import Access

SPREAD = ("auto", "balanced")  # the values of `device_map` that spread the specialists
_FILL = 0.9  # of a device's free memory: the remainder is for caches and activations


def accelerators() -> dict[str, int]:
    """The accelerators that this process sees, and their free memory in bytes."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return {}
    backend = getattr(torch, accelerator.type)
    if not hasattr(backend, "mem_get_info"):
        return {}
    return {f"{accelerator.type}:{i}": backend.mem_get_info(i)[0] for i in range(torch.accelerator.device_count())}


def place_groups(
    config: UltraFuserConfig, folder: Path | None, dtype: str, access: Access, free: Mapping[str, int]
) -> list[str]:
    """The device of each group of specialists.

    Empty if transformers must divide them: a specialist has its own `device_map` or cannot be measured, one does not fit as a
    whole, or all would be on one device.

    Args:
        folder, dtype, access: as for `load_groups`.
        free: of `accelerators`.
    """
    if any(spec.get("device_map") for spec in config.specialists):
        return []
    try:
        groups = empty_groups(config, folder, dtype, access)
    except CheckpointError:  # its own code would have to run. If something else is wrong, loading says so
        return []
    sizes = [sum(p.numel() * p.dtype.itemsize for p in group.parameters()) for group in groups]
    devices = spread(sizes, free)
    return devices if len(set(devices)) > 1 else []


def spread(sizes: Sequence[int], free: Mapping[str, int]) -> list[str]:
    """The device with the most room for each size in bytes, the largest size first. Empty if one fits nowhere."""
    room = {device: int(_FILL * free_bytes) for device, free_bytes in free.items()}
    devices = [""] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        devices[i] = max(room, key=lambda device: room[device])
        room[devices[i]] -= sizes[i]
        if room[devices[i]] < 0:
            return []
    return devices
