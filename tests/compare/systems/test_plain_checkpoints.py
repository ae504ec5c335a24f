"""Specialists written as ordinary checkpoints are the specialists, and are written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import save_adapter, tokens
from training_fixtures import NAMES, TEMPLATES, RecordingProgress, TinyRun
from ultrafuser.compare.systems.plain_checkpoints import write_plain_checkpoints
from ultrafuser.model.saving import plain_model
from ultrafuser.specialists import fuse

IDS = tokens(1, 8)


@pytest.fixture
def adapters(tiny_run: TinyRun, tmp_path: Path) -> tuple[Any, Any]:
    return fuse(tiny_run.recipe(tmp_path, specialists=tiny_run.adapter_recipe(tmp_path, save_adapter)))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def test_adapters_are_merged_and_the_base_is_bare(adapters, tmp_path):
    model, tokenizer = adapters
    checkpoints = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    assert list(checkpoints.specialists) == list(NAMES) and checkpoints.base is not None
    for name, folder in checkpoints.specialists.items():
        plain = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(logits(plain), logits(model.specialist(name)))
    bare = plain_model(model.groups[0], {})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(checkpoints.base)), logits(bare))
    assert not torch.allclose(logits(bare), logits(model.specialist("text")), atol=1e-2)


def test_each_has_the_template_of_its_specialist(tiny_run, tmp_path):
    model, tokenizer = fuse(tiny_run.recipe(tmp_path))
    checkpoints = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    assert checkpoints.base is None
    for spec in model.config.specialists:
        loaded = AutoTokenizer.from_pretrained(checkpoints.specialists[spec["name"]])
        assert loaded.chat_template == spec["chat_template"]
        assert loaded.get_vocab() == tokenizer.get_vocab()
    assert len({spec["chat_template"] for spec in model.config.specialists}) == len(set(TEMPLATES.values()))


def times(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def test_they_are_written_once_and_rewritten_when_weights_change(adapters, tmp_path):
    model, tokenizer = adapters
    write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    first_times = times(tmp_path / "plain")
    write_plain_checkpoints(model, tokenizer, tmp_path / "plain", RecordingProgress())
    assert times(tmp_path / "plain") == first_times
    with torch.no_grad():
        next(iter(model.groups[0].loras.values())).lora_B[1].mul_(1.5)  # code's adapter alone
    checkpoints = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    changed = {name for name, time in times(tmp_path / "plain").items() if time != first_times[name]}
    assert changed == {"specialists/code/model.safetensors"}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(checkpoints.specialists["code"])), logits(model.specialist("code"))
    )


def test_an_incomplete_folder_is_rewritten(adapters, tmp_path):
    model, tokenizer = adapters
    checkpoints = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    (checkpoints.specialists["math"] / "config.json").unlink()
    write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(checkpoints.specialists["math"])
