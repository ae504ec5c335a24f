"""Register the model with transformers' Auto classes as soon as transformers is imported."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

_AUTO = "transformers.models.auto.modeling_auto"
_IMPORTERS = (
    "configuration_ultrafuser",
    "shared_base",
    "cache",
    "generation",
    "checkpoint",
    "saving",
    "modeling_ultrafuser",
)


def when_transformers_loads() -> None:
    """Register now if the Auto classes are loaded, otherwise right after they are loaded."""
    if _AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    """Import the model, which registers itself. If one of its modules is already being imported, that import does it."""
    if not any(f"ultrafuser.model.{name}" in sys.modules for name in _IMPORTERS):
        import_module("ultrafuser.model.modeling_ultrafuser")


class _AfterImport(importlib.abc.MetaPathFinder):
    """Import hook that finds `_AUTO` as usual, and registers the model after its code has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_then_register(module: ModuleType) -> None:
                run(module)
                _register()

            spec.loader.exec_module = run_then_register  # type: ignore[method-assign]
        return spec
