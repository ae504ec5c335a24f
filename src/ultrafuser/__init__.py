"""Fuse already specialised language models into one, token by token.

    import ultrafuser
    model, renderer = ultrafuser.load("my-fused")

This import loads neither torch nor transformers. The names below import their modules on first use. Afterwards
`transformers.AutoModelForCausalLM` loads fused checkpoints.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ultrafuser import _register
from ultrafuser.errors import UltraFuserError

__version__ = "0.1.0"

_MODULES = {
    "Recipe": "ultrafuser.recipe",
    "load_recipe": "ultrafuser.recipe",
    "UltraFuserConfig": "ultrafuser.model.configuration_ultrafuser",
    "UltraFuserForCausalLM": "ultrafuser.model.modeling_ultrafuser",
    "Renderer": "ultrafuser.data.templates",
    "Row": "ultrafuser.data.schema",
    "load_rows": "ultrafuser.data.sources",
    "prompt_inputs": "ultrafuser.data.collate",
    "fuse": "ultrafuser.specialists",
    "load": "ultrafuser.specialists",
    "Speculation": "ultrafuser.model.speculation",
}

__all__ = [*_MODULES, "UltraFuserError", "__version__"]

_register.when_transformers_loads()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'ultrafuser' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
