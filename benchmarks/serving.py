"""Throughput and latency of served models: fused in one engine, fused outside, and one specialist alone.

All servers run side by side, and every round measures each of them in turn, so that other work on the machine meets
them alike. Ratios are taken within a round.

    python benchmarks/serving.py runs/demo/fused --work runs/serving --json docs/results/serving.json

The fused folder must hold adapters on one base. The other models are made from it: a fused model of whole specialists,
and each specialist by itself. Needs `pip install 'ultrafuser[vllm,serve]'`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table

from serving_load import OneEngineEach, Served, closed_load, open_load

START_S = 600
ONE = "one specialist, vLLM"
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="fused model whose specialists are adapters on one base")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models and the servers' logs")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 32])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 1.0], help="requests per second")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    parser.add_argument(
        "--requests", type=int, default=4, help="requests per round of a closed load, or one per client"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--eager", action="store_true", help="do not compile the models")
    parser.add_argument("--only", nargs="*", help="systems to measure, by a word of their names")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped too
    prompts = make_models(args.folder, args.work)
    with contextlib.ExitStack() as stack:
        systems = start_systems(args, stack)
        results = measure(systems, prompts, args)
    print_results(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def make_models(folder: Path, work: Path) -> list[list[int]]:
    """Write each specialist and the fused model of whole specialists into `work`. Returns prompts as token ids."""
    import ultrafuser
    from ultrafuser.data.sources import load_rows

    model, renderer = ultrafuser.load(folder)
    recipe: dict[str, Any] = {"specialists": [], "mixing": model.config.mixing, "dtype": "float32"}
    for name in model.config.names:
        target = work / name
        if not target.exists():
            model.specialist(name).save_pretrained(target)
            renderer.tokenizer.save_pretrained(target)
        recipe["specialists"].append({"name": name, "model": str(target.resolve()), "chat_template": "chatml"})
    if not (work / "separate").exists():
        (work / "separate.json").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        fuse = [
            sys.executable,
            "-m",
            "ultrafuser",
            "fuse",
            str(work / "separate.json"),
            "--output",
            str(work / "separate"),
        ]
        subprocess.run(fuse, check=True, stdout=sys.stderr)
    rows = [
        row
        for domain in ("text", "code", "math", "mixed")
        for row in load_rows(f"package:ultrafuser/zoo/data/{domain}.test.jsonl", domain=domain, limit=16)
    ]
    return [list(renderer.prompt(row.chat()[:-1])[0]) for row in rows]


def start_systems(
    args: argparse.Namespace, stack: contextlib.ExitStack
) -> dict[str, tuple[Callable[[], Served], list[int]]]:
    """Start every server. Returns, for each system, what makes its client and the processes of its servers."""
    names = [
        path.name
        for path in sorted(args.work.iterdir())
        if (path / "config.json").is_file() and path.name != "separate"
    ]
    systems: dict[str, tuple[Callable[[], Served], list[int]]] = {}

    def wanted(name: str) -> bool:
        return not args.only or any(word in name for word in args.only)

    def vllm(path: Path, log: str, speculation: dict[str, Any] | None = None) -> tuple[str, int]:
        command = [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(path),
            "--dtype",
            args.dtype,
            "--max-model-len",
            "1024",
        ]
        command += ["--speculative-config", json.dumps(speculation)] if speculation else []
        command += ["--enforce-eager"] if args.eager else []
        return stack.enter_context(server(command, args.work / f"{log}.log"))

    engines = [(name, vllm(args.work / name, f"vllm-{name}")) for name in names[: None if wanted("paper's way") else 1]]
    first_url, first_pid = engines[0][1]
    systems[ONE] = (lambda: Served(first_url, args.tokens), [first_pid])
    ngram = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    draft = {"model": str(args.work / names[0]), "num_speculative_tokens": 3}
    for name, path, speculation in (
        ("fused, shared base, vLLM", args.folder, None),
        ("fused, shared base, n-gram drafts, vLLM", args.folder, ngram),
        (f"fused, shared base, drafts by {names[0]}, vLLM", args.folder, draft),
        ("fused, separate, vLLM", args.work / "separate", None),
    ):
        if wanted(name):
            url, pid = vllm(path, name.replace(", ", "-").replace(" ", "-"), speculation)
            systems[name] = (lambda url=url: Served(url, args.tokens), [pid])  # type: ignore[misc]
    if wanted("fused, embedded engine"):
        command = [sys.executable, "-m", "ultrafuser", "serve", str(args.folder), "--engine", "embedded"]
        url, pid = stack.enter_context(server(command + ["--max-batch-size", "32"], args.work / "embedded.log"))
        systems["fused, embedded engine"] = (lambda: Served(url, args.tokens), [pid])
    if wanted("paper's way"):
        urls, pids = [url for _, (url, _) in engines], [pid for _, (_, pid) in engines]
        systems["paper's way: one vLLM each, mixed outside"] = (lambda: OneEngineEach(urls, args.tokens), pids)
    return systems


@contextlib.contextmanager
def server(command: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """Run a server on a free port until the context ends. Gives its address and process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ | {"PATH": path}
    console.print("starting", " ".join(command), style="dim")
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{command[0]} did not start, see {log}")
            time.sleep(1)
        yield url, process.pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return reply.status == 200
    except (OSError, urllib.error.URLError):
        return False


def measure(systems: dict[str, Any], prompts: list[list[int]], args: argparse.Namespace) -> dict[str, Any]:
    """Every load on every system, round by round."""
    rounds: dict[str, dict[str, list[dict[str, float]]]] = {name: {} for name in systems}

    async def run_all() -> None:
        for turn in range(-1, args.rounds):  # the first round warms up, and is not kept
            for name, (make, _) in systems.items():
                client = make()
                async with aiohttp.ClientSession() as session:
                    await client.prepare(session)
                for label, load in loads(client, prompts, args, turn):
                    result = await load
                    if turn >= 0:
                        rounds[name].setdefault(label, []).append(result)
                    console.print(f"round {turn + 1}, {name}, {label}: {result['tokens_per_s']:.1f} tokens/s")

    asyncio.run(run_all())
    memory = {name: sum(map(memory_mb, pids)) for name, (_, pids) in systems.items()}
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "dtype": args.dtype,
            "compiled": not args.eager,
        },
        "versions": {name: _version(name) for name in ("torch", "vllm", "vllm-cpu", "transformers")},
        "settings": {"tokens": args.tokens, "requests": args.requests, "rounds": args.rounds},
        "systems": {name: {"memory_mb": round(memory[name]), "loads": summaries(rounds, name)} for name in systems},
    }


def loads(client: Served, prompts: list[list[int]], args: argparse.Namespace, turn: int) -> Iterator[tuple[str, Any]]:
    """The loads of one round, each with its label. The warm-up is short."""
    for clients in args.clients:
        count = max(clients, args.requests if turn >= 0 else 1)
        # every round has prompts of its own order, so that no prefix cache holds all of them from the same load
        offset = (turn + 1) * 7
        yield f"{clients} clients", closed_load(client, _cycle(prompts, offset, count), clients)
    for rate in args.rates if turn >= 0 else []:
        yield f"{rate:g} requests/s", open_load(client, _cycle(prompts, 3, max(8, int(12 * rate))), rate, seed=turn)


def _cycle(prompts: list[list[int]], offset: int, count: int) -> list[list[int]]:
    return [prompts[(offset + i) % len(prompts)] for i in range(count)]


def summaries(rounds: dict[str, Any], name: str) -> dict[str, Any]:
    """Medians over the rounds, and the ratio of the throughput to the specialist alone in the same round."""
    out = {}
    for label, results in rounds[name].items():
        ratios = [
            result["tokens_per_s"] / alone["tokens_per_s"]
            for result, alone in zip(results, rounds[ONE][label], strict=True)
        ]
        out[label] = {key: round(statistics.median(r[key] for r in results), 4) for key in results[0]} | {
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    return out


def memory_mb(pid: int) -> float:
    """Proportional memory of a process and its children."""
    import psutil

    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def _version(package: str) -> str | None:
    with contextlib.suppress(ImportError):
        return version(package)
    return None


def print_results(results: dict[str, Any]) -> None:
    labels = list(next(iter(results["systems"].values()))["loads"])
    table = Table(title="tokens/s (ratio to one specialist)")
    for column in ("system", *labels, "MB"):
        table.add_column(column, justify="left" if column == "system" else "right")
    for name, system in results["systems"].items():
        cells = [f"{load['tokens_per_s']:.1f} ({load['ratio']:.2f})" for load in system["loads"].values()]
        table.add_row(name, *cells, str(system["memory_mb"]))
    Console().print(table)


if __name__ == "__main__":
    main()
