"""What it costs to keep a sample of each row's response tokens in the feature cache: loss of the gate stage, and bytes.

    python benchmarks/features_per_row.py --folder runs/features-per-row --output docs/results/features-per-row.json

The gate of the zoo's specialists is trained with `stages.gate.features_per_row` of 32, 64, 128 and all, three seeds each, on
the rows of `ultrafuser/zoo/fuse.yaml`. The losses are those of its validation rows, of which all tokens count. They are
the mean over the domains, in nats per response token.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import mean, stdev

from ultrafuser.model.references import package_path
from ultrafuser.progress import ConsoleProgress
from ultrafuser.recipe import load_recipe
from ultrafuser.train.metrics import read_metrics
from ultrafuser.train.run import train

LIMITS = (32, 64, 128, None)


def measure(limit: int | None, seed: int, folder: Path) -> dict[str, float]:
    """Train one gate. Returns its validation losses, and the bytes of the states that it learned from."""
    overrides = ["stages=[gate]", "stages.gate.steps=100", "stages.gate.samples_per_domain=8", f"seed={seed}"]
    overrides += [
        "stages.gate.calibrate=false",
        "stages.gate.rows_per_device=null",
        "cache_features=true",
        "eval_every=100",
    ]
    if limit is not None:
        overrides.append(f"stages.gate.features_per_row={limit}")
    recipe = load_recipe(package_path("package:ultrafuser/zoo/fuse.yaml"), overrides)
    run, features = folder / f"{limit}-{seed}", folder / "features"
    shutil.rmtree(run, ignore_errors=True)
    train(recipe.model_copy(update={"output": str(run)}), features=features, progress=ConsoleProgress())
    row = next(row for row in reversed(read_metrics(run / "metrics.jsonl")) if "eval_loss" in row)
    losses = {key.removeprefix("eval_"): value for key, value in row.items() if key.startswith("eval_loss")}
    return losses | {"bytes": sum(file.stat().st_size for file in (features / "train").glob("*.bin"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/features-per-row"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {str(limit or "all"): [] for limit in LIMITS}
    for seed in range(args.seeds):
        for limit in LIMITS:
            results[str(limit or "all")].append(measure(limit, seed, args.folder))
            print(limit, seed, results[str(limit or "all")][-1], flush=True)
    for limit, runs in results.items():
        losses = [run["loss"] for run in runs]
        spread = stdev(losses) if len(losses) > 1 else 0.0
        print(
            f"{limit}: {mean(losses):.4f} (deviation {spread:.4f}), {mean(run['bytes'] for run in runs) / 1e6:.1f} MB"
        )
    if args.output:
        args.output.write_text(json.dumps({"seeds": args.seeds, "results": results}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
