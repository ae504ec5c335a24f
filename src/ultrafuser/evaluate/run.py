"""`ultrafuser eval`: models through losses, benchmarks and judged benchmarks; everything that was answered is kept."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.data.locking import exclusive_lock
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.writing import write_json
from ultrafuser.endpoint.recipe import EndpointRecipe
from ultrafuser.errors import DataError
from ultrafuser.evaluate.intervals import Stratum, estimate
from ultrafuser.evaluate.lm.load import ENDPOINT, LoadedModel, load_model, name_of, split_name
from ultrafuser.evaluate.lm.response_cache import RememberingLM, Store
from ultrafuser.evaluate.losses import mean_weights
from ultrafuser.evaluate.sampling import draw_rows
from ultrafuser.evaluate.scoring import TaskScores, benchmark, losses
from ultrafuser.evaluate.tasks import SUITES as TASK_SUITES
from ultrafuser.evaluate.tasks import TASKS, load_tasks
from ultrafuser.progress import Progress

if TYPE_CHECKING:
    from ultrafuser.evaluate.judged.judge import Judge

ZOO = "package:ultrafuser/zoo/data/{}.test.jsonl"
LOSSES = {"loss": ("text", "code", "math"), "mixed": ("mixed",)}
JUDGED = {"alpaca_eval": "win_rate", "mt_bench": "rating"}
SUITES = {
    "quick": ["loss"],
    **TASK_SUITES,
    "paper": [*TASK_SUITES["paper"], "alpaca_eval"],
    "mt-bench": ["mt_bench"],
}


@dataclass
class EvalOptions:
    """What is measured, and how.

    Attributes:
        names: of `loss`, `mixed`, our tasks, `alpaca_eval`, `mt_bench`.
        named: those of them that were asked for by name: an endpoint, which weighs no given text, is an error there, where
            it leaves out the others.
        data: rows whose loss is measured, instead of the zoo's test rows.
        data_dir: folder of the benchmarks' files; None: the hub.
        limit: so many rows a domain and documents a task, the same for all models.
        judge: who judges `alpaca_eval` and `mt_bench`.
        task_options: of `tasks.load_tasks`, e.g. `samples`, `temperature`, `max_new_tokens`, `unsafe_code`.
        model_options: of `models.load_model`, e.g. `dtype`, `device`, `chat_template`.
    """

    names: Sequence[str]
    named: Sequence[str] = ()
    data: Sequence[str] = ()
    data_dir: str | None = None
    limit: int | None = None
    seed: int = 0
    batch_size: int = 8
    judge: EndpointRecipe | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)
    model_options: Mapping[str, Any] = field(default_factory=dict)


def names_of(suites: Sequence[str], tasks: Sequence[str], *, has_judge: bool) -> tuple[list[str], list[str]]:
    """What suites and tasks ask for, without repeats, and what is left out for want of a judge.

    Raises:
        DataError: an unknown suite, nothing at all, or a judged benchmark asked for by name without a judge.
    """
    for suite in suites:
        if suite not in SUITES:
            raise DataError(f"unknown suite {suite!r}; there are: {', '.join(SUITES)}")
    wanted = list(dict.fromkeys([*(name for suite in suites for name in SUITES[suite]), *tasks]))
    if not wanted:
        raise DataError("nothing to measure; give --suite or --tasks")
    missing = [] if has_judge else [name for name in wanted if name in JUDGED]
    left = [name for name in wanted if name not in missing]
    if not left or any(name in tasks for name in missing):
        raise DataError(f"{missing[0]} needs a judge; give --judge NAME@URL, any OpenAI-compatible endpoint")
    return left, missing


def lm_eval_names(names: Sequence[str]) -> list[str]:
    """Those that lm-eval runs."""
    return [name for name in names if name not in LOSSES and name not in JUDGED]


def evaluate_models(
    models: Sequence[str], options: EvalOptions, output: Path, progress: Progress | None = None
) -> dict[str, Any]:
    """Measure every model and write `results.json`, `table.md` and, by model, each document's answer and score.

    Run again with the same output, it asks only for what is missing.

    Raises:
        DataError: an unknown task, missing data, no rows, a request that does not fit.
        CheckpointError: a model that cannot be loaded.
        EndpointError: an endpoint that cannot be used.
    """
    progress = progress or Progress()
    rows, named = loss_rows(options), _named(models)
    own = {name: _own_options(text, options, progress) for name, text in named.items()}
    check_tasks(options)
    output.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(output, "evaluation"):
        results: dict[str, Any] = {"created": time.strftime("%Y-%m-%d"), "models": _before(output / "results.json")}
        for name, text in named.items():
            progress.log(f"{name}: {text}")
            began = time.monotonic()
            served = load_model(
                text, name=name, batch_size=options.batch_size, seed=options.seed, **options.model_options
            )
            found = measure(served, own[name], rows, output / name, progress)
            del served  # before the next one is loaded
            found |= {"source": text, "seed": options.seed, "limit": options.limit}
            found["seconds"] = round(time.monotonic() - began, 1)
            results["models"][name] = _joined(results["models"].get(name, {}), found)
            write_json(output / "results.json", results)
            (output / "table.md").write_text(markdown(results), encoding="utf-8")
    return results


def _own_options(text: str, options: EvalOptions, progress: Progress) -> EvalOptions:
    """What is measured of one model: an endpoint does not tell how likely a given text is.

    Raises:
        DataError: nothing is left of an endpoint, or something that was asked for by name.
    """
    unseen = [name for name in options.names if name in LOSSES or name in TASKS and TASKS[name].needs_log_probs]
    if not text.startswith(ENDPOINT) or not unseen:
        return options
    left = [name for name in options.names if name not in unseen]
    if not left or set(unseen) & set(options.named):
        what = ", ".join(name for name in unseen if not left or name in options.named)
        raise DataError(
            f"{text}: an endpoint does not tell how likely a given text is, which {what} needs; give the model itself, or "
            "tasks that generate, such as --tasks gsm8k"
        )
    progress.log(f"left out of {text}, as an endpoint does not tell how likely a given text is: {', '.join(unseen)}")
    return replace(options, names=left)


def check_tasks(options: EvalOptions) -> None:
    """Find out before any model runs that a task is unknown, or its file, its judge or the sandbox missing.

    Raises:
        DataError, SandboxError, MissingExtraError: what is missing, and what to do.
    """
    from ultrafuser.evaluate.judged import alpaca, mt_bench

    load_tasks(lm_eval_names(options.names), data_dir=options.data_dir, **options.task_options)
    for name in options.names:
        if name in JUDGED:
            (alpaca if name == "alpaca_eval" else mt_bench).load_rows(options.data_dir)
            _judge(name, options, None)


def _before(file: Path) -> dict[str, Any]:
    """What earlier calls measured into the same folder.

    Raises:
        DataError: the folder holds something else, such as a comparison.
    """
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text(encoding="utf-8"))["models"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the results of an evaluation; choose another --output") from error


def _joined(before: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A model's new numbers with those of earlier calls that were not taken again."""
    if before.get("fingerprint") != found["fingerprint"]:
        return found
    parts = {part: {**before.get(part, {}), **found.get(part, {})} for part in ("loss", "tasks")}
    return {**before, **found, **{part: own for part, own in parts.items() if own or part in found}}


def measure(
    served: LoadedModel, options: EvalOptions, rows: Sequence[Row], folder: Path, progress: Progress
) -> dict[str, Any]:
    """One model: its losses by domain, its tasks, and what lies behind them in files of `folder`."""
    out: dict[str, Any] = {"fingerprint": served.fingerprint, "parameters": served.parameters()}
    if rows and set(options.names) & set(LOSSES):
        strata, weights = losses(served, rows, folder / "features", progress)
        out["loss"] = {domain: loss_cell([stratum], options.seed) for domain, stratum in strata.items()}
        if served.model is not None and len(served.model.config.names) > 1:
            tokens = {domain: list(stratum.weights.values()) for domain, stratum in strata.items()}
            out["gate_weights"] = mean_weights(weights, tokens, served.model.config.names)
    store = Store(folder / "answers.sqlite", served.fingerprint)
    try:
        out["tasks"] = {}
        for name, scores in all_tasks(served, options, store, progress).items():
            out["tasks"][name] = task_cell(name, scores, options.seed)
            _write_documents(folder / f"{name}.jsonl", scores)
    finally:
        store.close()
    return out


def all_tasks(served: LoadedModel, options: EvalOptions, store: Store, progress: Progress) -> dict[str, TaskScores]:
    """Benchmarks and judged benchmarks, with a memory."""
    lm = RememberingLM(served.lm, store, progress, options.seed)
    found = benchmark(
        lm,
        lm_eval_names(options.names),
        limit=options.limit,
        seed=options.seed,
        data_dir=options.data_dir,
        **options.task_options,
    )
    for name in options.names:
        if name in JUDGED:
            found[name] = _judged(name, lm, options, store, progress)
    return found


def _judged(name: str, lm: RememberingLM, options: EvalOptions, store: Store, progress: Progress) -> TaskScores:
    from ultrafuser.evaluate.judged import alpaca, mt_bench

    judge = _judge(name, options, store)
    settings: dict[str, Any] = {"limit": options.limit, "seed": options.seed, "progress": progress}
    if new_tokens := options.task_options.get("max_new_tokens"):
        settings["max_tokens"] = new_tokens
    if name == "alpaca_eval":
        result = alpaca.evaluate(lm, judge, alpaca.load_rows(options.data_dir), **settings)
    else:
        result = mt_bench.evaluate(lm, judge, mt_bench.load_rows(options.data_dir), **settings)
    answers = {str(sample["id"]): sample for sample in result.samples}
    by_question: dict[str, list[float]] = {}  # the turns of a question depend on each other
    for sample_id, score in result.scores.items():
        by_question.setdefault(sample_id.partition(".")[0], []).append(score)
    scores = {question: sum(own) / len(own) for question, own in by_question.items()}
    return TaskScores(result.metric, "1.0", scores, counts=result.counts, answers=answers, details=result.details)


def _judge(name: str, options: EvalOptions, store: Store | None) -> Judge:
    from ultrafuser.endpoint.client import Endpoint
    from ultrafuser.evaluate.judged.judge import Judge

    if options.judge is None:
        raise DataError(f"{name} needs a judge; give --judge NAME@URL, any OpenAI-compatible endpoint")
    return Judge(Endpoint(options.judge), store, seed=options.seed)


def loss_rows(options: EvalOptions) -> list[Row]:
    """The rows whose loss is asked for: the user's, or the zoo's test rows."""
    domains = [domain for name in options.names if name in LOSSES for domain in LOSSES[name]]
    if not domains:
        if options.data:
            raise DataError("--data holds rows for `loss` and `mixed`, and neither is asked for; add one to --tasks")
        return []
    if not options.data:
        by_domain = {domain: load_rows(ZOO.format(domain)) for domain in domains}
        return _draw_each(by_domain, options)
    rows: list[Row] = []
    for path in options.data:
        rows += load_rows(path)
    wanted = [d for d in dict.fromkeys(row.domain for row in rows) if (d == "mixed") <= ("mixed" in domains)]
    if "loss" not in options.names:
        wanted = [domain for domain in wanted if domain == "mixed"]
    if not wanted:
        asked = "`mixed`" if "loss" not in options.names else "`loss`"
        other = "`loss`" if "loss" not in options.names else "`mixed`"
        have = ", ".join(dict.fromkeys(row.domain for row in rows))
        raise DataError(
            f"{', '.join(options.data)}: rows of {have}, none of which {asked} measures; ask for {other}, or give others"
        )
    return _draw_each({domain: [row for row in rows if row.domain == domain] for domain in wanted}, options)


def _draw_each(by_domain: Mapping[str, list[Row]], options: EvalOptions) -> list[Row]:
    return [row for name, rows in by_domain.items() for row in draw_rows(rows, options.limit, options.seed, name)]


def loss_cell(strata: Sequence[Stratum], seed: int) -> dict[str, Any]:
    """Nats a response token with its interval, and how much it rests on."""
    found = estimate(strata, seed)
    tokens = sum(int(sum(stratum.weights.values())) for stratum in strata)
    samples = sum(len(stratum.totals) for stratum in strata)
    return {"nll": found["value"], "ci95": found["ci95"], "tokens": tokens, "samples": samples}


def task_cell(name: str, scores: TaskScores, seed: int) -> dict[str, Any]:
    """A task's mean with its interval, its second metrics, and what was counted."""
    out: dict[str, Any] = {"metric": scores.metric, "version": scores.version, "samples": len(scores.scores)}
    if scores.scores:
        out |= estimate([scores.stratum()], seed)
    else:  # a judge that gave no readable verdict at all
        out |= {"value": None, "ci95": None}
    for extra, by_document in scores.extra.items():
        if extra != "unparsed":
            ones = dict.fromkeys(by_document, 1.0)
            out[extra] = estimate([Stratum(by_document, ones)], seed)
    return (
        out
        | ({"counts": scores.counts} if scores.counts else {})
        | ({"details": scores.details} if scores.details else {})
    )


def columns_of(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(`loss` or `tasks`, name) of each column that some model has."""
    found: dict[tuple[str, str], None] = {}
    for model in results["models"].values():
        found |= dict.fromkeys(("loss", domain) for domain in model.get("loss", {}))
    for model in results["models"].values():
        found |= dict.fromkeys(("tasks", task) for task in model.get("tasks", {}))
    return list(found)


def cell_text(kind: str, cell: Mapping[str, Any] | None) -> tuple[str, str]:
    """A number, and its interval with what was of no use, as a table writes them."""
    if cell is None:
        return "–", ""
    counts = "".join(f"; {number} {what}" for what, number in cell.get("counts", {}).items() if number and what != "ok")
    if cell.get("ci95") is None:
        return "–", counts.removeprefix("; ")
    low, high = cell["ci95"]
    if kind == "loss":
        return f"{cell['nll']:.4f}", f"{low:.4f} to {high:.4f}"
    scale, unit = (1, "") if cell["metric"] == "rating" else (100, " %")
    return f"{scale * cell['value']:.2f}{unit}", f"{scale * low:.2f} to {scale * high:.2f}{counts}"


def markdown(results: Mapping[str, Any]) -> str:
    """The results as a Markdown table."""
    columns = columns_of(results)
    heads = [f"{name}, nats/token" if kind == "loss" else name for kind, name in columns]
    lines = [f"| model | {' | '.join(heads)} |", "|---|" + "---:|" * len(columns)]
    for name, model in results["models"].items():
        cells = []
        for kind, column in columns:
            value, interval = cell_text(kind, model.get(kind, {}).get(column))
            cells.append(f"{value} ({interval})" if interval else value)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    counts = {
        f"{name}: {cell['samples']}" for model in results["models"].values() for name, cell in model["tasks"].items()
    } | {f"{d}: {c['samples']} rows" for m in results["models"].values() for d, c in m.get("loss", {}).items()}
    return "\n".join(lines) + f"\n\n95% intervals in brackets. Samples: {'; '.join(sorted(counts))}.\n"


def _named(models: Sequence[str]) -> dict[str, str]:
    """Model texts by the names that they were given, or by short ones of their own.

    Raises:
        DataError: no model, or two of one name.
    """
    out: dict[str, str] = {}
    for given in models:
        own, text = split_name(given)
        if own in out:
            raise DataError(f"two models are named {own!r}; names must differ")
        short = own or name_of(text)
        name, number = short, 2
        while name in out:
            name, number = f"{short}-{number}", number + 1
        out[name] = text
    if not out:
        raise DataError("no model; give at least one MODEL")
    return out


def _write_documents(file: Path, scores: TaskScores) -> None:
    extra = scores.extra
    with file.open("w", encoding="utf-8") as lines:
        for document in dict.fromkeys([*scores.scores, *scores.answers]):
            record = {"id": document, scores.metric: scores.scores.get(document)}
            record |= {name: values[document] for name, values in extra.items() if document in values}
            if document in scores.answers:
                record["answer"] = scores.answers[document]
            lines.write(json.dumps(record) + "\n")
