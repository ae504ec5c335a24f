"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations


def register() -> None:
    """Make `UltraFuserForCausalLM` known to vLLM's registry of models, lazily."""
