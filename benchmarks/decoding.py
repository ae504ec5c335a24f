"""Tokens per second of a fused model against one specialist, plain and speculative.

Every round asks each system the same question in turn, so that other work on the machine meets them alike, and ratios are
taken within a round. The one specialist is a merged model that transformers' `generate` runs.

    python benchmarks/decoding.py runs/demo/fused --json docs/results/decoding.json

The fused folder must hold adapters on one base. The model of whole specialists is made from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from ultrafuser.data.collate import prompt_inputs
from ultrafuser.data.templates import Renderer
from ultrafuser.model import few_rows
from ultrafuser.model.loss import all_logits
from ultrafuser.model.mixing import mix_logits
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.model.shared_base import SpecialistGroup
from ultrafuser.model.speculation import Speculation
from ultrafuser.specialists import load
from ultrafuser.zoo.exams import EXAMS, questions

ONE, SHARED, SEPARATE = "one specialist", "shared base", "whole specialists"
USUAL = f"{SHARED}, usual products"
PART_ROUNDS = 40
MIN_ANSWER = 24  # tokens of the fused answer, so that times are not those of the first token
console = Console(stderr=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="fused model whose specialists are adapters on one base")
    parser.add_argument("--prompts", type=int, default=20, help="questions, spread over all exams. Each is a round")
    parser.add_argument("--tokens", type=int, default=256, help="tokens per answer, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="systems to measure, by a word of their names")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared, renderer = load(args.folder, dtype="float32", device_map="cpu")
    shared.eval()
    separate = _separate(shared)
    weights = {
        name: round(sum(p.numel() * p.dtype.itemsize for p in model.parameters()) / 2**20)
        for name, model in {
            ONE: separate.specialist(separate.config.names[0]),
            SHARED: shared,
            SEPARATE: separate,
        }.items()
    }
    systems = _systems(shared, separate)
    systems = {name: system for name, system in systems.items() if not args.only or any(w in name for w in args.only)}
    prompts = _prompts(args.prompts, shared, renderer, args.tokens)
    rows: list[dict[str, Any]] = []
    for number, (domain, chat) in enumerate(prompts):
        rows += _round(systems, renderer, shared, domain, chat, args.tokens, number)
    result = {
        "machine": describe_machine(args.threads),
        "versions": {name: version(name) for name in ("transformers", "ultrafuser")},
        "tokens": args.tokens,
        "rounds": len(prompts),
        "weights_mib": weights,
        "step_ms": _parts(shared, renderer, prompts[0][1]),
        "systems": _summary(rows, list(systems)),
        "rows": rows,
    }
    _print(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _systems(shared: UltraFuserForCausalLM, separate: UltraFuserForCausalLM) -> dict[str, Callable[..., Any]]:
    """A function for each system: (domain, inputs, options) -> tokens (1, T)."""

    def plain(model: Any) -> Callable[..., Any]:
        return lambda domain, inputs, **options: model.generate(**inputs, **options)

    def one(domain: str, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        """The specialist of the question's domain, or the first."""
        names = separate.config.names
        specialist = separate.specialist(domain if domain in names else names[0])
        return specialist.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)

    def usual(domain: str, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        with _usual_products():
            return shared.generate(**inputs, **options)

    def drafted(model: Any, mode: str) -> Callable[..., Any]:
        def run(domain: str, inputs: dict[str, torch.Tensor], **options: Any) -> tuple[torch.Tensor, Speculation]:
            speculation = Speculation(mode)
            return model.generate(**inputs, speculative=speculation, **options), speculation

        return run

    return {
        ONE: one,
        USUAL: usual,
        SHARED: plain(shared),
        f"{SHARED}, drafts from the text": drafted(shared, "ngram"),
        SEPARATE: plain(separate),
        f"{SEPARATE}, drafts of a specialist": drafted(separate, "specialist"),
        f"{SEPARATE}, both drafts": drafted(separate, "auto"),
    }


def _separate(shared: UltraFuserForCausalLM) -> UltraFuserForCausalLM:
    """The same specialists, each with its adapter merged into a base of its own, and the same gate."""
    names = shared.config.names
    groups = [SpecialistGroup(shared.specialist(name), [name]) for name in names]
    model = UltraFuserForCausalLM(shared.config, groups)
    model.gate = shared.gate
    model.generation_config = shared.generation_config
    return model.eval()


@contextmanager
def _usual_products() -> Any:
    with mock.patch.object(few_rows, "_other_order_is_faster", lambda *_: False):
        yield


def _prompts(
    count: int, model: UltraFuserForCausalLM, renderer: Renderer, num_tokens: int
) -> list[tuple[str, list[dict[str, str]]]]:
    """(domain, conversation) of unseen questions with answers that take some time, the exams in turn."""
    drawn = {exam: questions(exam, "test") for exam in EXAMS}
    prompts: list[tuple[str, list[dict[str, str]]]] = []
    while len(prompts) < count:
        domain = list(EXAMS)[len(prompts) % len(EXAMS)]
        chat = [{"role": "user", "content": next(drawn[domain]).prompt}]
        inputs = prompt_inputs(renderer, [chat], model.device)
        out = model.generate(**inputs, max_new_tokens=MIN_ANSWER, do_sample=False, pad_token_id=0)
        if out.shape[1] - inputs["input_ids"].shape[1] >= MIN_ANSWER:
            prompts.append((domain, chat))
    return prompts


def _round(
    systems: dict[str, Callable[..., Any]],
    renderer: Renderer,
    model: UltraFuserForCausalLM,
    domain: str,
    chat: list[dict[str, str]],
    num_tokens: int,
    number: int,
) -> list[dict[str, Any]]:
    inputs = prompt_inputs(renderer, [chat], model.device)
    options = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    names, rows, texts = list(systems), [], {}
    for name in names[number % len(names) :] + names[: number % len(names)]:
        prefill = _seconds(lambda name=name: systems[name](domain, inputs, **(options | {"max_new_tokens": 1})))
        began = time.perf_counter()
        out = systems[name](domain, inputs, **options)
        seconds = time.perf_counter() - began - prefill
        out, speculation = out if isinstance(out, tuple) else (out, None)
        texts[name] = out[0, inputs["input_ids"].shape[1] :].tolist()
        row = {"round": number, "domain": domain, "system": name, "tokens": len(texts[name])}
        row["tokens_per_s"] = round((len(texts[name]) - 1) / seconds, 3)
        if speculation is not None:
            row |= {"drafted": speculation.drafted, "accepted": speculation.accepted, "passes": speculation.passes}
        rows.append(row)
    for row in rows:
        plain = SHARED if row["system"].startswith(SHARED) else SEPARATE if row["system"].startswith(SEPARATE) else None
        if plain in texts:
            row["same_answer"] = texts[row["system"]] == texts[plain]
    console.print(
        f"round {number}, {domain}: " + ", ".join(f"{row['system']} {row['tokens_per_s']:.1f}" for row in rows)
    )
    return rows


@torch.inference_mode()
def _parts(model: UltraFuserForCausalLM, renderer: Renderer, chat: list[dict[str, str]]) -> dict[str, float]:
    """Milliseconds of the parts of one decoding step of the shared base, medians."""
    cache = model.new_cache()
    model(**prompt_inputs(renderer, [chat], model.device), past_key_values=cache, logits_to_keep=1)
    token = torch.zeros(1, 1, dtype=torch.long)
    times: dict[str, list[float]] = {name: [] for name in ("specialists", "gate", "output layers", "mixing")}
    for _ in range(PART_ROUNDS):
        marks = [time.perf_counter()]
        states = model.specialist_states(token, cache=cache)
        marks.append(time.perf_counter())
        log_weights = model.gate(states)
        marks.append(time.perf_counter())
        logits = list(all_logits(states, model.heads()))
        marks.append(time.perf_counter())
        mix_logits(logits, log_weights, model.config.mixing)
        marks.append(time.perf_counter())
        cache.crop(-1)
        for name, began, ended in zip(times, marks[:-1], marks[1:], strict=True):
            times[name].append(1e3 * (ended - began))
    return {name: round(statistics.median(values), 2) for name, values in times.items()}


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _summary(rows: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Medians of each system, and of its ratios within a round to the one specialist."""
    speeds = {(row["round"], row["system"]): row["tokens_per_s"] for row in rows}
    out = []
    for name in names:
        mine = [row for row in rows if row["system"] == name]
        ratios = [row["tokens_per_s"] / speeds[row["round"], ONE] for row in mine if (row["round"], ONE) in speeds]
        entry: dict[str, Any] = {
            "system": name,
            "tokens_per_s": round(statistics.median(row["tokens_per_s"] for row in mine), 2),
            "ratio": round(statistics.median(ratios), 3) if ratios else None,
            "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)[::2]] if len(ratios) > 1 else None,
        }
        if "drafted" in mine[0]:
            entry["acceptance"] = {
                domain: round(sum(row["accepted"] for row in part) / max(1, sum(row["drafted"] for row in part)), 3)
                for domain in dict.fromkeys(row["domain"] for row in mine)
                if (part := [row for row in mine if row["domain"] == domain])
            }
            entry["tokens_per_pass"] = round(
                1 + sum(row["accepted"] for row in mine) / sum(row["passes"] for row in mine), 2
            )
        if "same_answer" in mine[0]:
            entry["same_answers"] = sum(row["same_answer"] for row in mine)
        out.append(entry)
    return out


def describe_machine(threads: int) -> dict[str, Any]:
    """What the figures depend on besides the code."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {"processor": next(names, platform.machine()), "threads": threads, "torch": torch.__version__}


def _print(result: dict[str, Any]) -> None:
    table = Table("system", "tokens/s", "of one specialist", "quartiles", "tokens a pass", "same answers")
    for entry in result["systems"]:
        table.add_row(
            *(
                str(entry.get(key, ""))
                for key in ("system", "tokens_per_s", "ratio", "quartiles", "tokens_per_pass", "same_answers")
            )
        )
    Console().print(table)


if __name__ == "__main__":
    main()
