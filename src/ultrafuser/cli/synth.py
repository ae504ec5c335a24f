"""`ultrafuser synth`: run, status, join and review of a synthesis."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import HORIZONTALS
from rich.table import Table
from typer import Argument, Option
from typer.core import TyperGroup

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import Json, TrustRemoteCode, overrides_like
from ultrafuser.errors import DataError, RecipeError
from ultrafuser.printing import PlainConsole, echo
from ultrafuser.progress import ConsoleProgress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.synth.recipe import SynthRecipe

RUN = "run"


class RunByDefault(TyperGroup):
    """`ultrafuser synth recipe.yaml` is `ultrafuser synth run recipe.yaml`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = [RUN, *args]
        return super().parse_args(ctx, args)


synth_app = typer.Typer(
    cls=RunByDefault,
    no_args_is_help=True,
    help="Synthesise instruction data: topics, instructions, answers, filters, a balanced data set.\n\n"
    "`ultrafuser synth RECIPE` is short for `ultrafuser synth run RECIPE`. `ultrafuser synth run --help` shows its options.",
)
SynthRecipeFile = Annotated[Path, Argument(help="Synthesis recipe (YAML). `docs/synthesis.md` lists the fields.")]
BudgetUsd = Annotated[
    float | None,
    Option(min=0.0, help="Spend at most this many dollars, over all runs on this store. Default: as in the recipe."),
]
BudgetTokens = Annotated[
    int | None, Option(min=1, help="Stop after this many prompt and completion tokens, over all runs on this store.")
]
Until = Annotated[
    str | None,
    Option(
        help="Stop after this stage, to check its results: meta_topics, sub_topics (topics.json), instructions, expand, "
        "complex (instructions.jsonl), responses, checks, judge, turns (report.json)."
    ),
]
Shard = Annotated[
    str | None,
    Option(help="I/N, such as 2/8: process only shard I of N of the sub-topics. `synth join` joins the shards."),
]
RetryFailed = Annotated[
    bool,
    Option("--retry-failed", help="Retry requests that failed permanently, e.g. after raising the context of a model."),
]
Overrides = Annotated[list[str] | None, overrides_like("calls.responses.temperature=0.3 or filters.language=null")]


@synth_app.command(name=RUN)
@how_to_go_on(f"{AGAIN}: stored responses are kept, and no request is repeated")
def run_command(
    recipe: SynthRecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Estimate calls, tokens and cost up to --until, and send no request.")
    ] = False,
    budget_usd: BudgetUsd = None,
    budget_tokens: BudgetTokens = None,
    until: Until = None,
    shard: Shard = None,
    retry_failed: RetryFailed = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Synthesise a data set: request the missing responses, then filter, balance and write the rows.

    Every response is stored at once. Rerun the same command after an interruption: no request is repeated.
    """
    from ultrafuser.synth.recipe import load_synth_recipe

    typed = load_synth_recipe(recipe, overrides or [])
    if trust_remote_code:
        local = [model.name for model in typed.used_models() if model.endpoint == "local"]
        trust = [f"models.{name}.trust_remote_code=true" for name in local]
        typed = load_synth_recipe(recipe, [*(overrides or []), *trust])
    shard_numbers = _shard(shard)
    if dry_run:
        options = {
            "--shard": shard,
            "--budget-usd": budget_usd,
            "--budget-tokens": budget_tokens,
            "--retry-failed": retry_failed or None,
        }
        _dry_run(typed, until, [name for name, value in options.items() if value is not None], as_json)
        return
    from ultrafuser.synth.pipeline import synthesise

    if any(model.endpoint == "local" for model in typed.used_models()):
        quiet_libraries()
    outcome = synthesise(
        typed,
        budget_usd=budget_usd,
        budget_tokens=budget_tokens,
        shard=shard_numbers,
        until=until,
        retry_failed=retry_failed,
        progress=ConsoleProgress(),
    )
    _echo_results(typed.output, outcome, as_json)


def _dry_run(recipe: SynthRecipe, until: str | None, unused_options: list[str], as_json: bool) -> None:
    from ultrafuser.synth.plan import plan
    from ultrafuser.synth.prompts import Prompts

    if unused_options:
        raise RecipeError(
            f"{unused_options[0]} does not apply to --dry-run, which estimates a whole run. Remove one of them"
        )
    estimates = plan(recipe, Prompts(recipe.prompts), until)
    if as_json:
        echo(json.dumps([vars(estimate) for estimate in estimates]))
    else:
        PlainConsole().print(_plan_table(estimates))


@synth_app.command(name="status")
@how_to_go_on(AGAIN)
def status_command(recipe: SynthRecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show the progress of a synthesis: items and yield of every stage, calls, cost, remaining time."""
    from ultrafuser.synth.recipe import load_synth_recipe
    from ultrafuser.synth.status import calls, status

    typed = load_synth_recipe(recipe, overrides or [])
    if as_json:
        echo(json.dumps(status(typed).to_dict()))
        return
    counts = calls(typed)
    pace = "none in the last minutes" if counts.a_second is None else f"{60 * counts.a_second:.1f} per minute"
    echo(f"calls: {counts.answered} answered, {counts.under_way} under way ({pace}), cost: ${counts.spent_usd:.4f}")
    progress = status(typed)
    PlainConsole().print(_status_table(progress))
    rows = ", ".join(f"{domain} {count}" for domain, count in progress.rows.items()) or "none"
    echo(f"rows if it ended now, near duplicates included: {rows}")
    remaining = "unknown"
    if progress.left_s is not None:
        minutes = round(progress.left_s / 60)
        remaining = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"
    echo(f"remaining: about {progress.left_calls} calls, ${progress.left_usd:.4f} (time: {remaining})")


@synth_app.command(name="join")
@how_to_go_on(f"{AGAIN}, which writes the whole data set")
def join_command(
    recipe: SynthRecipeFile,
    arguments: Annotated[
        list[str] | None,
        Argument(
            help="Stores of shards (calls.sqlite) to join, and recipe fields to change (KEY=VALUE).", metavar="STORE..."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Join the stores of shards and write the data set of all stored responses, without sending requests.

    Without a store it rewrites the data set: after a review, with other filters, or from an abandoned run.
    """
    from ultrafuser.synth.recipe import load_synth_recipe

    texts = arguments or []
    overrides = [text for text in texts if re.match(r"[a-z_]+[\w.]*=", text) and not Path(text).exists()]
    stores = [Path(text) for text in texts if text not in overrides]
    typed = load_synth_recipe(recipe, overrides)
    if missing := [file for file in stores if not file.is_file()]:
        raise DataError(f"{missing[0]}: no such file, expected the calls.sqlite of a shard")
    from ultrafuser.synth.pipeline import join

    _echo_results(typed.output, join(typed, stores, ConsoleProgress()), as_json)


@synth_app.command(name="review")
@how_to_go_on(f"Decisions are stored. {AGAIN} to go on")
def review_command(
    recipe: SynthRecipeFile,
    overrides: Overrides = None,
    host: Annotated[str, Option(help="Address of the page.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port of the page.")] = 7860,
) -> None:
    """Review the rows in a browser: accept, edit or reject them. Decisions are stored at once.

    Run `ultrafuser synth RECIPE` afterwards to rewrite the data set with the decisions.
    """
    from ultrafuser.synth.recipe import load_synth_recipe

    typed = load_synth_recipe(recipe, overrides or [])
    from ultrafuser.synth.review.page import review_page
    from ultrafuser.synth.review.session import ReviewSession

    page = review_page(ReviewSession.open(typed), host)
    echo(f"review page: http://{host}:{port} (press Ctrl-C to stop)")
    page.launch(server_name=host, server_port=port, quiet=True, share=False)


# ---------------------------------------------------------------- words and tables


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"--shard {text}: expected I/N such as 1/8, counted from 1")
    return int(match[1]), int(match[2])


def _echo_results(output: str, outcome: Any, as_json: bool) -> None:
    rows = Counter(row.domain for row in outcome.rows)
    stopped_after, folder = outcome.stopped_after, Path(output)
    if as_json:
        facts = {"folder": output, "rows": rows, "stopped_after": stopped_after, "stages": outcome.ledger.rows()}
        echo(json.dumps(facts))
        return
    if stopped_after is not None:
        files = {"report": "report.json", "topics": "topics.json"}
        files |= {} if outcome.instructions is None else {"instructions": "instructions.jsonl"}
        echo(f"stopped after {stopped_after}: " + ", ".join(f"{k}: {folder / name}" for k, name in files.items()))
        return
    echo(f"{len(outcome.rows)} rows: " + ", ".join(f"{domain} {count}" for domain, count in sorted(rows.items())))
    if missing := outcome.ledger.pending():
        echo(f"{missing} items have no response yet, so their rows are missing. Run the recipe to its end")
    echo(f"data set: {folder / 'data.jsonl'}, {folder / 'data.parquet'}, card: {folder / 'README.md'}")


def _plan_table(estimates: list[Any]) -> Table:
    title = "estimate in tokens, if every response is usable: four characters per token, answers as long as those of the paper"
    # narrow enough for the paper's sizes in 80 columns
    table = Table(title=title, title_justify="left", box=HORIZONTALS, padding=(0, 1, 0, 0))
    table.add_column("stage", no_wrap=True)
    table.add_column("domain", overflow="fold")
    table.add_column("model", overflow="fold")
    for name in ("calls", "read", "written", "dollars"):
        table.add_column(name, justify="right", no_wrap=True)
    formats = {"calls": ",", "prompt_tokens": ",", "completion_tokens": ",", "usd": ",.2f"}
    for estimate in estimates:
        table.add_row(
            f"{estimate.stage} {estimate.part}".rstrip(),
            estimate.domain,
            estimate.model,
            *(f"{getattr(estimate, key):{form}}" for key, form in formats.items()),
        )
    sums = (f"{sum(getattr(estimate, key) for estimate in estimates):{form}}" for key, form in formats.items())
    table.add_section()
    table.add_row("all", "", "", *sums)
    return table


def _status_table(progress: Any) -> Table:
    table = Table(box=HORIZONTALS)
    table.add_column("stage")
    for name in ("calls", "planned", "asked", "kept", "open", "rejected", "yield", "dollars"):
        table.add_column(name, justify="right")
    table.add_column("why rejected", overflow="fold")
    for stage in progress.stages:
        has_calls = bool(stage.planned)
        table.add_row(
            stage.stage,
            *((f"{stage.answered}", f"{stage.planned}") if has_calls else ("", "")),
            *(f"{count}" for count in (stage.asked, stage.kept, stage.open, stage.rejected)),
            "" if stage.share_kept is None else f"{stage.share_kept:.0%}",
            f"{stage.usd:.4f}" if has_calls else "",
            ", ".join(f"{reason} {count}" for reason, count in list(stage.reasons.items())[:3]),
        )
    return table
