"""lm-evaluation-harness loads a fused folder with its own `hf` model type."""

from __future__ import annotations

import os

import pytest
import torch

from tiny_models import shake_gate
from training_fixtures import TinyRun
from ultrafuser.specialists import fuse


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun, tmp_path_factory):
    if not os.environ.get("CI"):
        pytest.importorskip("lm_eval", reason="the dev extra is not installed")
    model, tokenizer = fuse(tiny_run.recipe("unused"))
    shake_gate(model)
    path = tmp_path_factory.mktemp("lm-eval") / "fused"
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path, model, tokenizer


def test_loglikelihood_equals_a_direct_computation(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path, model, tokenizer = folder
    harness = HFLM(pretrained=str(path), device="cpu", trust_remote_code=True, batch_size=2)
    pairs = [("The quick brown", " fox jumps over"), ("12345 +", " 67890"), ("def add(a,", " b):")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    outputs = harness.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (log_p, is_greedy) in zip(pairs, outputs, strict=True):
        prompt = tokenizer.encode(context, add_special_tokens=False)
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        rest = ids[len(prompt) :]
        assert ids[: len(prompt)] == prompt
        expected = sum(log_probs[len(prompt) - 1 + i, token].item() for i, token in enumerate(rest))
        assert log_p == pytest.approx(expected, rel=1e-4)
        greedy = [log_probs[len(prompt) - 1 + i].argmax().item() for i in range(len(rest))]
        assert is_greedy == (greedy == rest)


def test_generate_until(folder):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    path, model, tokenizer = folder
    harness = HFLM(pretrained=str(path), device="cpu", trust_remote_code=True, batch_size=2)
    options = {"until": ["<|im_end|>"], "max_gen_toks": 6, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (text, options), i) for i, text in enumerate(["The quick", "12345 + 678"])
    ]
    outputs = harness.generate_until(requests, disable_tqdm=True)
    for text, answer in zip(["The quick", "12345 + 678"], outputs, strict=True):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
        assert answer == tokenizer.decode(out, skip_special_tokens=True)
