"""`ultrafuser compare`: build and measure the missing systems, skip finished ones, and put all of them side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ultrafuser.compare import system as process
from ultrafuser.compare.keys import Step
from ultrafuser.compare.recipe import CompareRecipe, dump_compare_recipe
from ultrafuser.compare.results import ORACLE, Measurement, SystemResult, compare_systems
from ultrafuser.compare.system import RECIPE, Built, eval_options, read_built, read_measured
from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.data.files import disk_errors, run_folder, write_json, write_text
from ultrafuser.data.locking import exclusive_lock
from ultrafuser.endpoint.client import Endpoint
from ultrafuser.endpoint.recipe import logins_for_children
from ultrafuser.errors import DataError, MissingExtraError
from ultrafuser.evaluate.options import LOSSES
from ultrafuser.evaluate.run import check_benchmarks
from ultrafuser.progress import Progress
from ultrafuser.report.data import MEAN, Comparison

if TYPE_CHECKING:
    from rich.table import Table


def compare(recipe: CompareRecipe, progress: Progress | None = None) -> Comparison:
    """Run the comparison and write `results.json` and the report.

    Every system is built and measured in a process of its own. A system that fails is reported, and the others go on.
    Run again with the same output, it skips finished systems.

    Returns:
        The content of results.json.

    Raises:
        DataError: no system could be measured.
        MissingExtraError: the report's figures need matplotlib.
    """
    from ultrafuser.report.page import write_report

    progress = progress or Progress()
    folder = Path(recipe.output)
    with run_folder(folder), exclusive_lock(folder, "comparison"):
        _check(recipe)
        write_text(folder / RECIPE, dump_compare_recipe(recipe))
        with logins_for_children([recipe.judge] if recipe.judge is not None else []):
            errors = _run_systems(recipe, folder, progress)
        measured = {system.id: read_measured(recipe, system) for system in recipe.systems}
        comparison = collect(recipe, measured, errors)
        write_json(folder / "results.json", comparison.model_dump(mode="json"))
        if not any(system.kind != ORACLE for system in comparison.done.values()):
            raise DataError(f"no system could be measured. The first error: {next(iter(errors.values()), 'none')}")
        main = measured[comparison.main] if comparison.main is not None else None
        with disk_errors(folder / "report.html"):
            write_report(comparison, folder, traces=main.traces if main else [])
    return comparison


def _check(recipe: CompareRecipe) -> None:
    """Check before any system is built that everything can run."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "report", "the report's figures")
    for system in recipe.systems:
        system.check()
    if recipe.judge is not None:
        Endpoint(recipe.judge)  # its package and its key
    if losses := [name for name in recipe.tasks if name in LOSSES]:
        raise DataError(
            f"tasks: {losses[0]!r} is no benchmark here. List its rows under 'test', and the loss is measured"
        )
    check_benchmarks(eval_options(recipe, recipe.tasks))


def _run_systems(recipe: CompareRecipe, folder: Path, progress: Progress) -> dict[str, str]:
    """Build and measure every system in the order of the recipe. Returns the errors of the failed ones."""
    errors: dict[str, str] = {}
    for index, system in enumerate(recipe.systems, 1):
        if system.kind == ORACLE:
            continue
        progress.log(f"[{index}/{len(recipe.systems)}] {system.id}")
        previous = system.predecessor
        if previous in errors and read_built(recipe, recipe.system(str(previous))) is None:
            error: str | None = f"it comes after {previous!r}, which failed"
        else:
            error = _run_step(recipe, system, "build", folder) or _run_step(recipe, system, "measure", folder)
        if error is not None:
            errors[system.id] = error
            progress.log(f"{system.id} failed: {error}")
    return errors


def _run_step(recipe: CompareRecipe, system: SystemRecipe, step: Step, folder: Path) -> str | None:
    """Run a step unless it is finished. Returns the error, if any."""
    if step == "build" and read_built(recipe, system) is not None:
        return None
    if step == "measure" and (measured := read_measured(recipe, system)) and not _lacks_verdicts(measured):
        return None
    error = process.start(folder, system.id, step)
    result = read_built(recipe, system) if step == "build" else read_measured(recipe, system)
    return f"its {step} ended without results" if error is None and result is None else error


def _lacks_verdicts(measured: Measurement) -> bool:
    """Whether a judge did not answer some requests, which are then repeated."""
    return any(scores.counts.get("error") for scores in measured.tasks.values())


def system_states(recipe: CompareRecipe) -> dict[str, str]:
    """The kind of each system, and which of its steps are finished."""
    states = {}
    for system in recipe.systems:
        built, measured = read_built(recipe, system), read_measured(recipe, system)
        if system.kind == ORACLE:
            state = "made of the specialists"
        elif measured is not None and _lacks_verdicts(measured):
            state = "measured, verdicts of the judge are missing"
        else:
            finished = sum(result is not None for result in (built, measured))
            state = ("to be built", "built, to be measured", "done")[finished]
        states[system.id] = f"{system.kind}, {state}"
    return states


def collect(recipe: CompareRecipe, measured: Mapping[str, Measurement | None], errors: Mapping[str, str]) -> Comparison:
    """The finished systems side by side, with intervals and paired differences."""
    results = []
    for system in recipe.systems:
        built = read_built(recipe, system) or Built()
        result = SystemResult(
            name=system.id,
            kind=system.kind,
            kind_label=system.kind_label,
            description=system.description,
            measurement=measured[system.id],
            error=errors.get(system.id, SystemResult.error),
            label=system.label or "",
            versus=system.versus,
            trained_parameters=built.trained_parameters,
            build_seconds=built.seconds,
        )
        results.append(result)
    return compare_systems(
        results,
        title=recipe.title,
        specialists=[specialist.name for specialist in recipe.training().specialists],
        main=recipe.main,
        seed=recipe.seed,
        config=recipe.model_dump(exclude={"systems", "title"}, mode="json"),
    )


def tables(comparison: Comparison) -> list[Table]:
    """Losses, then benchmarks, for the terminal: the systems that have them, and those that failed."""
    out = []
    systems, domains = comparison.systems, [*comparison.domains, MEAN]
    if comparison.domains:
        cells = {name: [f"{s.loss[d].nll:.4f}" for d in domains] for name, s in systems.items() if s.loss}
        out.append(_table("nats per response token, lower is better", domains, cells, comparison))
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
