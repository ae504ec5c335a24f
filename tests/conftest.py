"""What every test may use: a tiny real tokenizer, and tiny specialists on disk (see tiny_models.py)."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fake_endpoint import fake_endpoint
from fake_hub import FakeHub, fake_hub
from tiny_models import entry, fuse_entries, save_adapter, tiny
from training_fixtures import TinyRun, shared_tiny_run
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # tests run in the background: their commands would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SENTENCES = [
    "The quick brown fox jumps over the lazy dog, and 12345 + 67890 = 80235.",
    "def add(a, b):\n    return a + b\n",
    "User: how many?\nAssistant: [INST] << >> | # ### Instruction Response",
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained in memory, with bos, eos, pad and a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|im_end|>", pad_token="<|pad|>", chat_template=CHATML
    )


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """save(name, kind, seed): a tiny HF checkpoint in tmp_path."""

    def save(name: str, kind: str = "llama", seed: int = 0, **changes: Any) -> Path:
        folder = tmp_path / name
        tiny(kind, seed, **changes).save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def full(save: Callable[..., Path]) -> UltraFuserForCausalLM:
    """Three full specialists on disk, fused."""
    return fuse_entries([entry(name, save(name, seed=seed)) for seed, name in enumerate(("text", "code", "math"))])


@pytest.fixture
def shared(save: Callable[..., Path], tmp_path: Path) -> UltraFuserForCausalLM:
    """Three adapters of different ranks and target modules on one base, fused."""
    base = save("base")
    plain = tiny()
    kinds = {
        "text": (4, ["q_proj", "v_proj"]),
        "code": (2, ["q_proj", "up_proj"]),
        "math": (8, ["o_proj", "down_proj"]),
    }
    adapters = {
        name: save_adapter(plain, tmp_path / f"{name}-lora", seed=10 + rank, r=rank, targets=targets)
        for name, (rank, targets) in kinds.items()
    }
    return fuse_entries([entry(name, base, adapter) for name, adapter in adapters.items()])


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> TinyRun:
    """Tiny specialists and rows on disk, trained where a test asks for it."""
    return shared_tiny_run(lambda: tmp_path_factory.mktemp("tiny_run"), tokenizer)


@pytest.fixture
def server():
    """A server of our own behind the OpenAI protocol."""
    pytest.importorskip("aiohttp", reason="the endpoint extra is not installed")
    with fake_endpoint() as server:
        yield server


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub of our own, with an empty cache."""
    from huggingface_hub import constants

    with fake_hub() as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # which remembers its hub
        yield hub
