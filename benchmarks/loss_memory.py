"""Measure the peak memory of the fused loss above the hidden states, with and without chunks.

The case: 4,096 response tokens, K = 3 specialists of width 576, V = 49,152 (SmolLM2), float32. Forward and backward of
`mixed_log_prob` are compared with plain autograd over full logits. Stage 1 needs the gradient of the gate's weights
alone, stage 2 also that of the hidden states (output layers frozen, as with LoRA). Each case runs in its own process.
The result is its peak resident memory minus that just before the loss, when inputs, output layers and libraries are
loaded and warmed up.

    python benchmarks/loss_memory.py [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ultrafuser.model.loss import Head, mixed_log_prob

V, D, K = 49_152, 576, 3
TARGET_MB = 300
METHODS, STAGES, MIXINGS = ("chunked", "plain"), (1, 2), ("logits", "probabilities")


def plain_log_prob(
    states: list[torch.Tensor], heads: list[Head], log_w: torch.Tensor, y: torch.Tensor, mixing: str
) -> torch.Tensor:
    """The same log-probabilities from full logits, by plain autograd."""
    mixed: torch.Tensor | None = None
    for k, (state, head) in enumerate(zip(states, heads, strict=True)):
        z = head.logits(state)
        if mixing == "logits":
            weighted = log_w[:, k, None].exp() * z
            mixed = weighted if mixed is None else mixed + weighted
        else:
            weighted = log_w[:, k, None] + z.log_softmax(-1)
            mixed = weighted if mixed is None else torch.logaddexp(mixed, weighted)
    assert mixed is not None
    return -torch.nn.functional.cross_entropy(mixed, y, reduction="none")


def peak_bytes() -> int:
    """High-water mark of this process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_case(method: str, stage: int, mixing: str, tokens: int) -> dict[str, Any]:
    """Measure one case. Call it in a fresh process."""
    g = torch.Generator().manual_seed(0)
    heads = [Head(torch.randn(V, D, generator=g).mul_(D**-0.5)) for _ in range(K)]
    compute = mixed_log_prob if method == "chunked" else plain_log_prob

    def run(n: int) -> float:
        states = [torch.randn(n, D, generator=g).requires_grad_(stage == 2) for _ in range(K)]
        scores = torch.randn(n, K, generator=g).requires_grad_()
        y = torch.randint(0, V, (n,), generator=g)
        baseline = peak_bytes()
        start = time.perf_counter()
        loss = -compute(states, heads, scores.log_softmax(-1), y, mixing).mean()
        loss.backward()
        figures.update(seconds=time.perf_counter() - start, mb=(peak_bytes() - baseline) / 1e6)
        return loss.item()

    figures: dict[str, float] = {}
    run(8)  # warm up libraries and thread pools
    loss = run(tokens)
    return {"method": method, "stage": stage, "mixing": mixing, "loss": loss, **figures}


def measure(tokens: int, threads: int) -> list[dict[str, Any]]:
    """Measure every case, one process after another."""
    rows = []
    for stage, mixing, method in itertools.product(STAGES, MIXINGS, METHODS):
        command = [sys.executable, __file__, "--case", method, str(stage), mixing]
        command += ["--tokens", str(tokens), "--threads", str(threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(output))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--case", nargs=3, metavar=("METHOD", "STAGE", "MIXING"), help="run one case and print its JSON"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.case:
        print(json.dumps(run_case(args.case[0], int(args.case[1]), args.case[2], args.tokens)))
        return
    rows = measure(args.tokens, args.threads)
    states_mb = args.tokens * D * K * 4 / 1e6
    table = Table(title=f"Peak memory above the {states_mb:.0f} MB of hidden states, {args.tokens} tokens, V = {V}")
    for column in ("stage", "mixing", "chunked MB", "plain MB", "chunked s", "plain s"):
        table.add_column(column, justify="right")
    for chunked, plain in zip(rows[::2], rows[1::2], strict=True):
        figures = [
            f"{chunked['mb']:,.0f}",
            f"{plain['mb']:,.0f}",
            f"{chunked['seconds']:.1f}",
            f"{plain['seconds']:.1f}",
        ]
        table.add_row(str(chunked["stage"]), chunked["mixing"], *figures)
    Console().print(table)
    if args.json:
        result = {
            "tokens": args.tokens,
            "vocab": V,
            "width": D,
            "specialists": K,
            "target_mb": TARGET_MB,
            "cases": rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
