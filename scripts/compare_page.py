"""Write the tables of docs/results/compare-zoo.md. With --check, fail when they are out of date.

`ultrafuser compare recipes/compare/zoo.yaml` wrote docs/results/compare-zoo/results.json.
"""

from __future__ import annotations

import json
from pathlib import Path

from marked_page import refresh

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "compare-zoo.md"
RESULTS = ROOT / "docs" / "results" / "compare-zoo" / "results.json"
START, END = "<!-- tables:start -->", "<!-- tables:end -->"
AGAINST = {"best_specialist": "the best specialist there", "router": "the router"}


def tables(results: dict) -> str:
    """Losses and costs of every system, benchmarks, paired differences, the gate's weights."""
    blocks = [losses(results), paired(results), to_others(results), gate(results)]
    if any(system["tasks"] for system in results["systems"].values()):
        blocks.insert(1, tasks(results))
    return "\n\n".join(blocks)


def losses(results: dict, costs: bool = True) -> str:
    """`costs`: with speed, memory and parameters."""
    columns = [*results["domains"], "mean"]
    systems = {name: system for name, system in results["systems"].items() if system["loss"]}
    fair = {name: system for name, system in systems.items() if system["kind"] != "oracle"}
    best = {c: min(system["loss"][c]["nll"] for system in fair.values()) for c in columns}
    heads = [*columns, *(["tokens/s", "peak MB", "active, M", "trained"] if costs else [])]
    lines = [f"| nats per response token | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, system in systems.items():
        values = [system["loss"][c]["nll"] for c in columns]
        cells = [
            f"**{v:.4f}**" if v == best[c] and name in fair else f"{v:.4f}"
            for c, v in zip(columns, values, strict=True)
        ]
        speed = f"{system['tokens_per_s']['median']:.1f}" if system["tokens_per_s"] else ""
        memory = f"{system['peak_memory_mb']:,}" if system["peak_memory_mb"] else ""
        active = f"{system['parameters']['active'] / 1e6:.0f}" if system["parameters"] else ""
        trained = f"{system['parameters']['trained']:,}" if system["parameters"] else ""
        label = f"**{system['label']}**" if name == results["main"] else system["label"]
        note = " (not a system)" if system["kind"] == "oracle" else ""
        cells += [speed, memory, active, trained] if costs else []
        lines.append(f"| {label}{note} | {' | '.join(cells)} |")
    counts = ", ".join(f"{systems[next(iter(systems))]['loss'][d]['samples']} {d}" for d in results["domains"])
    tokens = sum(systems[next(iter(systems))]["loss"][d]["tokens"] for d in results["domains"])
    return "\n".join([*lines, "", f"Test rows: {counts} ({tokens:,} response tokens), the same for every system."])


def tasks(results: dict) -> str:
    names = list(results["tasks"])
    lines = [f"| score, % | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for system in results["systems"].values():
        if not system["tasks"]:
            continue
        cells = []
        for task in names:
            score = system["tasks"].get(task)
            low, high = score["ci95"] if score else (0, 0)
            cells.append(f"{100 * score['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})" if score else "–")
        lines.append(f"| {system['label']} | {' | '.join(cells)} |")
    first = next(system["tasks"] for system in results["systems"].values() if system["tasks"])
    counts = ", ".join(f"{score['samples']} of {task}" for task, score in first.items())
    return "\n".join([*lines, "", f"Documents: {counts}, the same for every system. Parentheses hold 95% intervals."])


def paired(results: dict) -> str:
    columns = [*results["domains"], "mean"]
    lines = [f"| system | minus | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for name in dict.fromkeys(["router", *results["table2"], results["main"]]):
        system = results["systems"].get(name)
        if system is None or not system["loss"]:
            continue
        for baseline, label in AGAINST.items():
            pairs = system["paired"].get(baseline, {})
            cells = [difference_cell(pairs[c]) if c in pairs else "" for c in columns]
            if any(cells):
                lines.append(f"| {system['label']} | {label} | {' | '.join(cells)} |")
    note = "Paired differences on the same rows, with 95% intervals. Below zero the system is better. Intervals that exclude zero are bold."
    return "\n".join([*lines, "", note])


def to_others(results: dict) -> str:
    """Every system minus the main one, and minus the system that its recipe entry names in `versus`."""
    columns, systems = [*results["domains"], "mean"], results["systems"]
    lines = [f"| system | minus | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for baseline in ("versus", "main"):
        for system in systems.values():
            if pairs := system["paired"].get(baseline) if system["loss"] else None:
                cells = [difference_cell(pairs[c]) if c in pairs else "" for c in columns]
                lines.append(
                    f"| {system['label']} | {systems[pairs['mean']['versus']]['label']} | {' | '.join(cells)} |"
                )
    return "\n".join([*lines, "", "The same for single comparisons, and for every system minus the main one."])


def difference_cell(pair: dict, scale: int = 1, digits: int = 4) -> str:
    """A paired difference with its interval, bold if that excludes zero."""
    low, high = (scale * bound for bound in pair["ci95"])
    text = f"{scale * pair['difference']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def gate(results: dict) -> str:
    weights = results["gate_weights"][results["main"]]
    names = list(next(iter(weights.values())))
    lines = [f"| mean gate weight | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [
        f"| {domain} data | {' | '.join(f'{shares[n]:.3f}' for n in names)} |" for domain, shares in weights.items()
    ]
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    refresh(PAGE, START, END, tables(results), "compare_page")


if __name__ == "__main__":
    main()
