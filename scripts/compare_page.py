"""Write the tables of docs/results/compare-zoo.md from the kept run: python scripts/compare_page.py [--check]

docs/results/compare-zoo/results.json is what `ultrafuser compare recipes/compare/zoo.yaml` wrote.
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
    parts = [losses(results), paired(results), to_others(results), gate(results)]
    if any(system["tasks"] for system in results["systems"].values()):
        parts.insert(1, tasks(results))
    return "\n\n".join(parts)


def losses(results: dict) -> str:
    columns = [*results["domains"], "mean"]
    systems = {name: own for name, own in results["systems"].items() if own["loss"]}
    fair = {name: own for name, own in systems.items() if own["kind"] != "oracle"}
    best = {c: min(own["loss"][c]["nll"] for own in fair.values()) for c in columns}
    lines = [
        f"| nats a response token | {' | '.join(columns)} | tokens/s | peak MB | active, M | trained |",
        "|---|" + "---:|" * (len(columns) + 4),
    ]
    for name, own in systems.items():
        values = [own["loss"][c]["nll"] for c in columns]
        cells = [
            f"**{v:.4f}**" if v == best[c] and name in fair else f"{v:.4f}"
            for c, v in zip(columns, values, strict=True)
        ]
        speed = f"{own['tokens_per_s']['median']:.1f}" if own["tokens_per_s"] else ""
        memory = f"{own['peak_memory_mb']:,}" if own["peak_memory_mb"] else ""
        active = f"{own['parameters']['active'] / 1e6:.0f}" if own["parameters"] else ""
        trained = f"{own['parameters']['trained']:,}" if own["parameters"] else ""
        label = f"**{own['label']}**" if name == results["main"] else own["label"]
        note = " (not a system)" if own["kind"] == "oracle" else ""
        lines.append(f"| {label}{note} | {' | '.join(cells)} | {speed} | {memory} | {active} | {trained} |")
    counts = ", ".join(f"{systems[next(iter(systems))]['loss'][d]['samples']} {d}" for d in results["domains"])
    tokens = sum(systems[next(iter(systems))]["loss"][d]["tokens"] for d in results["domains"])
    return "\n".join([*lines, "", f"Test rows: {counts} ({tokens:,} response tokens), the same for every system."])


def tasks(results: dict) -> str:
    names = list(results["tasks"])
    lines = [f"| score, % | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    for own in results["systems"].values():
        if not own["tasks"]:
            continue
        cells = []
        for task in names:
            found = own["tasks"].get(task)
            low, high = found["ci95"] if found else (0, 0)
            cells.append(f"{100 * found['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})" if found else "–")
        lines.append(f"| {own['label']} | {' | '.join(cells)} |")
    first = next(own["tasks"] for own in results["systems"].values() if own["tasks"])
    counts = ", ".join(f"{found['samples']} of {task}" for task, found in first.items())
    return "\n".join([*lines, "", f"Documents: {counts}, the same for every system; 95% intervals."])


def paired(results: dict) -> str:
    columns = [*results["domains"], "mean"]
    lines = [f"| system | minus | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for name in dict.fromkeys(["router", *results["table2"], results["main"]]):
        own = results["systems"].get(name)
        if own is None or not own["loss"]:
            continue
        for rival, words in AGAINST.items():
            pairs = own["paired"].get(rival, {})
            cells = [_difference(pairs[c]) if c in pairs else "" for c in columns]
            if any(cells):
                lines.append(f"| {own['label']} | {words} | {' | '.join(cells)} |")
    note = "Paired differences on the same rows with 95% intervals; below zero the system is better. Off zero in bold."
    return "\n".join([*lines, "", note])


def to_others(results: dict) -> str:
    """Every system minus the main one, and those lines of the recipe that name a system to compare with."""
    columns, systems = [*results["domains"], "mean"], results["systems"]
    lines = [f"| system | minus | {' | '.join(columns)} |", "|---|---|" + "---:|" * len(columns)]
    for rival in ("versus", "main"):
        for own in systems.values():
            if pairs := own["paired"].get(rival) if own["loss"] else None:
                cells = [_difference(pairs[c]) if c in pairs else "" for c in columns]
                lines.append(f"| {own['label']} | {systems[pairs['mean']['versus']]['label']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "The same for single comparisons, and for every system against the main one."])


def _difference(pair: dict) -> str:
    low, high = pair["ci95"]
    text = f"{pair['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def gate(results: dict) -> str:
    weights = results["gate_weights"][results["main"]]
    names = list(next(iter(weights.values())))
    lines = [f"| mean gate weight | {' | '.join(names)} |", "|---|" + "---:|" * len(names)]
    lines += [f"| {domain} data | {' | '.join(f'{own[n]:.3f}' for n in names)} |" for domain, own in weights.items()]
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    refresh(PAGE, START, END, tables(results), "compare_page")


if __name__ == "__main__":
    main()
