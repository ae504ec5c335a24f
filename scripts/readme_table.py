"""Write the result tables from kept runs of the demo: python scripts/readme_table.py [--check]

docs/results/demo.json (`make demo`) goes to the README, docs/results/demo-full.json (`ultrafuser demo --full`, on a GPU)
to docs/results/demo-full.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from marked_page import refresh

ROOT = Path(__file__).parent.parent
START, END = "<!-- demo:start -->", "<!-- demo:end -->"
LABELS = {
    "base": "base, no specialist",
    "weight_average": "average of the weights",
    "uniform": "equal mixture of the outputs",
    "fused_stage1": "**fused, stage 1** (gate only)",
    "fused": "**fused, stage 2** (joint)",
}


def table(results: dict) -> str:
    """Markdown: one line a system, the best of each column in bold, then the paired differences."""
    domains, systems = results["domains"], results["systems"]
    means = {name: sum(own[d]["nll"] for d in domains) / len(domains) for name, own in systems.items()}
    best = {d: min(own[d]["nll"] for own in systems.values()) for d in domains} | {"mean": min(means.values())}
    lines = [f"| nats a response token | {' | '.join(domains)} | mean |", "|---|" + "---:|" * (len(domains) + 1)]
    for name, own in systems.items():
        values = {d: own[d]["nll"] for d in domains} | {"mean": means[name]}
        cells = [f"**{v:.4f}**" if v == best[c] else f"{v:.4f}" for c, v in values.items()]
        lines.append(f"| {LABELS.get(name, f'{name} specialist')} | {' | '.join(cells)} |")
    cells = []
    for d in domains:
        pair = results["paired"][d]
        low, high = pair["ci95"]
        cells.append(f"{pair['difference']:+.4f} ({low:+.4f} to {high:+.4f})")
    lines.append(f"| fused minus best single specialist, 95% interval | {' | '.join(cells)} | |")
    counts = ", ".join(f"{systems['fused'][d]['samples']} {d}" for d in domains)
    tokens = sum(systems["fused"][d]["tokens"] for d in domains)
    config, seconds = results["config"], results["seconds"]["total"]
    cpu = f"{config['threads']} CPU cores (AVX2, float32)"
    hardware = cpu if config["device"] == "cpu" else "one NVIDIA H100 80GB (float32)"
    lines += [
        "",
        f"Held-out rows: {counts} ({tokens:,} response tokens), the same for every system; intervals are paired "
        f"bootstraps over rows. {hardware}, {seconds / 60:.1f} minutes, {config['peak_memory_mb'] / 1024:.1f} GiB of memory.",
    ]
    return "\n".join(lines)


def main() -> None:
    for page, kept in (("README.md", "demo"), ("docs/results/demo-full.md", "demo-full")):
        results = json.loads((ROOT / f"docs/results/{kept}.json").read_text())
        refresh(ROOT / page, START, END, table(results), "readme_table")


if __name__ == "__main__":
    main()
