"""The numbers of a comparison: order, best systems, relative scores, summaries, figures, and results of another form."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from comparison_specimen import NAMES, specimen, without

from ultrafuser.errors import DataError
from ultrafuser.report.data import Comparison, check_comparison
from ultrafuser.report.text import summary

pytest.importorskip("matplotlib")
from ultrafuser.report.figures import quality as report_figures
from ultrafuser.report.figures import relative as report_relative
from ultrafuser.report.page import write_report

KEPT_RESULTS = Path(__file__).parents[2] / "docs" / "results" / "compare-zoo" / "results.json"


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return specimen()


def test_an_oracle_ahead_of_all_takes_no_bold_and_equal_numbers_share_it(results: dict[str, Any]) -> None:
    changed = copy.deepcopy(results)
    changed["systems"]["oracle"]["loss"]["code"]["nll"] = 0.1
    changed["systems"]["base"]["loss"]["code"]["nll"] = changed["systems"]["unbalanced"]["loss"]["code"]["nll"]
    comparison = check_comparison(changed)
    code = next(column for column in comparison.losses if column.name == "code")
    assert comparison.best(code) == {"base", "unbalanced"}


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
