"""The report of a demo: its page, and its table in the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.data import Column, Pair, check_comparison
from ultrafuser.report.terminal import loss_table
from ultrafuser.report.text import summary

pytest.importorskip("matplotlib")
from ultrafuser.report.page import write_report


@pytest.fixture
def html(results: dict[str, Any], trace: TokenTrace, tmp_path: Path) -> str:
    return write_report(results, tmp_path, traces=[trace] * 3).read_text(encoding="utf-8")


def printed(results: dict[str, Any], *, width: int = 80, styled: bool = False) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=styled).print(loss_table(check_comparison(results)))
    return file.getvalue()


def test_the_page_has_the_numbers_of_the_demo(html: str, results: dict[str, Any]) -> None:
    for system in results["systems"].values():
        for cell in system["loss"].values():
            assert f"{cell['nll']:.3f}" in html
    for weights in results["gate_weights"]["fused"].values():
        assert "".join(f"<td>{weight:.3f}</td>" for weight in weights.values()) in html
    for seconds in results["config"]["seconds"].values():
        assert str(seconds) in html


def test_the_page_is_self_contained_and_safe(html: str) -> None:
    assert not re.search(r"https?:|@import|<script|<iframe", html)
    loads = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', html) + re.findall(r"url\(\s*['\"]?([^)'\"]*)", html)
    assert loads and all(load.startswith(("#", "data:")) for load in loads)
    assert html.count('<div class="answer">') == 3
    assert "&lt;/pre&gt;&lt;script&gt;" in html


def test_the_training_is_drawn_in_detail_where_the_gate_was_logged(
    html: str, results: dict[str, Any], tmp_path: Path
) -> None:
    assert (tmp_path / "figures" / "training-curves.svg").is_file() and "entropy of the gate" in html
    results |= {"training": {}, "sample_weights": {}}
    bare = write_report(results, tmp_path / "bare").read_text(encoding="utf-8")
    assert html.count("<svg") == bare.count("<svg") + 3
    assert "<h2>Training</h2>" not in bare and "<h2>Answers" not in bare


def test_the_summary_follows_the_numbers(results: dict[str, Any]) -> None:
    text = " ".join(summary(check_comparison(results)))
    assert "fused has a loss of 1.172 nats per response token on the mean of 4 domains, the lowest of 8 systems" in text
    assert "in loss it wins on mixed, ties on text and math and loses on code" in text


def test_a_fused_model_that_loses_is_said_to_lose(results: dict[str, Any]) -> None:
    fused = results["systems"]["fused"]
    for domain in results["domains"]:
        fused["loss"][domain]["nll"] = 3.0
        fused["paired"]["best_specialist"][domain] = {"versus": "text", "difference": 0.5, "ci95": [0.4, 0.6]}
    fused["loss"]["mean"]["nll"] = 3.0
    text = " ".join(summary(check_comparison(results)))
    assert "number 8 of 8 systems; the lowest is that of fused, stage 1 (1.176)" in text
    assert "in loss it loses on text, code, math and mixed" in text
    assert "wins on" not in text and "ties on" not in text


def test_a_verdict_needs_an_interval_off_zero(results: dict[str, Any]) -> None:
    comparison, loss = check_comparison(results), Column("text", "text")
    pairs = [Pair(versus="text", difference=0, ci95=bounds) for bounds in ((-2, -1), (-1, 0), (-1, 1), (0, 1), (1, 2))]
    verdicts = [comparison.verdict(pair, loss) for pair in pairs]
    assert verdicts == ["better", "level", "level", "level", "worse"]


def test_the_terminal_table_has_every_number_in_80_columns(results: dict[str, Any]) -> None:
    text = printed(results, width=80)
    for system in results["systems"].values():
        for domain in results["domains"]:
            cell = system["loss"][domain]
            assert f"{cell['nll']:.4f}" in text and f"{cell['ci95'][0]:.2f}–{cell['ci95'][1]:.2f}" in text
        assert f"{system['loss']['mean']['nll']:.4f}" in text
    for pair in results["systems"]["fused"]["paired"]["best_specialist"].values():
        assert f"{pair['difference']:+.4f}" in text and f"vs {pair['versus']}" in text
        assert f"{pair['ci95'][0]:+.4f} to" in text and f"{pair['ci95'][1]:+.4f}" in text


def test_the_best_of_each_column_is_bold_in_the_terminal(results: dict[str, Any]) -> None:
    bold = re.findall(r"\x1b\[1m *(\d\.\d{4})", printed(results, styled=True))
    assert sorted(bold) == sorted(["2.2108", "0.4216", "0.8307", "1.2206", "1.1716"])


def test_differences_are_coloured_by_their_interval_in_the_terminal(results: dict[str, Any]) -> None:
    text = printed(results, styled=True)
    assert re.search(r"\x1b\[31m *\+0\.0023", text) and re.search(r"\x1b\[32m *-0\.0587", text)
    assert not re.search(r"\x1b\[3[12]m *-0\.00(07|14)", text)
