"""Which accelerator holds which specialists, where one process sees several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from .configuration_ultrafuser import UltraFuserConfig
from .empty import empty_groups
from .hub import Access

SPREAD = ("auto", "balanced")  # the values of `device_map` that spread the specialists
_ROOM = 0.9  # of a device's free memory: the rest is for caches and activations


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
    """A `device_map` for each group of specialists: a device, or `auto` for one that is too large for each device.

    Args:
        folder, dtype, access: as for `load_groups`.
        free: of `accelerators`.
    """
    groups = empty_groups(config, folder, dtype, access)
    sizes = [sum(p.numel() * p.dtype.itemsize for p in group.parameters()) for group in groups]
    return spread(sizes, free)


def spread(sizes: Sequence[int], free: Mapping[str, int]) -> list[str]:
    """The device with the most room for each size in bytes, the largest size first. `auto` where none has room."""
    room = {device: int(_ROOM * free_bytes) for device, free_bytes in free.items()}
    devices = ["auto"] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        device = max(room, key=lambda device: room[device])
        if sizes[i] <= room[device]:
            devices[i] = device
            room[device] -= sizes[i]
    return devices
