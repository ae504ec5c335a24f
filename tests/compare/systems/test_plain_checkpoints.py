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
    found = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    assert list(found.specialists) == list(NAMES) and found.base is not None
    for name, home in found.specialists.items():
        plain = AutoModelForCausalLM.from_pretrained(home)
        torch.testing.assert_close(logits(plain), logits(model.specialist(name)))
    bare = plain_model(model.groups[0], {})
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(found.base)), logits(bare))
    assert not torch.allclose(logits(bare), logits(model.specialist("text")), atol=1e-2)


def test_each_has_the_template_of_its_specialist(tiny_run, tmp_path):
    model, tokenizer = fuse(tiny_run.recipe(tmp_path))
    found = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    assert found.base is None
    for spec in model.config.specialists:
        theirs = AutoTokenizer.from_pretrained(found.specialists[spec["name"]])
        assert theirs.chat_template == spec["chat_template"]
        assert theirs.get_vocab() == tokenizer.get_vocab()
    assert len({spec["chat_template"] for spec in model.config.specialists}) == len(set(TEMPLATES.values()))


def times(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}


def test_they_are_written_once_and_again_where_something_changed(adapters, tmp_path):
    model, tokenizer = adapters
    write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    before = times(tmp_path / "plain")
    write_plain_checkpoints(model, tokenizer, tmp_path / "plain", RecordingProgress())
    assert times(tmp_path / "plain") == before
    with torch.no_grad():
        next(iter(model.groups[0].loras.values())).lora_B[1].mul_(1.5)  # code's adapter alone
    found = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    changed = {name for name, time in times(tmp_path / "plain").items() if time != before[name]}
    assert changed == {"specialists/code/model.safetensors"}
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(found.specialists["code"])), logits(model.specialist("code"))
    )


def test_a_half_written_folder_is_written_again(adapters, tmp_path):
    model, tokenizer = adapters
    found = write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    (found.specialists["math"] / "config.json").unlink()
    write_plain_checkpoints(model, tokenizer, tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(found.specialists["math"])
