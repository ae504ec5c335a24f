"""A small trace that holds everything awkward, and the results of a demo."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from ultrafuser.inspect.trace import TokenTrace

SPECIALISTS = ["text", "code", "math"]
DOMAINS = ["text", "code", "math", "mixed"]
# Markup of HTML and of rich, mathematics, an escape sequence, wide characters, and every kind of white space.
TOKENS = [
    "Let",
    " $x_1",
    "$",
    ":\n",
    "\n",
    "\tif",
    "    a",
    "<script>",
    " &amp;",
    "[bold]",
    '"',
    "\x1b[31m",
    "数",
    "  \n",
    "end",
]
LEADERS = [0, 2, 2, 0, 1, 1, 1, 1, 0, 2, 0, 1, 0, 1, 0]

LOSSES = {
    "base": [2.4349, 0.5711, 1.3886, 1.3920],
    "text": [2.2115, 0.5187, 1.3401, 1.2793],
    "code": [2.3842, 0.4221, 1.3160, 1.2919],
    "math": [2.3796, 0.5593, 0.8321, 1.3041],
    "weight_average": [2.2676, 0.4623, 1.0090, 1.2700],
    "uniform": [2.2720, 0.4613, 1.0399, 1.2607],
    "fused_stage1": [2.2121, 0.4216, 0.8363, 1.2346],
    "fused": [2.2108, 0.4244, 0.8307, 1.2206],
}


def weights_for(leaders: list[int], lead: float = 0.8) -> list[list[float]]:
    return [[lead if k == best else (1 - lead) / 2 for k in range(3)] for best in leaders]


@pytest.fixture
def trace() -> TokenTrace:
    return TokenTrace(
        TOKENS, weights_for(LEADERS), SPECIALISTS, prompt="<b>why</b> [red]", domain="mixed", title="A & B"
    )


KINDS = {"base": "base", "weight_average": "merge", "uniform": "static", "fused_stage1": "fused", "fused": "fused"}
LABELS = {"weight_average": "weight average", "fused_stage1": "fused, stage 1"}


@pytest.fixture
def results(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The results.json of a demo."""
    systems: dict[str, Any] = {}
    for name, losses in LOSSES.items():
        cells: dict[str, Any] = {
            domain: {"nll": loss, "ci95": [loss * 0.93, loss * 1.07], "tokens": 4000 + n, "samples": 40 + n}
            for n, (domain, loss) in enumerate(zip(DOMAINS, losses, strict=True))
        }
        mean = sum(losses) / len(losses)
        cells["mean"] = {"nll": mean, "ci95": [mean * 0.93, mean * 1.07]}
        kind = KINDS.get(name, "specialist")
        systems[name] = {"label": LABELS.get(name, name), "kind": kind, "status": "done", "loss": cells}
    paired = [
        ("text", -0.0007, -0.0046, 0.0031),
        ("code", 0.0023, 0.0009, 0.0057),
        ("math", -0.0014, -0.0062, 0.0035),
        ("text", -0.0587, -0.0811, -0.0374),
    ]
    systems["fused"]["paired"] = {
        "best_specialist": {
            domain: {"versus": versus, "difference": difference, "ci95": [low, high]}
            for domain, (versus, difference, low, high) in zip(DOMAINS, paired, strict=True)
        }
    }
    gate = [[0.877, 0.071, 0.052], [0.131, 0.808, 0.061], [0.058, 0.093, 0.849], [0.412, 0.379, 0.209]]
    weights = {d: dict(zip(SPECIALISTS, row, strict=True)) for d, row in zip(DOMAINS, gate, strict=True)}
    return copy.deepcopy(
        {
            "title": "ultrafuser demo",
            "created": "2026-11-23",
            "seed": 0,
            "specialists": SPECIALISTS,
            "domains": DOMAINS,
            "tasks": {},
            "systems": systems,
            "gate_weights": {"fused": weights},
            "sample_weights": {"fused": {domain: [row, row] for domain, row in weights.items()}},
            "training": {"fused": metrics},
            "main": "fused",
            "config": {
                "mixing": "probabilities",
                "note": "</pre><script>alert(1)</script>",
                "seconds": {"load": 6.1, "stage_gate": 9.8, "total": 374.0},
            },
        }
    )


@pytest.fixture
def metrics() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, steps in (("gate", 40), ("joint", 6)):
        for step in range(1, steps + 1):
            row: dict[str, Any] = {"stage": stage, "step": step, "loss": 1.2, "gate_entropy": 1 / step}
            row |= {f"loss/{domain}": 1.0 + n + 1 / step for n, domain in enumerate(DOMAINS)}
            row |= {f"gate_weight/{name}": weight for name, weight in zip(SPECIALISTS, (0.4, 0.35, 0.25), strict=True)}
            rows.append(row)
        rows.append({"stage": stage, "step": steps} | {f"eval_loss/{domain}": 1.1 for domain in DOMAINS})
    return rows
