"""`ultrafuser demo`: the whole way from three specialists to one measured model, on the zoo."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ultrafuser.compare.systems.average import weight_average
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import TrainingError
from ultrafuser.evaluate.lm.parameters import peak_rss_mb
from ultrafuser.evaluate.losses import (
    RowLoss,
    by_domain,
    fused_losses,
    group_losses,
    mean_weights,
    paired_difference,
    specialist_losses,
    summarise,
)
from ultrafuser.inspect.run import answer, trace_tokens
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.model.references import package_path
from ultrafuser.progress import Progress
from ultrafuser.recipe import Recipe, load_recipe
from ultrafuser.report.demo_page import demo_report
from ultrafuser.specialists import fuse, pick_device
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.stages import read_metrics, read_sources, run_stage, save_fused_folder

DOMAINS = ["text", "code", "math", "mixed"]
FULL = ("stages.gate.steps=300", "stages.joint.steps=30")
# Three prompts for the eye: they are in no file, and no number depends on them.
PROMPTS = {
    "text": "Why do people find it easier to remember songs than phone numbers?",
    "code": "Write a Python function `count_vowels(text)` that returns how many vowels a string has.",
    "math": "A box holds 24 pencils. A class of 18 pupils needs 4 pencils each. How many boxes are needed?",
}
ANSWER_TOKENS = 64


class Clock:
    """Seconds spent in each phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of the block under `name`."""
        began = time.monotonic()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - began, 1)

    def total(self) -> dict[str, float]:
        """All phases and the whole."""
        return self.seconds | {"total": round(time.monotonic() - self._began, 1)}


def demo_recipe(output: Path, *, full: bool = False, seed: int = 0, device: str = "auto") -> Recipe:
    """The demo's recipe; `full` uses all rows of the zoo and trains longer."""
    overrides = [f"output={output}", f"seed={seed}", f"device={device}"]
    if full:
        overrides += [f"data.{part}.{i}.limit=null" for part in ("train", "validation") for i in range(len(DOMAINS))]
        overrides += FULL
    return load_recipe(package_path("package:ultrafuser/zoo/demo.yaml"), overrides)


def run_demo(recipe: Recipe, progress: Progress | None = None) -> tuple[dict[str, Any], list[TokenTrace]]:
    """Load, fuse, train both stages, measure, and write everything into `recipe.output`.

    Returns:
        What is in results.json, and three answers with their weights.

    Raises:
        CheckpointError: the zoo's base model is not installed.
        TrainingError: the folder holds a training run.
    """
    progress, clock = progress or Progress(), Clock()
    output = Path(recipe.output)
    if (output / "recipe.yaml").exists():
        raise TrainingError(f"{output} holds a training run, which the demo would overwrite; choose another --output")
    for stale in ("1-gate", "2-joint", "features", "fused"):
        shutil.rmtree(output / stale, ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    (output / "metrics.jsonl").unlink(missing_ok=True)

    with clock.phase("load"):
        model, tokenizer = fuse(recipe)
        renderer = Renderer(tokenizer, model.config.chat_templates, recipe.data.max_length)
    rows = read_sources(recipe.data.train, renderer, progress, "training")
    test_rows = read_sources(recipe.data.validation, renderer, progress, "test")
    losses: dict[str, list[RowLoss]] = {}
    with clock.phase("test: base, weight average"):
        losses |= _alternatives(model, test_rows, progress)
    with clock.phase("test: specialists read"):
        test = FeatureStore.build(model, test_rows, output / "features" / "test", progress=progress)
        losses |= specialist_losses(test, model.config.names)
        losses["uniform"], _ = fused_losses(model, test, uniform=True)
    with clock.phase("stage 1: gate"):
        run_stage(model, recipe.stages[0], recipe, rows, [], output / "1-gate", progress=progress)
    with clock.phase("test: stage 1"):  # the same states, at the temperatures that stage 1 found
        test = FeatureStore.build(model, test_rows, output / "features" / "test", progress=progress)
        losses["fused_stage1"], _ = fused_losses(model, test)
    with clock.phase("stage 2: joint"):
        run_stage(model, recipe.stages[1], recipe, rows, [], output / "2-joint", progress=progress)
        model.eval()
    with clock.phase("test: fused"):
        test = FeatureStore.build(model, test_rows, output / "features" / "test-joint", progress=progress)
        losses["fused"], weights = fused_losses(model, test)
    with clock.phase("save"):
        save_fused_folder(model, tokenizer, recipe, output)
    with clock.phase("three answers"):
        traces = _answers(model, renderer)
    shutil.rmtree(output / "features")
    results = _results(losses, weights, test_rows, model.config.names, recipe, clock)
    _write(output, results, traces, weights, test_rows)
    return results, traces


def _alternatives(model: Any, rows: list[Rendered], progress: Progress) -> dict[str, list[RowLoss]]:
    """The base without adapters, and the average of the specialists' weights."""
    group, vocab = model.groups[0], model.config.vocab_size
    with group.only([]):
        base = group_losses(group, rows, vocab, what="base", progress=progress)
    average = group_losses(weight_average(model), rows, vocab, what="weight average", progress=progress)
    return {"base": base, "weight_average": average}


def _answers(model: Any, renderer: Renderer) -> list[TokenTrace]:
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS.values()]
    answers = answer(model, renderer, chats, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return [
        trace_tokens(model, renderer, chat, ids, domain=domain, title=domain)
        for domain, chat, ids in zip(PROMPTS, chats, answers, strict=True)
        if ids
    ]


def _results(
    losses: dict[str, list[RowLoss]],
    weights: list[list[float]],
    rows: list[Rendered],
    names: list[str],
    recipe: Recipe,
    clock: Clock,
) -> dict[str, Any]:
    order = ["base", *names, "weight_average", "uniform", "fused_stage1", "fused"]
    systems = {name: summarise(losses[name], DOMAINS, recipe.seed) for name in order}
    paired = {}
    for domain in DOMAINS:
        best = min(names, key=lambda name: systems[name][domain]["nll"])
        paired[domain] = {
            "versus": best,
            **paired_difference(losses["fused"], losses[best], domain, recipe.seed),
        }
    mine = by_domain(rows, weights)
    tokens = {domain: [len(row.labels) for row in rows if row.domain == domain] for domain in DOMAINS}
    return {
        "domains": DOMAINS,
        "systems": systems,
        "gate_weights": mean_weights({d: mine[d] for d in DOMAINS}, tokens, names),
        "paired": paired,
        "seconds": clock.total(),
        "config": {
            "mixing": recipe.mixing,
            "seed": recipe.seed,
            "device": pick_device(recipe.device),
            "threads": torch.get_num_threads(),
            "peak_memory_mb": peak_rss_mb(),
            "training_rows": {
                domain: source.limit or "all" for domain, source in zip(DOMAINS, recipe.data.train, strict=True)
            },
            "stages": [stage.model_dump(exclude_defaults=True) for stage in recipe.stages],
        },
    }


def _write(
    output: Path,
    results: dict[str, Any],
    traces: list[TokenTrace],
    weights: list[list[float]],
    rows: list[Rendered],
) -> None:
    names = list(next(iter(results["gate_weights"].values())))
    mine = by_domain(rows, weights)
    samples = {domain: [dict(zip(names, own, strict=True)) for own in mine[domain]] for domain in DOMAINS}
    metrics = read_metrics(output / "metrics.jsonl")
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    page = demo_report(results, metrics=metrics, traces=traces, sample_weights=samples)
    (output / "report.html").write_text(page, encoding="utf-8")
