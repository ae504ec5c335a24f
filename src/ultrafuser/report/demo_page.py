"""The demo's report.html: one self-contained page with the numbers of a run, drawn and explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ultrafuser.inspect.html import page
from ultrafuser.inspect.trace import TokenTrace
from ultrafuser.report.blocks import answers, as_json, definitions, details, plot, row, table
from ultrafuser.report.demo_results import (
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
from ultrafuser.report.figures import demo as figures

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
    sections = {
        "Loss by system and domain": _loss_table(results)
        + plot(figures.svg(figures.loss_bars(results)), _LOSS_CAPTION),
        "Where the gate puts its weight": (
            plot(figures.svg(figures.weights_by_domain(results["gate_weights"])), _WEIGHTS_CAPTION)
            + _gate_table(results)
            + (plot(figures.svg(figures.weights_heatmap(sample_weights)), _HEATMAP_CAPTION) if sample_weights else "")
        ),
        "Answers, token by token": answers(traces) if traces else "",
        "Training": plot(figures.svg(figures.training_curves(metrics)), _TRAINING_CAPTION) if metrics else "",
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


def _loss_table(results: Mapping[str, Any]) -> str:
    domains, systems = results["domains"], results["systems"]
    best = {domain: best_system(results, domain) for domain in domains}
    heads = [f"{escape(domain)}<small>{_size(systems['fused'][domain])}</small>" for domain in domains]
    rows = []
    for system, cells in systems.items():
        line = [_loss_cell(cells[d]["nll"], interval(cells[d]["ci95"]), best[d] == system) for d in domains]
        line.append(_loss_cell(mean_nll(results, system), "", best_system(results) == system))
        rows.append(row(escape(system_label(system)), line, "strong" if system == "fused" else ""))
    differences = [_difference_cell(results["paired"][domain]) for domain in domains]
    rows.append(row("fused − best single<br>specialist, paired", [*differences, ""], "rule"))
    note = "Nats per response token with 95% intervals; lower is better, the best of each column in bold."
    return f'<p class="note">{note}</p>\n{table(["system", *heads, "mean"], rows)}'


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
        row(escape(domain), [f"{weights[name]:.3f}" for name in specialists])
        for domain, weights in results["gate_weights"].items()
    ]
    return details("The same in numbers", table(["data", *(escape(name) for name in specialists)], rows))


def _costs(results: Mapping[str, Any]) -> str:
    rows = [
        row(escape(phase.replace("_", " ")), [f"{seconds:,.1f} s"]) for phase, seconds in results["seconds"].items()
    ]
    return f'<div class="pair">{table(["phase", "time"], rows)}{as_json(results["config"])}</div>'


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
    return definitions(entries)
