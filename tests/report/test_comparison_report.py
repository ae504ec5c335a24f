"""The report of a comparison: it has the numbers of the results and no others, and adapts to what is missing."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from comparison_specimen import (
    NAMES,
    all_failed,
    bare,
    many,
    no_loss,
    no_tasks,
    rows_of,
    section,
    specimen,
    thin,
    traces,
    without,
)

from ultrafuser.errors import MissingExtraError
from ultrafuser.report.data import check_comparison
from ultrafuser.report.export import markdown_table

pytest.importorskip("matplotlib")
from ultrafuser.report.figures import training as report_training
from ultrafuser.report.page import write_report


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return specimen()


@pytest.fixture(scope="module")
def folder(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    assert write_report(results, out / "new", traces=traces()) == out / "new" / "report.html"
    return out / "new"


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """PNG files take most of the time; where they are not the point, leave them empty."""
    monkeypatch.setattr("ultrafuser.report.page.png_bytes", lambda figure, **options: b"")


def test_the_main_table_has_every_number_of_every_system(html: str, results: dict[str, Any]) -> None:
    rows = rows_of(section(html, "All systems"))
    for system in results["systems"].values():
        if system["status"] == "failed":
            continue
        cells = rows[system["label"]]
        loss = system["loss"] or {}
        for name in [*results["domains"], "mean"] if loss else ():  # a table of losses leaves out who has none
            low, high = loss[name]["ci95"]
            assert cells.pop(0) == [f"{loss[name]['nll']:.3f}", f"{low:.3f}–{high:.3f}"]
        for score in system["tasks"].values():
            counts = ["2", "unparsed"] if score["counts"] else []
            low, high = score["ci95"]
            assert cells.pop(0) == [f"{score['value']:.3f}", f"{low:.3f}–{high:.3f}", *counts]
        assert cells.pop(0) == [f"{system['tokens_per_s']['median']:,.1f}", "batch", "of", "8"]
        assert cells.pop(0) == [f"{system['peak_memory_mb']:,.0f}"]
        total, active, trained = (float(count) for count in system["parameters"].values())
        assert cells[:3] == [[f"{total / 1e6:.4g}", "M"], [f"{active / 1e6:.4g}", "M"], [f"{trained / 1e3:.4g}", "k"]]
        assert cells[3:] == [[f"{seconds:,.1f}"] for seconds in system["seconds"].values()]


def test_numbers_that_were_not_given_are_nowhere(html: str, results: dict[str, Any]) -> None:
    """Each number in a quality table is a value or a bound of the results."""
    values = [
        v for s in results["systems"].values() for c in (s.get("loss") or {}).values() for v in _numbers(c, "nll")
    ]
    values += [
        v for s in results["systems"].values() for c in s.get("tasks", {}).values() for v in _numbers(c, "value")
    ]
    allowed = {f"{value:.3f}" for value in values}
    tables = section(html, "All systems") + section(html, "Ablations")
    numbers = re.findall(r"(?<![\d.])-?\d+\.\d{3}(?!\d)", tables)
    assert len(numbers) > 3 * len(results["systems"]) and set(numbers) <= allowed


def _numbers(cell: dict[str, Any], key: str) -> list[float]:
    return [cell[key], *cell["ci95"]]


def test_bold_is_the_best_and_never_the_oracle(html: str, results: dict[str, Any]) -> None:
    tables = section(html, "All systems")
    candidates = {n: s for n, s in results["systems"].items() if s["status"] == "done" and s["kind"] != "oracle"}
    for name in [*results["domains"], "mean"]:
        least = min(system["loss"][name]["nll"] for system in candidates.values() if system["loss"])
        assert f"<b>{least:.3f}</b>" in tables
    for task in results["tasks"]:
        assert f"<b>{max(system['tasks'][task]['value'] for system in candidates.values()):.3f}</b>" in tables
    for row in re.findall(r"<tr.*?</tr>", tables, re.DOTALL):
        assert ("†" in row) <= ("<b>" not in row)
    numbers = re.findall(r"<b>[\d.,]+</b>", tables)
    cheapest = min(system["peak_memory_mb"] for system in candidates.values())
    ties = sum(system["peak_memory_mb"] == cheapest for system in candidates.values())
    assert len(numbers) == len(results["domains"]) + 1 + len(results["tasks"]) + 1 + ties


def test_paired_differences_are_shown_and_marked_by_their_interval(html: str, results: dict[str, Any]) -> None:
    text = section(html, "Paired differences").replace("−", "-")
    for system in results["systems"].values():
        for rival, pairs in system.get("paired", {}).items():
            for name, pair in pairs.items():
                if results["systems"][pair["versus"]]["label"] == system["label"]:
                    continue
                digits = 4 if name in [*results["domains"], "mean"] else 3
                low, high = pair["ci95"]
                better = low > 0 if digits == 3 else high < 0
                worse = high < 0 if digits == 3 else low > 0
                mark = "better" if better else "worse" if worse else "level"
                text_of_difference = f'<span class="{mark}">{pair["difference"]:+.{digits}f}</span>'
                interval = f"<small>{low:+.{digits}f} to {high:+.{digits}f}</small>"
                assert f"<td>{text_of_difference}{interval}" in text, (rival, name)


def test_a_failed_system_is_shown_with_its_error_and_no_numbers(html: str, folder: Path) -> None:
    message = "OutOfMemoryError: tried to allocate &lt;2.6&gt; GiB &amp; failed"
    assert html.count(message) == 1 + 3 + 1  # the summary, three tables, the failures
    assert rows_of(section(html, "All systems"))["BTX"][0][:2] == ["failed:", "OutOfMemoryError:"]
    assert "Traceback:" in section(html, "Failures") and "1 system failed" in section(html, "Summary")
    assert "btx," not in (folder / "results.csv").read_text(encoding="utf-8")


def test_the_page_loads_nothing_and_escapes_what_it_shows(html: str) -> None:
    assert not re.search(r"https?:|@import|<script|<iframe|<link rel=.stylesheet", html)
    loads = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html) + re.findall(r"url\(\s*['\"]?([^)'\"]*)", html)
    assert loads and all(load.startswith(("#", "data:")) for load in loads)
    assert "default-src 'none'" in html and "&lt;script&gt;alert(1)" in html


def test_names_are_escaped_everywhere(results: dict[str, Any], tmp_path: Path, quick: None) -> None:
    evil = '<img src=x onerror="alert(1)">|*&'
    changed = json.loads(json.dumps(results).replace('"mixed"', json.dumps(evil)))
    changed["title"] = evil
    for system in changed["systems"].values():
        system["label"] = evil + system["label"]
    html = write_report(changed, tmp_path, traces=traces()).read_text(encoding="utf-8")
    assert "<img" not in html and "&lt;img src=x" in html
    lines = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()[: len(changed["systems"]) + 2]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1 and "<img" not in "".join(lines)


def test_every_figure_is_a_file_of_its_own(folder: Path, html: str) -> None:
    names = {path.stem for path in (folder / "figures").glob("*.svg")}
    assert names == {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {
        *("loss", "tasks", "radar", "relative", "cost", "loss-matrix", "gate-weights", "gate-weights-2"),
        *("sample-weights", "training", "stability", "answer-1", "answer-2"),
    }
    for path in (folder / "figures").iterdir():
        if path.suffix == ".svg":
            text = path.read_text(encoding="utf-8")
            assert ElementTree.fromstring(text).tag.endswith("svg") and "var(--" not in text
        else:
            assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert html.count("<svg") == len(names) - 2  # answers are coloured text on the page
    assert html.count('<div class="answer">') == 2 and "var(--ink, " in html


def test_the_csv_holds_every_number_exactly(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "results.csv").read_text(encoding="utf-8")
    head, *lines = csv.reader(io.StringIO(text))
    assert head == ["system", "column", "metric", "value", "low", "high", "samples"]
    table = {tuple(line[:3]): line[3:] for line in lines}
    assert len(table) == len(lines), "system, column and metric name a line"
    for name, system in results["systems"].items():
        for domain, cell in (system.get("loss") or {}).items():
            assert _floats(table.pop((name, domain, "nll"))) == [cell["nll"], *cell["ci95"], cell.get("samples")]
            if "tokens" in cell:
                assert float(table.pop((name, domain, "tokens"))[0]) == cell["tokens"]
        for task, cell in system.get("tasks", {}).items():
            metric = results["tasks"][task]["metric"]
            assert _floats(table.pop((name, task, metric))) == [cell["value"], *cell["ci95"], cell["samples"]]
            for label, value in cell["counts"].items():
                assert float(table.pop((name, task, f"{metric}/{label}"))[0]) == value
        for rival, pairs in system.get("paired", {}).items():
            for column, pair in pairs.items():
                task = column.removeprefix("task/")
                is_task = column not in [*results["domains"], "mean"]
                metric = results["tasks"][task]["metric"] if is_task else "nll"
                line = table.pop((name, task, f"{metric}/minus/{rival}/{pair['versus']}"))
                assert _floats(line)[:3] == [pair["difference"], *pair["ci95"]]
        if system["status"] == "done":
            speed = system["tokens_per_s"]
            numbers = {"tokens_per_s": speed["median"], "tokens_per_s/batch_size": speed["batch_size"]}
            numbers |= {f"tokens_per_s/run/{n}": run for n, run in enumerate(speed["runs"])}
            numbers |= {"peak_memory_mb": system["peak_memory_mb"]}
            numbers |= {f"parameters/{name}": value for name, value in system["parameters"].items()}
            numbers |= {f"seconds/{name}": value for name, value in system["seconds"].items()}
            assert {metric: float(table.pop((name, "", metric))[0]) for metric in numbers} == numbers
    for name, domains in results["gate_weights"].items():
        for domain, weights in domains.items():
            assert {s: float(table.pop((name, domain, f"gate_weight/{s}"))[0]) for s in weights} == weights
    for name, domains in results["sample_weights"].items():
        for domain, samples in domains.items():
            for n, weights in enumerate(samples):
                assert {s: float(table.pop((name, domain, f"sample_weight/{n}/{s}"))[0]) for s in weights} == weights
    for name, points in results["stability"].items():
        for point in points:
            for domain, nll in point["loss"].items():
                assert float(table.pop((name, domain, f"nll/step/{point['step']}"))[0]) == nll
    assert not table, "no line that the results do not have"


def _floats(cells: list[str]) -> list[float | None]:
    return [float(cell) if cell else None for cell in cells]


def test_the_markdown_table_has_a_line_for_each_system(folder: Path, results: dict[str, Any]) -> None:
    text = (folder / "table.md").read_text(encoding="utf-8")
    head, rule, *lines = text.split("\n\n")[0].splitlines()
    assert len(lines) == len(results["systems"])
    labels = [line.split("|")[1].strip(" *†") for line in lines]
    assert sorted(labels) == sorted(system["label"] for system in results["systems"].values())
    assert {line.count("|") for line in (head, rule, *lines)} == {head.count("|")}
    assert "failed: OutOfMemoryError" in next(line for line in lines if line.startswith("| BTX"))
    column = [cell.strip() for cell in head.split("|")].index("code (nats)")
    cells = [line.split("|")[column].strip() for line in lines]
    least = min(s["loss"]["code"]["nll"] for s in results["systems"].values() if s.get("loss"))
    assert [cell.split("**")[1] for cell in cells if "**" in cell] == [f"{least:.3f}"]


def test_the_markdown_table_leaves_out_costs_that_no_system_has(results: dict[str, Any]) -> None:
    free = copy.deepcopy(results)
    for system in free["systems"].values():
        system["tokens_per_s"] = system["peak_memory_mb"] = None
    headings = [heading.strip() for heading in markdown_table(check_comparison(free)).splitlines()[0].split("|")]
    full = [heading.strip() for heading in markdown_table(check_comparison(results)).splitlines()[0].split("|")]
    assert [heading for heading in full if heading not in headings] == ["tokens/s", "peak memory, MB"]


def test_equal_results_give_equal_files(folder: Path, tmp_path: Path) -> None:
    write_report(json.loads(json.dumps(specimen())), tmp_path, traces=traces())
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_a_png_names_the_digest_of_its_results(folder: Path, results: dict[str, Any]) -> None:
    from PIL import Image

    digest = check_comparison(results).digest
    for path in (folder / "figures").glob("*.png"):
        with Image.open(path) as picture:
            assert picture.info["Results"] == digest
    assert check_comparison(json.loads(json.dumps(results))).digest == digest
    assert check_comparison(results | {"seed": 1}).digest != digest


def test_stages_are_apart_and_deviations_are_those_of_samples(results: dict[str, Any], html: str) -> None:
    rows = [{"stage": "a", "step": n, "loss": 3.0 - n} for n in (1, 2)]
    rows += [{"stage": "b", "step": 1, "loss/x": 1.0, "loss/y": 2.0}, {"stage": "b", "step": 1, "eval_loss/x": 9.0}]
    rows += [{"stage": "btx", "step": 1, "loss": 4.0}]
    stages = report_training.steps_by_stage(rows)
    points = {stage: [(row["step"], row["loss"]) for row in steps] for stage, steps in stages.items()}
    assert points == {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 1.5)], "joint": [(1, 4.0)]}
    figure = report_training.training_losses(check_comparison(results))
    assert figure and [axes.get_xlabel() for axes in figure.axes] == [
        "step of the gate stage",
        "step of the joint stage",
    ]
    table = rows_of(section(html, "Training"))
    for name, points in results["stability"].items():
        series = [point["loss"]["code"] for point in points]
        assert table[results["systems"][name]["label"]][1] == [f"{fmean(series):.3f}", "±", f"{stdev(series):.3f}"]


@pytest.mark.parametrize(
    ("change", "absent", "present"),
    [
        (no_tasks, ["gsm8k", "unparsed"], ["<h2>Quality</h2>", "Figure 1."]),
        (no_loss, ["Quality against cost", "Specialists by domain", "nats ↓"], ["gsm8k", "Figure 1."]),
        (lambda r: without(r, *NAMES), ["Specialists by domain"], ["<h2>Quality</h2>"]),
        (lambda r: without(r, "code", "math", specialists=["text"]), ["Specialists by domain"], ["text specialist"]),
        (
            thin,
            [
                "Where the gate",
                "<h2>Training</h2>",
                "<h2>Ablations</h2>",
                "<h2>Failures</h2>",
                "failed:",
                "A classifier",
            ],
            ["<h2>Quality</h2>", "Against the best specialist"],
        ),
        (bare, ["Paired differences", "Quality against cost", "Where the gate"], ["<h2>Quality</h2>", "2.000"]),
        (all_failed, ["<svg"], ["<h2>Failures</h2>", "no luck with fused", "was not measured"]),
        (many, [], ["number 5", "nan", "inf"]),
    ],
)
def test_missing_parts_are_left_out(
    results: dict[str, Any], tmp_path: Path, quick: None, change: Any, absent: list[str], present: list[str]
) -> None:
    changed = change(results)
    html = write_report(changed, tmp_path).read_text(encoding="utf-8")
    assert not [text for text in absent if text in html] and not [text for text in present if text not in html]
    assert "<h2>Answers" not in html and "How to read this" in html
    assert len((tmp_path / "table.md").read_text(encoding="utf-8").splitlines()) >= len(changed["systems"]) + 4


def test_without_matplotlib_the_tables_are_written(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r'pip install "ultrafuser\[report\]"'):
        write_report(results, tmp_path)
    assert (tmp_path / "table.md").is_file() and (tmp_path / "results.csv").is_file()


def test_importing_the_report_needs_neither_matplotlib_nor_torch() -> None:
    code = "import sys, ultrafuser.report.page; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
