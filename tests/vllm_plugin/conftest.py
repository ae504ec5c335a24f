"""Tiny fused checkpoints of a size that vLLM takes. Without vLLM its tests are skipped."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from fused_engines import WIDTHS, save_fused, save_tiny
from transformers import PreTrainedTokenizerFast

from tiny_models import entry, fuse_entries, save_adapter, tiny

HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # starts faster, and tests reach the model
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # other tests run on these cores
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder that need vLLM, and skip them without it."""
    for item in items:
        if item.path.parent == Path(__file__).parent and item.get_closest_marker("vllm") and not HAS_VLLM:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed. `make test-vllm` has it"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all tiny checkpoints."""
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="session")
def adapters(folders: Path) -> dict[str, dict]:
    """Manifest entries of three adapters of different ranks and target modules on one base."""
    base, plain = save_tiny(folders / "base"), tiny(max_position_embeddings=512, vocab_size=320, **WIDTHS)
    targets = {
        "text": (4, ["q_proj", "v_proj"]),
        "code": (2, ["q_proj", "k_proj", "up_proj"]),
        "math": (8, ["o_proj", "down_proj", "gate_proj"]),
    }
    return {
        name: entry(name, base, save_adapter(plain, folders / f"{name}-lora", seed=rank, r=rank, targets=layers))
        for name, (rank, layers) in targets.items()
    }


@pytest.fixture(scope="session")
def shared_folder(folders: Path, adapters: dict[str, dict], tokenizer: PreTrainedTokenizerFast) -> Path:
    """Three adapters on one base."""
    return save_fused(fuse_entries(list(adapters.values())), folders / "shared", tokenizer)


@pytest.fixture(scope="session")
def mixed_folder(folders: Path, adapters: dict[str, dict], tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two adapters on one base, and three models of other architectures and widths, with logits mixed."""
    others = [
        entry(kind, save_tiny(folders / kind, kind, seed)) for seed, kind in enumerate(("gemma2", "qwen2", "gpt2"), 7)
    ]
    entries = [adapters["text"], others[0], adapters["code"], *others[1:]]
    entries[1]["temperature"], entries[2]["temperature"] = 1.5, 0.8
    model = fuse_entries(entries, mixing="logits", masked_token_ids=[5, 300])
    return save_fused(model, folders / "mixed", tokenizer)
