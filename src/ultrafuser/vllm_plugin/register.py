"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

ARCHITECTURE = "UltraFuserForCausalLM"
MODEL_CLASS = "ultrafuser.vllm_plugin.model:UltraFuserForCausalLM"


def register() -> None:
    """Make fused models known to vLLM. The model's module is imported when a fused model is loaded, not before."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry

    from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig

    AutoConfig.register(UltraFuserConfig.model_type, UltraFuserConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, MODEL_CLASS)
