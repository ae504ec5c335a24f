"""The report: it has every number, its words follow the numbers, and it loads nothing."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console

from ultrafuser.errors import DataError
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.demo_results import best_system, mean_nll, summary, verdict

pytest.importorskip("matplotlib")
from ultrafuser.report.demo_page import demo_report, results_table


@pytest.fixture
def html(results: dict[str, Any], metrics: list[dict[str, Any]], trace: TokenTrace) -> str:
    samples = {domain: [weights, weights] for domain, weights in results["gate_weights"].items()}
    return demo_report(results, metrics=metrics, traces=[trace] * 3, sample_weights=samples)


def table_rows(html: str) -> dict[str, list[str]]:
    """The first table: its cells as plain text, by the head of each row."""
    body = html[html.index("<tbody>") : html.index("</tbody>")]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("</tr>") if "<tr" in row]
    plain = [[re.sub(r"<[^>]+>", " ", cell).strip() for cell in row] for row in rows]
    return {row[0]: row[1:] for row in plain}


def printed(results: dict[str, Any], width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(results_table(results))
    return file.getvalue()


def test_the_table_has_every_number_in_its_place(html: str, results: dict[str, Any]) -> None:
    rows = table_rows(html)
    labels = {"fused_stage1": "fused, stage 1", "weight_average": "weight average"}
    for system, cells in results["systems"].items():
        *columns, mean = rows[labels.get(system, system)]
        for column, domain in zip(columns, results["domains"], strict=True):
            low, high = cells[domain]["ci95"]
            assert column.split() == [f"{cells[domain]['nll']:.4f}", f"[{low:.4f},", f"{high:.4f}]"]
        assert mean == f"{mean_nll(results, system):.4f}"
    (differences,) = (row for head, row in rows.items() if "paired" in head)
    for cell, pair in zip(differences, results["paired"].values(), strict=False):
        low, high = pair["ci95"]
        assert cell.split() == [
            f"{pair['difference']:+.4f}",
            f"[{low:+.4f},",
            f"{high:+.4f}]",
            "vs",
            pair["versus"],
        ]
    for row in results["gate_weights"].values():
        assert "".join(f"<td>{weight:.3f}</td>" for weight in row.values()) in html
    for cell in results["systems"]["fused"].values():
        assert f"{cell['samples']} rows, {cell['tokens']:,} tokens" in html
    for seconds in results["seconds"].values():
        assert f"{seconds:,.1f} s" in html


def test_the_best_of_each_column_is_bold(html: str, results: dict[str, Any]) -> None:
    bold = re.findall(r"<b>(\d\.\d{4})</b>", html)
    best = [results["systems"][best_system(results, d)][d]["nll"] for d in results["domains"]]
    assert sorted(bold) == sorted(f"{value:.4f}" for value in [*best, mean_nll(results, best_system(results))])
    assert best == [2.2108, 0.4216, 0.8307, 1.2206]


def test_differences_are_marked_by_their_interval(html: str) -> None:
    marks = re.findall(r'<span class="(better|worse|level)">', html)
    assert marks == ["level", "worse", "level", "better"]


def test_the_page_is_self_contained_and_safe(html: str) -> None:
    assert not re.search(r"https?:|@import|<script|<iframe", html)
    loads = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html) + re.findall(r"url\(\s*['\"]?([^)'\"]*)", html)
    assert loads and all(load.startswith(("#", "data:")) for load in loads)
    assert html.count("<svg") == 4 and html.count('<div class="answer">') == 3
    assert "&lt;/pre&gt;&lt;script&gt;" in html


def test_parts_without_data_are_left_out(results: dict[str, Any]) -> None:
    html = demo_report(results, metrics=[], traces=[], sample_weights={})
    assert html.count("<svg") == 2
    assert "<h2>Training</h2>" not in html and "<h2>Answers" not in html


def test_the_summary_follows_the_numbers(results: dict[str, Any]) -> None:
    text = summary(results)
    assert "1.1716 nats per response token on the mean of all 4 domains, 7.7% lower than" in text
    assert "best single specialist (math, 1.2688)" in text
    assert "clearly better on mixed" in text and "not distinguishable from it on text and math" in text
    assert "clearly worse on code" in text
    assert "lower on every domain than with averaged weights and with equal weights at every token" in text


def test_a_fused_model_that_loses_is_said_to_lose(results: dict[str, Any]) -> None:
    for domain in results["domains"]:
        results["systems"]["fused"][domain]["nll"] = 3.0
        results["paired"][domain] = {"versus": "text", "difference": 0.5, "ci95": [0.4, 0.6]}
    results["systems"]["uniform"]["text"]["nll"] = 3.5
    text = summary(results)
    assert "136.4% higher than" in text and "clearly worse on text, code, math and mixed" in text
    assert "better" not in text and "not distinguishable" not in text
    assert "on no domain lower than with averaged weights" in text
    assert "lower on text, but not on code, math and mixed, than with equal weights at every token" in text


def test_verdict_needs_an_interval_off_zero() -> None:
    intervals = ([-2, -1], [-1, 0], [-1, 1], [0, 1], [1, 2])
    assert [verdict({"ci95": ci}) for ci in intervals] == ["better", "level", "level", "level", "worse"]


def test_the_terminal_table_has_every_number_in_80_columns(results: dict[str, Any]) -> None:
    text = printed(results, width=80)
    for system, cells in results["systems"].items():
        for cell in cells.values():
            assert f"{cell['nll']:.4f}" in text and f"{cell['ci95'][0]:.2f}–{cell['ci95'][1]:.2f}" in text
        assert f"{mean_nll(results, system):.4f}" in text
    for pair in results["paired"].values():
        assert f"{pair['difference']:+.4f}" in text and f"vs {pair['versus']}" in text
        assert f"{pair['ci95'][0]:+.4f} to" in text and f"{pair['ci95'][1]:+.4f}" in text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("paired",), r"missing keys \['paired'\]"),
        (("systems", "fused"), "system 'fused' is missing"),
        (
            ("systems", "uniform", "code"),
            r"system 'uniform' lacks \['nll', 'ci95', 'tokens', 'samples'\] for domain 'code'",
        ),
        (("systems", "base", "text", "ci95"), r"system 'base' lacks \['ci95'\] for domain 'text'"),
        (("paired", "math"), "'paired' lacks domain 'math'"),
        (("gate_weights", "text"), "'gate_weights' lacks domain 'text'"),
    ],
)
def test_results_of_another_form_are_refused(results: dict[str, Any], path: tuple[str, ...], message: str) -> None:
    parent = results
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    with pytest.raises(DataError, match=message):
        demo_report(results, metrics=[], traces=[], sample_weights={})
    with pytest.raises(DataError, match=message):
        results_table(results)


def test_importing_the_report_needs_neither_matplotlib_nor_torch() -> None:
    code = "import sys, ultrafuser.report.demo_page; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
