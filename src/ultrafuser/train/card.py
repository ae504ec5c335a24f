"""What the model card of a fused checkpoint says about its training, from its recipe and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultrafuser.model.card import model_card
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
    text = model_card(config, title=title, sections=training_section(recipe, metrics))
    (folder / "README.md").write_text(text, encoding="utf-8")


def training_section(
    recipe: Recipe | None, metrics: Sequence[Mapping[str, Any]], figure: str | None = None
) -> list[str]:
    """The lines about the training: stages, the loss after each, and a figure. Empty if there was none.

    Args:
        recipe: None: the gate is untrained.
        figure: file of the training curves, beside the card.
    """
    lines: list[str] = []
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
        lines += [f"| stage | {' | '.join(domains)} |", f"|---|{'---:|' * len(domains)}"]
        for stage, row in last.items():
            lines.append(f"| {stage} | " + " | ".join(f"{row[f'eval_loss/{d}']:.4f}" for d in domains) + " |")
        lines.append("")
    if figure is not None:
        lines += [f"![Losses and gate weights over the training]({figure})", ""]
    return lines
