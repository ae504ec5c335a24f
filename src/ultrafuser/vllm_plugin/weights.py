"""Read specialists' weights for vLLM from where the manifest says: safetensors as they are, the rest through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.weight_utils import safetensors_weights_iterator

from ultrafuser.errors import CheckpointError
from ultrafuser.model.adapters import merge_adapter
from ultrafuser.model.checkpoint import load_base, locate_model
from ultrafuser.model.files import ADAPTER_FILE, refuse_pickles, weight_files
from ultrafuser.model.hub import Access
from ultrafuser.model.manifest import SpecialistEntry


def is_converted(entry: SpecialistEntry) -> bool:
    """Whether transformers has to load a specialist first: a GGUF file, or an adapter that PEFT merges."""
    source = entry["source"]
    return bool(source.get("gguf_file") or source["model"].endswith(".gguf") or entry.get("separate"))


def specialist_weights(
    entry: SpecialistEntry, folder: Path, access: Access, load_config: LoadConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and weights of a specialist without its plain LoRA adapter, by the names of its checkpoint.

    Args:
        folder: the fused checkpoint.

    Raises:
        CheckpointError: a reference is gone, or has pickled weights alone.
    """
    name = entry["name"]
    if is_converted(entry):
        yield from _converted_weights(entry, folder, access)
        return
    path, _ = locate_model(entry["source"], folder, name, access, weights=True)
    refuse_pickles(path, f"specialist {name!r}", entry["config"].get("transformers_weights"))
    files = [str(file) for file in weight_files(path) if file.name != ADAPTER_FILE]
    if any(file.endswith(".gguf") for file in files):
        raise CheckpointError(f"specialist {name!r}: {path} holds GGUF files alone. Name one in its source (gguf_file)")
    yield from safetensors_weights_iterator(files, load_config.use_tqdm_on_load, load_config.safetensors_load_strategy)


def _converted_weights(entry: SpecialistEntry, folder: Path, access: Access) -> Iterator[tuple[str, torch.Tensor]]:
    with torch.device("cpu"):
        model = load_base(entry, folder, access, dtype=torch.float32)
        if entry.get("separate"):
            model = merge_adapter(model, entry, folder, access)
    tied = _tied_weights(model)
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tensor


def _tied_weights(model: PreTrainedModel) -> set[str]:
    """Names of weights that are another one's. Checkpoints leave them out."""
    return set(model.all_tied_weights_keys or {}) if model.config.get_text_config().tie_word_embeddings else set()
