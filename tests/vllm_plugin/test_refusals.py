"""What vLLM cannot serve is refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fused_engines import save_tiny

from tiny_models import entry
from ultrafuser.errors import CheckpointError, UltraFuserError
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.shared_base import AdapterWeights

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def vllm_config(shared_folder: Path) -> Any:
    """vLLM's configuration of a fused model, without an engine."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(shared_folder), dtype="float32", enforce_eager=True, max_model_len=256).create_engine_config()


def test_vllm_knows_a_fused_model(vllm_config):
    """Its context is the smallest of the specialists'."""
    model_config = vllm_config.model_config
    assert isinstance(model_config.hf_config, UltraFuserConfig)
    assert model_config.architecture == "UltraFuserForCausalLM"
    assert model_config.get_vocab_size() == 320
    assert model_config.get_hidden_size() == 3 * 64
    assert (model_config.get_head_size(), model_config.get_num_layers(vllm_config.parallel_config)) == (32, 2)


def test_other_models_are_served_as_before(folders, tokenizer):
    from vllm.engine.arg_utils import EngineArgs

    folder = save_tiny(folders / "plain")
    tokenizer.save_pretrained(folder)
    config = EngineArgs(str(folder), dtype="float32").create_engine_config()
    assert config.model_config.architecture == "LlamaForCausalLM"


def test_templates_that_differ_are_refused(vllm_config, adapters):
    from ultrafuser.vllm_plugin.config import check_request

    entries = [{**spec, "chat_template": "{{ messages }}"} for spec in adapters.values()]
    check_request(UltraFuserConfig(entries), vllm_config)
    for change in ({"chat_template": "other"}, {"system": "drop"}, {"template_kwargs": {"enable_thinking": False}}):
        other = UltraFuserConfig([entries[0], {**entries[1], **change}])
        with pytest.raises(
            UltraFuserError, match="'code' has another chat template than 'text'.*--engine embedded.*one_template"
        ):
            check_request(other, vllm_config)
        other.one_template = True
        check_request(other, vllm_config)


def test_pipelines_and_embeddings_are_refused(vllm_config, adapters, monkeypatch):
    from ultrafuser.vllm_plugin.config import check_request

    config = UltraFuserConfig(list(adapters.values()))
    with monkeypatch.context() as patch, pytest.raises(UltraFuserError, match="--tensor-parallel-size"):
        patch.setattr(vllm_config.parallel_config, "pipeline_parallel_size", 2)
        check_request(config, vllm_config)
    with monkeypatch.context() as patch, pytest.raises(UltraFuserError, match="without --enable-prompt-embeds"):
        patch.setattr(vllm_config.model_config, "enable_prompt_embeds", True)
        check_request(config, vllm_config)


def test_code_of_a_repository_is_refused(adapters):
    from ultrafuser.vllm_plugin.config import hf_config

    spec = {**adapters["text"], "config": {"model_type": "unheard-of", "vocab_size": 320}}
    with pytest.raises(CheckpointError, match="'text': its architecture needs the code.*--engine embedded"):
        hf_config(spec)


def test_a_gguf_file_needs_a_name(folders, tmp_path):
    from vllm.config import LoadConfig

    from ultrafuser.model.hub import Access
    from ultrafuser.vllm_plugin.weights import specialist_weights

    base = save_tiny(folders / "with-gguf")
    spec = entry("text", base)
    (tmp_path / "model.gguf").touch()
    spec["source"]["model"] = str(tmp_path)
    with pytest.raises(CheckpointError, match="GGUF files alone. Name one"):
        list(specialist_weights(spec, tmp_path, Access(), LoadConfig()))


def test_adapters_on_other_layers_are_refused():
    from ultrafuser.vllm_plugin.lora import add_adapters

    model = torch.nn.Sequential(torch.nn.LayerNorm(4))
    pair = (torch.zeros(2, 4), torch.zeros(4, 2))
    for layer, kind in (("0", "a LayerNorm"), ("experts", "no such layer")):
        with pytest.raises(
            CheckpointError, match=f"'text': its adapter changes '{layer}'.* has {kind}.*share_base: false"
        ):
            add_adapters(model, ["text"], [AdapterWeights({layer: pair})])
