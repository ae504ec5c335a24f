"""The demo's results.json: check its form, find who is best, say in words and as a table what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import HORIZONTALS
from rich.table import Table
from rich.text import Text

from ultrafuser.errors import DataError

_KEYS = ("domains", "systems", "gate_weights", "paired", "seconds", "config")
_CELL = ("nll", "ci95", "tokens", "samples")
_LABELS = {"fused_stage1": "fused, stage 1", "weight_average": "weight average"}
_RIVALS = {"weight_average": "with averaged weights", "uniform": "with equal weights at every token"}


def check_results(results: Mapping[str, Any]) -> None:
    """Refuse results of another form.

    Raises:
        DataError: a key, a domain of a system, or the system `fused` is missing; the message names it.
    """
    missing = [key for key in _KEYS if key not in results]
    if missing:
        raise DataError(f"results: missing keys {missing}, expected {list(_KEYS)}; run `ultrafuser demo` again")
    if not results["domains"]:
        raise DataError("results: 'domains' is empty, expected at least one domain")
    if "fused" not in results["systems"]:
        raise DataError(f"results: system 'fused' is missing, got {list(results['systems'])}")
    for domain in results["domains"]:
        for name, cells in results["systems"].items():
            lacks = [key for key in _CELL if key not in cells.get(domain, {})]
            if lacks:
                raise DataError(f"results: system {name!r} lacks {lacks} for domain {domain!r}")
        for key in ("gate_weights", "paired"):
            if domain not in results[key]:
                raise DataError(f"results: {key!r} lacks domain {domain!r}, got {list(results[key])}")


def system_label(system: str) -> str:
    """How tables and figures write the name of a system; a specialist's name stays as it is."""
    return _LABELS.get(system, system)


def specialists_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the specialists, in the order of the gate's weights."""
    return list(next(iter(results["gate_weights"].values()), {}))


def mean_nll(results: Mapping[str, Any], system: str) -> float:
    """Mean over domains, each counting the same, of a system's nats per response token."""
    losses = [results["systems"][system][domain]["nll"] for domain in results["domains"]]
    return sum(losses) / len(losses)


def best_system(results: Mapping[str, Any], domain: str | None = None) -> str:
    """The system of lowest loss on a domain, or on the mean of all domains."""
    systems = results["systems"]
    if domain is None:
        return min(systems, key=lambda name: mean_nll(results, name))
    return min(systems, key=lambda name: systems[name][domain]["nll"])


def verdict(pair: Mapping[str, Any]) -> str:
    """`better`, `worse` or `level`: on which side of zero the interval of fused minus other lies, if any."""
    low, high = pair["ci95"]
    return "better" if high < 0 else "worse" if low > 0 else "level"


def summary(results: Mapping[str, Any]) -> str:
    """What the numbers show, in a few sentences computed from them alone."""
    return " ".join([_mean_sentence(results), _paired_sentence(results), *_rival_sentences(results)])


def results_table(results: Mapping[str, Any]) -> Table:
    """The systems and domains for the terminal, in 80 columns; the best of each column in bold.

    Raises:
        DataError: as `check_results`.
    """
    check_results(results)
    domains, systems = results["domains"], results["systems"]
    best = {domain: best_system(results, domain) for domain in domains}
    title = "nats per response token over its 95% interval; lower is better"
    table = Table(title=title, title_justify="left", header_style="bold", box=HORIZONTALS)
    table.add_column(Text("system"), no_wrap=True)
    for name in (*domains, "mean"):
        table.add_column(Text(name), justify="right", no_wrap=True)
    for system, cells in systems.items():
        row = [_loss_cell(cells[domain], bold=best[domain] == system) for domain in domains]
        mean = Text(f"{mean_nll(results, system):.4f}", "bold" if best_system(results) == system else "")
        table.add_row(Text(system_label(system)), *row, mean, end_section=system == list(systems)[-1])
    differences = [_difference_cell(results["paired"][domain]) for domain in domains]
    table.add_row(Text("fused − best\nspecialist,\npaired"), *differences, Text(""))
    return table


def interval(bounds: Sequence[float], *, signed: bool = False) -> str:
    """An interval as `[low, high]`, with signs for a difference."""
    low, high = bounds
    return f"[{low:+.4f}, {high:+.4f}]" if signed else f"[{low:.4f}, {high:.4f}]"


def _loss_cell(cell: Mapping[str, Any], *, bold: bool) -> Text:
    low, high = cell["ci95"]
    return Text(f"{cell['nll']:.4f}", "bold" if bold else "") + Text(f"\n{low:.2f}–{high:.2f}", "dim")


def _difference_cell(pair: Mapping[str, Any]) -> Text:
    text = Text(f"{pair['difference']:+.4f}", {"better": "green", "worse": "red", "level": ""}[verdict(pair)])
    low, high = pair["ci95"]
    return text + Text(f"\n{low:+.4f} to\n{high:+.4f}\nvs {system_label(pair['versus'])}", "dim")


def _mean_sentence(results: Mapping[str, Any]) -> str:
    fused = mean_nll(results, "fused")
    where = f"nats per response token on the mean of {_all_domains(results)}"
    text = f"The fused model's loss is {fused:.4f} {where}"
    singles = [name for name in specialists_of(results) if name in results["systems"]]
    if not singles:
        return f"{text}."
    rival = min(singles, key=lambda name: mean_nll(results, name))
    other = mean_nll(results, rival)
    how = "lower" if fused < other else "higher"
    change = f"{abs(fused / other - 1):.1%} {how}"
    return f"{text}, {change} than that of the best single specialist ({rival}, {other:.4f})."


def _paired_sentence(results: Mapping[str, Any]) -> str:
    words = {
        "better": "clearly better on {} (the 95% interval of the difference lies below zero)",
        "level": "not distinguishable from it on {}",
        "worse": "clearly worse on {} (the interval lies above zero)",
    }
    groups: dict[str, list[str]] = {kind: [] for kind in words}
    for domain in results["domains"]:
        groups[verdict(results["paired"][domain])].append(domain)
    clauses = [words[kind].format(_listed(found)) for kind, found in groups.items() if found]
    return f"Compared row by row with the best single specialist of each domain it is {'; '.join(clauses)}."


def _rival_sentences(results: Mapping[str, Any]) -> list[str]:
    """Where fusing beats mixing without training; rivals with the same outcome share a sentence."""
    systems, domains = results["systems"], results["domains"]
    outcomes: dict[tuple[str, ...], list[str]] = {}
    for rival, words in _RIVALS.items():
        if rival in systems:
            lower = tuple(d for d in domains if systems["fused"][d]["nll"] < systems[rival][d]["nll"])
            outcomes.setdefault(lower, []).append(words)
    return [f"Its loss is {_outcome(lower, domains)} {_listed(rivals)}." for lower, rivals in outcomes.items()]


def _outcome(lower: Sequence[str], domains: Sequence[str]) -> str:
    rest = [domain for domain in domains if domain not in lower]
    if not lower:
        return "on no domain lower than"
    return f"lower on {_listed(lower)}, but not on {_listed(rest)}, than" if rest else "lower on every domain than"


def _all_domains(results: Mapping[str, Any]) -> str:
    domains = results["domains"]
    return f"all {len(domains)} domains" if len(domains) > 1 else f"the domain {domains[0]}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
