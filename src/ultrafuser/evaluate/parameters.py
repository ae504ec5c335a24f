"""How large a system is: its parameters, and how many of them a token passes through."""

from __future__ import annotations

from typing import Any

from torch import nn


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters in all (tied ones once), and those active for each token.

    They differ where a module says what it leaves out: `idle_parameters()`, as the mixture layers of BTX do.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    modules: list[Any] = list(model.modules())
    idle = sum(module.idle_parameters() for module in modules if hasattr(module, "idle_parameters"))
    return {"total": total, "active": total - idle}
