"""The report of a comparison: one self-contained page, its figures as files, its numbers as CSV and Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ultrafuser.display.drawing import png_bytes, svg, themed_svg
from ultrafuser.inspect.figure import trace_figure
from ultrafuser.inspect.html import page
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.blocks import answers, as_json, definitions, details, plot
from ultrafuser.report.data import BASELINES, Comparison, check_comparison
from ultrafuser.report.figures import quality as report_figures
from ultrafuser.report.figures import relative as report_relative
from ultrafuser.report.figures import training as report_training
from ultrafuser.report.figures.gate import weights_by_domain, weights_heatmap
from ultrafuser.report.tables import (
    chosen_table,
    csv_text,
    gate_table,
    main_tables,
    markdown_table,
    paired_tables,
    stability_table,
)
from ultrafuser.report.text import glossary, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
table.dense { width: 100%; }
table.dense th, table.dense td { padding: .36rem .55rem; }
table.dense th:first-child { padding-left: 0; white-space: normal; overflow-wrap: anywhere;
  min-width: 8.5rem; max-width: 15rem; }
table.dense thead th { vertical-align: bottom; }
table.dense tbody tr.rule > * { border-top: 1px solid var(--muted); }
td.failed { text-align: left; white-space: normal; overflow-wrap: anywhere; color: var(--bad); }
ul.summary { padding-left: 1.1rem; max-width: 46rem; } ul.summary li { margin-bottom: .45rem; }
figure.plot figcaption b { color: var(--ink); }
h3 { font-size: 1rem; margin: 1.6rem 0 .5rem; }
pre.error { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) { table.dense th:first-child { min-width: 6.5rem; max-width: 7.5rem; }
  table.dense { font-size: .85rem; } main { padding: 1.4rem .9rem 3rem; } }
@media print { main { max-width: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""


def write_report(
    results: Comparison | Mapping[str, Any], folder: str | PathLike[str], *, traces: Sequence[TokenTrace] = ()
) -> Path:
    """Write report.html, figures/*.svg and *.png, results.csv and table.md into a folder.

    results: a comparison, or what its results.json holds. traces: answers to show token by token.

    Returns:
        The path of report.html.

    Raises:
        DataError: results of another form; the message names what is missing.
        MissingExtraError: matplotlib is not installed; the tables are written all the same.
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
    """Draws figures into a folder and numbers them on the page; a PNG names the digest of its results."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self.digest = digest
        self.count = 0

    def save(self, name: str, figure: Figure) -> str:
        """Write NAME.svg and NAME.png; the SVG's text."""
        image = svg(figure, themed=False)
        (self.folder / f"{name}.svg").write_text(image + "\n", encoding="utf-8")
        (self.folder / f"{name}.png").write_bytes(png_bytes(figure, metadata={"Results": self.digest}))
        return image

    def __call__(self, name: str, figure: Figure | None, caption: str) -> str:
        """The figure for the page, or nothing where there is none."""
        if figure is None:
            return ""
        self.count += 1
        return plot(themed_svg(self.save(name, figure)), caption, number=f"Figure {self.count}.")


def _page(comparison: Comparison, plots: _Plots, traces: Sequence[TokenTrace]) -> str:
    sections = {
        "Summary": _summary(comparison),
        "All systems": _all_systems(comparison),
        "Quality": _quality(comparison, plots),
        "Paired differences": _paired(comparison),
        "Quality against cost": plots("cost", report_figures.quality_and_cost(comparison), _COST_CAPTION),
        "Ablations": chosen_table(comparison, comparison.table2) if comparison.table2 and comparison.columns else "",
        "Specialists by domain": plots("loss-matrix", report_figures.loss_matrix(comparison), _MATRIX_CAPTION),
        "Where the gate puts its weight": _gate(comparison, plots),
        "Answers, token by token": _answers(traces, plots),
        "Training": _training(comparison, plots),
        "Failures": _failures(comparison),
        "How to read this": definitions(glossary(comparison)),
        "Configuration": as_json(comparison.config),
    }
    size = f"Systems: {len(comparison.systems)}; columns: {len(comparison.columns)}"
    footer = f"{size}; seed {comparison.seed}; {comparison.created}. All numbers: results.json and results.csv."
    shown = [(heading, content) for heading, content in sections.items() if content]
    return page(comparison.title, shown, footer=footer, style=_STYLE)


_COST_CAPTION = (
    "Mean loss against speed and memory. The dashed line joins the systems that no other beats in both; systems "
    "without one of the numbers are left out, and a triangle at the upper edge has the loss that its name says."
)
_MATRIX_CAPTION = (
    "Loss of every specialist on every domain, in nats per response token; the lowest of each domain in bold. The "
    "colour is the distance to that lowest loss (table 3 of the paper)."
)
_RADAR_CAPTION = (
    "Relative scores (figure 1 of the paper): 100%, the circle, is the best specialist of each domain or task, outside "
    "is better. For a loss the score is the ratio of the geometric mean probabilities of a reference token, for a task "
    "the ratio of the scores. Drawn are {drawn}. The centre is not zero; read the rings."
)
_BARS_CAPTION = (
    "The same relative scores for every system: marks are domains (circles) and tasks (squares), the bar is their mean, "
    "drawn from 100%. A system that lacks a number has marks but no bar; below 50% and above 200% a bar ends with its number."
)
_TRAINING_CAPTION = (
    "Training loss by stage (figure 5 of the paper). Where there are many steps, thin lines are the single ones and thick lines "
    "their running mean."
)
_CURVES_CAPTION = (
    "{label}: loss on the data of each domain, mean gate weight of each specialist, and entropy of the gate (0: one specialist "
    "has all the weight; ln K: all K have the same). Diamonds are the loss on validation rows."
)


def _summary(comparison: Comparison) -> str:
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in summary(comparison))
    return f'<ul class="summary">{items}</ul>'


def _all_systems(comparison: Comparison) -> str:
    note = "95% intervals stand under each number; the best of each column in bold."
    if any(system.kind == "oracle" for system in comparison.systems.values()):
        note += " † is not a system, since it chooses knowing the answers, and is never in bold."
    return f'<p class="note">{note}</p>\n{"".join(main_tables(comparison))}'


def _quality(comparison: Comparison, plots: _Plots) -> str:
    main = comparison.done.get(comparison.main or "")
    dotted = f" The dotted line is {main.label}." if main else ""
    far = any(
        not cell.value <= report_figures.off_scale(comparison, column)
        for column in comparison.losses
        for cell in comparison.values(column).values()
    )
    beyond = " Losses beyond twice the median stand at the edge." if far else ""
    parts = []
    if comparison.losses:
        caption = f"Loss by system on the same held-out samples, with 95% intervals.{dotted}{beyond}"
        parts.append(plots("loss", report_figures.quality(comparison, comparison.losses), caption))
    if comparison.scores:
        caption = f"Task scores by system, with 95% intervals.{dotted}"
        parts.append(plots("tasks", report_figures.quality(comparison, comparison.scores), caption))
    drawn = "the main system, the specialists and the best of other kinds, six at the most, if they have every number"
    parts.append(plots("radar", report_relative.radar(comparison), _RADAR_CAPTION.format(drawn=drawn)))
    parts.append(plots("relative", report_relative.relative_bars(comparison), _BARS_CAPTION))
    return "".join(parts)


def _paired(comparison: Comparison) -> str:
    parts = {BASELINES[rival]: paired_tables(comparison, rival) for rival in BASELINES}
    shown = "".join(f"<h3>Against {escape(words)}</h3>\n{table}" for words, table in parts.items() if table)
    note = (
        "This system minus the other on the same samples, with 95% intervals. "
        '<span class="better">Better</span> and <span class="worse">worse</span>: the interval excludes zero.'
    )
    return f'<p class="note">{note}</p>\n{shown}' if shown else ""


def _gate(comparison: Comparison, plots: _Plots) -> str:
    parts = []
    for number, name in enumerate(_main_first(comparison, comparison.gate_weights)):
        label = comparison.label(name)
        caption = f"{label}: mean gate weight on the data of each domain (table 6 of the paper)."
        parts.append(plots(f"gate-weights{_suffix(number)}", weights_by_domain(comparison.gate_weights[name]), caption))
    if comparison.gate_weights:
        parts.append(details("The same in numbers", gate_table(comparison)))
    for number, name in enumerate(_main_first(comparison, comparison.sample_weights)):
        samples = {domain: found for domain, found in comparison.sample_weights[name].items() if found}
        caption = f"{comparison.label(name)}: mean gate weight of each sample, a column each (figure 6 of the paper)."
        figure = weights_heatmap(samples) if samples else None
        parts.append(plots(f"sample-weights{_suffix(number)}", figure, caption))
    return "".join(parts)


def _answers(traces: Sequence[TokenTrace], plots: _Plots) -> str:
    """The answers in colours; as figures they are files only."""
    for number, trace in enumerate(traces, start=1):
        plots.save(f"answer-{number}", trace_figure(trace))
    return answers(traces) if traces else ""


def _training(comparison: Comparison, plots: _Plots) -> str:
    parts = [plots("training", report_training.training_losses(comparison), _TRAINING_CAPTION)]
    main = comparison.main or ""
    metrics = comparison.training.get(main, [])
    if any(key.startswith("gate_weight/") for row in metrics for key in row):
        caption = _CURVES_CAPTION.format(label=comparison.label(main))
        parts.append(plots("training-curves", report_training.training_curves(metrics), caption))
    if comparison.stability:
        note = "Loss over the checkpoints of a training: mean and sample standard deviation (table 4 of the paper)."
        figure = report_training.stability_curves(comparison)
        parts.append(f'<h3>Stability</h3>\n<p class="note">{note}</p>\n{stability_table(comparison)}')
        parts.append(plots("stability", figure, "Mean loss over the domains at each checkpoint."))
    return "".join(parts)


def _failures(comparison: Comparison) -> str:
    return "".join(
        f'<h3>{escape(system.label)}</h3>\n<pre class="error">{escape(system.error or "")}</pre>\n'
        for system in comparison.failed.values()
    )


def _main_first(comparison: Comparison, names: Mapping[str, Any]) -> list[str]:
    return sorted((name for name in names if names[name]), key=lambda name: name != comparison.main)


def _suffix(number: int) -> str:
    return f"-{number + 1}" if number else ""
