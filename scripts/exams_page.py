"""Write the tables and the figure of the exams: docs/results/exams.md, README.md, docs/assets/exams.png.

`ultrafuser compare recipes/compare/exams.yaml` wrote docs/results/exams/results.json, and recipes/compare/exams-seeds.yaml
the files seed-*.json beside it. With --check, fail when a page or the figure is out of date.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from adapter_card import FRONT_MATTER, USAGE
from compare_page import difference_cell, gate, losses
from marked_page import check_figure, digest, refresh
from ultrafuser.display.drawing import INK, PAPER, SMALL, TEXT, new_figure

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "exams.md"
RESULTS = ROOT / "docs" / "results" / "exams" / "results.json"
FIGURE = ROOT / "docs" / "assets" / "exams.png"
ADAPTERS = ROOT / "src" / "ultrafuser" / "zoo" / "exams" / "adapters"
START, END = "<!-- exams:start -->", "<!-- exams:end -->"
BOUNDS = {"oracle"}  # no systems
# The systems of the figure, as far as they are measured.
SHOWN = ["base", "text", "code", "math", "weight-average", "ties", "router", "all-r16", "btx", "fused-stage1", "fused"]
AGAINST = {
    "best_specialist": "the best specialist there",
    "router": "the router",
    "main": "the fused model",
    "versus": "another system",
}

ABOUT = {
    "text": "short passages, family relations, the order of words, past tense and fields of a text",
    "code": "short Python functions from a description, mended bugs and printed output",
    "math": "chains of operations, equations, fractions, percentages and word problems, worked step by step",
}
CARD = (
    FRONT_MATTER
    + """
# The {name} specialist of ultrafuser's exams

This is a LoRA adapter on SmolLM2-135M-Instruct for the tasks of the {name} exam: {about}. It is one of three (text, code, math) that
ship with ultrafuser. Each passes its own exam and fails those of the others, so that it becomes visible what a fused model keeps.

"""
    + USAGE
    + """
## Training

{rows} generated rows of the exam's training split (Apache-2.0), one epoch: {steps} steps of at most {tokens} tokens, {trained} response tokens.
Rank {rank}, alpha {alpha}, learning rate {lr} with AdamW, cosine to 0 after warm-up, bfloat16 autocast over float32 weights, saved in bfloat16, seed 0.
It took {minutes} minutes on one core of a CPU with AVX512-BF16, with {versions}. `recipes/exams/{name}.yaml` has the commands.

## Measured

Right answers to 300 questions of each exam's test split: {passed}. [docs/results/exams.md](../../../../../../docs/results/exams.md) has intervals.

## Limits

It knows tasks of these kinds and little else: all rows are generated from templates, in English, with a single turn. There is no safety training beyond
the base model's.
"""
)


def label_of(results: dict, name: str) -> str:
    """How the tables and the figure call a system."""
    system = results["systems"][name]
    return f"{system['label']} specialist" if system["kind"] == "specialist" else system["label"]


def bold_label(results: dict, name: str) -> str:
    """The label, bold for the main system."""
    label = label_of(results, name)
    return f"**{label}**" if name == results["main"] else label


def exams(results: dict) -> list[str]:
    return [task.removeprefix("exam_") for task in results["tasks"]]


def scores(results: dict, system: dict) -> list[dict | None]:
    """By exam, then the mean."""
    return [*(system["tasks"].get(task) for task in results["tasks"]), system["task_mean"]]


def accuracy(results: dict) -> str:
    """Accuracy of every system by exam, with intervals. The best system of each column is bold."""
    systems = {name: system for name, system in results["systems"].items() if system["tasks"]}
    fair = [scores(results, system) for system in systems.values() if system["kind"] not in BOUNDS]
    best = [max((score["value"] for score in column if score), default=None) for column in zip(*fair, strict=True)]
    lines = [f"| right answers, % | {' | '.join(exams(results))} | mean |", "|---|" + "---:|" * (len(best))]
    for name, system in systems.items():
        is_bound = system["kind"] in BOUNDS
        cells = [
            _share(score, bold=not is_bound and score["value"] == top) if score else "–"
            for score, top in zip(scores(results, system), best, strict=True)
        ]
        lines.append(f"| {bold_label(results, name)}{' (not a system)' if is_bound else ''} | {' | '.join(cells)} |")
    samples = next(iter(systems.values()))["tasks"]
    counts = ", ".join(f"{samples[task]['samples']} of {task.removeprefix('exam_')}" for task in results["tasks"])
    note = f"Questions: {counts}, the same for every system, seed 0. Parentheses hold 95% intervals: Wilson's, and a bootstrap for the mean."
    return "\n".join([*lines, "", note])


def _share(score: dict, bold: bool = False) -> str:
    low, high = score["ci95"]
    value = f"{100 * score['value']:.1f}"
    return f"{f'**{value}**' if bold else value} ({100 * low:.1f} to {100 * high:.1f})"


def differences(results: dict) -> str:
    """Paired differences on the same questions, in points."""
    columns, systems = [*(f"task/{task}" for task in results["tasks"]), "task/mean"], results["systems"]
    lines = [f"| system | minus | {' | '.join(exams(results))} | mean |", "|---|---|" + "---:|" * len(columns)]
    for name, system in systems.items():
        for baseline, label in AGAINST.items():
            is_ours = system["kind"] == "fused" or (name == "router" and baseline == "best_specialist")
            pairs = system["paired"].get(baseline, {})
            if not any(column in pairs for column in columns) or not (is_ours or baseline == "main"):
                continue
            if baseline == "versus":
                label = label_of(results, next(iter(pairs.values()))["versus"])
            cells = [
                difference_cell(pairs[column], scale=100, digits=1) if column in pairs else "" for column in columns
            ]
            lines.append(f"| {label_of(results, name)} | {label} | {' | '.join(cells)} |")
    note = "Paired differences in points on the same questions, with 95% intervals. Above zero the system is better. Intervals that exclude zero are bold."
    return "\n".join([*lines, "", note])


def seeds(runs: list[dict]) -> str:
    """Mean and standard deviation over seeds of each variant's right answers and losses (tables 2 and 4 of the paper)."""
    first = runs[0]
    lines = [
        f"| mean and deviation over {len(runs)} seeds | {' | '.join(exams(first))} | mean, % | nats | deviation over checkpoints |",
        "|---|" + "---:|" * (len(first["tasks"]) + 3),
    ]
    for name, system in first["systems"].items():
        trials = [run["systems"][name] for run in runs]
        columns = zip(*([100 * score["value"] for score in scores(first, trial)] for trial in trials), strict=True)
        cells = [f"{mean(values):.1f} ± {stdev(values):.1f}" for values in columns]
        nats = [trial["loss"]["mean"]["nll"] for trial in trials]
        spread = mean(_over_checkpoints(run["stability"][name]) for run in runs)
        lines.append(
            f"| {system['label']} | {' | '.join(cells)} | {mean(nats):.4f} ± {stdev(nats):.4f} | {spread:.4f} |"
        )
    samples = sum(next(iter(first["systems"].values()))["tasks"][task]["samples"] for task in first["tasks"])
    return "\n".join(
        [*lines, "", f"{samples} questions and a training of its own for each seed. The deviation is that of a sample."]
    )


def _over_checkpoints(checkpoints: list[dict]) -> float:
    """Standard deviation of the mean loss over the second half of the checkpoints, in nats."""
    return stdev(mean(checkpoint["loss"].values()) for checkpoint in checkpoints[len(checkpoints) // 2 :])


def summary(results: dict) -> str:
    """The README's table: the systems of the figure, without intervals. The best system of each column is bold."""
    systems = _shown(results)
    best = [max(column) for column in zip(*(_percents(results, system) for system in systems.values()), strict=True)]
    lines = [
        f"| right answers, % | {' | '.join(exams(results))} | mean |",
        "|---|" + "---:|" * (len(results["tasks"]) + 1),
    ]
    for name, system in systems.items():
        values = zip(_percents(results, system), best, strict=True)
        cells = [f"**{value:.0f}**" if value == top else f"{value:.0f}" for value, top in values]
        lines.append(f"| {bold_label(results, name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(results: dict) -> dict[str, dict]:
    """The measured systems of the figure."""
    systems = {name: results["systems"][name] for name in SHOWN if name in results["systems"]}
    return {name: system for name, system in systems.items() if system["tasks"]}


def _percents(results: dict, system: dict) -> list[float]:
    return [100 * score["value"] for score in scores(results, system) if score]


def draw(results: dict) -> None:
    """Systems as rows, exams as columns, accuracy as colour and as a number."""
    systems = _shown(results)
    columns = [*exams(results), "mean"]
    values = [_percents(results, system) for system in systems.values()]
    figure = new_figure(7.2, 0.36 * len(systems) + 0.7)
    axes = figure.subplots()
    axes.imshow(values, cmap="Greens", vmin=0, vmax=100, aspect="auto", interpolation="none")
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            shade = PAPER if value > 55 else INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", size=TEXT, color=shade)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(systems)), [label_of(results, name) for name in systems])
    axes.tick_params(
        length=0, labelsize=TEXT, labelcolor=INK, top=False, bottom=False, labeltop=True, labelbottom=False
    )
    for name, label in zip(systems, axes.get_yticklabels(), strict=True):
        if name == results["main"]:
            label.set_fontweight("bold")
    for line in range(1, len(systems)):
        axes.axhline(line - 0.5, color=PAPER, linewidth=2)
    for line in range(1, len(columns)):
        axes.axvline(line - 0.5, color=PAPER, linewidth=6 if line == len(columns) - 1 else 2)
    axes.spines[:].set_visible(False)
    samples = next(iter(systems.values()))["tasks"][next(iter(results["tasks"]))]["samples"]
    axes.set_xlabel(f"right answers of 100 ({samples} questions each)", size=SMALL, color=INK)
    figure.savefig(FIGURE, dpi=130, metadata={"Results": digest(RESULTS)})


def card(name: str, results: dict) -> str:
    """README.md of one adapter, from its training.json and the results."""
    report = json.loads((ADAPTERS / name / "training.json").read_text(encoding="utf-8"))
    recipe, lora = report["recipe"], report["recipe"]["lora"]
    rows = next(iter(report["rows_per_epoch"].values()))
    scores_here = {task: score["value"] for task, score in results["systems"][name]["tasks"].items()}
    passed = ", ".join(f"{task.removeprefix('exam_')} {100 * score:.0f}%" for task, score in scores_here.items())
    return CARD.format(
        name=name,
        about=ABOUT[name],
        base=recipe["base"],
        folder="exams/adapters",
        rows=f"{rows:,}",
        rank=lora["r"],
        alpha=lora["alpha"],
        lr=recipe["lr"],
        steps=report["steps"],
        tokens=f"{recipe['tokens_per_batch']:,}",
        trained=f"{report['response_tokens_trained']:,}",
        minutes=f"{report['seconds'] / 60:.0f}",
        versions=", ".join(f"{package} {version}" for package, version in report["versions"].items()),
        passed=passed,
    )


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    if "--check" not in sys.argv:
        draw(results)
    check_figure(FIGURE, RESULTS, "exams_page")
    tables = [accuracy(results), differences(results), losses(results, costs=False), gate(results)]
    if runs := [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.parent.glob("seed-*.json"))]:
        tables.append(seeds(runs))
    refresh(PAGE, START, END, "\n\n".join(tables), "exams_page")
    refresh(ROOT / "README.md", START, END, summary(results), "exams_page")
    for name in ABOUT:
        file = ADAPTERS / name / "README.md"
        if "--check" not in sys.argv:
            file.write_text(card(name, results), encoding="utf-8")
        elif file.read_text(encoding="utf-8") != card(name, results):
            sys.exit(f"{file}: out of date. Run: python scripts/exams_page.py")


if __name__ == "__main__":
    main()
