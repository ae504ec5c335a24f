"""`ultrafuser data`: count, map, clean, split, convert and validate data sets, and write questions of the exams."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table
from rich.text import Text
from typer import Argument, Option

from ultrafuser.cli.ending import AGAIN, how_to_go_on
from ultrafuser.cli.options import (
    DTYPES,
    Device,
    Dtype,
    Json,
    OnBadRow,
    Seed,
    TrustRemoteCode,
    check_choice,
    report_reading,
    row_reader,
)
from ultrafuser.errors import DataError
from ultrafuser.printing import PlainConsole, echo
from ultrafuser.progress import ConsoleProgress, quiet_libraries

if TYPE_CHECKING:
    from ultrafuser.data.tools.statistics import DomainStatistics

NOTHING_WRITTEN = f"Nothing was written. {AGAIN}"
data_app = typer.Typer(
    name="data",
    help="Count, map, decontaminate, deduplicate, split, convert and validate the rows of data sets. Write exam questions.",
    no_args_is_help=True,
)

Sources = Annotated[
    list[str],
    Argument(
        help="Rows: files (JSONL, JSON, CSV, Parquet, Arrow), folders, globs, package:MODULE/FILE, hub ids.",
        metavar="DATA...",
    ),
]
Domain = Annotated[str | None, Option(help="Domain of all rows. Default: the domain that each row names.")]
Force = Annotated[bool, Option("--force", help="Replace existing files.")]
Report = Annotated[Path | None, Option(help="Also write the full report to this JSON file.")]
Cleaned = Annotated[
    Path | None,
    Option(
        "--output", "-o", help="Write the kept rows to this file (.jsonl, .json, .csv, .parquet). Default: only report."
    ),
]
On = Annotated[str, Option(help="Messages to compare: conversation, instructions or answers.")]
Threshold = Annotated[float, Option(help="Lowest Jaccard similarity of near duplicates.")]
Shingle = Annotated[int, Option(min=1, help="Consecutive words in a shingle.")]
ExactOnly = Annotated[bool, Option("--exact-only", help="Find exact duplicates only. This needs no datasketch.")]


Embedder = Annotated[
    str,
    Option(
        "--model",
        "-m",
        help="Model that embeds the rows: a causal or sentence embedding model, BASE+ADAPTER, GGUF or fused.",
    ),
]


@data_app.command(name="stats")
@how_to_go_on(AGAIN, resumes=False)
def stats_command(
    sources: Sources,
    tokenizer: Annotated[
        str | None, Option("--tokenizer", "-t", help="Hub id or folder of the tokenizer that counts tokens.")
    ] = None,
    domain: Domain = None,
    on_bad_row: OnBadRow = "stop",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Count conversations, topics, tokens and turns by domain, and rows by source and licence."""
    from ultrafuser.data.tools.statistics import data_statistics, load_tokenizer
    from ultrafuser.data.tools.streaming import stream_rows

    counter = None
    if tokenizer is not None:
        quiet_libraries()
        counter = load_tokenizer(tokenizer, trust_remote_code)
    progress, reader = ConsoleProgress(), row_reader(on_bad_row)
    rows = stream_rows(sources, domain=domain, reader=reader, progress=progress, label="rows counted")
    statistics = data_statistics(rows, counter)
    report_reading(reader, progress)
    if as_json:
        echo(json.dumps(statistics, ensure_ascii=False))
        return
    by_domain = {**statistics["domains"], "all": statistics["all"]}
    heads = ["conversations", "topics", "sub-topics", "turns"]
    heads += ["tokens, mean", "median", "longest"] if counter is not None else []
    _print_table("rows by domain", ["domain", *heads], (_cells(name, counts) for name, counts in by_domain.items()))
    columns: dict[str, Literal["sources", "licences"]] = {"source": "sources", "licence": "licences"}
    for head, key in columns.items():
        lines = [
            [name, value or "(none given)", f"{count:,}"]
            for name, counts in statistics["domains"].items()
            for value, count in counts[key].items()
        ]
        _print_table(f"rows by domain and {head}", ["domain", head, "rows"], lines, text_columns=2)


def _cells(name: str, counts: DomainStatistics) -> list[str]:
    sizes = (counts["conversations"], counts["topics"], counts["subtopics"])
    cells = [name, *(f"{size:,}" for size in sizes), f"{counts['mean_turns']:.2f}"]
    if tokens := counts.get("tokens"):
        cells += [f"{tokens['mean']:,.2f}", f"{tokens['median']:,.0f}", f"{tokens['longest']:,}"]
    return cells


@data_app.command(name="map")
@how_to_go_on(NOTHING_WRITTEN, resumes=False)
def map_command(
    sources: Sources,
    model: Embedder,
    output: Annotated[Path, Option("--output", "-o", help="HTML page to write.")] = Path("map.html"),
    png: Annotated[Path | None, Option(help="Also write the map as a picture.")] = None,
    part: Annotated[str, Option(help="Messages to embed: instructions, answers or conversation.")] = "instructions",
    per_domain: Annotated[int, Option(min=1, help="Draw at most N rows of each domain, by --seed.")] = 5000,
    method: Annotated[str, Option(help="Layout: tsne, or umap if umap-learn is installed.")] = "tsne",
    max_tokens: Annotated[int, Option(min=1, help="Read at most N tokens of each row.")] = 256,
    batch_size: Annotated[int, Option(min=1, help="Number of rows per batch.")] = 16,
    domain: Domain = None,
    on_bad_row: OnBadRow = "stop",
    force: Force = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Draw a map of the rows: a page to zoom and search, where a point is near the rows that a model embeds similarly."""
    from ultrafuser.data.files import atomic_files, check_target, naming
    from ultrafuser.data.tools.near_duplicates import COMPARED_ROLES
    from ultrafuser.data.tools.streaming import stream_rows
    from ultrafuser.datamap import layout as maps
    from ultrafuser.datamap.page import map_figure, map_page

    check_choice("--part", part, COMPARED_ROLES)
    check_choice("--method", method, maps.METHODS)
    check_choice("--dtype", dtype, DTYPES)
    for target in filter(None, (output, png)):
        check_target(target, force=force)
    progress, reader = ConsoleProgress(), row_reader(on_bad_row)
    stream = stream_rows(sources, domain=domain, reader=reader, progress=progress, label="rows read")
    rows = maps.sample(stream, per_domain, seed)
    report_reading(reader, progress, output)
    quiet_libraries()
    from ultrafuser.datamap.embed import embed, load_reader

    embedder = load_reader(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    texts = [maps.text_of(row, part) for row in rows]
    vectors = embed(embedder, texts, max_tokens=max_tokens, batch_size=batch_size, progress=progress)
    vectors = maps.principal(vectors, seed)
    points = maps.as_points(rows, maps.lay_out(vectors, method, seed=seed, progress=progress), part)
    agreement = maps.neighbour_agreement(vectors, [row.domain for row in rows])
    name = Path(model).name if Path(model).exists() else model
    text = map_page(points, model=name, method=method, content=part, agreement=agreement)
    with atomic_files([output, *filter(None, [png])], force=force) as drafts:
        with naming(output, drafts[0]):
            drafts[0].write_text(text, encoding="utf-8", errors="backslashreplace")
        if png is not None:
            from ultrafuser.display.drawing import png_bytes

            with naming(png, drafts[1]):
                drafts[1].write_bytes(png_bytes(map_figure(points)))
    counts = {name: sum(row.domain == name for row in rows) for name in agreement}
    facts = {"html": str(output), "png": str(png) if png else None, "method": method, "model": model, "part": part}
    if as_json:
        echo(json.dumps(facts | {"rows": counts, "neighbour_agreement": agreement}, ensure_ascii=False))
        return
    _print_map(counts, agreement)
    echo(f"map: {output}" + (f", {png}" if png else ""))


def _print_map(counts: Mapping[str, int], agreement: Mapping[str, float]) -> None:
    lines = [[name, f"{count:,}", f"{agreement[name]:.3f}"] for name, count in counts.items()]
    _print_table("rows on the map", ["domain", "rows", "neighbours of the same domain"], lines)


@data_app.command(name="decontaminate")
@how_to_go_on(NOTHING_WRITTEN, resumes=False)
def decontaminate_command(
    sources: Sources,
    against: Annotated[
        list[str],
        Option(
            "--against",
            "-a",
            help="Test data: JSONL, JSON, CSV, Parquet or text files, a folder or a glob. Repeat it for several.",
        ),
    ],
    output: Cleaned = None,
    report: Report = None,
    field: Annotated[
        list[str] | None, Option(help="Top-level field of the test items to read. Repeat it for several. Default: all.")
    ] = None,
    ngram: Annotated[int, Option(min=3, help="A row may not share N consecutive words with a test text.")] = 13,
    min_words: Annotated[
        int, Option(min=3, help="Test texts of at least N words and fewer than --ngram match as a whole.")
    ] = 8,
    domain: Domain = None,
    on_bad_row: OnBadRow = "stop",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Drop rows that share 13 consecutive words with test data, and report the test items that they match."""
    from ultrafuser.data.tools.decontaminate import Rule, decontaminate

    progress, reader = ConsoleProgress(), row_reader(on_bad_row)
    result = decontaminate(
        sources,
        against,
        output,
        fields=field or [],
        rule=Rule(ngram, min_words),
        domain=domain,
        report=report,
        force=force,
        reader=reader,
        progress=progress,
    )
    report_reading(reader, progress, output or report)
    if as_json:
        echo(json.dumps(asdict(result), ensure_ascii=False))
        return
    if result.dropped_by_test:
        lines = [[test, f"{count:,}"] for test, count in result.dropped_by_test.items()]
        _print_table("rows that match each test file", ["test file", "rows"], lines)
    by_domain = ", ".join(f"{name} {count:,}" for name, count in result.dropped_by_domain.items())
    dropped = f"{result.dropped:,} dropped" + (f" ({by_domain})" if by_domain else "")
    echo(f"{result.rows:,} rows: {result.kept:,} kept, {dropped}")
    texts = result.test_texts
    echo(
        f"test texts: {texts['ngram']:,} by {ngram}-grams, {texts['whole']:,} whole, {texts['message']:,} as a whole "
        f"message, {texts['ignored']:,} too short"
    )
    _echo_files(output, report)


@data_app.command(name="dedup")
@how_to_go_on(NOTHING_WRITTEN, resumes=False)
def dedup_command(
    sources: Sources,
    output: Cleaned = None,
    report: Report = None,
    threshold: Threshold = 0.7,
    on: On = "conversation",
    shingle: Shingle = 3,
    exact_only: ExactOnly = False,
    domain: Domain = None,
    on_bad_row: OnBadRow = "stop",
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Drop exact and near duplicates. The first row by id of each cluster is kept."""
    from ultrafuser.data.tools.near_duplicates import NearDuplicateRule, deduplicate

    rule = NearDuplicateRule(None if exact_only else threshold, on, shingle)
    progress, reader = ConsoleProgress(), row_reader(on_bad_row)
    summary = deduplicate(
        sources,
        output,
        rule=rule,
        domain=domain,
        report=report,
        force=force,
        reader=reader,
        progress=progress,
    )
    report_reading(reader, progress, output or report)
    if as_json:
        echo(json.dumps(summary, ensure_ascii=False))
        return
    largest = sorted(summary["clusters"], key=lambda cluster: -len(cluster["exact"]) - len(cluster["near"]))[:10]
    if largest:
        lines = [
            [cluster["kept"], cluster["domain"], f"{len(cluster['exact']):,}", f"{len(cluster['near']):,}"]
            for cluster in largest
        ]
        _print_table("largest clusters", ["kept", "domain", "exact", "near"], lines, text_columns=2)
    echo(
        f"{summary['rows']:,} rows: {summary['kept']:,} kept, {summary['exact_duplicates']:,} exact and "
        f"{summary['near_duplicates']:,} near duplicates dropped"
    )
    _echo_files(output, report)


@data_app.command(name="split")
@how_to_go_on(NOTHING_WRITTEN, resumes=False)
def split_command(
    sources: Sources,
    output: Annotated[Path, Option("--output", "-o", help="Folder for the parts and split.json.")],
    part: Annotated[
        list[str] | None,
        Option(
            "--part",
            "-p",
            help="NAME=SHARE of a part. Repeat it for each part. Default: train=0.9, validation=0.05, test=0.05.",
            metavar="PART",
        ),
    ] = None,
    kind: Annotated[str, Option(help="File type: jsonl, json, csv or parquet.")] = "jsonl",
    threshold: Threshold = 0.7,
    on: On = "conversation",
    shingle: Shingle = 3,
    exact_only: ExactOnly = False,
    domain: Domain = None,
    on_bad_row: OnBadRow = "stop",
    force: Force = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Split rows into parts, each with its share of every domain. Duplicates stay in one part."""
    from ultrafuser.data.tools.near_duplicates import NearDuplicateRule
    from ultrafuser.data.tools.split import split

    rule = NearDuplicateRule(None if exact_only else threshold, on, shingle)
    progress, reader = ConsoleProgress(), row_reader(on_bad_row)
    report = split(
        sources,
        output,
        _shares(part or ["train=0.9", "validation=0.05", "test=0.05"]),
        seed=seed,
        rule=rule,
        kind=kind,
        domain=domain,
        force=force,
        reader=reader,
        progress=progress,
    )
    report_reading(reader, progress, output)
    if as_json:
        echo(json.dumps(report, ensure_ascii=False))
        return
    domains = sorted({name for counts in report["parts"].values() for name in counts["domains"]})
    lines = [
        [name, f"{counts['rows']:,}", *(f"{counts['domains'].get(domain, 0):,}" for domain in domains)]
        for name, counts in report["parts"].items()
    ]
    _print_table("rows of each part", ["part", "all", *domains], lines)
    echo(f"parts: {output}")


def _shares(options: list[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for text in options:
        name, separator, value = text.partition("=")
        try:
            share = float(value)
        except ValueError:
            share = 0.0
        if not separator or not name or share <= 0 or "/" in name:
            raise DataError(f"--part {text!r}: expected NAME=SHARE, such as train=0.9")
        if name in shares:
            raise DataError(f"--part {text!r}: another part is named {name!r}, expected unique names")
        shares[name] = share
    return shares


@data_app.command(name="convert")
@how_to_go_on(NOTHING_WRITTEN, resumes=False)
def convert_command(
    sources: Sources,
    output: Annotated[Path, Option("--output", "-o", help="File to write: .jsonl, .json, .csv, .parquet.")],
    layout: Annotated[
        str | None,
        Option(
            help="messages, conversations (ShareGPT), or columns such as instruction/input/output or prompt/completion. "
            "Default: messages, or instruction/input/output for CSV."
        ),
    ] = None,
    domain: Domain = None,
    on_bad_row: OnBadRow = "stop",
    limit: Annotated[int | None, Option(min=1, help="Read at most N rows.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Convert rows from any known layout and file type to another."""
    from ultrafuser.data.tools.streaming import convert

    progress, reader = ConsoleProgress(), row_reader(on_bad_row)
    count = convert(sources, output, layout, domain=domain, limit=limit, force=force, reader=reader, progress=progress)
    report_reading(reader, progress, output)
    if as_json:
        echo(json.dumps({"rows": count, "output": str(output), "layout": layout}))
    else:
        echo(f"{count:,} rows: {output}")


@data_app.command(name="exam")
@how_to_go_on(NOTHING_WRITTEN, resumes=False)
def exam_command(
    exam: Annotated[str, Argument(help="text, code, math or mixed.")],
    output: Annotated[Path, Option("--output", "-o", help="File to write: .jsonl, .json, .csv, .parquet.")],
    num_rows: Annotated[int, Option("--rows", "-n", min=1, help="Number of questions.")] = 1000,
    split: Annotated[
        str, Option(help="train, or test for questions whose structures no training question has.")
    ] = "train",
    force: Force = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Write questions of an exam with their answers, for specialists and gates to be trained on.

    The exams are small generated tasks. `ultrafuser eval MODEL --suite exams` asks the questions of the test split.
    """
    from ultrafuser.data.writing import check_layout, row_writer
    from ultrafuser.zoo.exams import EXAMS, SPLITS
    from ultrafuser.zoo.exams.rows import exam_rows

    check_choice("EXAM", exam, EXAMS)
    check_choice("--split", split, SPLITS)
    check_layout(output, None)
    progress = ConsoleProgress()
    progress.start("questions", num_rows)
    with row_writer(output, force=force) as write:
        for row in exam_rows(exam, "test" if split == "test" else "train", num_rows, seed):
            write(row)
            progress.advance()
    progress.finish()
    if as_json:
        echo(json.dumps({"exam": exam, "split": split, "seed": seed, "rows": num_rows, "output": str(output)}))
    else:
        echo(f"{num_rows:,} rows: {output}")


@data_app.command(name="validate")
@how_to_go_on(AGAIN, resumes=False)
def validate_command(sources: Sources, domain: Domain = None, as_json: Json = False) -> None:
    """Check every row and list all problems with file and line. The exit code is 2 if there is a problem."""
    from ultrafuser.data.tools.validate import validate

    findings = validate(sources, domain=domain, progress=ConsoleProgress())
    if as_json:
        echo(json.dumps(asdict(findings), ensure_ascii=False))
    else:
        for problem in findings.problems:
            echo(f"{problem['where']}: {problem['problem']}")
        for note in findings.notes:
            echo(f"note: {note}")
        domains = ", ".join(f"{name} {count:,}" for name, count in findings.domains.items())
        rows = f"{findings.rows:,} rows" + (f" ({domains})" if domains else "")
        echo(f"{rows}, {len(findings.problems):,} problems")
    if count := len(findings.problems):
        raise DataError(f"{count} problems in {findings.bad_rows} of {findings.rows} rows, listed above")


# ---------------------------------------------------------------- shared by the commands


def _print_table(title: str, heads: list[str], lines: Iterable[list[str]], text_columns: int = 1) -> None:
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < text_columns else "right", overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))  # plain text, since a source may hold brackets
    PlainConsole().print(table)


def _echo_files(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            echo(f"written: {file}")
