"""The report of a comparison: it has the numbers of the results and no others, and adapts to what is missing."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, get_args

import pytest

from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.errors import DataError
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.data import Column, Comparison, check_comparison
from ultrafuser.report.text import summary

pytest.importorskip("matplotlib")
from ultrafuser.report.figures import quality as report_figures
from ultrafuser.report.figures import relative as report_relative
from ultrafuser.report.figures import training as report_training
from ultrafuser.report.page import write_report

KINDS = {get_args(node.model_fields["kind"].annotation)[0]: node for node in get_args(get_args(SystemRecipe)[0])}
MEASURED_LOSSES = Path(__file__).with_name("losses.json")
KEPT_RESULTS = Path(__file__).parents[2] / "docs" / "results" / "compare-zoo" / "results.json"
NAMES = ["text", "code", "math"]
TASKS = {
    "gsm8k": {"metric": "exact_match", "higher_is_better": True, "description": "Grade-school maths, zero-shot."},
    "math": {"metric": "exact_match", "higher_is_better": True, "description": "Competition maths."},
    "humaneval": {"metric": "pass@1", "higher_is_better": True, "description": "Python functions, run with tests."},
}
# Measured on all rows of the zoo. Name -> kind and label.
MEASURED = {
    "base": ("base", "base"),
    "text": ("specialist", "text specialist"),
    "code": ("specialist", "code specialist"),
    "math": ("specialist", "math specialist"),
    "uniform": ("static", "equal weights"),
    "weight_average": ("merge", "average of the weights"),
    "fused_stage1": ("fused", "fused, stage 1"),
    "fused": ("fused", "fused, stage 2"),
}
# Invented, to fill the page: what is added to the best specialist's loss.
INVENTED = {
    "oracle": ("oracle", "oracle per domain", 0.0),
    "ties": ("merge", "TIES merging, density 0.5", 0.11),
    "arithmetic": ("merge", "task arithmetic, coefficient 1.0", 6.4),
    "tuned": ("tuned", "text specialist, tuned further", 0.04),
    "router": ("router", "router", 0.006),
    "unbalanced": ("fused", "fused, no balanced sampler", -0.02),
}


def specimen() -> dict[str, Any]:
    """A comparison with every part: the demo's numbers, and invented ones for what the demo does not measure."""
    demo = json.loads(MEASURED_LOSSES.read_text(encoding="utf-8"))
    rng = random.Random(0)
    domains = demo["domains"]
    best = {d: min(NAMES, key=lambda name, d=d: demo["systems"][name][d]["nll"]) for d in domains}  # type: ignore[misc]
    losses = {name: demo["systems"][name] for name in MEASURED}
    for name, (_, _, extra) in INVENTED.items():
        losses[name] = {d: _shifted(demo["systems"][best[d]][d], extra * (0.5 + rng.random())) for d in domains}
    systems = {name: _system(label, kind, losses[name]) for name, (kind, label) in MEASURED.items()}
    systems |= {name: _system(label, kind, losses[name]) for name, (kind, label, _) in INVENTED.items()}
    systems["best_of"] = _system("best of three answers", "best_of", None)
    systems["btx"] = {"label": "BTX", "kind": "btx", "status": "failed"}
    systems["btx"]["error"] = "Traceback:\nOutOfMemoryError: tried to allocate <2.6> GiB & failed"
    skill = {"base": 0.18, "arithmetic": 0.01, "fused": 0.42, "best_of": 0.36, "router": 0.35, "oracle": 0.36}
    measured = {name: system for name, system in systems.items() if system["status"] == "done"}
    for name, system in measured.items():
        system["tasks"] = {task: _score(rng, skill.get(name, 0.3) + 0.03 * n, 200) for n, task in enumerate(TASKS)}
        system["tokens_per_s"] = _speed(rng.uniform(20, 35) if name.startswith("fused") else rng.uniform(80, 100))
    measured["fused"]["tasks"]["humaneval"] = _score(rng, 0.2, 200)  # the page has to show a loss, too
    measured["fused"]["tasks"]["math"] = _score(rng, 0.36, 200)
    for name, system in measured.items():
        system["paired"] = _paired(name, losses, best, measured)
    systems["fused"]["paired"]["best_specialist"] |= demo["paired"]
    return {
        "title": "Fusing three specialists, and what else one could do",
        "created": "2026-11-23",
        "seed": 0,
        "specialists": NAMES,
        "domains": domains,
        "tasks": copy.deepcopy(TASKS),
        "systems": systems,
        "gate_weights": {"fused": demo["gate_weights"], "fused_stage1": demo["gate_weights"]},
        "sample_weights": {"fused": {d: [_sample(rng, w) for _ in range(40)] for d, w in demo["gate_weights"].items()}},
        "training": {
            name: _metrics(rng, start) for name, start in (("fused", 2.3), ("unbalanced", 2.5), ("tuned", 2.9))
        },
        "stability": {
            name: [
                {"step": step, "loss": {d: losses[name][d]["nll"] + rng.gauss(0, spread) for d in domains}}
                for step in range(50, 301, 50)
            ]
            for name, spread in (("fused", 0.01), ("unbalanced", 0.04))
        },
        "table2": ["unbalanced", "fused_stage1", "fused"],
        "main": "fused",
        "config": {"mixing": "probabilities", "note": "</pre><script>alert(1)</script>"},
    }


def _shifted(cell: dict[str, Any], extra: float) -> dict[str, Any]:
    return cell | {"nll": cell["nll"] + extra, "ci95": [bound + extra for bound in cell["ci95"]]}


def _system(label: str, kind: str, loss: dict[str, Any] | None) -> dict[str, Any]:
    if loss is not None:
        mean = {"nll": fmean(cell["nll"] for cell in loss.values())}
        mean["ci95"] = [fmean(cell["ci95"][side] for cell in loss.values()) for side in (0, 1)]  # type: ignore[assignment]
        loss = {**copy.deepcopy(loss), "mean": mean}
    many = 1 if kind not in ("fused", "static", "best_of", "router") else 3
    return {
        "label": label,
        "kind": kind,
        "kind_label": KINDS[kind].kind_label,
        "description": KINDS[kind].description,
        "status": "done",
        "error": None,
        "loss": loss,
        "peak_memory_mb": 640.5 + 410 * many,
        "parameters": {"total": 134515008 + 4884480 * many, "active": 134515008 * many, "trained": 295425},
        "seconds": {"build": 3.25 * many, "measure": 61.5 * many},
    }


def _score(rng: random.Random, value: float, samples: int) -> dict[str, Any]:
    value = min(max(value + rng.gauss(0, 0.015), 0.0), 1.0)
    half = 1.96 * math.sqrt(value * (1 - value) / samples)
    return {
        "value": value,
        "ci95": [value - half, value + half],
        "samples": samples,
        "counts": {"unparsed": 2} if rng.random() < 0.5 else {},
    }


def _speed(median: float) -> dict[str, Any]:
    return {"median": median, "runs": [median - 1.5, median, median + 0.5], "batch_size": 8}


def _paired(name: str, losses: dict[str, Any], best: dict[str, str], systems: dict[str, Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for rival, versus in {"best_specialist": best, "router": dict.fromkeys(best, "router")}.items():
        columns = {}
        if systems[name]["loss"]:
            for domain, opponent in versus.items():
                difference = losses[name][domain]["nll"] - losses[opponent][domain]["nll"]
                columns[domain] = _pair(opponent, difference, 0.015)
            mean = fmean(pair["difference"] for pair in columns.values())
            columns["mean"] = _pair("text" if rival == "best_specialist" else "router", mean, 0.008)
        for task in TASKS:
            scores = {system: entry["tasks"][task]["value"] for system, entry in systems.items()}
            opponent = max(NAMES, key=lambda s: scores[s]) if rival == "best_specialist" else "router"
            key = f"task/{task}" if task in losses["text"] else task
            columns[key] = _pair(opponent, scores[name] - scores[opponent], 0.045)
        pairs[rival] = columns
    return pairs


def _pair(versus: str, difference: float, half: float) -> dict[str, Any]:
    return {"versus": versus, "difference": difference, "ci95": [difference - half, difference + half]}


def _sample(rng: random.Random, mean: dict[str, float]) -> dict[str, float]:
    raw = {name: rng.gammavariate(12 * weight, 1) for name, weight in mean.items()}
    return {name: weight / sum(raw.values()) for name, weight in raw.items()}


def _metrics(rng: random.Random, start: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, steps, low in (("gate", 200, start - 0.2), ("joint", 60, start - 0.45)):
        top = rows[-1]["loss"] if rows else start
        for step in range(1, steps + 1):
            loss = low + (top - low) * math.exp(-5 * step / steps) + rng.gauss(0, 0.03)
            rows.append({"stage": stage, "step": step, "loss": loss, "loss/text": loss + 1})
    rows.append({"stage": "joint", "step": 60, "eval_loss/text": 1.0})
    return rows


def traces() -> list[TokenTrace]:
    code = ["def", " add", "(a", ",", " b", "):", "\n", "    return", " a", " +", " b", "\n"]
    maths = ["So", " $x", " =", " 4", "$", ":", " 4", " +", " 3", " =", " 7", "."]
    weights = {"code": [0.1, 0.8, 0.1], "math": [0.1, 0.15, 0.75]}
    return [
        TokenTrace(
            tokens, [weights[domain]] * len(tokens), NAMES, f"The {domain} prompt", domain, f"An answer: {domain}"
        )
        for domain, tokens in (("code", code), ("math", maths))
    ]


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


def section(html: str, heading: str) -> str:
    (content,) = re.findall(rf"<h2>{heading}</h2>(.*?)</section>", html, re.DOTALL)
    return content


def rows_of(html: str) -> dict[str, list[list[str]]]:
    """All table rows as plain text by the label in their head; each cell is split into words."""
    rows: dict[str, list[list[str]]] = {}
    for row in re.findall(r"<tr class=[^>]*>(.*?)</tr>", html, re.DOTALL):
        head, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        label = head.split("<small>")[0].replace("\u00a0†", "")
        rows.setdefault(label, []).extend(re.sub(r"<[^>]+>", " ", cell).split() for cell in cells)
    return rows


def columns_of(results: dict[str, Any]) -> list[Column]:
    return check_comparison(results).columns


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


def test_an_oracle_ahead_of_all_takes_no_bold_and_equal_numbers_share_it(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["systems"]["oracle"]["loss"]["code"]["nll"] = 0.1
    changed["systems"]["base"]["loss"]["code"]["nll"] = changed["systems"]["unbalanced"]["loss"]["code"]["nll"]
    comparison = check_comparison(changed)
    code = next(column for column in comparison.losses if column.name == "code")
    assert comparison.best(code) == {"base", "unbalanced"}


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


def test_equal_results_give_equal_files(folder: Path, tmp_path: Path) -> None:
    write_report(json.loads(json.dumps(specimen())), tmp_path, traces=traces())
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert (folder / path).read_bytes() == (tmp_path / path).read_bytes(), path


def test_systems_stand_in_the_order_of_their_kinds(results: dict[str, Any]) -> None:
    shuffled = results | {"systems": dict(reversed(results["systems"].items()))}
    shuffled["systems"]["odd"] = shuffled["systems"]["base"] | {"kind": "something new"}
    kinds = [system.kind for system in check_comparison(shuffled).systems.values()]
    assert kinds[0] == "base" and kinds[-1] == "fused" and kinds.index("oracle") == 4
    assert kinds.index("something new") == kinds.index("fused") - 1


def test_the_summary_counts_wins_ties_and_losses_by_the_intervals(results: dict[str, Any]) -> None:
    text = " ".join(summary(check_comparison(results)))
    assert "has a loss of 2.083 nats per response token on the mean of 4 domains, the lowest of 13 systems" in text
    assert "the best specialist at home, in loss it wins on text, code, math, mixed and the mean; in task" in text
    assert "in task scores it wins on gsm8k, ties on math (task) and loses on humaneval" in text
    assert "no paired differences to the per-domain oracle" in text
    assert "1 system failed and has no numbers: BTX (OutOfMemoryError" in text


def test_a_main_system_that_loses_is_said_to_lose(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    fused = changed["systems"]["fused"]
    fused["loss"]["mean"]["nll"] = 9.0
    for domain in (*changed["domains"], "mean"):
        fused["paired"]["best_specialist"][domain] |= {"difference": 0.5, "ci95": [0.4, 0.6]}
    for task in fused["tasks"].values():
        task["value"] = 0.0
    text = " ".join(summary(check_comparison(changed)))
    assert "number 12 of 13 systems; the lowest is that of fused, stage 1 (2.172)" in text
    assert "in loss it loses on text, code, math, mixed and the mean" in text
    assert "the best score on none of 3 tasks" in text
    fused |= {"status": "failed", "error": "it broke", "loss": None, "tasks": {}, "paired": {}}
    sentences = summary(check_comparison(changed))
    assert (
        "was not measured, so nothing can be said about it" in sentences[0]
        and "fused, stage 2 (it broke)" in sentences[-1]
    )


def test_relative_scores_are_ratios_to_the_best_specialist(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["tasks"]["humaneval"]["higher_is_better"] = False
    comparison = check_comparison(changed)
    columns = {(column.name, column.is_task): column for column in comparison.columns}
    code, gsm8k = columns["code", False], columns["gsm8k", True]
    assert comparison.relative("code", code) == 1.0
    loss, best = (changed["systems"][name]["loss"]["code"]["nll"] for name in ("fused", "code"))
    assert comparison.relative("fused", code) == pytest.approx(math.exp(-loss) / math.exp(-best))
    scores = {name: changed["systems"][name]["tasks"]["gsm8k"]["value"] for name in (*NAMES, "base")}
    assert comparison.relative("base", gsm8k) == scores["base"] / max(scores[name] for name in NAMES)
    low = {name: changed["systems"][name]["tasks"]["humaneval"]["value"] for name in (*NAMES, "base")}
    assert comparison.relative("base", columns["humaneval", True]) == min(low[name] for name in NAMES) / low["base"]
    assert comparison.relative("best_of", code) is None


def test_points_and_intervals_are_drawn_where_they_are(results: dict[str, Any]) -> None:
    comparison = check_comparison(results)
    figure = report_figures.quality(comparison, comparison.losses)
    assert [axes.get_title() for axes in figure.axes] == [*results["domains"], "mean"]
    for axes, name in zip(figure.axes, [*results["domains"], "mean"], strict=True):
        points = {float(line.get_xdata()[0]) for line in axes.lines if line.get_marker() == "o"}  # type: ignore[index]
        losses = {n: s["loss"][name]["nll"] for n, s in results["systems"].items() if s.get("loss")}
        far = losses.pop("arithmetic")
        assert points == set(losses.values())
        assert f"{far:.3g} ▸" in {text.get_text() for text in axes.texts}


def test_the_loss_matrix_has_the_specialists_losses(results: dict[str, Any]) -> None:
    figure = report_figures.loss_matrix(check_comparison(results))
    assert figure
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert numbers == [f"{results['systems'][s]['loss'][d]['nll']:.3f}" for s in NAMES for d in results["domains"]]


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


def test_specialists_are_known_by_their_kind_not_their_name(results: dict[str, Any]) -> None:
    changed = without(results)
    changed["systems"] = {{"math": "alone"}.get(name, name): system for name, system in changed["systems"].items()}
    comparison = check_comparison(changed)
    math_loss = next(column for column in comparison.losses if column.name == "math")
    assert comparison.best_specialist(math_loss) == "alone"
    shades = report_figures.system_colours(comparison, ["text", "code", "alone", "fused", "router"])
    assert len(set(shades.values())) == 5


def test_rings_of_the_radar_are_few_and_hold_the_best_specialist() -> None:
    for low, high in ((0.8, 1.57), (0.0, 1.02), (0.95, 1.02), (0.4, 1.58), (0.0, 7.0)):
        rings = report_relative._rings(low, high)
        assert 1.0 in rings and 1 <= len(rings) <= 6 and all(low < ring < high for ring in rings)


def test_labels_moved_apart_keep_their_order_and_stay_inside() -> None:
    placed = report_figures.spread([0.1, 0.1, 0.12, 0.9, 0.99, 1.0], 0.1)
    gaps = [following - position for position, following in zip(placed, placed[1:], strict=False)]
    assert min(gaps) > 0.0999 and placed[0] >= 0 and placed[-1] <= 1
    assert report_figures.spread([0.2, 0.8], 0.1) == [0.2, 0.8]


def without(results: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    """The comparison without some systems, and with other changes."""
    out = copy.deepcopy(results) | changes
    out["systems"] = {name: system for name, system in out["systems"].items() if name not in names}
    for key in ("gate_weights", "sample_weights", "training", "stability"):
        out[key] = {name: value for name, value in out[key].items() if name in out["systems"]}
    out["table2"] = [name for name in out["table2"] if name in out["systems"]]
    return out


def no_tasks(results: dict[str, Any]) -> dict[str, Any]:
    out = without(results, tasks={})
    for system in out["systems"].values():
        system["tasks"] = {}
    return out


def no_loss(results: dict[str, Any]) -> dict[str, Any]:
    out = without(results)
    for system in out["systems"].values():
        system["loss"] = None
    return out


def thin(results: dict[str, Any]) -> dict[str, Any]:
    """No router, nothing failed, no gate weights, no training, no ablations."""
    out = without(results, "router", "btx", gate_weights={}, sample_weights={}, training={}, stability={}, table2=[])
    for system in out["systems"].values():
        system["paired"].pop("router")
    return out


def bare(results: dict[str, Any]) -> dict[str, Any]:
    """One fused model of one specialist on one domain, and nothing measured but its loss."""
    keep = {"title", "created", "seed", "main", "config"}
    out = {key: value for key, value in copy.deepcopy(results).items() if key in keep}
    loss = {
        "text": {"nll": 2.0, "ci95": [1.9, 2.1], "tokens": 5, "samples": 2},
        "mean": {"nll": 2.0, "ci95": [1.9, 2.1]},
    }
    fused = {"label": "only", "kind": "fused", "status": "done", "loss": loss}
    return out | {"specialists": ["text"], "domains": ["text"], "tasks": {}, "systems": {"fused": fused}}


def all_failed(results: dict[str, Any]) -> dict[str, Any]:
    out = without(results, gate_weights={}, sample_weights={}, training={}, stability={}, table2=[], main=None)
    for name in out["systems"]:
        out["systems"][name] = {"label": name, "kind": "fused", "status": "failed", "error": f"no luck with {name}"}
    return out


def many(results: dict[str, Any]) -> dict[str, Any]:
    """Twenty systems of long names, seven specialists, and numbers that are not numbers."""
    out = without(results)
    for n in range(6):
        name = f"a specialist of a domain with a rather long name, number {n}"
        out["systems"][name] = copy.deepcopy(out["systems"]["text"]) | {"label": name}
        out["specialists"] = [*out["specialists"], name]
    out["systems"]["ties"]["loss"]["code"] |= {"nll": math.nan, "ci95": [math.nan, math.nan]}
    out["systems"]["arithmetic"]["loss"]["mean"] |= {"nll": math.inf, "ci95": [9.0, math.inf]}
    out["systems"]["arithmetic"]["tasks"]["gsm8k"] |= {"value": 0.0, "ci95": [0.0, 0.0]}
    return out


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


def test_a_task_of_a_domains_name_is_never_mistaken_for_it(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    del changed["systems"]["fused"]["paired"]["router"]["task/math"]
    comparison = check_comparison(changed)
    domain, task = (column for column in comparison.columns if column.name == "math")
    assert (domain.heading, task.heading) == ("math", "math (task)")
    assert comparison.pair("fused", "router", task) is None and comparison.pair("fused", "router", domain)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("systems",), "key 'systems' is missing"),
        (("main",), "key 'main' is missing"),
        (("systems", "fused"), r"main: unknown names \['fused'\]"),
        (("systems", "text", "label"), "key 'systems.text.label' is missing"),
        (("systems", "btx", "error"), "systems.btx: status is 'failed', but 'error' is empty"),
        (("systems", "text", "loss", "code"), r"systems.text.loss: has \['math', 'mean', 'mixed', 'text'\], expected"),
        (("systems", "text", "loss", "code", "ci95"), "key 'systems.text.loss.code.ci95' is missing"),
        (("systems", "text", "tasks", "gsm8k", "value"), "key 'systems.text.tasks.gsm8k.value' is missing"),
        (("systems", "fused", "paired", "router", "text", "versus"), "key 'systems.fused.paired.router.text.versus'"),
        (("tasks", "gsm8k"), r"systems.base.tasks: unknown names \['gsm8k'\], expected some of"),
        (("systems", "fused_stage1"), r"table2: unknown names \['fused_stage1'\]"),
        (("stability", "fused", 0, "step"), "key 'stability.fused.0.step' is missing"),
    ],
)
def test_results_of_another_form_are_refused(
    results: dict[str, Any], tmp_path: Path, path: tuple[Any, ...], message: str
) -> None:
    changed: Any = copy.deepcopy(results)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    with pytest.raises(DataError, match=message):
        write_report(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_values_of_another_type_are_refused_by_name(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["systems"]["text"]["loss"]["code"]["ci95"] = [1.0]
    changed["systems"]["code"]["status"] = "half done"
    with pytest.raises(DataError, match=r"systems\.text\.loss\.code\.ci95.*systems\.code\.status: got 'half done'"):
        check_comparison(changed)


def test_without_matplotlib_the_tables_are_written(
    results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == "matplotlib" or name.startswith("matplotlib.")]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError.__base__, match=r'pip install "ultrafuser\[report\]"'):  # type: ignore[arg-type]
        write_report(results, tmp_path)
    assert (tmp_path / "table.md").is_file() and (tmp_path / "results.csv").is_file()


def test_importing_the_report_needs_neither_matplotlib_nor_torch() -> None:
    code = "import sys, ultrafuser.report.page; print(sorted({'matplotlib', 'torch'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_comparison_is_read_without_being_changed(results: dict[str, Any]) -> None:
    original = copy.deepcopy(results)
    assert isinstance(check_comparison(results), Comparison) and results == original


def test_a_kind_of_no_other_name_is_called_by_its_own(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    for name in ("kind_label", "description"):
        del changed["systems"]["tuned"][name]
    tuned = check_comparison(changed).systems["tuned"]
    assert (tuned.kind_label, tuned.description) == ("tuned", "")


def test_the_kept_comparison_loads() -> None:
    results = json.loads(KEPT_RESULTS.read_text(encoding="utf-8"))
    systems = check_comparison(results).systems
    assert systems["btx"].kind_label == "BTX" and all(system.description for system in systems.values())
