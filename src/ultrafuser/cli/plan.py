"""`ultrafuser plan`: the memory and time that a recipe needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import TRUST, Json, Overrides, TrustRemoteCode
from ultrafuser.printing import PlainConsole, echo
from ultrafuser.progress import ConsoleProgress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.train.plan import Plan


@how_to_go_on(AGAIN, resumes=False)
def plan_command(
    recipe: Annotated[Path, Argument(help="Recipe (YAML). `docs/recipes.md` lists the fields.")],
    overrides: Overrides = None,
    memory: Annotated[
        float | None,
        Option(min=0.001, help="Memory of each device in GiB. Default: what is free on this machine's device."),
    ] = None,
    processes: Annotated[
        int | None,
        Option(
            min=1,
            help="Processes that train together, each with one device. Default: `parallel.specialist` of the recipe.",
        ),
    ] = None,
    tflops: Annotated[
        float | None,
        Option(min=0.001, help="Speed that each device reaches, in 1e12 operations a second. It gives the time."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Estimate the memory and time of a recipe's stages, before any weight is loaded.

    A stage that does not fit is an error, which names the overrides with which it fits.
    """
    from ultrafuser.recipe import load_recipe

    typed = load_recipe(recipe, [*(overrides or []), *(TRUST if trust_remote_code else [])])
    quiet_libraries()
    import torch

    from ultrafuser.specialists import pick_device
    from ultrafuser.train.memory import free_bytes
    from ultrafuser.train.plan import GIB, check_plan, plan

    device = torch.device("cuda" if memory is not None and typed.device == "auto" else pick_device(typed.device))
    available = free_bytes(device) if memory is None else int(memory * GIB)
    processes = processes or typed.parallel.specialist
    with ConsoleProgress().waiting("reading the configurations"):
        planned = plan(typed, memory=available, processes=processes, kind=device.type)
    if as_json:
        echo(json.dumps(_as_json(planned, available, processes, tflops)))
    else:
        _print(planned, available, processes, tflops)
    check_plan(planned, available)


def _as_json(planned: Plan, available: int, processes: int, tflops: float | None) -> dict[str, Any]:
    return {
        "memory_bytes": available,
        "processes": processes,
        "parameters": planned.parameters,
        "feature_bytes_per_token": planned.feature_bytes,
        "stages": [
            {
                "name": stage.name,
                "memory_bytes": stage.memory,
                "total_bytes": stage.total,
                "fits": stage.total <= available,
                "trained_parameters": stage.trained,
                "rows_per_device": stage.rows_per_device,
                "gradient_checkpointing": stage.checkpointing,
                "flops": stage.flops,
                "hours": stage.hours(processes, tflops) if tflops else None,
                "proposal": planned.proposals.get(stage.name),
            }
            for stage in planned.stages
        ],
    }


def _print(planned: Plan, available: int, processes: int, tflops: float | None) -> None:
    from ultrafuser.train.plan import GIB

    for names, count in planned.parameters.items():
        echo(f"{names}: {count / 1e9:.2f} billion parameters")
    echo(
        f"feature cache of the gate stage: {planned.feature_bytes / 1000:.1f} GB on the disk per million response tokens"
    )
    parts = dict.fromkeys(part for stage in planned.stages for part in stage.memory)
    table = Table(title=f"GiB on each of {processes} device{'s' * (processes > 1)} with {available / GIB:.1f} GiB")
    table.add_column("")
    for stage in planned.stages:
        table.add_column(stage.name, justify="right")
    for part in parts:
        cells = [f"{stage.memory[part] / GIB:.2f}" if part in stage.memory else "" for stage in planned.stages]
        table.add_row(part, *cells)
    table.add_section()
    table.add_row("total", *(f"{stage.total / GIB:.2f}" for stage in planned.stages))
    table.add_row("trained parameters", *(f"{stage.trained / 1e6:.1f}M" for stage in planned.stages))
    table.add_row("rows in a pass", *(str(stage.rows_per_device or "") for stage in planned.stages))
    table.add_row("gradient checkpointing", *("on" if stage.checkpointing else "off" for stage in planned.stages))
    if tflops:
        table.add_row("hours at most", *(f"{stage.hours(processes, tflops):.1f}" for stage in planned.stages))
    PlainConsole().print(table)
