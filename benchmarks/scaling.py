"""Time of a decoding step and memory against the number of specialists on one base, the context and the batch.

    python benchmarks/scaling.py --json docs/results/scaling.json

The adapters of the exams are taken several times over, since the time of a step does not depend on what they have learned. Each
round times one step of each model in turn, beside one merged specialist. Caches are filled with random numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from decoding import describe_machine
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import package_path
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse

SIZES = (1, 2, 3, 6, 10)
SETTINGS = ((64, 1), (512, 1), (2048, 1), (64, 8))  # context, batch
ONE = "one specialist"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models: dict[str, Any] = {f"K = {size}": fused(size) for size in SIZES}
    models = {ONE: models["K = 3"].specialist("text0").eval()} | models
    bandwidth = read_bandwidth()
    results = []
    for context, batch in SETTINGS:
        steps = {name: make_step(model, context, batch) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for number in range(args.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter()
                step()
                if number:  # the first round warms up
                    times[name].append(1e3 * (time.perf_counter() - began))
        for name, values in times.items():
            results.append(
                {"context": context, "batch": batch, "system": name, "ms": round(statistics.median(values), 1)}
            )
            print(results[-1], flush=True)
    weights = {
        name: round(sum(p.numel() * p.dtype.itemsize for p in m.parameters()) / 2**20) for name, m in models.items()
    }
    machine = describe_machine(args.threads) | {"read_gb_per_s": bandwidth, "gflops": product_speed()}
    if args.json:
        content = {"machine": machine, "rounds": args.rounds, "weights_mib": weights, "steps": results}
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def fused(size: int) -> UltraFuserForCausalLM:
    """A model of that many adapters on one base, with an untrained gate."""
    recipe = load_recipe(package_path("package:ultrafuser/zoo/exams/fuse.yaml"))
    given = recipe.specialists
    specialists = [
        given[k % len(given)].model_copy(update={"name": f"{given[k % len(given)].name}{k // len(given)}"})
        for k in range(size)
    ]
    model, _ = fuse(recipe.model_copy(update={"specialists": specialists}))
    return model.eval()


def make_step(model: UltraFuserForCausalLM | PreTrainedModel, context: int, batch: int) -> Callable[[], None]:
    """A function that runs one decoding step behind a context of random states."""
    fuses = isinstance(model, UltraFuserForCausalLM)
    cache: Any = model.new_cache() if fuses else DynamicCache(config=model.config)
    config = (model.groups[0].model if fuses else model).config
    rows = batch * (model.groups[0].size if fuses else 1)
    for layer in (cache.groups[0] if fuses else cache).layers:
        shape = (rows, config.num_key_value_heads, context, config.head_dim)
        layer.update(torch.randn(shape), torch.randn(shape))
    if fuses:
        cache.record(torch.zeros(batch, model.groups[0].size, context, dtype=torch.long), None)
    token = torch.zeros(batch, 1, dtype=torch.long)

    @torch.inference_mode()
    def step() -> None:
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)

    return step


def read_bandwidth() -> float:
    """Bytes of memory that one thread reads in a second, in 1e9: the best of several sums over 512 MiB."""
    numbers = torch.zeros(2**27)
    return round(numbers.numel() * 4 / _shortest(numbers.sum) / 1e9, 1)


def product_speed() -> float:
    """Operations of a large product in a second, in 1e9."""
    a = torch.zeros(1536, 1536)
    return round(2 * 1536**3 / _shortest(lambda: a @ a) / 1e9, 1)


def _shortest(work: Callable[[], Any], trials: int = 7) -> float:
    times = []
    for _ in range(trials):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    main()
