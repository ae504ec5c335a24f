"""Write the README's table and figures from a run of the demo, given as its folder (runs/demo).

The run's results.json becomes docs/results/demo.json, and two of its figures go to docs/assets. With --check, fail when
the table or a figure is not that of docs/results/demo.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

from marked_page import refresh
from ultrafuser.report.data import MEAN, Comparison, System, check_comparison

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "demo.json"
FIGURES = {"loss": "demo-loss.png"}  # of the run: in docs/assets
START, END = "<!-- demo:start -->", "<!-- demo:end -->"
LABELS = {
    "base": "base, no specialist",
    "weight_average": "average of the weights",
    "uniform": "equal mixture of the outputs",
    "fused_stage1": "**fused, stage 1** (gate only)",
    "fused": "**fused, stage 2** (joint)",
}


def table(comparison: Comparison) -> str:
    """Markdown: one line per system, the best of each column in bold, then the paired differences."""
    domains, systems = comparison.domains, comparison.systems
    losses = {name: _losses(system) for name, system in systems.items()}
    best = {column: min(row[column] for row in losses.values()) for column in [*domains, MEAN]}
    lines = [f"| nats per response token | {' | '.join([*domains, MEAN])} |", "|---|" + "---:|" * (len(domains) + 1)]
    for name, row in losses.items():
        cells = [f"**{row[c]:.4f}**" if row[c] == best[c] else f"{row[c]:.4f}" for c in [*domains, MEAN]]
        lines.append(f"| {LABELS.get(name, f'{name} specialist')} | {' | '.join(cells)} |")
    cells = []
    for domain in domains:
        pair = systems["fused"].paired["best_specialist"][domain]
        low, high = pair.ci95
        cells.append(f"{pair.difference:+.4f} ({low:+.4f} to {high:+.4f})")
    lines.append(f"| fused minus best single specialist, 95% interval | {' | '.join(cells)} | |")
    return "\n".join([*lines, "", *_exams(comparison), "", _note(comparison)])


def _exams(comparison: Comparison) -> list[str]:
    """Right answers of the systems that sat the exams."""
    tasks = list(comparison.tasks)
    heads = [task.removeprefix("exam_") for task in tasks]
    lines = [f"| right answers | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, system in comparison.systems.items():
        if system.tasks:
            cells = [f"{round(system.tasks[t].value * system.tasks[t].samples)}" for t in tasks]
            lines.append(f"| {LABELS.get(name, f'{name} specialist')} | {' | '.join(cells)} |")
    samples = comparison.systems["fused"].tasks[tasks[0]].samples
    return [*lines, "", f"Of {samples} questions of each exam, the same for every system."]


def _losses(system: System) -> dict[str, float]:
    return {column: loss.nll for column, loss in (system.loss or {}).items()}


def _note(comparison: Comparison) -> str:
    """Test rows, hardware, time and memory of the run."""
    loss = comparison.systems["fused"].loss or {}
    counts = ", ".join(f"{loss[domain].samples} {domain}" for domain in comparison.domains)
    tokens = sum(loss[domain].tokens or 0 for domain in comparison.domains)
    config = comparison.config
    cpu = f"{config['threads']} CPU cores (AVX2, float32)"
    hardware = cpu if config["device"] == "cpu" else "one NVIDIA H100 80GB (float32)"
    return (
        f"Held-out rows: {counts} ({tokens:,} response tokens), the same for every system. Intervals are paired bootstraps "
        f"over rows. {hardware}, {config['seconds']['total'] / 60:.1f} minutes, "
        f"{config['peak_memory_mb'] / 1024:.1f} GiB of memory."
    )


def check_figures(comparison: Comparison) -> None:
    """End with an error where a figure was not drawn from these results."""
    for name in FIGURES.values():
        with Image.open(ROOT / "docs" / "assets" / name) as image:
            if image.info.get("Results") != comparison.digest:
                sys.exit(
                    f"docs/assets/{name}: not drawn from docs/results/demo.json. Run: python scripts/demo_page.py runs/demo"
                )


def main() -> None:
    run = next((Path(word) for word in sys.argv[1:] if not word.startswith("--")), None)
    if run is not None:
        shutil.copyfile(run / "results.json", RESULTS)
        for figure, name in FIGURES.items():
            shutil.copyfile(run / "figures" / f"{figure}.png", ROOT / "docs" / "assets" / name)
    comparison = check_comparison(json.loads(RESULTS.read_text(encoding="utf-8")))
    refresh(ROOT / "README.md", START, END, table(comparison), "demo_page")
    check_figures(comparison)


if __name__ == "__main__":
    main()
