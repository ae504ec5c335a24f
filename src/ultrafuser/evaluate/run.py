"""`ultrafuser eval`: losses, benchmarks and judged benchmarks of several models. Answers are saved as they arrive."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ultrafuser.data.files import check_folder, run_folder, write_json, write_text
from ultrafuser.data.locking import exclusive_lock
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import RowReader, load_rows
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.errors import DataError, hide_logins
from ultrafuser.evaluate.judged import alpaca, mt_bench
from ultrafuser.evaluate.judged.judge import Judge
from ultrafuser.evaluate.judged.result import JudgedResult
from ultrafuser.evaluate.lm.load import ENDPOINT, LoadedModel, load_model, name_of, split_name
from ultrafuser.evaluate.lm.response_cache import CachedLM, ResponseCache
from ultrafuser.evaluate.losses import mean_weights
from ultrafuser.evaluate.options import JUDGED, LOSSES, EvalOptions
from ultrafuser.evaluate.results import (
    EvalResults,
    ModelResults,
    loss_cell,
    markdown,
    merge_results,
    read_models,
    task_cell,
    write_documents,
)
from ultrafuser.evaluate.sampling import draw_rows
from ultrafuser.evaluate.scoring import TaskScores, score_losses, score_tasks
from ultrafuser.evaluate.tasks import TASKS, load_tasks
from ultrafuser.progress import Progress

ZOO = "package:ultrafuser/zoo/data/{}.test.jsonl"


def evaluate_models(
    models: Sequence[str], options: EvalOptions, output: Path, progress: Progress | None = None
) -> EvalResults:
    """Measure every model and write `results.json`, `table.md` and, by model, each document's answer and score.

    Run again with the same output, it asks only for the missing answers.

    Raises:
        DataError: an unknown task, missing data, no rows, a request that does not fit.
        CheckpointError: a model that cannot be loaded.
        EndpointError: an endpoint that cannot be used.
    """
    progress = progress or Progress()
    # Everything that can be wrong with the request comes before the first model is loaded.
    reader = RowReader(options.on_bad_row)
    rows, sources = loss_rows(options, reader), _name_models(models)
    model_options = {name: _options_of(source, options, progress) for name, source in sources.items()}
    check_benchmarks(options)
    for note in reader.notes():
        progress.log(note)
    with run_folder(output), exclusive_lock(output, "evaluation"):
        for name in sources:
            check_folder(output / name)
        reader.write_bad_rows(output / "bad_rows.jsonl")
        results = EvalResults(created=time.strftime("%Y-%m-%d"), models=read_models(output / "results.json"))
        for name, source in sources.items():
            progress.log(f"{name}: {hide_logins(source)}")
            current = _measure_source(name, source, model_options[name], rows, output / name, progress)
            results["models"][name] = merge_results(results["models"].get(name, {}), current)
            write_json(output / "results.json", results)
            write_text(output / "table.md", markdown(results))
    return results


def _name_models(models: Sequence[str]) -> dict[str, str]:
    """The models by the names given as NAME=MODEL, or by short names made from them."""
    sources: dict[str, str] = {}
    for model in models:
        given_name, source = split_name(model)
        if given_name in sources:
            raise DataError(f"two models are named {given_name!r}. Names must differ")
        short = given_name or name_of(source)
        name, count = short, 1
        while name in sources:
            count += 1
            name = f"{short}-{count}"
        sources[name] = source
    if not sources:
        raise DataError("no model. Give at least one MODEL")
    return sources


def _options_of(source: str, options: EvalOptions, progress: Progress) -> EvalOptions:
    """The options for one model: benchmarks that score given text are skipped for an endpoint."""
    scoring = {*LOSSES, *(name for name, task in TASKS.items() if task.needs_log_probs)}
    impossible = [name for name in options.benchmarks if name in scoring]
    if not source.startswith(ENDPOINT) or not impossible:
        return options
    possible = [name for name in options.benchmarks if name not in impossible]
    required = [name for name in impossible if not possible or name in options.required]
    if required:
        raise DataError(
            f"{source}: an endpoint cannot score given text, which {', '.join(required)} needs. Give the model itself, or "
            "tasks that generate, such as --tasks gsm8k"
        )
    progress.log(
        f"skipped for {hide_logins(source)}, since an endpoint cannot score given text: {', '.join(impossible)}"
    )
    return replace(options, benchmarks=possible)


def check_benchmarks(options: EvalOptions) -> None:
    """Find out before any model runs that a task is unknown, or that its file, its judge or the sandbox is missing.

    Raises:
        DataError, SandboxError, MissingExtraError: what is missing, and what to do.
    """
    load_tasks(options.tasks, options.task_options)
    for name in options.benchmarks:
        if name in JUDGED:
            (alpaca if name == "alpaca_eval" else mt_bench).load_rows(options.task_options.data_dir)
            _judge_endpoint(name, options)


# ---------------------------------------------------------------- one model


def _measure_source(
    name: str, source: str, options: EvalOptions, rows: Sequence[Row], folder: Path, progress: Progress
) -> ModelResults:
    """Load a model and measure it. It is released on return, before the next one is loaded."""
    start = time.monotonic()
    with progress.waiting(f"loading {name}"):
        loaded = load_model(source, options.load_options, name=name, seed=options.seed)
    results = measure(loaded, options, rows, folder, progress)
    seconds = round(time.monotonic() - start, 1)
    return {**results, "source": hide_logins(source), "seed": options.seed, "limit": options.limit, "seconds": seconds}


def measure(
    loaded: LoadedModel, options: EvalOptions, rows: Sequence[Row], folder: Path, progress: Progress
) -> ModelResults:
    """The losses of one model by domain, and its benchmarks. Answers and scores by document go to files of `folder`."""
    results: ModelResults = {"fingerprint": loaded.fingerprint, "parameters": loaded.parameters()}
    if rows and set(options.benchmarks) & set(LOSSES):
        strata, weights = score_losses(loaded, rows, folder / "features", progress)
        results["loss"] = {domain: loss_cell(stratum, options.seed) for domain, stratum in strata.items()}
        if loaded.model is not None and len(loaded.model.config.names) > 1:
            tokens = {domain: list(stratum.weights.values()) for domain, stratum in strata.items()}
            results["gate_weights"] = mean_weights(weights, tokens, loaded.model.config.names)
    results["tasks"] = {}
    with closing(ResponseCache(folder / "answers.sqlite", loaded.fingerprint)) as store:
        for name, scores in score_benchmarks(loaded, options, store, progress).items():
            results["tasks"][name] = task_cell(scores, options.seed)
            write_documents(folder / f"{name}.jsonl", scores)
    return results


def score_benchmarks(
    loaded: LoadedModel, options: EvalOptions, store: ResponseCache, progress: Progress
) -> dict[str, TaskScores]:
    """Tasks and judged benchmarks of one model. Answers and verdicts are read from the store, or added to it."""
    lm = CachedLM(loaded.lm, store, progress, options.seed)
    scores = score_tasks(lm, options.tasks, options.task_options, limit=options.limit, seed=options.seed)
    for name in options.benchmarks:
        if name in JUDGED:
            benchmark = alpaca if name == "alpaca_eval" else mt_bench
            result = benchmark.evaluate(
                lm,
                Judge(_judge_endpoint(name, options), store, seed=options.seed),
                benchmark.load_rows(options.task_options.data_dir),
                limit=options.limit,
                seed=options.seed,
                max_tokens=options.task_options.max_new_tokens or benchmark.MAX_TOKENS,
                progress=progress,
            )
            scores[name] = _by_question(result)
    return scores


def _by_question(result: JudgedResult) -> TaskScores:
    """The mean score of each question. Its turns depend on each other, so they are one sample."""
    by_question: dict[str, list[float]] = {}
    for sample_id, score in result.scores.items():
        by_question.setdefault(sample_id.partition(".")[0], []).append(score)
    return TaskScores(
        metric=result.metric,
        version="1.0",
        scores={question: sum(scores) / len(scores) for question, scores in by_question.items()},
        counts=result.counts,
        answers={str(sample["id"]): sample for sample in result.samples},
        details=result.details,
    )


def _judge_endpoint(benchmark: str, options: EvalOptions) -> Endpoint:
    if options.judge is None:
        raise DataError(f"{benchmark} needs a judge. Give --judge NAME@URL, any OpenAI-compatible endpoint")
    return Endpoint(options.judge)


# ---------------------------------------------------------------- rows of the losses


def loss_rows(options: EvalOptions, reader: RowReader | None = None) -> list[Row]:
    """The rows for `loss` and `mixed`: the user's, or the zoo's test rows.

    Raises:
        DataError: rows that no requested benchmark measures, or a file that cannot be read.
    """
    domains = [domain for name in options.benchmarks if name in LOSSES for domain in LOSSES[name]]
    if not domains:
        if options.data:
            raise DataError("--data holds rows for `loss` and `mixed`, and neither is requested. Add one to --tasks")
        return []
    by_domain: dict[str, list[Row]] = {}
    for path in options.data or [ZOO.format(domain) for domain in domains]:
        for row in load_rows(path, reader=reader):
            by_domain.setdefault(row.domain, []).append(row)
    # `mixed` measures the domain of that name, `loss` all others.
    benchmark_of = {domain: "mixed" if domain == "mixed" else "loss" for domain in by_domain}
    measured = [domain for domain in by_domain if benchmark_of[domain] in options.benchmarks]
    if not measured:
        requested, missing = ("loss", "mixed") if "loss" in options.benchmarks else ("mixed", "loss")
        raise DataError(
            f"{', '.join(options.data)}: rows of {', '.join(by_domain)}, none of which `{requested}` measures. "
            f"Request `{missing}`, or give other rows"
        )
    draws = [draw_rows(by_domain[domain], options.limit, options.seed, domain) for domain in measured]
    return [row for rows in draws for row in rows]
