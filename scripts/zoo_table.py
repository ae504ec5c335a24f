"""Measure the zoo's base and specialists on rows that none of them was trained on, and write the table.

    python scripts/zoo_table.py --data ../shared/data/train --output docs/results --cards

It uses plain transformers and peft, not ultrafuser's model code, so that ultrafuser's own evaluation can be checked
against it. It writes zoo.json, with the loss of every row, and zoo.md. `--cards` also writes the model cards beside the
adapters. It takes seconds on a GPU and an hour on two CPU cores. `--reuse` makes the tables from the losses in zoo.json.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from adapter_card import FRONT_MATTER, USAGE
from train_specialist import load_base, permissive_rows, row_losses
from ultrafuser.data.chat_format import BUILTIN
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.data.templates import Renderer
from ultrafuser.evaluate.intervals import Stratum, difference, estimate

ZOO = Path(__file__).parents[1] / "src" / "ultrafuser" / "zoo"
NAMES = ("text", "code", "math")  # of the specialists and their domains
SYSTEMS = ("base", *NAMES)
MAX_LENGTH = 1024
TOKENS_PER_BATCH = 8192

# One record per row: {"set": "held_out" | "zoo_test" | ..., "domain", "id", "tokens", "nats": {system: summed loss}}
Losses = list[dict[str, Any]]


def test_sets(data: Path, split: str) -> dict[tuple[str, str], list[Row]]:
    """Rows by (set, domain): `held_out` with the zoo's test rows, or `validation` with its training rows."""
    zoo_split = {"held_out": "test", "validation": "train"}[split]
    sets = {(split, domain): permissive_rows(data / f"{domain}.jsonl", split) for domain in NAMES}
    for domain in (*NAMES, "mixed"):
        sets[f"zoo_{zoo_split}", domain] = load_rows(str(ZOO / "data" / f"{domain}.{zoo_split}.jsonl"))
    return sets


def load_systems(adapters: Path, device: str) -> tuple[PeftModel, Any]:
    """The base with the three adapters on it, and the tokenizer."""
    configs = [json.loads((adapters / name / "adapter_config.json").read_text()) for name in NAMES]
    (reference,) = {config["base_model_name_or_path"] for config in configs}
    base, tokenizer = load_base(reference, device)
    model = PeftModel.from_pretrained(base, adapters / NAMES[0], adapter_name=NAMES[0])
    for name in NAMES[1:]:
        model.load_adapter(adapters / name, adapter_name=name)
    return model, tokenizer


def measure(model: PeftModel, tokenizer: Any, sets: dict[tuple[str, str], list[Row]]) -> Losses:
    """Every row's loss under every system, in nats summed over response tokens, in float32."""
    renderer = Renderer(tokenizer, [BUILTIN["chatml"]], MAX_LENGTH)
    out = []
    for (set_name, domain), rows in sets.items():
        rendered, _ = renderer.render_all(rows)
        with model.disable_adapter():
            nats = {"base": row_losses(model, rendered, TOKENS_PER_BATCH)}
        for name in NAMES:
            model.set_adapter(name)
            nats[name] = row_losses(model, rendered, TOKENS_PER_BATCH)
        for i, row in enumerate(rendered):
            losses = {system: round(nats[system][i], 5) for system in SYSTEMS}
            facts = {"set": set_name, "domain": domain, "id": row.row_id, "tokens": len(row.labels)}
            out.append(facts | {"nats": losses})
    return out


def tabulate(losses: Losses) -> dict[str, Any]:
    """{set: {domain: {rows, tokens, systems: {...}, differences: {...}}}}, differences for the domain's specialist."""
    table: dict[str, Any] = {}
    for name, domain in dict.fromkeys((row["set"], row["domain"]) for row in losses):
        rows = [row for row in losses if (row["set"], row["domain"]) == (name, domain)]
        tokens = {row["id"]: row["tokens"] for row in rows}
        nats = {system: Stratum({row["id"]: row["nats"][system] for row in rows}, tokens) for system in SYSTEMS}
        baselines = [system for system in SYSTEMS if system != domain and domain in NAMES]
        means = {system: estimate([nats[system]]) for system in SYSTEMS}
        pairs = {system: difference([nats[domain]], [nats[system]]) for system in baselines}
        table.setdefault(name, {})[domain] = {
            "rows": len(rows),
            "tokens": sum(tokens.values()),
            "systems": {system: {"nats": mean["value"], "ci95": mean["ci95"]} for system, mean in means.items()},
            "differences": {
                system: {"nats": pair["difference"], "ci95": pair["ci95"]} for system, pair in pairs.items() if pair
            },
        }
    return table


TITLES = {
    "held_out": "Held-out rows of the training sources",
    "validation": "Validation rows of the training sources",
    "zoo_test": "Test rows of the zoo's own data (`src/ultrafuser/zoo/data`)",
    "zoo_train": "Training rows of the zoo's own data (`src/ultrafuser/zoo/data`)",
}
EXPLANATION = """Losses are means over all response tokens, in nats per token, with 95% bootstrap intervals over rows (10,000
resamples). Lower is better. They were measured in float32 with plain transformers and peft. No adapter was trained on
any of these rows."""


def cell(result: dict[str, Any], bold: bool = False) -> str:
    text = f"**{result['nats']:.4f}**" if bold else f"{result['nats']:.4f}"
    return f"{text} [{result['ci95'][0]:.4f}, {result['ci95'][1]:.4f}]"


def lines_of(cells: list[list[str]]) -> list[str]:
    """A Markdown table. The first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return [head, "|" + "---|" * len(cells[0]), *body]


def levels(domains: dict[str, Any]) -> list[str]:
    """Every system's loss in every domain, the best in bold."""
    counts = [f"{results['rows']} / {results['tokens']:,}" for results in domains.values()]
    cells = [["", *domains], ["rows / response tokens", *counts]]
    losses = {domain: results["systems"] for domain, results in domains.items()}
    best = {domain: min(SYSTEMS, key=lambda system: losses[domain][system]["nats"]) for domain in domains}
    for system in SYSTEMS:
        cells.append([system, *(cell(losses[domain][system], best[domain] == system) for domain in domains)])
    return lines_of(cells)


def differences(domains: dict[str, Any], names: tuple[str, ...] = NAMES) -> list[str]:
    """Each specialist minus every other system, on the rows of the specialist's domain."""
    baselines = [system for system in SYSTEMS if (system,) != names]
    cells = [["on its own domain", *(f"minus {system}" for system in baselines)]]
    for name in names:
        pairs = domains[name]["differences"]
        cells.append([name, *(cell(pairs[system]) if system in pairs else "" for system in baselines)])
    return lines_of(cells)


def page(table: dict[str, Any]) -> str:
    """docs/results/zoo.md."""
    out = ["# The zoo's specialists", "", EXPLANATION]
    for name, domains in table.items():
        out += ["", f"## {TITLES[name]}", "", *levels(domains), "", *differences(domains)]
    return "\n".join(out) + "\n"


# Attribution of each source, as its licence requires.
SOURCES = {
    "oasst1": "OpenAssistant Conversations (Köpf et al., 2023)",
    "self-instruct-seed": "Self-Instruct seed tasks (Wang et al., 2023)",
    "flan-cot-strategyqa": "StrategyQA (Geva et al., 2021), as in FLAN's chain-of-thought tasks",
    "flan-cot-creak": "CREAK (Onoe et al., 2021), as in FLAN's chain-of-thought tasks",
    "flan-cot-qasc": "QASC (Khot et al., 2020; Allen Institute for AI), as in FLAN's chain-of-thought tasks",
    "TheAlgorithms/Python": "TheAlgorithms/Python, functions with their docstrings",
    "codeio (reasoning-gym)": "CodeI/O tasks, as in reasoning-gym",
    "mbpp-train": "MBPP, training split (Austin et al., 2021; Google Research)",
    "PythonProgrammingPuzzles": "Python Programming Puzzles (Schuster et al., 2021)",
    "exercism/python": "Exercism, Python track",
    "gsm8k-train": "GSM8K, training split (Cobbe et al., 2021)",
    "aqua-rat-train (FLAN)": "AQuA-RAT, training split (Ling et al., 2017), as in FLAN's chain-of-thought tasks",
}
ABOUT = {
    "text": "explanations, advice and short reasoning in prose",
    "code": "Python functions and short programs, with and without prose around them",
    "math": "word problems and short calculations, worked step by step",
}
CARD = (
    FRONT_MATTER
    + """
# The {name} specialist of ultrafuser's zoo

This is a LoRA adapter on SmolLM2-135M-Instruct for {about}.
It is one of three (text, code, math) that ship with ultrafuser as a small, real example of specialists to fuse.

"""
    + USAGE
    + """
## Training data

{data}

{rewrites}One twentieth of all rows was held out for the table below. The settings were chosen on another twentieth
and on the training rows of the zoo's own data. No adapter is trained on any of these.
Sources under CC-BY require this attribution to stay with the adapter.
Rows are truncated at {max_length} tokens: {truncation}.

## Training

{settings}

`python scripts/train_specialist.py recipes/zoo/{name}.yaml --data ../shared/data/train --output runs/zoo/{name}`

{spent}

## Measured

{explanation}

Held-out rows of the training sources:

{held_out}

Test rows of the zoo's own data, written for ultrafuser:

{zoo_test}

`docs/results/zoo.md` has the same tables for the other two.

## Limits

This model has 135 million parameters. Its facts, its arithmetic and its code are often wrong, so do not rely on them.
The table shows the loss on a reference answer, not whether the model's own answers are right. The data are English, and
Python for code. Training rows had a single turn and at most {max_length} tokens. There is no safety training beyond the
base model's.
"""
)


def card(report: dict[str, Any], table: dict[str, Any]) -> str:
    """README.md of one adapter, from its training.json and the table."""
    recipe, name = report["recipe"], report["recipe"]["name"]
    data = [["source", "rows per epoch", "share of the training rows", "licence"]]
    for source, count in report["rows_per_epoch"].items():
        data.append([SOURCES[source], f"{count:,}", f"{recipe['sources'][source]:g}", report["licences"][source]])
    lora = recipe["lora"]
    settings = {
        "rank, alpha, dropout": f"{lora['r']}, {lora['alpha']}, {lora['dropout']}",
        "modules": ", ".join(lora["target_modules"]),
        "learning rate": f"{recipe['lr']}, AdamW, cosine to 0 after {recipe['warmup_ratio']:.0%} warm-up",
        "epochs, steps": f"{recipe['epochs']}, {report['steps']} of at most {recipe['tokens_per_batch']:,} tokens",
        "response tokens": f"{report['response_tokens_per_epoch']:,} per epoch, "
        f"{report['response_tokens_trained']:,} in total, and only these have a loss",
        "precision": "bfloat16 autocast over float32 weights, saved in bfloat16",
        "seed": str(recipe["seed"]),
    }
    rewrites = "".join(
        f"- In the answers of {rewrite['share']:.0%} of the rows, `{rewrite['pattern']}` became `{rewrite['by']}`.\n"
        for rewrite in recipe.get("rewrites", [])
    )
    measured = {
        split: "\n".join(
            [*levels(table[split]), "", f"{name} minus the others on its own domain's rows:", ""]
            + differences(table[split], (name,))
        )
        for split in ("held_out", "zoo_test")
    }
    note = f" ({report['note']})" if "note" in report else ""
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    return CARD.format(
        name=name,
        about=ABOUT[name],
        base=recipe["base"],
        folder="adapters",
        data="\n".join(lines_of(data)),
        rewrites=rewrites and rewrites + "\n",
        truncation=re.sub(r"^(\d+)", lambda match: f"{int(match[0]):,}", report["truncation"]),
        settings="\n".join(lines_of([["setting", "value"], *map(list, settings.items())])),
        spent=f"{report['seconds']:.0f} s on one {report['device']}{note}, with {versions}.",
        explanation=EXPLANATION,
        max_length=recipe["max_length"],
        **measured,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with text.jsonl, code.jsonl and math.jsonl")
    parser.add_argument("--adapters", type=Path, default=ZOO / "adapters")
    parser.add_argument("--split", choices=("held_out", "validation"), default="held_out")
    parser.add_argument("--output", type=Path, required=True, help="folder of zoo.json and zoo.md")
    parser.add_argument("--reuse", action="store_true", help="read the losses from zoo.json instead of measuring them")
    parser.add_argument("--cards", action="store_true", help="write README.md into each adapter's folder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    saved = options.output / "zoo.json"
    if options.reuse:
        result = json.loads(saved.read_text())
        losses, device = result["losses"], result["device"]
    elif options.data is None:
        parser.error("--data is required to measure. --reuse makes the tables from zoo.json")
    else:
        model, tokenizer = load_systems(options.adapters, options.device)
        losses = measure(model, tokenizer, test_sets(options.data, options.split))
        device = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    table = tabulate(losses)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = ",\n".join("  " + json.dumps(row) for row in losses)
    head = json.dumps({"device": device, "table": table}, indent=1).removesuffix("\n}")
    saved.write_text(f'{head},\n "losses": [\n{rows}\n ]\n}}\n')
    (options.output / "zoo.md").write_text(page(table))
    if options.cards:
        for name in NAMES:
            report = json.loads((options.adapters / name / "training.json").read_text())
            (options.adapters / name / "README.md").write_text(card(report, table))
    print(page(table))


if __name__ == "__main__":
    main()
