"""The loss table of the zoo: base and specialists on rows that none of them was trained on.

    python scripts/zoo_table.py --data ../shared/data/train --output docs/results --cards

Plain transformers and peft, nothing of ultrafuser's model code, so that its own evaluation can be checked against this.
Writes zoo.json and zoo.md; `--cards` also writes the model cards beside the adapters. Uses a GPU when there is one; a few
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from train_specialist import load_base, permissive_rows, row_losses
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.templates import BUILTIN, Renderer

ZOO = Path(__file__).parents[1] / "src" / "ultrafuser" / "zoo"
HOMES = ("text", "code", "math")
DOMAINS = (*HOMES, "mixed")
RESAMPLES = 10_000
TOKENS_PER_BATCH = 4096


def test_sets(data: Path, split: str) -> dict[tuple[str, str], list[Row]]:
    """Rows by (set, domain). `held_out` goes with the zoo's test rows; `validation`, for choosing, with its train rows."""
    sets = {("shared", domain): permissive_rows(data / f"{domain}.jsonl", split) for domain in HOMES}
    zoo_split = {"held_out": "test", "validation": "train"}[split]
    return sets | {("zoo", domain): load_rows(str(ZOO / "data" / f"{domain}.{zoo_split}.jsonl")) for domain in DOMAINS}


def load_systems(adapters: Path, device: str) -> tuple[PeftModel, Any]:
    """The base with the three adapters on it, and the tokenizer."""
    references = {
        json.loads((adapters / home / "adapter_config.json").read_text())["base_model_name_or_path"] for home in HOMES
    }
    if len(references) != 1:
        raise SystemExit(f"{adapters}: the adapters name different bases: {', '.join(sorted(references))}")
    base, tokenizer = load_base(references.pop(), device)
    model = PeftModel.from_pretrained(base, adapters / HOMES[0], adapter_name=HOMES[0])
    for home in HOMES[1:]:
        model.load_adapter(adapters / home, adapter_name=home)
    return model, tokenizer


def losses(model: PeftModel, rows: list[Any]) -> dict[str, np.ndarray]:
    """For each system, every row's summed nats."""
    with model.disable_adapter():
        out = {"base": np.array(row_losses(model, rows, TOKENS_PER_BATCH))}
    for home in HOMES:
        model.set_adapter(home)
        out[home] = np.array(row_losses(model, rows, TOKENS_PER_BATCH))
    return out


def bootstrap(sums: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Token-weighted mean and its 95% percentile interval over resampled rows."""
    draws = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), RESAMPLES)
    low, high = np.percentile((draws @ sums) / (draws @ tokens), [2.5, 97.5])
    return {"nats": float(sums.sum() / tokens.sum()), "ci95": [float(low), float(high)]}


def measure(
    model: PeftModel, tokenizer: Any, sets: dict[tuple[str, str], list[Row]], max_length: int
) -> dict[str, Any]:
    """The whole table: {set: {domain: {rows, tokens, systems: {...}, differences: {...}}}}."""
    renderer = Renderer(tokenizer, [BUILTIN["chatml"]], max_length)
    table: dict[str, Any] = {"shared": {}, "zoo": {}}
    for (name, domain), rows in sets.items():
        rendered, stats = renderer.render_all(rows)
        tokens = np.array([len(row.labels) for row in rendered])
        found = losses(model, rendered)
        rivals = [system for system in found if system != domain]
        table[name][domain] = {
            "rows": len(rendered),
            "tokens": int(tokens.sum()),
            "truncation": str(stats),
            "systems": {system: bootstrap(sums, tokens) for system, sums in found.items()},
            # the same resampled rows for both, so that what rows share cancels
            "differences": {
                f"{domain} - {rival}": bootstrap(found[domain] - found[rival], tokens)
                for rival in rivals
                if domain in HOMES
            },
        }
    return table


TITLES = {
    "shared": "Held-out rows of the training sources",
    "zoo": "Test rows of `zoo/data`, written for this project; nothing like them was trained on",
}


def cell(result: dict[str, Any], best: bool = False) -> str:
    text = f"{result['nats']:.4f}"
    return f"{f'**{text}**' if best else text} [{result['ci95'][0]:.4f}, {result['ci95'][1]:.4f}]"


def markdown(table: dict[str, Any]) -> str:
    """Both tables, and the paired differences at home."""
    out = []
    for name, domains in table.items():
        out += [f"## {TITLES[name]}", "", "| system | " + " | ".join(domains) + " |", "|---" * (len(domains) + 1) + "|"]
        out.append(
            "| rows / response tokens | "
            + " | ".join(f"{d['rows']} / {d['tokens']:,}" for d in domains.values())
            + " |"
        )
        for system in ("base", *HOMES):
            cells = []
            for result in domains.values():
                best = min(result["systems"], key=lambda s: result["systems"][s]["nats"])
                cells.append(cell(result["systems"][system], best == system))
            out.append(f"| {system} | " + " | ".join(cells) + " |")
        out += ["", "At home, specialist minus each other system on the same rows:", ""]
        out += ["| domain | minus base | minus the other specialists |", "|---|---|---|"]
        for domain in HOMES:
            base, *others = domains[domain]["differences"].items()
            shown = "; ".join(f"{key.split(' - ')[1]} {cell(result)}" for key, result in others)
            out.append(f"| {domain} | {cell(base[1])} | {shown} |")
        out.append("")
    return "\n".join(out)


EXPLANATION = """Nats per response token, lower is better; the mean over all response tokens, with 95% bootstrap intervals over rows
({resamples:,} resamples). Computed by `scripts/zoo_table.py` in float32 with plain transformers and peft."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with text.jsonl, code.jsonl and math.jsonl")
    parser.add_argument("--adapters", type=Path, default=ZOO / "adapters")
    parser.add_argument("--split", choices=("held_out", "validation"), default="held_out")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--output", type=Path, required=True, help="folder for zoo.json and zoo.md")
    parser.add_argument("--cards", action="store_true", help="write README.md into each adapter's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model, tokenizer = load_systems(options.adapters, options.device)
    table = measure(model, tokenizer, test_sets(options.data, options.split), options.max_length)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "zoo.json").write_text(json.dumps(table, indent=1) + "\n")
    page = f"# The zoo's specialists\n\n{EXPLANATION.format(resamples=RESAMPLES)}\n\n{markdown(table)}"
    (options.output / "zoo.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
