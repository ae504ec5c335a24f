"""`ultrafuser data ...`: look at data sets, clean them, split them, convert them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from ultrafuser.cli.options import DTYPES, Device, Dtype, Json, Seed, echo, quiet
from ultrafuser.errors import DataError, RecipeError

data_app = typer.Typer(
    name="data",
    help="Data sets: count, map, decontaminate, deduplicate, split, convert and validate rows.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Rows: files (JSONL, JSON, CSV, Parquet), folders, globs, package:MODULE/FILE, hub ids.", metavar="DATA..."
    ),
]
Domain = Annotated[str | None, typer.Option(help="The domain of all rows; default: each row's own.")]
Force = Annotated[bool, typer.Option("--force", help="Replace files that are there already.")]
Report = Annotated[Path | None, typer.Option(help="Write the whole report as JSON, too.")]
Cleaned = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", help="The rows that are kept (.jsonl, .json, .csv, .parquet); default: only report."
    ),
]
On = Annotated[str, typer.Option(help="What is compared: conversation, instructions or answers.")]
Threshold = Annotated[float, typer.Option(help="Jaccard similarity from which on rows are near duplicates.")]
Shingle = Annotated[int, typer.Option(min=1, help="Words in a row that make a shingle.")]
ExactOnly = Annotated[bool, typer.Option("--exact-only", help="Leave near duplicates alone; needs no datasketch.")]


@data_app.command(name="stats")
def stats_command(
    sources: Sources,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", "-t", help="Hub id or folder of the tokenizer that counts tokens.")
    ] = None,
    domain: Domain = None,
    as_json: Json = False,
) -> None:
    """Count conversations, topics, tokens and turns by domain, and rows by source and licence."""
    from ultrafuser.data.tools.statistics import data_statistics, load_tokenizer
    from ultrafuser.data.tools.streaming import stream_rows
    from ultrafuser.progress import ConsoleProgress

    counter = None
    if tokenizer is not None:
        with quiet():
            counter = load_tokenizer(tokenizer)
    rows = stream_rows(sources, domain=domain, progress=ConsoleProgress(), label="rows counted")
    found = data_statistics(rows, counter)
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
        return
    every = {**found["domains"], "all": found["all"]}
    heads = ["conversations", "topics", "sub-topics", "turns"]
    heads += ["tokens, mean", "median", "longest"] if counter is not None else []
    _print_table("rows by domain", ["domain", *heads], (_counts(name, own) for name, own in every.items()))
    for what in ("sources", "licences"):
        lines = [
            [name, value or "(none given)", f"{count:,}"]
            for name, own in found["domains"].items()
            for value, count in own[what].items()
        ]
        _print_table(f"rows by domain and {what[:-1]}", ["domain", what[:-1], "rows"], lines, text_columns=2)


def _counts(name: str, own: dict[str, Any]) -> list[str]:
    cells = [
        name,
        f"{own['conversations']:,}",
        f"{own['topics']:,}",
        f"{own['subtopics']:,}",
        f"{own['mean_turns']:.2f}",
    ]
    if tokens := own.get("tokens"):
        cells += [f"{tokens['mean']:,.2f}", f"{tokens['median']:,.0f}", f"{tokens['longest']:,}"]
    return cells


@data_app.command(name="map")
def map_command(
    sources: Sources,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="What reads the rows: a causal or sentence embedding model, BASE+ADAPTER, GGUF, fused.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("map.html"),
    png: Annotated[Path | None, typer.Option(help="Write the map as a picture, too.")] = None,
    part: Annotated[str, typer.Option(help="What is read: instructions, answers or conversation.")] = "instructions",
    per_domain: Annotated[int, typer.Option(min=1, help="Rows of each domain at most, drawn by --seed.")] = 5000,
    method: Annotated[str, typer.Option(help="tsne, or umap where umap-learn is installed.")] = "tsne",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens read of each row.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows read at once.")] = 16,
    domain: Domain = None,
    force: Force = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw every row as a point, near those that a model reads alike, coloured by domain: a page to zoom and search."""
    from ultrafuser.data.tools.near_duplicates import COMPARED_ROLES
    from ultrafuser.data.tools.streaming import stream_rows
    from ultrafuser.data.writing import atomic_file, check_target
    from ultrafuser.datamap import layout as maps
    from ultrafuser.datamap.page import map_figure, map_page
    from ultrafuser.progress import ConsoleProgress

    if part not in COMPARED_ROLES:
        raise DataError(f"--part {part!r}: expected one of {', '.join(COMPARED_ROLES)}")
    if method not in maps.METHODS:
        raise DataError(f"--method {method!r}: expected one of {', '.join(maps.METHODS)}")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    for target in filter(None, (output, png)):
        check_target(target, force=force)
    progress = ConsoleProgress()
    rows = maps.sample(stream_rows(sources, domain=domain, progress=progress, label="rows read"), per_domain, seed)
    with quiet():
        from ultrafuser.datamap.embed import embed, load_reader

        reader = load_reader(model, dtype=dtype, device=device)
        texts = [maps.text_of(row, part) for row in rows]
        vectors = embed(reader, texts, max_tokens=max_tokens, batch_size=batch_size, progress=progress)
    vectors = maps.principal(vectors, seed)
    points = maps.as_points(rows, maps.lay_out(vectors, method, seed=seed, progress=progress), part)
    agreement = maps.neighbour_agreement(vectors, [row.domain for row in rows])
    name = Path(model).name if Path(model).exists() else model
    text = map_page(points, model=name, method=method, part=part, agreement=agreement)
    with atomic_file(output, force=force) as draft:
        draft.write_text(text, encoding="utf-8")
    if png is not None:
        from ultrafuser.display.drawing import png_bytes

        picture = png_bytes(map_figure(points))
        with atomic_file(png, force=force) as draft:
            draft.write_bytes(picture)
    counts = {own: sum(row.domain == own for row in rows) for own in agreement}
    if as_json:
        facts = {"html": str(output), "png": str(png) if png else None, "method": method, "model": model, "part": part}
        echo(json.dumps(facts | {"rows": counts, "neighbour_agreement": agreement}, ensure_ascii=False))
        return
    lines = [[own, f"{counts[own]:,}", f"{agreement[own]:.3f}"] for own in counts]
    _print_table("rows on the map", ["domain", "rows", "neighbours of the same domain"], lines)
    echo(f"map: {output}" + (f", {png}" if png else ""))


@data_app.command(name="decontaminate")
def decontaminate_command(
    sources: Sources,
    against: Annotated[
        list[str],
        typer.Option(
            "--against", "-a", help="Test data: JSONL, JSON, CSV, Parquet or text, a folder, a glob; repeat it."
        ),
    ],
    output: Cleaned = None,
    report: Report = None,
    field: Annotated[
        list[str] | None, typer.Option(help="A top-level field of the test items to look at; repeat it; default: all.")
    ] = None,
    ngram: Annotated[int, typer.Option(min=3, help="Words in a row that a row and a test text must not share.")] = 13,
    min_words: Annotated[
        int,
        typer.Option(min=3, help="Test texts from this many words up to --ngram match as a whole; see the guide."),
    ] = 8,
    domain: Domain = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Drop rows that share 13 words in a row with test data, and report which test item each one touched."""
    from ultrafuser.data.tools.decontaminate import Rule, decontaminate
    from ultrafuser.progress import ConsoleProgress

    done = decontaminate(
        sources, against, output, fields=field or [], rule=Rule(ngram, min_words), domain=domain, report=report,
        force=force, progress=ConsoleProgress(),
    )  # fmt: skip
    if as_json:
        echo(json.dumps(done.to_dict(), ensure_ascii=False))
        return
    if done.dropped_by_test:
        lines = [[test, f"{count:,}"] for test, count in done.dropped_by_test.items()]
        _print_table("rows that touch each test file", ["test file", "rows"], lines)
    by_domain = ", ".join(f"{name} {count:,}" for name, count in done.dropped_by_domain.items())
    echo(f"{done.rows:,} rows: {done.kept:,} kept, {done.dropped:,} dropped" + (f" ({by_domain})" if by_domain else ""))
    looked = done.test_texts
    echo(
        f"test texts: {looked['ngram']:,} by {ngram}-grams, {looked['whole']:,} whole, {looked['message']:,} as a whole "
        f"message, {looked['ignored']:,} too short"
    )
    _say_files(output, report)


@data_app.command(name="dedup")
def dedup_command(
    sources: Sources,
    output: Cleaned = None,
    report: Report = None,
    threshold: Threshold = 0.7,
    on: On = "conversation",
    shingle: Shingle = 3,
    exact_only: ExactOnly = False,
    domain: Domain = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Drop exact and near duplicates; of each cluster the first row by id stays."""
    from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, deduplicate
    from ultrafuser.progress import ConsoleProgress

    rule = NearDuplicateRule(None if exact_only else threshold, on, shingle)
    found = deduplicate(
        sources, output, rule=rule, domain=domain, report=report, force=force, progress=ConsoleProgress()
    )
    if as_json:
        echo(json.dumps(found, ensure_ascii=False))
        return
    largest = sorted(found["clusters"], key=lambda one: -len(one["exact"]) - len(one["near"]))[:10]
    if largest:
        lines = [[one["kept"], one["domain"], f"{len(one['exact']):,}", f"{len(one['near']):,}"] for one in largest]
        _print_table("largest clusters", ["kept", "domain", "exact", "near"], lines, text_columns=2)
    echo(
        f"{found['rows']:,} rows: {found['kept']:,} kept, {found['exact_duplicates']:,} exact and "
        f"{found['near_duplicates']:,} near duplicates dropped"
    )
    _say_files(output, report)


@data_app.command(name="split")
def split_command(
    sources: Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the parts and split.json.")],
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            "-p",
            help="NAME=SHARE; repeat it; default: train=0.9, validation=0.05, test=0.05.",
            metavar="PART",
        ),
    ] = None,
    kind: Annotated[str, typer.Option(help="Kind of the files: jsonl, json, csv or parquet.")] = "jsonl",
    threshold: Threshold = 0.7,
    on: On = "conversation",
    shingle: Shingle = 3,
    exact_only: ExactOnly = False,
    domain: Domain = None,
    force: Force = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Split rows into parts, each with its share of every domain; duplicates never come into different parts."""
    from ultrafuser.data.tools.near_duplicates import NearDuplicateRule
    from ultrafuser.data.tools.split import split
    from ultrafuser.progress import ConsoleProgress

    rule = NearDuplicateRule(None if exact_only else threshold, on, shingle)
    report = split(
        sources, output, _shares(part or ["train=0.9", "validation=0.05", "test=0.05"]), seed=seed, rule=rule,
        kind=kind, domain=domain, force=force, progress=ConsoleProgress(),
    )  # fmt: skip
    if as_json:
        echo(json.dumps(report, ensure_ascii=False))
        return
    domains = sorted({name for own in report["parts"].values() for name in own["domains"]})
    lines = [
        [name, f"{own['rows']:,}", *(f"{own['domains'].get(one, 0):,}" for one in domains)]
        for name, own in report["parts"].items()
    ]
    _print_table("rows of each part", ["part", "all", *domains], lines)
    echo(f"parts: {output}")


def _shares(given: Iterable[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in given:
        name, separator, value = text.partition("=")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not separator or not name or share <= 0 or "/" in name:
            raise DataError(f"--part {text!r}: expected NAME=SHARE, such as train=0.9")
        if name in shares:
            raise DataError(f"--part {text!r}: there is another part named {name!r}; names must differ")
        shares[name] = share
    return shares


@data_app.command(name="convert")
def convert_command(
    sources: Sources,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write: .jsonl, .json, .csv, .parquet.")],
    layout: Annotated[
        str | None,
        typer.Option(
            help="messages, conversations (ShareGPT), or columns such as instruction/input/output or prompt/completion; "
            "default: messages, in CSV instruction/input/output."
        ),
    ] = None,
    domain: Domain = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many rows.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write rows of any known layout and kind of file in another."""
    from ultrafuser.data.tools.convert import convert
    from ultrafuser.progress import ConsoleProgress

    number = convert(sources, output, layout, domain=domain, limit=limit, force=force, progress=ConsoleProgress())
    if as_json:
        echo(json.dumps({"rows": number, "output": str(output), "layout": layout}))
    else:
        echo(f"{number:,} rows: {output}")


@data_app.command(name="validate")
def validate_command(sources: Sources, domain: Domain = None, as_json: Json = False) -> None:
    """Look at every row and list every problem with its line; exit code 2 when there is one."""
    from ultrafuser.data.tools.validate import validate
    from ultrafuser.progress import ConsoleProgress

    found = validate(sources, domain=domain, progress=ConsoleProgress())
    if as_json:
        echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        for one in found.problems:
            echo(f"{one['where']}: {one['problem']}")
        for note in found.notes:
            echo(f"note: {note}")
        domains = ", ".join(f"{name} {count:,}" for name, count in found.domains.items())
        echo(f"{found.rows:,} rows" + (f" ({domains})" if domains else "") + f", {len(found.problems):,} problems")
    if found.problems:
        raise DataError(f"{len(found.problems)} problems in {found.bad_rows} of {found.rows} rows; see the list")


# ---------------------------------------------------------------- shared by the commands


def _print_table(title: str, heads: list[str], lines: Iterable[list[str]], text_columns: int = 1) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left")
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < text_columns else "right", overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))  # a source may hold brackets
    Console().print(table)


def _say_files(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            echo(f"written: {file}")
