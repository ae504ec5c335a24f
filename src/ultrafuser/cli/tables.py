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
    for one in facts["specialists"]:
        parts = [one[part] for part in ("model", "adapter") if part in one]
        table.add_row(
            one["name"],
            one["domain"],
            one["architecture"],
            one["model"]["source"],
            one["adapter"]["source"] if "adapter" in one else "",
            _size(sum(part["size_bytes"] for part in parts)),
            ", ".join(dict.fromkeys(part["status"] for part in parts)),
        )
    Console().print(table)
    for group in sorted({tuple(sorted([s["name"], *s["shares_base_with"]])) for s in facts["specialists"]}):
        if len(group) > 1:
            echo(f"one base, loaded once: {', '.join(group)}")
    if any(one["temperature"] != 1 for one in facts["specialists"]):
        echo("temperatures: " + ", ".join(f"{one['name']} {one['temperature']:g}" for one in facts["specialists"]))
    gate = _size(facts["gate_size_bytes"] or 0)
    elsewhere = _size(facts["referenced_size_bytes"])
    echo(f"gate {gate}; folder {_size(facts['size_bytes'])}; referenced elsewhere {elsewhere}")
    if facts["verified"]:
        echo("every checksum holds")


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
