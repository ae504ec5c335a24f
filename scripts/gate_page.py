"""Write the tables of docs/results/gate-ablation.md. With --check, fail when they are out of date.

benchmarks/gate_ablation.py wrote docs/results/gate-ablation.json.
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
    for name, variant in variants.items():
        low, high = variant["minus_paper"]["mean"]["ci95"]
        pair = f"{variant['minus_paper']['mean']['difference']:+.4f} ({low:+.4f} to {high:+.4f})"
        pair = "" if low == high == 0 else f"**{pair}**" if low > 0 or high < 0 else pair
        temperatures = f" ({', '.join(f'{t:.2f}' for t in variant['temperatures'])})" if variant["temperatures"] else ""
        values = " | ".join(f"{variant['nll'][column]['value']:.4f}" for column in columns)
        lines.append(f"| {name}{temperatures} | {values} | {pair} |")
    lines += ["", f"| one specialist alone | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for name, specialist in results["specialists"].items():
        for state in ("as it is", "at its temperature"):
            label = f"{name}, {state}" + (f" ({specialist['temperature']:.2f})" if state != "as it is" else "")
            values = " | ".join(f"{specialist[state][column]['value']:.4f}" for column in columns)
            lines.append(f"| {label} | {values} |")
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    refresh(PAGE, START, END, tables(results), "gate_page")


if __name__ == "__main__":
    main()
