"""The demo's report.html: one self-contained page with the numbers of a run, drawn and explained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from ultrafuser.inspect import figures
from ultrafuser.inspect.html import page, trace_html
from ultrafuser.inspect.results import (
    best_system,
    check_results,
    interval,
    mean_nll,
    results_table,
    specialists_of,
    summary,
    system_label,
    verdict,
)
from ultrafuser.inspect.trace import TokenTrace

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["demo_report", "results_table"]


def demo_report(
    results: Mapping[str, Any],
    *,
    metrics: Sequence[Mapping[str, Any]],
    traces: Sequence[TokenTrace],
    sample_weights: Mapping[str, Sequence[Mapping[str, float]]],
    title: str = "What the fused model does",
) -> str:
    """The whole report as one HTML page with inline figures; nothing in it is loaded from elsewhere.

    results: the demo's results.json. metrics: rows of metrics.jsonl. traces: answers to show in colours.
    sample_weights: domain -> per test sample, specialist -> mean gate weight.

    Raises:
        DataError: results of another form.
        MissingExtraError: matplotlib is not installed.
    """
    check_results(results)
    answers = "\n".join(f'<div class="answer">{trace_html(trace, style=False)}</div>' for trace in traces)
    sections = {
        "Loss by system and domain": _loss_table(results) + _plot(figures.loss_bars(results), _LOSS_CAPTION),
        "Where the gate puts its weight": (
            _plot(figures.weights_by_domain(results["gate_weights"]), _WEIGHTS_CAPTION)
            + _gate_table(results)
            + (_plot(figures.weights_heatmap(sample_weights), _HEATMAP_CAPTION) if sample_weights else "")
        ),
        "Answers, token by token": f"<p>{_ANSWERS_NOTE}</p>\n{answers}" if traces else "",
        "Training": _plot(figures.training_curves(metrics), _TRAINING_CAPTION) if metrics else "",
        "Time and configuration": _costs(results),
        "What each number means": _glossary(results),
    }
    shown = [(heading, content) for heading, content in sections.items() if content]
    return page(title, shown, lead=summary(results))


_LOSS_CAPTION = (
    "Loss of every system on the same held-out rows, with 95% bootstrap intervals over rows. The dotted "
    "line is the fused model. Rows differ much in difficulty, so two intervals may overlap although the "
    "difference on each row, the last line of the table, is clear."
)
_WEIGHTS_CAPTION = "Mean gate weight of each specialist over the response tokens of each domain's rows."
_HEATMAP_CAPTION = "Mean gate weight per sample: one column per held-out row, one line per specialist."
_TRAINING_CAPTION = (
    "Loss and gate over the training steps of each stage. Where there are many steps, thin lines are the "
    "single ones and thick lines their running mean; diamonds are the loss on validation rows."
)
_ANSWERS_NOTE = (
    "Each token lies on the colour of the specialist with the largest weight, stronger the further it is "
    "ahead of the next. Point at a token, or tap it, for its weights."
)


def _loss_table(results: Mapping[str, Any]) -> str:
    domains, systems = results["domains"], results["systems"]
    best = {domain: best_system(results, domain) for domain in domains}
    heads = [f"{escape(domain)}<small>{_size(systems['fused'][domain])}</small>" for domain in domains]
    rows = []
    for system, cells in systems.items():
        row = [_loss_cell(cells[d]["nll"], interval(cells[d]["ci95"]), best[d] == system) for d in domains]
        row.append(_loss_cell(mean_nll(results, system), "", best_system(results) == system))
        rows.append(_row(escape(system_label(system)), row, "strong" if system == "fused" else ""))
    differences = [_difference_cell(results["paired"][domain]) for domain in domains]
    rows.append(_row("fused − best single<br>specialist, paired", [*differences, ""], "rule"))
    note = "Nats per response token with 95% intervals; lower is better, the best of each column in bold."
    return f'<p class="note">{note}</p>\n{_table(["system", *heads, "mean"], rows)}'


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways on a narrow screen; heads and rows are HTML."""
    cells = "".join(f'<th scope="col">{head}</th>' for head in heads)
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'


def _row(head: str, cells: Sequence[str], kind: str = "") -> str:
    columns = "".join(f"<td>{cell}</td>" for cell in cells)
    return f'<tr class="{kind}"><th scope="row">{head}</th>{columns}</tr>'


def _size(cell: Mapping[str, Any]) -> str:
    return f"{cell['samples']:,} rows, {cell['tokens']:,} tokens"


def _loss_cell(value: float, note: str, bold: bool) -> str:
    number = f"<b>{value:.4f}</b>" if bold else f"{value:.4f}"
    return f"{number}<small>{note}</small>" if note else number


def _difference_cell(pair: Mapping[str, Any]) -> str:
    notes = [interval(pair["ci95"], signed=True), f"vs {escape(system_label(pair['versus']))}"]
    number = f'<span class="{verdict(pair)}">{pair["difference"]:+.4f}</span>'
    return number + "".join(f"<small>{note}</small>" for note in notes)


def _gate_table(results: Mapping[str, Any]) -> str:
    specialists = specialists_of(results)
    rows = [
        _row(escape(domain), [f"{weights[name]:.3f}" for name in specialists])
        for domain, weights in results["gate_weights"].items()
    ]
    table = _table(["data", *(escape(name) for name in specialists)], rows)
    return f"<details><summary>The same in numbers</summary>{table}</details>\n"


def _costs(results: Mapping[str, Any]) -> str:
    rows = [
        _row(escape(phase.replace("_", " ")), [f"{seconds:,.1f} s"]) for phase, seconds in results["seconds"].items()
    ]
    config = json.dumps(results["config"], indent=2, ensure_ascii=False, default=str)
    return f'<div class="pair">{_table(["phase", "time"], rows)}<pre>{escape(config)}</pre></div>'


_TERMS = {
    "nats per response token": (
        "Minus the mean natural logarithm of the probability that a system gives to each token of the "
        "reference answer; e to its power is the perplexity. Prompts do not count. Within a domain every "
        "token counts the same; in the mean every domain does."
    ),
    "95% interval": (
        "Percentiles of the number over bootstrap resamples of the test rows: how far it might move with "
        "other rows of the same kind."
    ),
    "fused − best single specialist, paired": (
        "The difference of the losses on the same rows, against the specialist that is best on that "
        "domain. Below zero the fused model is better; an interval off zero makes the sign trustworthy."
    ),
    "gate weight": (
        "The share of a specialist in the mix at a token. At every token the weights of all specialists "
        "sum to 1; means over response tokens are shown."
    ),
    "gate entropy": (
        "How undecided the gate is, in nats: 0 when one specialist has all the weight, ln K when all K have the same."
    ),
}
_SYSTEMS = {
    "base": "The model that all specialists were tuned from, untouched.",
    "weight_average": "One model whose weights are the mean of the specialists' weights.",
    "uniform": "The specialists mixed with equal weights at every token, no gate.",
    "fused_stage1": "After stage 1: the gate trained, the specialists as they came.",
    "fused": "The fused model at the end of its training.",
}


def _glossary(results: Mapping[str, Any]) -> str:
    entries = dict(_TERMS)
    for name in results["systems"]:
        if name in _SYSTEMS:
            entries[system_label(name)] = _SYSTEMS[name]
    specialists = [name for name in specialists_of(results) if name in results["systems"]]
    if specialists:
        entries[", ".join(specialists)] = "Each specialist by itself."
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"


def _plot(figure: Figure, caption: str) -> str:
    """An inline figure; namespaces are implied in HTML, so that no address at all stands in the page."""
    image = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", figures.svg(figure))
    image = image.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    text = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure class="plot"><div class="scroll">{image}</div>{text}</figure>\n'
