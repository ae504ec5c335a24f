"""The report of a comparison: one self-contained page, its figures as files, its numbers as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import png_bytes, svg, themed_svg
from ultrafuser.display.page import (
    Block,
    Definitions,
    Details,
    Html,
    Note,
    Plot,
    Preformatted,
    Sentences,
    Subheading,
    as_json,
    page,
    text_file,
)
from ultrafuser.inspect.figure import trace_figure
from ultrafuser.inspect.html import trace_css, trace_html
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.data import BASELINES, Comparison, check_comparison
from ultrafuser.report.export import csv_text, markdown_table
from ultrafuser.report.figures import quality as quality_figures
from ultrafuser.report.figures import relative as relative_figures
from ultrafuser.report.figures import training as training_figures
from ultrafuser.report.figures.gate import weights_by_domain, weights_heatmap
from ultrafuser.report.tables import ablation_table, gate_table, main_tables, paired_tables, stability_table
from ultrafuser.report.text import glossary, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    results: Comparison | Mapping[str, Any], folder: str | PathLike[str], *, traces: Sequence[TokenTrace] = ()
) -> Path:
    """Write report.html, figures/*.svg and *.png, results.csv and table.md into a folder.

    results: a comparison, or what its results.json holds. traces: answers to show token by token.

    Returns:
        The path of report.html.

    Raises:
        DataError: results of another form. The message names the missing keys.
        MissingExtraError: matplotlib is not installed. The tables are written nevertheless.
    """
    comparison = results if isinstance(results, Comparison) else check_comparison(results)
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "results.csv").write_text(csv_text(comparison), encoding="utf-8")
    (folder / "table.md").write_text(markdown_table(comparison), encoding="utf-8")
    text = _page(comparison, _Plots(folder / "figures", comparison.digest), traces)
    (folder / "report.html").write_text(text, encoding="utf-8")
    return folder / "report.html"


class _Plots:
    """Draws figures into a folder and numbers them on the page. A PNG names the digest of its results."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest
        self.count = 0

    def save(self, name: str, figure: Figure) -> str:
        """Write NAME.svg and NAME.png.

        Returns:
            The text of the SVG.
        """
        image = svg(figure, themed=False)
        (self.folder / f"{name}.svg").write_text(image + "\n", encoding="utf-8")
        (self.folder / f"{name}.png").write_bytes(png_bytes(figure, metadata={"Results": self.digest}))
        return image

    def __call__(self, name: str, figure: Figure | None, caption: str) -> list[Block]:
        """The figure for the page, if there is one."""
        if figure is None:
            return []
        self.count += 1
        return [Plot(themed_svg(self.save(name, figure)), caption, label=f"Figure {self.count}.")]


def _page(comparison: Comparison, plots: _Plots, traces: Sequence[TokenTrace]) -> str:
    has_ablations = bool(comparison.table2 and comparison.columns)
    sections: dict[str, list[Block]] = {
        "Summary": [Sentences(summary(comparison))],
        "All systems": _all_systems(comparison),
        "Quality": _quality(comparison, plots),
        "Paired differences": _paired(comparison),
        "Quality against cost": plots("cost", quality_figures.quality_and_cost(comparison), _COST_CAPTION),
        "Ablations": [ablation_table(comparison, comparison.table2)] if has_ablations else [],
        "Specialists by domain": plots("loss-matrix", quality_figures.loss_matrix(comparison), _MATRIX_CAPTION),
        "Where the gate puts its weight": _gate(comparison, plots),
        "Answers, token by token": _answers(traces, plots),
        "Training": _training(comparison, plots),
        "Failures": _failures(comparison),
        "How to read this": [Definitions(glossary(comparison))],
        "Configuration": [as_json(comparison.config)],
    }
    size = f"Systems: {len(comparison.systems)}, columns: {len(comparison.columns)}"
    return page(
        comparison.title,
        [(heading, blocks) for heading, blocks in sections.items() if blocks],
        footer=f"{size}, seed {comparison.seed}, {comparison.created}. All numbers: results.json and results.csv.",
        styles=[trace_css(), text_file("report/templates/report.css")],
    )


_COST_CAPTION = (
    "Mean loss against speed and memory. The dashed line joins the systems that no other beats in both. Systems "
    "without one of the numbers are left out. A triangle at the upper edge has the loss that its name says."
)
_MATRIX_CAPTION = (
    "Loss of every specialist on every domain, in nats per response token, the lowest of each domain in bold. The "
    "colour is the distance to that lowest loss (table 3 of the paper)."
)
_RADAR_CAPTION = (
    "Relative scores (figure 1 of the paper): 100%, the circle, is the best specialist of each domain or task, outside "
    "is better. For a loss the score is the ratio of the geometric mean probabilities of a reference token, for a task "
    "the ratio of the scores. Drawn are the main system, the specialists and the best of other kinds, six at the most, if they "
    "have every number. The centre is not zero: read the rings."
)
_BARS_CAPTION = (
    "The same relative scores for every system: marks are domains (circles) and tasks (squares), the bar is their mean, "
    "drawn from 100%. A system that lacks a number has marks but no bar. Below 50% and above 200% a bar ends with its number."
)
_TRAINING_CAPTION = (
    "Training loss by stage (figure 5 of the paper). Where there are many steps, thin lines are the single ones and thick lines "
    "their running mean."
)
_CURVES_CAPTION = (
    "{label}: loss on the data of each domain, mean gate weight of each specialist, and entropy of the gate (0: one specialist "
    "has all the weight, ln K: all K have the same). Diamonds are the loss on validation rows."
)
_ANSWERS_NOTE = (
    "Each token lies on the colour of the specialist with the largest weight, stronger the further it is ahead of the next. "
    "Point at a token, or tap it, for its weights."
)


def _all_systems(comparison: Comparison) -> list[Block]:
    note = "95% intervals stand under each number. The best of each column is bold."
    if any(system.kind == "oracle" for system in comparison.systems.values()):
        note += " † is not a system, since it chooses knowing the answers, and is never in bold."
    return [Note(note), *main_tables(comparison)]


def _quality(comparison: Comparison, plots: _Plots) -> list[Block]:
    main = comparison.done.get(comparison.main or "")
    dotted = f" The dotted line is {main.label}." if main else ""
    beyond = ""
    for column in comparison.losses:
        limit = quality_figures.off_scale(comparison, column)
        if any(not value.value <= limit for value in comparison.values(column).values()):
            beyond = " Losses beyond twice the median stand at the edge."
    blocks: list[Block] = []
    if comparison.losses:
        caption = f"Loss by system on the same held-out samples, with 95% intervals.{dotted}{beyond}"
        blocks += plots("loss", quality_figures.quality(comparison, comparison.losses), caption)
    if comparison.scores:
        caption = f"Task scores by system, with 95% intervals.{dotted}"
        blocks += plots("tasks", quality_figures.quality(comparison, comparison.scores), caption)
    blocks += plots("radar", relative_figures.radar(comparison), _RADAR_CAPTION)
    blocks += plots("relative", relative_figures.relative_bars(comparison), _BARS_CAPTION)
    return blocks


def _paired(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    for rival, label in BASELINES.items():
        if tables := paired_tables(comparison, rival):
            blocks += [Subheading(f"Against {label}"), *tables]
    note = "This system minus the other on the same samples, with 95% intervals."
    return [Note(note, with_verdicts=True), *blocks] if blocks else []


def _gate(comparison: Comparison, plots: _Plots) -> list[Block]:
    blocks: list[Block] = []
    for index, name in enumerate(_main_first(comparison, comparison.gate_weights)):
        label = comparison.label(name)
        caption = f"{label}: mean gate weight on the data of each domain (table 6 of the paper)."
        figure = weights_by_domain(comparison.gate_weights[name])
        blocks += plots(f"gate-weights{_suffix(index)}", figure, caption)
    if comparison.gate_weights:
        blocks.append(Details("The same in numbers", gate_table(comparison)))
    for index, name in enumerate(_main_first(comparison, comparison.sample_weights)):
        samples = {domain: weights for domain, weights in comparison.sample_weights[name].items() if weights}
        caption = f"{comparison.label(name)}: mean gate weight of each sample, a column each (figure 6 of the paper)."
        blocks += plots(f"sample-weights{_suffix(index)}", weights_heatmap(samples) if samples else None, caption)
    return blocks


def _answers(traces: Sequence[TokenTrace], plots: _Plots) -> list[Block]:
    """The answers in colours. As figures they are files only."""
    for index, trace in enumerate(traces):
        plots.save(f"answer-{index + 1}", trace_figure(trace))
    answers = [Html(trace_html(trace, style=False), classes="answer") for trace in traces]
    return [Note(_ANSWERS_NOTE), *answers] if answers else []


def _training(comparison: Comparison, plots: _Plots) -> list[Block]:
    blocks = plots("training", training_figures.training_losses(comparison), _TRAINING_CAPTION)
    main = comparison.main or ""
    metrics = comparison.training.get(main, [])
    if any(key.startswith("gate_weight/") for row in metrics for key in row):
        caption = _CURVES_CAPTION.format(label=comparison.label(main))
        blocks += plots("training-curves", training_figures.training_curves(metrics), caption)
    if comparison.stability:
        note = "Loss over the checkpoints of a training: mean and sample standard deviation (table 4 of the paper)."
        blocks += [Subheading("Stability"), Note(note), stability_table(comparison)]
        caption = "Mean loss over the domains at each checkpoint."
        blocks += plots("stability", training_figures.stability_curves(comparison), caption)
    return blocks


def _failures(comparison: Comparison) -> list[Block]:
    blocks: list[Block] = []
    for system in comparison.failed.values():
        blocks += [Subheading(system.label), Preformatted(system.error or "", is_error=True)]
    return blocks


def _main_first(comparison: Comparison, weights: Mapping[str, Any]) -> list[str]:
    return sorted((name for name in weights if weights[name]), key=lambda name: name != comparison.main)


def _suffix(index: int) -> str:
    return f"-{index + 1}" if index else ""
