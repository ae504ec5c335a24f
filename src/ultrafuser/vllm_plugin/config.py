"""What vLLM is told about each specialist, and what it cannot serve."""

from __future__ import annotations

import copy
import json
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import WeightsMapper

from ultrafuser.errors import CheckpointError, UltraFuserError
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig, specialist_config, table_rows
from ultrafuser.model.manifest import SpecialistEntry

# `--hf-overrides '{"one_template": true}'` serves specialists of different templates with the one of the tokenizer
ONE_TEMPLATE = "one_template"


def check_request(config: UltraFuserConfig, vllm_config: VllmConfig) -> None:
    """Check that vLLM can serve a fused model in the way that it was started.

    Raises:
        UltraFuserError: pipeline parallelism, embeddings as prompts, or templates that differ.
    """
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise UltraFuserError(
            "a fused model cannot run with pipeline parallelism, because its specialists run side by side. Use "
            "--tensor-parallel-size or --data-parallel-size"
        )
    if vllm_config.model_config.enable_prompt_embeds:
        raise UltraFuserError(
            "a fused model cannot read embeddings as prompts, because each specialist has its own embeddings. Start without "
            "--enable-prompt-embeds"
        )
    first = config.specialists[0]
    for other in config.specialists[1:]:
        if _prompt_format(other) != _prompt_format(first) and not getattr(config, ONE_TEMPLATE, False):
            raise UltraFuserError(
                f"specialist {other['name']!r} has another chat template than {first['name']!r}, and vLLM gives all specialists "
                "the same tokens. Serve the model with `ultrafuser serve --engine embedded`, fuse it with one chat_template for "
                f"all, or give all the template of {first['name']!r}: --hf-overrides '{{\"{ONE_TEMPLATE}\": true}}'"
            )


def _prompt_format(entry: SpecialistEntry) -> tuple:
    """All that makes the text of a prompt."""
    variables = json.dumps(entry.get("template_kwargs") or {}, sort_keys=True)
    return entry.get("chat_template"), variables, entry.get("system", "keep")


def hf_config(entry: SpecialistEntry) -> PreTrainedConfig:
    """A specialist's configuration, with the rows of its embedding table as it is loaded.

    Raises:
        CheckpointError: an architecture that only the code of its repository knows.
    """
    config = specialist_config(entry["config"])
    if type(config) is PreTrainedConfig:
        raise CheckpointError(
            f"specialist {entry['name']!r}: its architecture needs the code of its repository, which cannot run inside a fused "
            "model in vLLM. Serve the model with `ultrafuser serve --engine embedded`"
        )
    config.get_text_config().vocab_size = table_rows(entry)
    return config


def specialist_vllm_config(
    vllm_config: VllmConfig, entry: SpecialistEntry, tag: str, signature: Any, quantized: bool
) -> VllmConfig:
    """The configuration with which vLLM builds one specialist, or the base of several.

    Args:
        tag: the prefix of its layers.
        signature: what makes its compiled graph different from that of another, as JSON. vLLM's cache of compiled graphs
            knows the configuration alone.
        quantized: whether its weights arrive as they are stored. Otherwise they have been dequantised.
    """
    config = hf_config(entry)
    if not quantized and hasattr(config, "quantization_config"):
        del config.quantization_config
    sub_config = vllm_config.with_hf_config(config)
    model_config = sub_config.model_config
    model_config.hf_text_config = config.get_text_config()
    model_config.model_arch_config = model_config.get_model_arch_config()
    sub_config.additional_config = {**_as_dict(vllm_config.additional_config), "ultrafuser": [tag, signature]}
    sub_config.cache_config = copy.copy(vllm_config.cache_config)
    sub_config.cache_config.sliding_window = _sliding_window(config.get_text_config())
    if getattr(config, "quantization_config", None) is not None:
        model_config.quantization = None
        model_config._verify_quantization()
        sub_config.quant_config = VllmConfig.get_quantization_config(model_config, vllm_config.load_config)
        if sub_config.quant_config is not None:  # it names layers as the checkpoint does
            sub_config.quant_config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"": f"{tag}."}))
    return sub_config


def _as_dict(additional: Any) -> dict[str, Any]:
    return dict(additional) if isinstance(additional, dict) else {"additional_config": additional.compute_hash()}


def _sliding_window(config: PreTrainedConfig) -> int | None:
    """The window of a model all of whose layers have it. Models whose layers differ give each layer its own."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and any(kind != "sliding_attention" for kind in kinds):
        return None
    return getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
