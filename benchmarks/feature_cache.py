"""What a smaller feature cache costs: the loss of the gate stage.

    python benchmarks/feature_cache.py --folder runs/feature-cache --output docs/results/feature-cache.json

The gate of the zoo's specialists is trained with `stages.gate.features_per_row` of 32, 64, 128 and all, and with a
`feature_dtype` of bfloat16 and int8, three seeds each, on the rows of `ultrafuser/zoo/fuse.yaml`. The losses are those of its
validation rows, of which all tokens count, in float32. They are the mean over the domains, in nats per response token.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from ultrafuser.data.packed import SampledRows
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import package_path
from ultrafuser.progress import ConsoleProgress, Progress
from ultrafuser.recipe import Recipe, load_recipe
from ultrafuser.specialists import fuse, make_renderer
from ultrafuser.train.features import FeatureStore, Int8States, RowFeatures
from ultrafuser.train.metrics import read_metrics
from ultrafuser.train.rows import read_sources
from ultrafuser.train.stages import StageRun, prepare_gate, train_stage, training_arguments

VARIANTS = ("32", "64", "128", "all", "bfloat16", "int8")


class SampledStore(FeatureStore):
    """The features that a cache with `features_per_row` holds, taken from one that holds all."""

    def __init__(self, store: FeatureStore, limit: int, seed: int) -> None:
        self.store, self.rows = store, SampledRows(store.rows, limit, seed)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> RowFeatures:
        whole, row = self.store[i], self.rows[i]
        places = {position: r for r, position in enumerate(whole.row.response_index[0])}
        picked = [places[position] for position in row.response_index[0]]
        return RowFeatures(row, [states[picked] for states in whole.states], whole.log_probs[picked])


class RoundedStore(FeatureStore):
    """The features that a cache with another `feature_dtype` holds."""

    def __init__(self, store: FeatureStore, precision: str, model: UltraFuserForCausalLM) -> None:
        self.store, self.rows, self.model = store, store.rows, model
        self.round = {"bfloat16": torch.Tensor.bfloat16, "int8": _in_8_bits}[precision]
        self.features: dict[int, RowFeatures] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> RowFeatures:
        if i not in self.features:
            row, states = self.rows[i], [self.round(states) for states in self.store[i].states]
            log_probs = self.model.specialist_log_probs(states, torch.tensor(row.labels))
            self.features[i] = RowFeatures(row, states, log_probs)
        return self.features[i]


def _in_8_bits(states: torch.Tensor) -> torch.Tensor:
    scales = torch.empty(len(states), math.ceil(states.shape[1] / Int8States.BLOCK))
    stored = Int8States(torch.empty_like(states, dtype=torch.int8), scales, states.dtype)
    stored[:] = states
    return stored[:]


def measure(
    recipe: Recipe, model: Any, train: FeatureStore, validation: FeatureStore, limit: int | None, folder: Path
) -> dict[str, float]:
    """Train one gate. Returns its validation losses, and the share of the response tokens that it learned from."""
    fresh, _ = fuse(recipe)  # with the gate of this seed
    model.gate.load_state_dict(fresh.gate.state_dict())
    shutil.rmtree(folder, ignore_errors=True)
    rows = train if limit is None else SampledStore(train, limit, recipe.seed)
    run = StageRun(model, recipe.stages[0], recipe, train.rows, validation.rows, folder / "1-gate")
    prepare_gate(model)
    train_stage(run, training_arguments(run, autocast=False), rows, validation)
    row = next(row for row in reversed(read_metrics(folder / "metrics.jsonl")) if "eval_loss" in row)
    losses = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_loss")}
    counts = [len(row.labels) for row in train.rows]
    return losses | {"share": sum(min(limit or count, count) for count in counts) / sum(counts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/feature-cache"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="The others keep their results."
    )
    args = parser.parse_args()
    overrides = ["stages=[gate]", "stages.gate.steps=100", "stages.gate.samples_per_domain=8", "eval_every=100"]
    overrides += ["stages.gate.rows_per_device=null", "stages.gate.calibrate=false"]
    recipe = load_recipe(package_path("package:ultrafuser/zoo/fuse.yaml"), overrides)
    progress = ConsoleProgress()
    model, tokenizer = fuse(recipe)
    renderer = make_renderer(model, tokenizer, recipe.data.max_length)
    stores = [
        FeatureStore.build(
            model, read_sources(sources, renderer, Progress(), name), args.folder / name, progress=progress
        )
        for name, sources in (("training", recipe.data.train), ("validation", recipe.data.validation))
    ]
    results = json.loads(args.output.read_text())["results"] if args.output and args.output.is_file() else {}
    for variant in args.variants:
        results[variant] = []
        limit = int(variant) if variant.isdigit() else None
        train = RoundedStore(stores[0], variant, model) if variant in ("bfloat16", "int8") else stores[0]
        for seed in range(args.seeds):
            seeded, folder = recipe.model_copy(update={"seed": seed}), args.folder / f"{variant}-{seed}"
            results[variant].append(measure(seeded, model, train, stores[1], limit, folder))
            print(variant, seed, results[variant][-1], flush=True)
    for variant, runs in results.items():
        losses = [run["loss"] for run in runs]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        tokens = mean(run["share"] for run in runs)
        print(f"{variant}: {mean(losses):.4f} (deviation {spread:.4f}), {tokens:.0%} of the tokens")
    if args.output:
        args.output.write_text(json.dumps({"seeds": args.seeds, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
