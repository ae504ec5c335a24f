"""Tables of the command line."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from ultrafuser.cli.options import echo


def print_info(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        echo(json.dumps(facts))
        return
    table = Table(title=f"{facts['folder']}: {facts['mixing']} mixing, context {facts['context']}")
    for column in ("specialist", "domain", "kind", "model", "adapter", "size", "status"):
        table.add_column(column, overflow="fold")
    for specialist in facts["specialists"]:
        sources = [specialist[key] for key in ("model", "adapter") if key in specialist]
        table.add_row(
            specialist["name"],
            specialist["domain"],
            specialist["architecture"],
            specialist["model"]["source"],
            specialist["adapter"]["source"] if "adapter" in specialist else "",
            _size(sum(source["size_bytes"] for source in sources)),
            ", ".join(dict.fromkeys(source["status"] for source in sources)),
        )
    Console().print(table)
    for group in sorted({tuple(sorted([s["name"], *s["shares_base_with"]])) for s in facts["specialists"]}):
        if len(group) > 1:
            echo(f"shared base, loaded once: {', '.join(group)}")
    if any(specialist["temperature"] != 1 for specialist in facts["specialists"]):
        temperatures = (f"{specialist['name']} {specialist['temperature']:g}" for specialist in facts["specialists"])
        echo("temperatures: " + ", ".join(temperatures))
    gate = _size(facts["gate_size_bytes"] or 0)
    referenced = _size(facts["referenced_size_bytes"])
    echo(f"gate {gate}, folder {_size(facts['size_bytes'])}, referenced weights {referenced}")
    if facts["verified"]:
        echo("all checksums match")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.1f} MB"


def print_means(means: dict[str, dict[str, float]]) -> None:
    table = Table(title="mean gate weight by domain")
    table.add_column("domain")
    for name in next(iter(means.values())):
        table.add_column(name, justify="right")
    for domain, row in means.items():
        table.add_row(domain, *(f"{value:.3f}" for value in row.values()))
    Console().print(table)
