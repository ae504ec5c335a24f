"""`ultrafuser demo`: fuse the specialists of the exams, train both stages, and compare the result with alternatives."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ultrafuser.compare.results import Measurement, SystemResult, compare_systems
from ultrafuser.data.collate import prompt_inputs
from ultrafuser.data.files import disk_errors, write_json
from ultrafuser.data.templates import Rendered, Renderer
from ultrafuser.errors import SandboxError, TrainingError
from ultrafuser.evaluate.lm.parameters import peak_rss_mb
from ultrafuser.evaluate.losses import RowLoss, by_domain, by_stratum, fused_losses, group_losses, specialist_losses
from ultrafuser.evaluate.scoring import TaskScores
from ultrafuser.inspect.run import answer, trace_tokens
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import package_path
from ultrafuser.model.saving import plain_model
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.progress import Progress
from ultrafuser.recipe import Recipe, load_recipe
from ultrafuser.report.data import Comparison
from ultrafuser.report.page import write_report
from ultrafuser.specialists import fuse, make_renderer, pick_device
from ultrafuser.train.features import FeatureStore
from ultrafuser.train.metrics import read_metrics
from ultrafuser.train.rows import read_sources
from ultrafuser.train.run import run_lock, save_fused_folder
from ultrafuser.train.stages import StageRun, run_stage
from ultrafuser.zoo.exams import EXAMS, MAX_NEW_TOKENS, check, questions

TRAINING_ROWS, TEST_ROWS, QUESTIONS = 24, 16, 5  # of each exam
SHORT = ("stages.gate.steps=100", "stages.joint.steps=4")
FULL_QUESTIONS = 100
BATCH_SIZE = 10  # questions that are answered together
ANSWER_TOKENS = max(MAX_NEW_TOKENS.values())
ANSWER_SEED = 100  # of the questions whose answers the report shows. No number depends on them.
SYSTEMS = {  # besides the specialists: kind and label
    "base": ("base", "base"),
    "weight_average": ("merge", "weight average"),
    "uniform": ("static", "uniform"),
    "fused_stage1": ("fused", "fused, stage 1"),
    "fused": ("fused", "fused"),
}
KIND_LABELS = {"merge": "merged"}
DESCRIPTIONS = {
    "base": "The model that all specialists were tuned from, untouched.",
    "specialist": "A model tuned for one domain, by itself.",
    "merge": "One model whose weights are the mean of the specialists' weights.",
    "static": "The specialists mixed with equal weights at every token, without a gate.",
    "fused": (
        "The specialists mixed at every token by a trained gate. Stage 1 trains the gate alone, stage 2 trains the gate and "
        "the specialists."
    ),
}


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
    """The demo's recipe. `full` uses all rows and trains longer."""
    overrides = [f"seed={seed}", f"device={device}"]
    if not full:
        for split, limit in (("train", TRAINING_ROWS), ("validation", TEST_ROWS)):
            overrides += [f"data.{split}.{i}.limit={limit}" for i in range(len(EXAMS))]
        overrides += SHORT
    recipe = load_recipe(package_path("package:ultrafuser/zoo/exams/fuse.yaml"), overrides)
    return recipe.model_copy(update={"output": str(output)})


def run_demo(
    recipe: Recipe, progress: Progress | None = None, *, questions: int = QUESTIONS
) -> tuple[Comparison, list[TokenTrace]]:
    """Load, fuse, train both stages, measure, and write everything into `recipe.output`.

    Args:
        questions: of each exam. The exams that need a sandbox are left out where there is none.

    Returns:
        The content of results.json, and an answer to a question of each exam with its weights.

    Raises:
        CheckpointError: the zoo's base model is not installed.
        TrainingError: the folder holds a training run.
    """
    progress, clock = progress or Progress(), Clock()
    output = Path(recipe.output)
    with run_lock(output):
        _empty(output)
        return _run_demo(recipe, output, questions, clock, progress)


def _run_demo(
    recipe: Recipe, output: Path, num_questions: int, clock: Clock, progress: Progress
) -> tuple[Comparison, list[TokenTrace]]:
    with clock.phase("load"), progress.waiting("loading the specialists"):
        model, tokenizer = fuse(recipe)
        renderer = make_renderer(model, tokenizer, recipe.data.max_length)
    test_rows = read_sources(recipe.data.validation, renderer, progress, "test")
    paper = ExamPaper(num_questions, progress)
    losses, weights = _train_and_measure(model, renderer, test_rows, paper, recipe, clock, progress)
    with clock.phase("save"), progress.waiting("writing the fused folder"):
        save_fused_folder(model, tokenizer, recipe, output)
    with clock.phase("coloured answers"):
        traces = _answers(model, renderer, progress)
    shutil.rmtree(output / "features")
    names = model.config.names
    systems = _systems(losses, test_rows, paper.scores, names)
    fused = systems["fused"].measurement
    assert fused is not None
    fused.sample_weights = by_domain(test_rows, weights)
    fused.training = read_metrics(output / "metrics.jsonl")
    comparison = compare_systems(
        list(systems.values()),
        title="ultrafuser demo",
        specialists=names,
        main="fused",
        seed=recipe.seed,
        config=_config(recipe, clock),
    )
    write_json(output / "results.json", comparison.model_dump(mode="json"))
    with disk_errors(output / "report.html"), progress.waiting("writing the report"):
        write_report(comparison, output, traces=traces)
    return comparison, traces


def _empty(output: Path) -> None:
    """Remove what an earlier demo left in the folder."""
    if (output / "recipe.yaml").exists():
        raise TrainingError(f"{output} holds a training run, which the demo would overwrite. Choose another --output")
    for stale in ("1-gate", "2-joint", "features", "fused"):
        shutil.rmtree(output / stale, ignore_errors=True)
    (output / "metrics.jsonl").unlink(missing_ok=True)


def _train_and_measure(
    model: UltraFuserForCausalLM,
    renderer: Renderer,
    test_rows: Sequence[Rendered],
    paper: ExamPaper,
    recipe: Recipe,
    clock: Clock,
    progress: Progress,
) -> tuple[dict[str, list[RowLoss]], list[list[float]]]:
    """Train both stages and measure every system on the way.

    Returns:
        The test rows' losses under each system, and their mean gate weights under the fused model.
    """
    output = Path(recipe.output)
    rows = read_sources(recipe.data.train, renderer, progress, "training")
    with clock.phase("test: base, weight average"):
        losses = _alternatives(model, test_rows, progress)
    with clock.phase("exams"):
        for k, name in enumerate(model.config.names):
            paper.sit(name, plain_model(model.groups[0], {k: 1.0}), renderer)
    with clock.phase("test: specialists read"):
        test = FeatureStore.build(model, test_rows, output / "features" / "test", progress=progress)
        losses |= specialist_losses(test, model.config.names)
        losses["uniform"], _ = fused_losses(model, test, uniform=True)
    with clock.phase("stage 1: gate"):
        run_stage(StageRun(model, recipe.stages[0], recipe, rows, [], output / "1-gate", progress=progress))
    with clock.phase("test: stage 1"):  # the same states, at the temperatures that stage 1 fitted
        test = FeatureStore.build(model, test_rows, output / "features" / "test", progress=progress)
        losses["fused_stage1"], _ = fused_losses(model, test)
    with clock.phase("stage 2: joint"):
        run_stage(StageRun(model, recipe.stages[1], recipe, rows, [], output / "2-joint", progress=progress))
        model.eval()
    with clock.phase("test: fused"):
        test = FeatureStore.build(model, test_rows, output / "features" / "test-joint", progress=progress)
        losses["fused"], weights = fused_losses(model, test)
    with clock.phase("exams"):
        paper.sit("fused", model, renderer)
    return losses, weights


def _alternatives(
    model: UltraFuserForCausalLM, rows: Sequence[Rendered], progress: Progress
) -> dict[str, list[RowLoss]]:
    """Measure the base without adapters and the average of the specialists' weights."""
    group, head = model.groups[0], model.heads()[0]._replace(temperature=1.0)
    with group.only([]):
        base = group_losses(group, rows, head, label="base", progress=progress)
    mean = SpecialistGroup(plain_model(group, {k: 1 / group.size for k in range(group.size)}), ["weight_average"])
    mean_head = mean.head(head.size, head.end, head.masked)
    average = group_losses(mean, rows, mean_head, label="weight average", progress=progress)
    return {"base": base, "weight_average": average}


class ExamPaper:
    """The questions of the demo, and the scores of the systems that have answered them.

    Attributes:
        scores: by system and task, whether each answer is right.
    """

    def __init__(self, count: int, progress: Progress) -> None:
        """`count`: questions of each exam."""
        self.questions = {exam: list(islice(questions(exam, "test"), count)) for exam in EXAMS}
        self.scores: dict[str, dict[str, TaskScores]] = {}
        self._progress = progress

    def sit(self, name: str, model: Any, renderer: Renderer) -> None:
        """Answer all questions and check the answers. Fused models and ordinary ones read the same prompts."""
        self.scores[name] = {}
        self._progress.start(f"exams: {name}", sum(map(len, self.questions.values())))
        for exam, batch in list(self.questions.items()):
            texts: list[str] = []
            for start in range(0, len(batch), BATCH_SIZE):
                prompts = [question.prompt for question in batch[start : start + BATCH_SIZE]]
                texts += _greedy(model, renderer, prompts, MAX_NEW_TOKENS[exam])
                self._progress.advance(len(prompts))
            try:
                right = [float(check(exam, *pair)) for pair in zip(batch, texts, strict=True)]
            except SandboxError as error:
                self._progress.log(f"the exam {exam} is left out: {error}")
                del self.questions[exam]
            else:
                scores = dict(zip((str(i) for i in range(len(right))), right, strict=True))
                self.scores[name][f"exam_{exam}"] = TaskScores("acc", "1.0", scores)
        self._progress.finish()


@torch.inference_mode()
def _greedy(model: Any, renderer: Renderer, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The answers of a fused model or of an ordinary one."""
    inputs = prompt_inputs(renderer, [[{"role": "user", "content": prompt}] for prompt in prompts], model.device)
    if not isinstance(model, UltraFuserForCausalLM):
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=renderer.pad_id)
    return [renderer.answer_text(ids) for ids in tokens[:, inputs["input_ids"].shape[1] :].tolist()]


def _answers(model: UltraFuserForCausalLM, renderer: Renderer, progress: Progress) -> list[TokenTrace]:
    shown = {exam: next(questions(exam, "test", ANSWER_SEED)) for exam in EXAMS}
    chats = [[{"role": "user", "content": question.prompt}] for question in shown.values()]
    answers = answer(model, renderer, chats, progress=progress, max_new_tokens=ANSWER_TOKENS, do_sample=False)
    return [
        trace_tokens(model, renderer, chat, ids, domain=domain, title=domain)
        for domain, chat, ids in zip(EXAMS, chats, answers, strict=True)
        if ids
    ]


def _systems(
    losses: dict[str, list[RowLoss]],
    rows: Sequence[Rendered],
    scores: dict[str, dict[str, TaskScores]],
    names: list[str],
) -> dict[str, SystemResult]:
    """The measured systems in the order of the report."""
    systems = {}
    for name in ["base", *names, *list(SYSTEMS)[1:]]:
        kind, label = SYSTEMS.get(name, ("specialist", name))
        measurement = Measurement(losses=by_stratum(rows, losses[name]), tasks=scores.get(name, {}))
        description = DESCRIPTIONS[kind]
        systems[name] = SystemResult(
            name, kind, measurement, label=label, kind_label=KIND_LABELS.get(kind, kind), description=description
        )
    return systems


def _config(recipe: Recipe, clock: Clock) -> dict[str, Any]:
    rows = {domain: source.limit or "all" for domain, source in zip(EXAMS, recipe.data.train, strict=True)}
    return {
        "mixing": recipe.mixing,
        "seed": recipe.seed,
        "device": pick_device(recipe.device),
        "threads": torch.get_num_threads(),
        "peak_memory_mb": peak_rss_mb(),
        "training_rows": rows,
        "stages": [stage.model_dump(exclude_defaults=True) for stage in recipe.stages],
        "seconds": clock.total(),
    }
