"""The model card of a fused checkpoint, from its manifest, recipe and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.recipe import Recipe


def write_card(
    folder: Path,
    config: UltraFuserConfig,
    recipe: Recipe | None,
    metrics: Sequence[Mapping[str, Any]],
    title: str,
) -> None:
    """Write README.md into a checkpoint's folder. `title` is its name."""
    names = ", ".join(config.names)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [ultrafuser, model-fusion]",
        "---",
        "",
        f"# {title}: {names} fused at the token level",
        "",
        f"{len(config.specialists)} specialists. A gate weighs them at every token, and their {config.mixing} are mixed.",
        "",
        *_specialists(config),
        "",
        "```python",
        "import ultrafuser",
        "",
        'model, renderer = ultrafuser.load(".")  # this folder',
        'inputs = ultrafuser.prompt_inputs(renderer, [[{"role": "user", "content": "Hello"}]], model.device)',
        "tokens = model.generate(**inputs, max_new_tokens=64)",
        'print(renderer.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```",
        "",
    ]
    if recipe is not None:
        stages = ", then ".join(
            f"{s.name}: {s.steps} steps, {s.samples_per_domain} rows per domain, lr {s.lr:g}" for s in recipe.stages
        )
        lines += [
            "## Training",
            "",
            f"{stages}. The recipe is in `recipe.yaml`, the metrics in `metrics.jsonl`.",
            "",
        ]
    validations = [row for row in metrics if "eval_loss" in row]
    if recipe is not None and recipe.keep_best:  # the checkpoint that the stage kept: the first of the lowest loss
        validations.sort(key=lambda row: -row["eval_loss"])
    last = {row["stage"]: row for row in validations}
    if last:
        domains = sorted(
            {key.removeprefix("eval_loss/") for row in last.values() for key in row if "eval_loss/" in key}
        )
        lines += ["Validation loss after each stage, in nats per response token:", ""]
        lines += [f"| stage | {' | '.join(domains)} |", f"|---|{'---|' * len(domains)}"]
        for stage, row in last.items():
            lines.append(f"| {stage} | " + " | ".join(f"{row[f'eval_loss/{d}']:.4f}" for d in domains) + " |")
        lines.append("")
    lines += ["The specialists' own licences apply.", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _specialists(config: UltraFuserConfig) -> list[str]:
    """The table of the specialists."""
    lines = ["| specialist | domain | model | adapter | temperature |", "|---|---|---|---|---:|"]
    for spec, temperature in zip(config.specialists, config.temperatures, strict=True):
        source = spec["source"]
        revision = f" at `{source['revision']}`" if source.get("revision") else ""
        adapter = f"`{source['adapter']}`" if source.get("adapter") else ""
        model = f"`{source['model']}`{revision}"
        lines.append(f"| {spec['name']} | {spec.get('domain', '')} | {model} | {adapter} | {temperature:g} |")
    return lines
