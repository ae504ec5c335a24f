"""How large a system is: its parameters, how many of them a token passes through, and the memory it took."""

from __future__ import annotations

import resource
import sys
from typing import Any

from torch import nn


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in all (tied ones once), and those active for each token.

    They differ if a module has a method `idle_parameters()`, as the mixture layers of BTX do.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    modules: list[Any] = list(model.modules())
    idle = sum(module.idle_parameters() for module in modules if hasattr(module, "idle_parameters"))
    return {"total": total, "active": total - idle}


def peak_rss_mb() -> int:
    """The most memory that this process has held, in MiB."""
    units = 1024 if sys.platform != "darwin" else 1024 * 1024  # getrusage counts kilobytes, or bytes
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units)
