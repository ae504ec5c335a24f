"""`ultrafuser compare`: build and measure what is missing, keep what is done, and put all of it side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.compare.kinds import KINDS
from ultrafuser.compare.process import start_step
from ultrafuser.compare.recipe import CompareRecipe, SystemRecipe, dump_compare_recipe
from ultrafuser.compare.results import ORACLE, Measurement, SystemResult, compare_systems
from ultrafuser.compare.systems.merge import find_program
from ultrafuser.compare.workspace import RECIPE, Workspace, eval_options
from ultrafuser.data.locking import exclusive_lock
from ultrafuser.data.writing import write_json
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.evaluate.run import LOSSES, check_tasks
from ultrafuser.progress import Progress
from ultrafuser.report.data import MEAN, Comparison

if TYPE_CHECKING:
    from rich.table import Table

BUILD, MEASURE = "ultrafuser.compare.build", "ultrafuser.compare.measure"


def compare(recipe: CompareRecipe, progress: Progress | None = None) -> Comparison:
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
        comparison = collect(place, errors)
        write_json(folder / "results.json", comparison.model_dump(mode="json"))
    if not any(system.kind != ORACLE for system in comparison.done.values()):
        raise DataError(f"no system could be measured; the first error: {next(iter(errors.values()), 'none')}")
    main = measurement_of(place, comparison.main) if comparison.main is not None else None
    write_report(comparison, folder, traces=main.traces if main else [])
    return comparison


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
        if system.kind == ORACLE:
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
        out[name] = f"{system.kind}, {'made of the specialists' if system.kind == ORACLE else state}"
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


def measurement_of(workspace: Workspace, name: str) -> Measurement | None:
    """What a system measured; None where that is missing or belongs to another recipe."""
    tree = workspace.facts(name, "measure")
    return Measurement.from_dict(tree) if tree is not None else None


def collect(workspace: Workspace, errors: Mapping[str, str]) -> Comparison:
    """What the finished systems measured, with intervals and paired differences."""
    recipe = workspace.recipe
    systems = []
    for system in recipe.systems:
        built = workspace.facts(str(system.name), "build") or {}
        result = SystemResult(
            name=str(system.name),
            kind=system.kind,
            kind_label=KINDS[system.kind][0],
            description=KINDS[system.kind][1],
            measurement=measurement_of(workspace, str(system.name)),
            label=system.label or "",
            versus=system.versus,
            trained_parameters=built.get("trained_parameters", 0),
            build_seconds=built.get("seconds", 0.0),
        )
        result.error = errors.get(result.name, result.error)
        systems.append(result)
    return compare_systems(
        systems,
        title=recipe.title,
        specialists=[specialist.name for specialist in recipe.training().specialists],
        main=recipe.main,
        seed=recipe.seed,
        config=recipe.model_dump(exclude={"systems", "title"}, mode="json"),
    )


def tables(comparison: Comparison) -> list[Table]:
    """Losses, then benchmarks, for the terminal: the systems that have them, and those that failed."""
    out = []
    systems = comparison.systems
    if comparison.domains:
        columns = [*comparison.domains, MEAN]
        cells = {
            name: [f"{system.loss[column].nll:.4f}" for column in columns]
            for name, system in systems.items()
            if system.loss
        }
        out.append(_table("nats per response token, lower is better", columns, cells, comparison))
    if comparison.tasks:
        scales = {name: 1 if task.metric == "rating" else 100 for name, task in comparison.tasks.items()}
        cells = {
            name: [f"{scale * system.tasks[t].value:.1f}" if t in system.tasks else "–" for t, scale in scales.items()]
            for name, system in systems.items()
            if system.tasks
        }
        marks = " and ratings of 1 to 10" if 1 in scales.values() else ""
        out.append(_table(f"benchmarks in %{marks}", list(comparison.tasks), cells, comparison))
    return out


def _table(title: str, columns: Sequence[str], cells: Mapping[str, Sequence[str]], comparison: Comparison) -> Table:
    from rich.box import HORIZONTALS
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=HORIZONTALS)
    for heading in ("system", *columns):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for name, system in comparison.systems.items():
        if system.failed:
            table.add_row(system.label, *["failed"] * len(columns), style="red")
        elif name in cells:
            table.add_row(system.label, *cells[name], style="bold" if name == comparison.main else "")
    return table
