"""`ultrafuser synth RECIPE`, and its `status`, `join` and `review`."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from ultrafuser.cli.options import Json, echo, overrides_like
from ultrafuser.errors import DataError, RecipeError

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
    "`ultrafuser synth RECIPE` is short for `ultrafuser synth run RECIPE`; `ultrafuser synth run --help` shows its options.",
)
SynthRecipeFile = Annotated[
    Path, typer.Argument(help="A synthesis recipe (YAML); `docs/synthesis.md` lists its fields.")
]
Overrides = Annotated[list[str] | None, overrides_like("calls.responses.temperature=0.3 or filters.language=null")]


@synth_app.command(name=RUN)
def run_command(
    recipe: SynthRecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Estimate calls, tokens and cost, up to --until, and ask nothing.")
    ] = False,
    budget_usd: Annotated[
        float | None,
        typer.Option(min=0.0, help="Dollars to spend at most, over all runs on this store; default: the recipe's."),
    ] = None,
    budget_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens read and written, over all runs on this store, after which it stops."),
    ] = None,
    until: Annotated[
        str | None,
        typer.Option(
            help="Stop after a stage, to look at what came of it: meta_topics, sub_topics (topics.json), instructions, expand, "
            "complex (instructions.jsonl), responses, checks, judge, turns (report.json)."
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            help="I/N, such as 2/8: ask for that part of the sub-topics alone; `synth join` puts the parts together."
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Ask again what failed for good, e.g. after raising a model's context."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Synthesise a data set: ask what is missing, then filter, balance and write it.

    Every reply is stored at once: run the same command again after an interruption, and nothing is asked twice.
    """
    from ultrafuser.synth.recipe import load_synth_recipe

    typed = load_synth_recipe(recipe, overrides or [])
    part = _shard(shard)
    if dry_run:
        from ultrafuser.synth.plan import plan
        from ultrafuser.synth.prompts import Prompts

        given = {"--shard": shard, "--budget-usd": budget_usd, "--budget-tokens": budget_tokens,
                 "--retry-failed": retry_failed or None}  # fmt: skip
        if odd := [name for name, value in given.items() if value is not None]:
            raise RecipeError(f"{odd[0]} has no part in --dry-run, which estimates a whole run; leave one of them out")
        planned = plan(typed, Prompts(typed.prompts), until)
        if as_json:
            echo(json.dumps([vars(one) for one in planned]))
        else:
            Console().print(_plan_table(planned))
        return
    from ultrafuser.progress import ConsoleProgress, quiet_libraries
    from ultrafuser.synth.pipeline import synthesise

    if any(model.endpoint == "local" for model in typed.used_models()):
        quiet_libraries()
    done = synthesise(
        typed,
        budget_usd=budget_usd,
        budget_tokens=budget_tokens,
        shard=part,
        until=until,
        retry_failed=retry_failed,
        progress=ConsoleProgress(),
    )
    _say_done(typed.output, done, as_json)


@synth_app.command(name="status")
def status_command(recipe: SynthRecipeFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Show how far a synthesis is: items and yield of every stage, calls, cost, time left."""
    from ultrafuser.synth.recipe import load_synth_recipe
    from ultrafuser.synth.status import calls, status

    typed = load_synth_recipe(recipe, overrides or [])
    if as_json:
        echo(json.dumps(status(typed).to_dict()))
        return
    so_far = calls(typed)
    pace = "none in the last minutes" if so_far.a_second is None else f"{60 * so_far.a_second:.1f} a minute"
    echo(f"calls: {so_far.answered} answered, {so_far.under_way} under way ({pace}); cost: ${so_far.spent_usd:.4f}")
    now = status(typed)
    Console().print(_status_table(now))
    rows = ", ".join(f"{domain} {number}" for domain, number in now.rows.items()) or "none"
    echo(f"rows if it ended now, near duplicates included: {rows}")
    left = "unknown" if now.left_s is None else _duration(now.left_s)
    echo(f"left: about {now.left_calls} calls, ${now.left_usd:.4f} (time: {left})")


@synth_app.command(name="join")
def join_command(
    recipe: SynthRecipeFile,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="Stores of shards (calls.sqlite) to take over, and recipe fields to change (KEY=VALUE).",
            metavar="STORE...",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Put the stores of shards together and write the data set of all that is there, without asking anything.

    Without a store it writes the data set again: after a review, with other filters, or from a run that was given up.
    """
    from ultrafuser.progress import ConsoleProgress
    from ultrafuser.synth.recipe import load_synth_recipe

    given = arguments or []
    overrides = [one for one in given if re.match(r"[a-z_]+[\w.]*=", one) and not Path(one).exists()]
    stores = [Path(one) for one in given if one not in overrides]
    typed = load_synth_recipe(recipe, overrides)
    if missing := [file for file in stores if not file.is_file()]:
        raise DataError(f"{missing[0]}: no such file, expected the calls.sqlite of a shard")
    from ultrafuser.synth.pipeline import join, write_again

    progress = ConsoleProgress()
    done = join(typed, stores, progress) if stores else write_again(typed, progress)
    _say_done(typed.output, done, as_json)


@synth_app.command(name="review")
def review_command(
    recipe: SynthRecipeFile,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to serve the page at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the page.")] = 7860,
) -> None:
    """Read the rows in a browser and accept, edit or reject them; decisions go back to the store at once.

    Run `ultrafuser synth RECIPE` again afterwards: the data set is written anew with them.
    """
    from ultrafuser.synth.recipe import load_synth_recipe

    typed = load_synth_recipe(recipe, overrides or [])
    from ultrafuser.synth.review.page import review_page
    from ultrafuser.synth.review.session import ReviewSession

    page = review_page(ReviewSession.open(typed))
    echo(f"review page: http://{host}:{port} (Ctrl-C ends it)")
    page.launch(server_name=host, server_port=port, quiet=True, share=False)


# ---------------------------------------------------------------- words and tables


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise RecipeError(f"--shard {text}: expected NUMBER/HOW-MANY such as 1/8, counted from 1")
    return int(match[1]), int(match[2])


def _say_done(output: str, done: Any, as_json: bool) -> None:
    rows: dict[str, int] = {}
    for row in done.rows:
        rows[row.domain] = rows.get(row.domain, 0) + 1
    if as_json:
        echo(
            json.dumps(
                {"folder": output, "rows": rows, "stopped_after": done.stopped_after, "stages": done.ledger.rows()}
            )
        )
        return
    if done.stopped_after is not None:
        files = {"report": "report.json", "topics": "topics.json"}
        files |= {} if done.instructions is None else {"instructions": "instructions.jsonl"}
        echo(f"stopped after {done.stopped_after}; " + ", ".join(f"{k}: {Path(output) / v}" for k, v in files.items()))
        return
    echo(f"{len(done.rows)} rows: " + ", ".join(f"{domain} {number}" for domain, number in sorted(rows.items())))
    if missing := done.ledger.pending():
        echo(f"{missing} items have no reply yet, and what would come of them is not in it; run the recipe to its end")
    echo(
        f"data set: {Path(output) / 'data.jsonl'}, {Path(output) / 'data.parquet'}; card: {Path(output) / 'README.md'}"
    )


def _plan_table(planned: list[Any]) -> Any:
    from rich.box import HORIZONTALS
    from rich.table import Table

    title = "estimate in tokens, if every reply can be used: four characters a token, answers as long as the paper's"
    # narrow enough for the paper's sizes in 80 columns
    out = Table(title=title, title_justify="left", box=HORIZONTALS, padding=(0, 1, 0, 0))
    out.add_column("stage", no_wrap=True)
    out.add_column("domain", overflow="fold")
    out.add_column("model", overflow="fold")
    for name in ("calls", "read", "written", "dollars"):
        out.add_column(name, justify="right", no_wrap=True)
    for one in planned:
        out.add_row(
            f"{one.stage} {one.part}".rstrip(),
            one.domain,
            one.model,
            f"{one.calls:,}",
            f"{one.prompt_tokens:,}",
            f"{one.completion_tokens:,}",
            f"{one.usd:,.2f}",
        )
    sums = [sum(getattr(one, key) for one in planned) for key in ("calls", "prompt_tokens", "completion_tokens")]
    out.add_section()
    out.add_row("all", "", "", *(f"{number:,}" for number in sums), f"{sum(one.usd for one in planned):,.2f}")
    return out


def _status_table(now: Any) -> Any:
    from rich.box import HORIZONTALS
    from rich.table import Table

    out = Table(box=HORIZONTALS)
    out.add_column("stage")
    for name in ("calls", "planned", "asked", "kept", "open", "rejected", "yield", "dollars"):
        out.add_column(name, justify="right")
    out.add_column("why rejected", overflow="fold")
    for one in now.stages:
        kept = "" if one.share_kept is None else f"{one.share_kept:.0%}"
        reasons = ", ".join(f"{reason} {number}" for reason, number in list(one.reasons.items())[:3])
        calls, planned = (f"{one.answered}", f"{one.planned}") if one.planned else ("", "")
        out.add_row(one.stage, calls, planned, f"{one.asked}", f"{one.kept}", f"{one.open}", f"{one.rejected}", kept,
                    f"{one.usd:.4f}" if one.planned else "", reasons)  # fmt: skip
    return out


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{max(1, minutes)} min"
