"""`ultrafuser eval` and `ultrafuser compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import (
    DTYPES,
    TRUST,
    Device,
    Dtype,
    Json,
    OnBadRow,
    Seed,
    TrustRemoteCode,
    check_choice,
    overrides_like,
    row_reader,
)
from ultrafuser.errors import RecipeError
from ultrafuser.printing import PlainConsole, echo
from ultrafuser.progress import ConsoleProgress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.evaluate.results import EvalResults

Models = Annotated[
    list[str],
    Argument(
        help="Fused folder, folder or hub id of any causal model, BASE+ADAPTER, GGUF file, or "
        "openai:NAME@http://host/v1. Write NAME=MODEL to name the model.",
        metavar="MODEL...",
    ),
]
Suites = Annotated[
    list[str] | None,
    Option(
        "--suite",
        "-s",
        help="Suite of tasks: quick (loss), paper, paper-cot, code, exams or mt-bench. Repeat it for several.",
    ),
]
Tasks = Annotated[
    str | None, Option("--tasks", "-t", help="Tasks, instead of a suite or in addition: gsm8k,humaneval,loss,mixed,...")
]
Output = Annotated[
    Path, Option("--output", "-o", help="Folder of the results. Rerunning with the same folder resumes.")
]
TestRows = Annotated[
    list[str] | None,
    Option(help="Rows for `loss` and `mixed` (JSONL, JSON, CSV, Parquet). Default: the test rows of the zoo."),
]
DataDir = Annotated[str | None, Option(help="Folder with the files of the benchmarks. Default: the hub.")]
Limit = Annotated[
    int | None, Option(min=1, help="Use at most N documents of each task, and N rows of each domain, drawn by --seed.")
]
Samples = Annotated[int, Option(min=1, help="Number of answers to each code task. Several give pass@k.")]
SamplesTemperature = Annotated[
    float | None,
    Option(min=0.0, help="Sampling temperature for --samples. Default: 0 for one answer, 0.8 for several."),
]
TaskTokens = Annotated[
    int | None, Option(min=1, help="Generate at most N tokens per answer. Default: the limit of each task.")
]
ChatTemplate = Annotated[
    str | None,
    Option(help="Chat template for a model without one: chatml, plain, inst, alpaca, a Jinja file or Jinja text."),
]
Judge = Annotated[
    str | None,
    Option(
        help="Judge of alpaca_eval and mt_bench: NAME@http://host/v1, or a YAML file with the fields of an endpoint "
        "(docs/judged.md)."
    ),
]


@how_to_go_on(f"{AGAIN}, which requests only the missing answers")
def eval_command(
    models: Models,
    suite: Suites = None,
    tasks: Tasks = None,
    output: Output = Path("runs/eval"),
    data: TestRows = None,
    on_bad_row: OnBadRow = "stop",
    data_dir: DataDir = None,
    limit: Limit = None,
    samples: Samples = 1,
    temperature: SamplesTemperature = None,
    max_new_tokens: TaskTokens = None,
    batch_size: Annotated[int, Option(min=1, help="Number of requests per batch.")] = 8,
    chat_template: ChatTemplate = None,
    judge: Judge = None,
    include_path: Annotated[str | None, Option(help="Folder with your lm-eval task files, for --tasks.")] = None,
    unsafe_code: Annotated[bool, Option("--unsafe-code", help="Run generated code without a sandbox.")] = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Measure models: loss by domain, the paper's benchmarks, judged benchmarks, with 95% intervals.

    Every answer is saved in --output at once. Rerun the same command after an interruption: it requests only the missing
    answers.
    """
    check_choice("--dtype", dtype, DTYPES)
    quiet_libraries()
    from ultrafuser.evaluate.lm.load import LoadOptions, endpoint_recipe
    from ultrafuser.evaluate.options import EvalOptions, select_benchmarks
    from ultrafuser.evaluate.run import evaluate_models
    from ultrafuser.evaluate.tasks import TaskOptions, require_lm_eval

    require_lm_eval()
    task_names = [task.strip() for task in (tasks or "").split(",") if task.strip()]
    suites = suite or ([] if task_names else ["quick"])
    names, skipped = select_benchmarks(suites, task_names, has_judge=judge is not None)
    progress = ConsoleProgress()
    if skipped:
        progress.log(f"skipped without --judge: {', '.join(skipped)}")
    options = EvalOptions(
        names,
        required=task_names,
        data=data or [],
        on_bad_row=row_reader(on_bad_row).on_bad_row,
        limit=limit,
        seed=seed,
        judge=endpoint_recipe(judge) if judge else None,
        task_options=TaskOptions(data_dir, unsafe_code, samples, temperature, max_new_tokens, include_path),
        load_options=LoadOptions(chat_template, dtype, device, batch_size, trust_remote_code),
    )
    results = evaluate_models(models, options, output, progress)
    if as_json:
        echo(json.dumps(results))
        return
    PlainConsole().print(_table(results))
    echo(f"results: {output / 'results.json'}, {output / 'table.md'}, with answers and scores by document beside them")


def _table(results: EvalResults) -> Table:
    """Models and columns for the terminal, each number over its interval."""
    from ultrafuser.evaluate.results import cell_texts, columns_of

    columns = columns_of(results)
    title = "nats per response token (lower is better), then benchmarks, with 95% intervals"
    table = Table(title=title, title_justify="left", box=HORIZONTALS)
    table.add_column("model", overflow="fold")
    for _, name in columns:
        table.add_column(name, justify="right")
    for name, model in results["models"].items():
        cells = [cell_texts(model, kind, column) for kind, column in columns]
        table.add_row(name, *(Text(value) + Text(f"\n{interval}", "dim") for value, interval in cells))
    return table


@how_to_go_on(f"{AGAIN}, which skips finished systems and resumes the others")
def compare_command(
    recipe: Annotated[Path, Argument(help="Comparison recipe (YAML). `docs/comparing.md` lists the fields.")],
    overrides: Annotated[list[str] | None, overrides_like("limit=20 or systems.btx.label=BTX")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="List the systems and their state, and run nothing.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Fuse, merge, route or fine-tune: build and measure every system of a recipe, and write one report.

    Rerunning with the same output skips finished systems and rebuilds those whose entry changed.
    """
    from ultrafuser.compare.recipe import load_compare_recipe

    typed = load_compare_recipe(recipe, [*(overrides or []), *(TRUST if trust_remote_code else [])])
    quiet_libraries()
    from ultrafuser.evaluate.tasks import require_lm_eval

    require_lm_eval()
    from ultrafuser.compare.run import compare, system_states, tables

    if dry_run:
        for name, state in system_states(typed).items():
            echo(f"{name}: {state}")
        return
    comparison = compare(typed, ConsoleProgress())
    if as_json:
        echo(json.dumps(comparison.model_dump(mode="json")))
    else:
        PlainConsole().print(*tables(comparison), sep="\n\n")
        echo(f"report: {Path(typed.output) / 'report.html'}")
    if failed := comparison.failed:
        raise RecipeError(
            f"{', '.join(failed)} failed, see the report. Fix the recipe and run again, which repeats only the failed systems"
        )
