"""`ultrafuser generate` and `inspect`: answer prompts, and show who led at each token."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from typer import Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import (
    Device,
    Dtype,
    Folder,
    Json,
    MaxNewTokens,
    OnBadRow,
    Prompt,
    Seed,
    System,
    Temperature,
    TopP,
    TrustRemoteCode,
    check_characters,
    check_choice,
    load_folder,
    report_reading,
    row_reader,
)
from ultrafuser.errors import DataError
from ultrafuser.printing import PlainConsole, echo, echo_answer
from ultrafuser.progress import ConsoleProgress

Response = Annotated[str | None, Option(help="Show the weights of this answer instead of generating one.")]


@how_to_go_on(f"Answers are printed at the end. {AGAIN}", resumes=False)
def generate_command(
    folder: Folder,
    prompt: Prompt = None,
    file: Annotated[
        Path | None,
        Option(
            help="Text file with one prompt per line, or rows (JSONL, JSON, CSV, Parquet) to answer again. Default: standard input."
        ),
    ] = None,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    num_beams: Annotated[int, Option(min=1, help="Number of beams. 1: no beam search.")] = 1,
    speculative: Annotated[
        str | None,
        Option(
            help="Draft tokens and check several in one pass: 'ngram' (from the text itself), 'specialist' (one runs ahead) or "
            "'auto' (both). The answers stay the same."
        ),
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Number of prompts per batch.")] = 8,
    on_bad_row: OnBadRow = "stop",
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Answer prompts, in batches."""
    if speculative is not None:
        from ultrafuser.model.speculation import MODES

        check_choice("--speculative", speculative, MODES)
    progress = ConsoleProgress()
    chats = _conversations(prompt, file, system, on_bad_row, progress)
    model, renderer = load_folder(folder, dtype, device, seed, trust_remote_code)
    from ultrafuser.inspect.run import answer

    options = _sampling(max_new_tokens, temperature, top_p) | {"num_beams": num_beams, "speculative": speculative}
    progress.start("answers", len(chats))
    answers: list[str] = []
    for start in range(0, len(chats), batch_size):
        batch = chats[start : start + batch_size]
        answers += [renderer.answer_text(ids) for ids in answer(model, renderer, batch, **options)]
        progress.advance(len(batch))
    progress.finish()
    if as_json:
        pairs = [{"prompt": chat[-1]["content"], "answer": text} for chat, text in zip(chats, answers, strict=True)]
        echo(json.dumps(pairs, ensure_ascii=False))
        return
    for chat, text in zip(chats, answers, strict=True):
        echo_answer(f"> {chat[-1]['content']}\n{text}\n" if len(chats) > 1 else text)


@how_to_go_on(f"Nothing was written. {AGAIN}", resumes=False)
def inspect_command(
    folder: Folder,
    prompt: Prompt = None,
    system: System = None,
    response: Response = None,
    file: Annotated[
        Path | None, Option(help="Show the weights of the answers in these rows (JSONL, JSON, ...).")
    ] = None,
    domain: Annotated[str | None, Option(help="Domain of the rows in --file. Default: as each row names it.")] = None,
    limit: Annotated[int | None, Option(min=1, help="Read at most N rows of --file.")] = None,
    on_bad_row: OnBadRow = "stop",
    weights: Annotated[bool, Option("--weights", help="Also print the weights of every token.")] = False,
    html: Annotated[Path | None, Option(help="Write an HTML page with coloured tokens.")] = None,
    png: Annotated[
        Path | None, Option(help="Write a figure of the first answer, or of the weights by domain for --file.")
    ] = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show in colours which specialist leads at each token of an answer. For a file, show mean weights by domain."""
    _check_inspected(prompt, file, response)
    from ultrafuser.data.files import check_target
    from ultrafuser.data.sources import load_rows
    from ultrafuser.inspect.trace import mean_weights_by_domain

    for target in filter(None, (html, png)):
        check_target(target, force=True)
    reader = row_reader(on_bad_row)
    rows = load_rows(str(file), domain=domain, limit=limit, reader=reader) if file else []
    progress = ConsoleProgress()
    report_reading(reader, progress)
    chats = [_chat(text, system) for text in prompt or []]
    model, renderer = load_folder(folder, dtype, device, seed, trust_remote_code)
    from ultrafuser.inspect.run import answer, trace_rows, trace_tokens

    if response is not None:
        answers = [renderer.tokenizer.encode(response, add_special_tokens=False)]
    else:
        options = _sampling(max_new_tokens, temperature, top_p)
        answers = answer(model, renderer, chats, progress=progress, **options) if chats else []
    with progress.waiting("reading the answers"):
        traces = [trace_tokens(model, renderer, c, ids) for c, ids in zip(chats, answers, strict=True) if ids]
        traces += trace_rows(model, renderer, rows) if file else []
    if not traces:
        raise DataError(
            "there is no answer to inspect: the model generated none, or no row of the file fits its context"
        )
    means = mean_weights_by_domain(traces) if file else {}
    _write_traces(traces, means, html, png)
    if as_json:
        echo(json.dumps({"mean_weights": means, "traces": [trace.to_dict() for trace in traces]}, ensure_ascii=False))
    elif file:
        _print_means(means)
    else:
        _print_traces(traces, weights)


def _print_traces(traces: Sequence[Any], weights: bool) -> None:
    from ultrafuser.inspect.terminal import render_terminal

    for trace in traces:
        PlainConsole().print(render_terminal(trace, weights=weights))


def _check_inspected(prompt: list[str] | None, file: Path | None, response: str | None) -> None:
    if (file is None) == (not prompt):
        raise DataError("inspect needs either --prompt or --file")
    if response is not None and (not prompt or len(prompt) > 1):
        raise DataError("--response needs exactly one --prompt")
    check_characters({"--response": response})


# ---------------------------------------------------------------- shared by the commands


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    return options | ({"temperature": temperature, "top_p": top_p} if temperature > 0 else {})


def _chat(text: str, system: str | None) -> list[dict[str, str]]:
    check_characters({"prompt": text, "--system": system})
    opening = [{"role": "system", "content": system}] if system else []
    return [*opening, {"role": "user", "content": text}]


def _conversations(
    prompts: list[str] | None, file: Path | None, system: str | None, on_bad_row: str, progress: ConsoleProgress
) -> list[list[dict[str, str]]]:
    """The conversations to answer: from the options, a file or standard input. Rows lose their last answer."""
    if prompts and file:
        raise DataError("give --prompt or --file, not both")
    from ultrafuser.data.records import read_text
    from ultrafuser.data.row_files import file_type
    from ultrafuser.data.sources import load_rows

    if file is not None and file_type(file) is not None:
        reader = row_reader(on_bad_row)
        rows = load_rows(str(file), domain="any", reader=reader)
        report_reading(reader, progress)
        return [row.chat()[:-1] for row in rows]
    if file is not None and not file.is_file():
        raise DataError(f"{file}: no such file, expected a text file with one prompt per line, or rows")
    if prompts:
        lines = prompts
    elif file is not None:
        lines = read_text(file).splitlines()
    elif sys.stdin.isatty():
        raise DataError("no prompt. Give --prompt TEXT, --file FILE, or text on standard input")
    else:
        lines = sys.stdin.read().splitlines()
    texts = [line for line in lines if line.strip()]
    if not texts:
        raise DataError(f"{'--prompt' if prompts else file or 'standard input'}: holds no prompt")
    return [_chat(text, system) for text in texts]


def _write_traces(traces: list[Any], means: dict[str, Any], html: Path | None, png: Path | None) -> None:
    """Write the page and the figure, both or none."""
    from ultrafuser.data.files import atomic_files, naming

    targets = {"html": html, "png": png}
    files = {kind: file for kind, file in targets.items() if file is not None}
    with atomic_files(list(files.values()), force=True) as drafts:
        for (kind, file), draft in zip(files.items(), drafts, strict=True):
            with naming(file, draft):
                if kind == "html":
                    _write_page(traces, draft)
                else:
                    _write_figure(traces, means, draft)


def _write_page(traces: list[Any], file: Path) -> None:
    from ultrafuser.inspect.html import trace_page

    file.write_text(trace_page("Which specialist leads", traces), encoding="utf-8")


def _write_figure(traces: list[Any], means: dict[str, Any], file: Path) -> None:
    from ultrafuser.display.drawing import png_bytes
    from ultrafuser.inspect.figure import trace_png
    from ultrafuser.report.figures.gate import weights_by_domain

    if means:
        file.write_bytes(png_bytes(weights_by_domain(means)))
    else:
        trace_png(traces[0], file)


def _print_means(means: dict[str, dict[str, float]]) -> None:
    table = Table(title="mean gate weight by domain")
    table.add_column("domain")
    for name in next(iter(means.values())):
        table.add_column(name, justify="right")
    for domain, row in means.items():
        table.add_row(domain, *(f"{value:.3f}" for value in row.values()))
    PlainConsole().print(table)
