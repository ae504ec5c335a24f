"""Write the table of docs/results/gate-ablation.md from its results: python scripts/gate_page.py [--check]

docs/results/gate-ablation.json is what benchmarks/gate_ablation.py wrote.
"""

from __future__ import annotations

import json
from pathlib import Path

from marked_page import refresh

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "gate-ablation.md"
RESULTS = PAGE.with_suffix(".json")
START, END = "<!-- tables:start -->", "<!-- tables:end -->"


def tables(results: dict) -> str:
    variants = results["variants"]
    columns = list(next(iter(variants.values()))["nll"])
    lines = [f"| gate | {' | '.join(columns)} | mean, minus the paper's gate |", "|---|" + "---:|" * (len(columns) + 1)]
    for name, own in variants.items():
        low, high = own["minus_paper"]["mean"]["ci95"]
        pair = f"{own['minus_paper']['mean']['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        pair = "" if low == high == 0 else f"**{pair}**" if low > 0 or high < 0 else pair
        temperatures = f" ({', '.join(f'{t:.2f}' for t in own['temperatures'])})" if own["temperatures"] else ""
        values = " | ".join(f"{own['nll'][column]['value']:.4f}" for column in columns)
        lines.append(f"| {name}{temperatures} | {values} | {pair} |")
    lines += ["", f"| one specialist alone | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, own in results["specialists"].items():
        for how in ("as it is", "at its temperature"):
            label = f"{name}, {how}" + (f" ({own['temperature']:.2f})" if how != "as it is" else "")
            values = " | ".join(f"{own[how][column]['value']:.4f}" for column in columns)
            lines.append(f"| {label} | {values} |")
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    refresh(PAGE, START, END, tables(results), "gate_page")


if __name__ == "__main__":
    main()
