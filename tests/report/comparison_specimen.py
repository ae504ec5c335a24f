"""A comparison with every part, for the tests of its report, and readers of the page."""

from __future__ import annotations

import copy
import json
import math
import random
import re
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from ultrafuser.compare.systems import SystemRecipe
from ultrafuser.inspect.trace import TokenTrace

KINDS = {get_args(node.model_fields["kind"].annotation)[0]: node for node in get_args(get_args(SystemRecipe)[0])}
MEASURED_LOSSES = Path(__file__).with_name("losses.json")
NAMES = ["text", "code", "math"]
TASKS = {
    "gsm8k": {"metric": "exact_match", "higher_is_better": True, "description": "Grade-school maths, zero-shot."},
    "math": {"metric": "exact_match", "higher_is_better": True, "description": "Competition maths."},
    "humaneval": {"metric": "pass@1", "higher_is_better": True, "description": "Python functions, run with tests."},
}
# Measured on all rows of the zoo. Name -> kind and label.
MEASURED = {
    "base": ("base", "base"),
    "text": ("specialist", "text specialist"),
    "code": ("specialist", "code specialist"),
    "math": ("specialist", "math specialist"),
    "uniform": ("static", "equal weights"),
    "weight_average": ("merge", "average of the weights"),
    "fused_stage1": ("fused", "fused, stage 1"),
    "fused": ("fused", "fused, stage 2"),
}
# Invented, to fill the page: what is added to the best specialist's loss.
INVENTED = {
    "oracle": ("oracle", "oracle per domain", 0.0),
    "ties": ("merge", "TIES merging, density 0.5", 0.11),
    "arithmetic": ("merge", "task arithmetic, coefficient 1.0", 6.4),
    "tuned": ("tuned", "text specialist, tuned further", 0.04),
    "router": ("router", "router", 0.006),
    "unbalanced": ("fused", "fused, no balanced sampler", -0.02),
}


def specimen() -> dict[str, Any]:
    """A comparison with every part: the demo's numbers, and invented ones for what the demo does not measure."""
    demo = json.loads(MEASURED_LOSSES.read_text(encoding="utf-8"))
    rng = random.Random(0)
    domains = demo["domains"]
    best = {d: min(NAMES, key=lambda name, d=d: demo["systems"][name][d]["nll"]) for d in domains}  # type: ignore[misc]
    losses = {name: demo["systems"][name] for name in MEASURED}
    for name, (_, _, extra) in INVENTED.items():
        losses[name] = {d: _shifted(demo["systems"][best[d]][d], extra * (0.5 + rng.random())) for d in domains}
    systems = {name: _system(label, kind, losses[name]) for name, (kind, label) in MEASURED.items()}
    systems |= {name: _system(label, kind, losses[name]) for name, (kind, label, _) in INVENTED.items()}
    systems["best_of"] = _system("best of three answers", "best_of", None)
    systems["btx"] = {"label": "BTX", "kind": "btx", "status": "failed"}
    systems["btx"]["error"] = "Traceback:\nOutOfMemoryError: tried to allocate <2.6> GiB & failed"
    skill = {"base": 0.18, "arithmetic": 0.01, "fused": 0.42, "best_of": 0.36, "router": 0.35, "oracle": 0.36}
    measured = {name: system for name, system in systems.items() if system["status"] == "done"}
    for name, system in measured.items():
        system["tasks"] = {task: _score(rng, skill.get(name, 0.3) + 0.03 * n, 200) for n, task in enumerate(TASKS)}
        system["tokens_per_s"] = _speed(rng.uniform(20, 35) if name.startswith("fused") else rng.uniform(80, 100))
    measured["fused"]["tasks"]["humaneval"] = _score(rng, 0.2, 200)  # the page has to show a loss, too
    measured["fused"]["tasks"]["math"] = _score(rng, 0.36, 200)
    for name, system in measured.items():
        system["paired"] = _paired(name, losses, best, measured)
    systems["fused"]["paired"]["best_specialist"] |= demo["paired"]
    return {
        "title": "Fusing three specialists, and what else one could do",
        "created": "2026-11-23",
        "seed": 0,
        "specialists": NAMES,
        "domains": domains,
        "tasks": copy.deepcopy(TASKS),
        "systems": systems,
        "gate_weights": {"fused": demo["gate_weights"], "fused_stage1": demo["gate_weights"]},
        "sample_weights": {"fused": {d: [_sample(rng, w) for _ in range(40)] for d, w in demo["gate_weights"].items()}},
        "training": {
            name: _metrics(rng, start) for name, start in (("fused", 2.3), ("unbalanced", 2.5), ("tuned", 2.9))
        },
        "stability": {
            name: [
                {"step": step, "loss": {d: losses[name][d]["nll"] + rng.gauss(0, spread) for d in domains}}
                for step in range(50, 301, 50)
            ]
            for name, spread in (("fused", 0.01), ("unbalanced", 0.04))
        },
        "table2": ["unbalanced", "fused_stage1", "fused"],
        "main": "fused",
        "config": {"mixing": "probabilities", "note": "</pre><script>alert(1)</script>"},
    }


def _shifted(cell: dict[str, Any], extra: float) -> dict[str, Any]:
    return cell | {"nll": cell["nll"] + extra, "ci95": [bound + extra for bound in cell["ci95"]]}


def _system(label: str, kind: str, loss: dict[str, Any] | None) -> dict[str, Any]:
    if loss is not None:
        mean = {"nll": fmean(cell["nll"] for cell in loss.values())}
        mean["ci95"] = [fmean(cell["ci95"][side] for cell in loss.values()) for side in (0, 1)]  # type: ignore[assignment]
        loss = {**copy.deepcopy(loss), "mean": mean}
    many = 1 if kind not in ("fused", "static", "best_of", "router") else 3
    return {
        "label": label,
        "kind": kind,
        "kind_label": KINDS[kind].kind_label,
        "description": KINDS[kind].description,
        "status": "done",
        "error": None,
        "loss": loss,
        "peak_memory_mb": 640.5 + 410 * many,
        "parameters": {"total": 134515008 + 4884480 * many, "active": 134515008 * many, "trained": 295425},
        "seconds": {"build": 3.25 * many, "measure": 61.5 * many},
    }


def _score(rng: random.Random, value: float, samples: int) -> dict[str, Any]:
    value = min(max(value + rng.gauss(0, 0.015), 0.0), 1.0)
    half = 1.96 * math.sqrt(value * (1 - value) / samples)
    return {
        "value": value,
        "ci95": [value - half, value + half],
        "samples": samples,
        "counts": {"unparsed": 2} if rng.random() < 0.5 else {},
    }


def _speed(median: float) -> dict[str, Any]:
    return {"median": median, "runs": [median - 1.5, median, median + 0.5], "batch_size": 8}


def _paired(name: str, losses: dict[str, Any], best: dict[str, str], systems: dict[str, Any]) -> dict[str, Any]:
    pairs: dict[str, Any] = {}
    for rival, versus in {"best_specialist": best, "router": dict.fromkeys(best, "router")}.items():
        columns = {}
        if systems[name]["loss"]:
            for domain, opponent in versus.items():
                difference = losses[name][domain]["nll"] - losses[opponent][domain]["nll"]
                columns[domain] = _pair(opponent, difference, 0.015)
            mean = fmean(pair["difference"] for pair in columns.values())
            columns["mean"] = _pair("text" if rival == "best_specialist" else "router", mean, 0.008)
        for task in TASKS:
            scores = {system: entry["tasks"][task]["value"] for system, entry in systems.items()}
            opponent = max(NAMES, key=lambda s: scores[s]) if rival == "best_specialist" else "router"
            key = f"task/{task}" if task in losses["text"] else task
            columns[key] = _pair(opponent, scores[name] - scores[opponent], 0.045)
        pairs[rival] = columns
    return pairs


def _pair(versus: str, difference: float, half: float) -> dict[str, Any]:
    return {"versus": versus, "difference": difference, "ci95": [difference - half, difference + half]}


def _sample(rng: random.Random, mean: dict[str, float]) -> dict[str, float]:
    raw = {name: rng.gammavariate(12 * weight, 1) for name, weight in mean.items()}
    return {name: weight / sum(raw.values()) for name, weight in raw.items()}


def _metrics(rng: random.Random, start: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, steps, low in (("gate", 200, start - 0.2), ("joint", 60, start - 0.45)):
        top = rows[-1]["loss"] if rows else start
        for step in range(1, steps + 1):
            loss = low + (top - low) * math.exp(-5 * step / steps) + rng.gauss(0, 0.03)
            rows.append({"stage": stage, "step": step, "loss": loss, "loss/text": loss + 1})
    rows.append({"stage": "joint", "step": 60, "eval_loss/text": 1.0})
    return rows


def traces() -> list[TokenTrace]:
    code = ["def", " add", "(a", ",", " b", "):", "\n", "    return", " a", " +", " b", "\n"]
    maths = ["So", " $x", " =", " 4", "$", ":", " 4", " +", " 3", " =", " 7", "."]
    weights = {"code": [0.1, 0.8, 0.1], "math": [0.1, 0.15, 0.75]}
    return [
        TokenTrace(
            tokens, [weights[domain]] * len(tokens), NAMES, f"The {domain} prompt", domain, f"An answer: {domain}"
        )
        for domain, tokens in (("code", code), ("math", maths))
    ]


def section(html: str, heading: str) -> str:
    (content,) = re.findall(rf"<h2>{heading}</h2>(.*?)</section>", html, re.DOTALL)
    return content


def rows_of(html: str) -> dict[str, list[list[str]]]:
    """All table rows as plain text by the label in their head; each cell is split into words."""
    rows: dict[str, list[list[str]]] = {}
    for row in re.findall(r"<tr class=[^>]*>(.*?)</tr>", html, re.DOTALL):
        head, *cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)
        label = head.split("<small>")[0].replace("\u00a0†", "")
        rows.setdefault(label, []).extend(re.sub(r"<[^>]+>", " ", cell).split() for cell in cells)
    return rows


def without(results: dict[str, Any], *names: str, **changes: Any) -> dict[str, Any]:
    """The comparison without some systems, and with other changes."""
    out = copy.deepcopy(results) | changes
    out["systems"] = {name: system for name, system in out["systems"].items() if name not in names}
    for key in ("gate_weights", "sample_weights", "training", "stability"):
        out[key] = {name: value for name, value in out[key].items() if name in out["systems"]}
    out["table2"] = [name for name in out["table2"] if name in out["systems"]]
    return out


def no_tasks(results: dict[str, Any]) -> dict[str, Any]:
    out = without(results, tasks={})
    for system in out["systems"].values():
        system["tasks"] = {}
    return out


def no_loss(results: dict[str, Any]) -> dict[str, Any]:
    out = without(results)
    for system in out["systems"].values():
        system["loss"] = None
    return out


def thin(results: dict[str, Any]) -> dict[str, Any]:
    """No router, nothing failed, no gate weights, no training, no ablations."""
    out = without(results, "router", "btx", gate_weights={}, sample_weights={}, training={}, stability={}, table2=[])
    for system in out["systems"].values():
        system["paired"].pop("router")
    return out


def bare(results: dict[str, Any]) -> dict[str, Any]:
    """One fused model of one specialist on one domain, and nothing measured but its loss."""
    keep = {"title", "created", "seed", "main", "config"}
    out = {key: value for key, value in copy.deepcopy(results).items() if key in keep}
    loss = {
        "text": {"nll": 2.0, "ci95": [1.9, 2.1], "tokens": 5, "samples": 2},
        "mean": {"nll": 2.0, "ci95": [1.9, 2.1]},
    }
    fused = {"label": "only", "kind": "fused", "status": "done", "loss": loss}
    return out | {"specialists": ["text"], "domains": ["text"], "tasks": {}, "systems": {"fused": fused}}


def all_failed(results: dict[str, Any]) -> dict[str, Any]:
    out = without(results, gate_weights={}, sample_weights={}, training={}, stability={}, table2=[], main=None)
    for name in out["systems"]:
        out["systems"][name] = {"label": name, "kind": "fused", "status": "failed", "error": f"no luck with {name}"}
    return out


def many(results: dict[str, Any]) -> dict[str, Any]:
    """Twenty systems of long names, seven specialists, and numbers that are not numbers."""
    out = without(results)
    for n in range(6):
        name = f"a specialist of a domain with a rather long name, number {n}"
        out["systems"][name] = copy.deepcopy(out["systems"]["text"]) | {"label": name}
        out["specialists"] = [*out["specialists"], name]
    out["systems"]["ties"]["loss"]["code"] |= {"nll": math.nan, "ci95": [math.nan, math.nan]}
    out["systems"]["arithmetic"]["loss"]["mean"] |= {"nll": math.inf, "ci95": [9.0, math.inf]}
    out["systems"]["arithmetic"]["tasks"]["gsm8k"] |= {"value": 0.0, "ci95": [0.0, 0.0]}
    return out
