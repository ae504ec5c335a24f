"""`ultrafuser compare`: build and measure what is missing, keep what is done, and put all of it side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ultrafuser.compare.kinds import KINDS
from ultrafuser.compare.process import start_step
from ultrafuser.compare.recipe import CompareRecipe, SystemRecipe, dump_compare_recipe
from ultrafuser.compare.systems.merge import find_program
from ultrafuser.compare.workspace import RECIPE, Workspace, eval_options
from ultrafuser.data.locking import exclusive_lock
from ultrafuser.data.writing import write_json
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.evaluate.losses import mean_weights
from ultrafuser.evaluate.run import LOSSES, check_tasks, loss_cell
from ultrafuser.evaluate.scoring import TaskScores
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.progress import Progress

BUILD, MEASURE = "ultrafuser.compare.build", "ultrafuser.compare.measure"
NOT_A_SYSTEM = "oracle"
TASK = "task/"  # before a benchmark's name where a domain may have the same one
Columns = dict[str, Stratum]  # domain or task -> its rows


def compare(recipe: CompareRecipe, progress: Progress | None = None) -> dict[str, Any]:
    """Run the comparison and write `results.json` and the report.

    Every system is built and measured in processes of its own; one that fails is reported, and the others go on. Run
    again with the same output, it does what is missing.

    Returns:
        What is in results.json.

    Raises:
        DataError: no system could be measured.
        MissingExtraError: the report's figures need matplotlib.
    """
    from ultrafuser.report.page import write_report

    progress = progress or Progress()
    folder = Path(recipe.output)
    folder.mkdir(parents=True, exist_ok=True)
    _check(recipe)
    with exclusive_lock(folder, "comparison"):
        (folder / RECIPE).write_text(dump_compare_recipe(recipe), encoding="utf-8")
        place = Workspace(folder, progress)
        errors = _run_all(place, progress)
        results = collect(place, errors)
        write_json(folder / "results.json", results)
    measured = [own for own in results["systems"].values() if own["kind"] != NOT_A_SYSTEM and own["status"] == "done"]
    if not measured:
        raise DataError(f"no system could be measured; the first error: {next(iter(errors.values()), 'none')}")
    write_report(results, folder, traces=traces_of(place))
    return results


def _check(recipe: CompareRecipe) -> None:
    """Find out before any system is built that something cannot run.

    Raises:
        DataError, SandboxError, MissingExtraError: what is missing, and what to do.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report", "the report's figures")
    if any(system.kind == "merge" for system in recipe.systems):
        find_program()
    if recipe.judge is not None:
        Endpoint(recipe.judge)  # its package and its key
    if odd := [name for name in recipe.tasks if name in LOSSES]:
        raise DataError(f"tasks: {odd[0]!r} is no benchmark here; list its rows under 'test', and the loss is measured")
    check_tasks(eval_options(recipe, recipe.tasks))


def _run_all(place: Workspace, progress: Progress) -> dict[str, str]:
    """Every system in the order of the recipe; the errors of those that failed."""
    errors: dict[str, str] = {}
    for number, system in enumerate(place.recipe.systems, 1):
        name = str(system.name)
        if system.kind == NOT_A_SYSTEM:
            continue
        progress.log(f"[{number}/{len(place.recipe.systems)}] {name}")
        error = _run(place, system, errors)
        if error is not None:
            errors[name] = error
            progress.log(f"{name} failed: {error}")
    return errors


def state_of(recipe: CompareRecipe) -> dict[str, str]:
    """For each system what is there of it already."""
    if not (Path(recipe.output) / RECIPE).is_file():
        return {str(system.name): f"{system.kind}, to be built" for system in recipe.systems}
    place = Workspace(Path(recipe.output))
    place.recipe = recipe
    out = {}
    for system in recipe.systems:
        name = str(system.name)
        found = [facts for step in ("build", "measure") if (facts := place.facts(name, step)) is not None]
        state = {0: "to be built", 1: "built, to be measured", 2: "done"}[len(found)]
        if any(map(_lacks_verdicts, found)):
            state = "measured, the judge to be asked again"
        out[name] = f"{system.kind}, {'made of the specialists' if system.kind == NOT_A_SYSTEM else state}"
    return out


def _run(place: Workspace, system: SystemRecipe, errors: Mapping[str, str]) -> str | None:
    """Build and measure one system, where that is not done; the error, if any."""
    name = str(system.name)
    if system.after in errors and place.facts(str(system.after), "build") is None:
        return f"it comes after {system.after!r}, which failed"
    for step, module in (("build", BUILD), ("measure", MEASURE)):
        facts = place.facts(name, step)
        if facts is None or _lacks_verdicts(facts):
            error = start_step(module, place.folder, name)
            if error is not None:
                return error
            if place.facts(name, step) is None:
                return f"its {step} ended without results"
    return None


def _lacks_verdicts(facts: Mapping[str, Any]) -> bool:
    """Whether a judge was not there for some answers, which are asked again."""
    return any(task["counts"].get("error") for task in facts.get("tasks", {}).values())


def traces_of(place: Workspace) -> list[TokenTrace]:
    """Token weights over an answer of each domain, of the main system."""
    main = place.recipe.main
    facts = place.facts(main, "measure") if main is not None else None
    return [TokenTrace.from_dict(trace) for trace in (facts or {}).get("traces", [])]


# ---------------------------------------------------------------- side by side


def collect(place: Workspace, errors: Mapping[str, str]) -> dict[str, Any]:
    """What the finished systems measured, with intervals and paired differences."""
    recipe = place.recipe
    specialists = [specialist.name for specialist in recipe.training().specialists]
    measured = {
        str(s.name): found for s in recipe.systems if (found := place.facts(str(s.name), "measure")) is not None
    }
    built = {name: place.facts(name, "build") or {} for name in measured}
    losses = {name: _strata(facts["loss"]) for name, facts in measured.items() if facts["loss"]}
    scores = {name: _task_strata(facts["tasks"]) for name, facts in measured.items()}
    domains = list(dict.fromkeys(domain for own in losses.values() for domain in own))
    tasks = _tasks(measured)
    alone = {str(s.name): str(s.specialist) for s in recipe.systems if s.kind == "specialist"}
    best = _best_specialists(alone, losses, scores, domains, tasks)
    if (oracle := next((s for s in recipe.systems if s.kind == NOT_A_SYSTEM), None)) is not None and best:
        losses[str(oracle.name)] = {d: losses[best[d]][d] for d in domains if d in best}
        scores[str(oracle.name)] = {t: scores[best[TASK + t]][t] for t in tasks if TASK + t in best}
    systems = {}
    for system in recipe.systems:
        name = str(system.name)
        own = _entry(system, measured.get(name, {}), built.get(name, {}), errors.get(name, "not measured yet"))
        own["loss"] = _loss_cells(losses[name], domains, recipe.seed) if losses.get(name) else None
        own["tasks"] = {
            task: _task_cell(stratum, measured.get(name, {}).get("tasks", {}).get(task), recipe.seed)
            for task, stratum in scores.get(name, {}).items()
        }
        systems[name] = own
    against = {"best_specialist": best}
    columns = [*domains, "mean", *(TASK + task for task in tasks)]
    for kind in ("router", NOT_A_SYSTEM):
        if (other := next((str(s.name) for s in recipe.systems if s.kind == kind), None)) in {**losses, **scores}:
            against[kind] = dict.fromkeys(columns, str(other))
    if recipe.main in measured:
        against["main"] = dict.fromkeys(columns, recipe.main)
    for system in recipe.systems:
        name = str(system.name)
        own = against | ({"versus": dict.fromkeys(columns, system.versus)} if system.versus else {})
        systems[name]["paired"] = {
            kind: _paired(name, others, losses, scores, domains, recipe.seed) for kind, others in own.items()
        }
    return {
        "title": recipe.title,
        "created": time.strftime("%Y-%m-%d"),
        "seed": recipe.seed,
        "specialists": specialists,
        "domains": domains,
        "tasks": tasks,
        "systems": systems,
        "gate_weights": {n: w for n, f in measured.items() if (w := _mean_weights(f, specialists))},
        "sample_weights": {
            n: _named_weights(f["sample_weights"], specialists) for n, f in measured.items() if f["sample_weights"]
        },
        "training": {name: facts["training"] for name, facts in measured.items() if facts["training"]},
        "stability": {n: s for n, f in measured.items() if (s := _stability(f["training"]))},
        "table2": [str(s.name) for s in recipe.systems if s.kind == "fused" and str(s.name) in measured],
        "main": recipe.main if recipe.main in measured else None,
        "config": recipe.model_dump(exclude={"systems", "title"}),
    }


def _entry(system: SystemRecipe, facts: Mapping[str, Any], built: Mapping[str, Any], error: str) -> dict[str, Any]:
    """What a system is, whether it was measured, and what it costs."""
    failed = system.kind != NOT_A_SYSTEM and not facts
    kind_label, description = KINDS[system.kind]
    return {
        "label": system.label or str(system.name),
        "kind": system.kind,
        "kind_label": kind_label,
        "description": description,
        "status": "failed" if failed else "done",
        "error": error if failed else None,
        "tokens_per_s": facts.get("tokens_per_s"),
        "peak_memory_mb": facts.get("peak_memory_mb"),
        "parameters": _parameters(facts, built),
        "chosen": facts.get("chosen"),
        "seconds": {"build": built.get("seconds", 0.0), "measure": facts.get("seconds", 0.0)},
    }


def _strata(tree: Mapping[str, Any]) -> Columns:
    return {domain: Stratum(**own) for domain, own in tree.items()}


def _task_strata(tree: Mapping[str, Any]) -> Columns:
    return {task: TaskScores(**own).stratum() for task, own in tree.items() if own["scores"]}


def _tasks(measured: Mapping[str, Any]) -> dict[str, Any]:
    from ultrafuser.evaluate.tasks import TASKS

    found: dict[str, Any] = {}
    for facts in measured.values():
        for task, own in facts["tasks"].items():
            description = TASKS[task].description if task in TASKS else task
            found.setdefault(task, {"metric": own["metric"], "higher_is_better": True, "description": description})
    return found


def _best_specialists(
    alone: Mapping[str, str],
    losses: Mapping[str, Columns],
    scores: Mapping[str, Columns],
    domains: Sequence[str],
    tasks: Mapping[str, Any],
) -> dict[str, str]:
    """By domain, `task/NAME` and for the `mean` of the domains: which specialist is best there, by this test's numbers."""
    out: dict[str, str] = {}
    with_loss = [name for name in alone if name in losses]
    for domain in domains if with_loss else []:
        out[domain] = min(with_loss, key=lambda name: losses[name][domain].value)
    if with_loss:
        out["mean"] = min(with_loss, key=lambda name: statistics.mean(losses[name][d].value for d in domains))
    for task in tasks:
        if having := [name for name in alone if task in scores.get(name, {})]:
            out[TASK + task] = max(having, key=lambda name: scores[name][task].value)
    return out


def _loss_cells(loss: Columns, domains: Sequence[str], seed: int) -> dict[str, Any]:
    out = {domain: loss_cell([loss[domain]], seed) for domain in domains}
    mean = loss_cell([loss[domain] for domain in domains], seed)
    return out | {"mean": {"nll": mean["nll"], "ci95": mean["ci95"]}}


def _task_cell(stratum: Stratum, facts: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    counts = {what: number for what, number in (facts or {}).get("counts", {}).items() if number and what != "ok"}
    return estimate([stratum], seed) | {"samples": len(stratum.totals), "counts": counts}


def _parameters(facts: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, int] | None:
    return None if not facts else facts["parameters"] | {"trained": built.get("trained_parameters", 0)}


def _paired(
    name: str,
    others: Mapping[str, str],
    losses: Mapping[str, Columns],
    scores: Mapping[str, Columns],
    domains: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """A system minus another on the same rows, by column."""
    out = {}
    for column, other in others.items():
        if other == name:
            continue
        tree = scores if column.startswith(TASK) else losses
        parts = domains if column == "mean" else [column.removeprefix(TASK)]
        mine, theirs = tree.get(name, {}), tree.get(other, {})
        if parts and all(part in mine and part in theirs for part in parts):
            pair = difference([mine[part] for part in parts], [theirs[part] for part in parts], seed)
            if pair is not None:
                out[column] = {"versus": other, **pair}
    return out


def _named_weights(tree: Mapping[str, Any], specialists: Sequence[str]) -> dict[str, Any]:
    return {domain: [dict(zip(specialists, row, strict=True)) for row in rows] for domain, rows in tree.items()}


def _mean_weights(facts: Mapping[str, Any], specialists: Sequence[str]) -> dict[str, dict[str, float]] | None:
    """Mean weights over the response tokens of each domain (table 6)."""
    if not facts["sample_weights"] or not facts["loss"]:
        return None
    tokens = {domain: list(own["weights"].values()) for domain, own in facts["loss"].items()}
    return mean_weights(facts["sample_weights"], tokens, specialists)


def _stability(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Validation losses by domain at each checkpoint of the last stage (table 4)."""
    if not metrics:
        return []
    last = metrics[-1]["stage"]
    out = []
    for row in metrics:
        loss = {key.removeprefix("eval_loss/"): value for key, value in row.items() if key.startswith("eval_loss/")}
        if loss and row["stage"] == last:
            out.append({"step": row["step"], "loss": loss})
    return out


def tables(results: Mapping[str, Any]) -> list[Any]:
    """Losses, then benchmarks, for the terminal: the systems that have them, and those that failed."""
    out = []
    if results["domains"]:
        columns = [*results["domains"], "mean"]
        cells = {
            name: [f"{system['loss'][c]['nll']:.4f}" for c in columns]
            for name, system in results["systems"].items()
            if system["loss"]
        }
        out.append(_table("nats per response token, lower is better", columns, cells, results))
    if results["tasks"]:
        scales = {task: 1 if facts["metric"] == "rating" else 100 for task, facts in results["tasks"].items()}
        cells = {
            name: [f"{scales[t] * own[t]['value']:.1f}" if t in own else "–" for t in results["tasks"]]
            for name, own in ((name, system["tasks"]) for name, system in results["systems"].items())
            if own
        }
        marks = " and ratings of 1 to 10" if 1 in scales.values() else ""
        out.append(_table(f"benchmarks in %{marks}", list(results["tasks"]), cells, results))
    return out


def _table(title: str, columns: Sequence[str], cells: Mapping[str, Sequence[str]], results: Mapping[str, Any]) -> Any:
    from rich.box import HORIZONTALS
    from rich.table import Table

    out = Table(title=title, title_justify="left", box=HORIZONTALS)
    for head in ("system", *columns):
        out.add_column(head, justify="left" if head == "system" else "right")
    for name, system in results["systems"].items():
        if system["status"] == "failed":
            out.add_row(system["label"], *["failed"] * len(columns), style="red")
        elif name in cells:
            out.add_row(system["label"], *cells[name], style="bold" if name == results["main"] else "")
    return out
