"""Time of a linear layer for few rows, in the usual order of the product and in the other one (model/few_rows.py).

    python benchmarks/few_rows.py --json docs/results/few-rows.json

Each round times both orders in turn, on weights that are not in the cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from decoding import describe_machine
from ultrafuser.model.few_rows import _FILLED, _other_order

SHAPES = ((576, 576), (1536, 576), (576, 1536), (49152, 576))  # (out, in) of SmolLM2-135M
ROWS = (1, 2, 3, 4, 5, 8, 9, 12, 15, 16)
CACHE_BYTES = 128 << 20  # weights that are read in turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = []
    with torch.inference_mode():
        for shape in SHAPES:
            weights = [torch.randn(shape) for _ in range(max(2, CACHE_BYTES // (4 * shape[0] * shape[1])))]
            for rows in ROWS:
                results.append(_measure(shape, rows, weights, args.rounds))
                print(results[-1], flush=True)
    machine = describe_machine(args.threads)
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "rounds": args.rounds, "products": results}, indent=1) + "\n",
            encoding="utf-8",
        )


def _measure(shape: tuple[int, int], rows: int, weights: list[torch.Tensor], rounds: int) -> dict[str, object]:
    x = torch.randn(rows, shape[1])
    filled = next(size for size in _FILLED if rows <= size)
    orders: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "usual": lambda weight: functional.linear(x, weight),
        "other": lambda weight: _other_order(x, weight, None, filled),
    }
    times: dict[str, list[float]] = {name: [] for name in orders}
    for i in range(rounds):
        for j, (name, product) in enumerate(orders.items()):
            weight = weights[(2 * i + j) % len(weights)]
            began = time.perf_counter()
            product(weight)
            times[name].append(1e3 * (time.perf_counter() - began))
    return {"shape": shape, "rows": rows} | {f"{name}_ms": round(statistics.median(t), 4) for name, t in times.items()}


if __name__ == "__main__":
    main()
