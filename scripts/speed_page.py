"""Write the tables of docs/speed.md. With --check, fail when they are out of date.

benchmarks/decoding.py and benchmarks/few_rows.py wrote the results.
"""

from __future__ import annotations

import json
from pathlib import Path

from marked_page import refresh

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "docs" / "results"


def main() -> None:
    for name, file, tables in (
        ("decoding", "decoding.json", decoding_tables),
        ("products", "few-rows.json", product_table),
    ):
        results = json.loads((RESULTS / file).read_text(encoding="utf-8"))
        refresh(PAGE, f"<!-- {name}:start -->", f"<!-- {name}:end -->", tables(results), "speed_page")


def decoding_tables(results: dict) -> str:
    machine = results["machine"]
    lines = [
        f"{machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}, float32, torch "
        f"{machine['torch']}, transformers {results['versions']['transformers']}. Medians of {results['rounds']} rounds.",
        "",
        "| | tokens/s | of one specialist | quartiles | tokens for each pass | answers as plain |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for entry in results["systems"]:
        low, high = entry["quartiles"]
        same = f"{entry['same_answers']} of {results['rounds']}" if "same_answers" in entry else ""
        lines.append(
            f"| {entry['system']} | {entry['tokens_per_s']:.1f} | {entry['ratio']:.2f} | {low:.2f} to {high:.2f} "
            f"| {entry.get('tokens_per_pass', '')} | {same} |"
        )
    drafting = [entry for entry in results["systems"] if "acceptance" in entry]
    domains = list(drafting[0]["acceptance"])
    lines += ["", f"| drafts kept | {' | '.join(domains)} |", "|---|" + "---:|" * len(domains)]
    for entry in drafting:
        kept = " | ".join(f"{entry['acceptance'][domain]:.0%}" for domain in domains)
        lines.append(f"| {entry['system']} | {kept} |")
    parts, weights = results["step_ms"], results["weights_mib"]
    total = sum(parts.values())
    lines += ["", f"| one step of the shared base | {' | '.join(parts)} |", "|---|" + "---:|" * len(parts)]
    lines.append(f"| ms | {' | '.join(f'{value:.1f}' for value in parts.values())} |")
    lines.append(f"| share | {' | '.join(f'{value / total:.1%}' for value in parts.values())} |")
    lines += ["", f"| weights | {' | '.join(weights)} |", "|---|" + "---:|" * len(weights)]
    lines.append(f"| MiB | {' | '.join(f'{value:,}' for value in weights.values())} |")
    return "\n".join(lines)


def product_table(results: dict) -> str:
    products = results["products"]
    rows = sorted({product["rows"] for product in products})
    lines = [f"| ms for rows | order | {' | '.join(map(str, rows))} |", "|---|---|" + "---:|" * len(rows)]
    for shape in dict.fromkeys(tuple(product["shape"]) for product in products):
        of_shape = {product["rows"]: product for product in products if tuple(product["shape"]) == shape}
        for order in ("usual", "other"):
            values = " | ".join(f"{of_shape[count][f'{order}_ms']:.2f}" for count in rows)
            lines.append(f"| {shape[0]} x {shape[1]} | {order} | {values} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
