"""Train gates on rows of some sources, and measure them on rows of sources that they have and have not seen.

    python benchmarks/gate_transfer.py ../shared/data/train --folder runs/gate-transfer --output docs/results/gate-transfer.json

The specialists are the zoo's. Their states are computed once in bfloat16. Rows come from the zoo's own data and from the
specialists' sources: the validation split of scripts/train_specialist.py trains gates, the held-out split measures them.
No specialist was trained on either, and nothing is chosen by the measured rows. `leave one out` trains one gate for each
source, on all rows but those of that source, and measures it there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from train_specialist import permissive_rows
from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.data.schema import Row
from ultrafuser.data.sources import load_rows
from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.model.gate import Gate
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.progress import ConsoleProgress
from ultrafuser.recipe import load_recipe
from ultrafuser.specialists import fuse, make_renderer
from ultrafuser.train.features import FeatureStore

DOMAINS = ("text", "code", "math")
ZOO = Path(__file__).parents[1] / "src" / "ultrafuser" / "zoo" / "data"
ROWS_PER_SOURCE = {"train": 40, "test": 40}
STEPS, ROWS_PER_DOMAIN, LR = 200, 8, 1e-3
TEMPERATURES = (0.9, 1.0, 1.1, 1.2)
TOKENS_PER_CHUNK = 1024
DECAYS = (0.9, 1.0)  # of the past likelihoods


class Tokens:
    """All response tokens of some rows.

    Attributes:
        sources: of each row, `zoo` for the zoo's own data.
        log_probs: (N, K, T) at TEMPERATURES, in nats.
        extra: (N, K, 3): the entropy of each specialist, and its past log-likelihood minus the specialists' mean, summed
            over the earlier response tokens with weights that fall by each of DECAYS per token.
    """

    def __init__(self, model: UltraFuserForCausalLM, store: FeatureStore, sources: Sequence[str]) -> None:
        self.rows, self.states, self.offsets, self.sources = store.rows, store.states, store.offsets, list(sources)
        labels = torch.tensor([label for row in store.rows for label in row.labels])
        self.log_probs = torch.empty(len(labels), len(store.states), len(TEMPERATURES))
        self.extra = torch.zeros(len(labels), len(store.states), 1 + len(DECAYS))
        with torch.no_grad():
            for k, (states, head) in enumerate(zip(store.states, model.heads(), strict=True)):
                for start in range(0, len(labels), TOKENS_PER_CHUNK):
                    chunk = slice(start, start + TOKENS_PER_CHUNK)
                    logits = head._replace(temperature=1.0).logits(states[chunk]).float()
                    picked = logits.gather(-1, labels[chunk, None])[:, 0]
                    for t, temperature in enumerate(TEMPERATURES):
                        self.log_probs[chunk, k, t] = picked / temperature - (logits / temperature).logsumexp(-1)
                    log_p = logits.log_softmax(-1)
                    self.extra[chunk, k, 0] = -(log_p.exp() * log_p).sum(-1)
        log_probs = self.log_probs[..., TEMPERATURES.index(1.0)]
        relative = log_probs - log_probs.mean(-1, keepdim=True)
        for first, end in pairwise(store.offsets):
            for i in range(first + 1, end):
                for j, decay in enumerate(DECAYS, 1):
                    self.extra[i, :, j] = decay * self.extra[i - 1, :, j] + relative[i - 1]

    def of(self, indices: Sequence[int]) -> torch.Tensor:
        """Positions of the response tokens of some rows."""
        return torch.cat([torch.arange(self.offsets[i], self.offsets[i + 1]) for i in indices])


class TransferGate(nn.Module):
    """The paper's gate, with further inputs or a prior from the past likelihoods.

    Args:
        inputs: columns of `Tokens.extra` that the network reads beside the states.
        prior: the column that is added to the scores, times a learned scale.
    """

    def __init__(self, widths: Sequence[int], inputs: Sequence[int] = (), prior: int | None = None) -> None:
        super().__init__()
        self.gate, self.inputs, self.prior = Gate([width + len(inputs) for width in widths]), list(inputs), prior
        self.scale = nn.Parameter(torch.tensor(0.1)) if prior is not None else None

    def forward(self, states: Sequence[torch.Tensor], extra: torch.Tensor) -> torch.Tensor:
        inputs = [torch.cat([state, extra[:, k, self.inputs]], -1) for k, state in enumerate(states)]
        log_weights = self.gate(inputs)
        return (
            log_weights if self.scale is None else (log_weights + self.scale * extra[..., self.prior]).log_softmax(-1)
        )


GATES: dict[str, Callable[[Sequence[int]], TransferGate]] = {
    "the paper's gate": TransferGate,
    "with each specialist's entropy": lambda widths: TransferGate(widths, [0]),
    "with its past likelihoods": lambda widths: TransferGate(widths, [1]),
    "with both": lambda widths: TransferGate(widths, [0, 1]),
    "prior from the last tokens": lambda widths: TransferGate(widths, prior=1),
    "prior from all past tokens": lambda widths: TransferGate(widths, prior=2),
}


def log_weights(gate: TransferGate, tokens: Tokens, positions: torch.Tensor) -> torch.Tensor:
    """(N, K) log weights at some positions."""
    return gate([states[positions].float() for states in tokens.states], tokens.extra[positions])


def at_temperatures(tokens: Tokens, positions: torch.Tensor, temperatures: Sequence[int]) -> torch.Tensor:
    """(N, K) log-probabilities, each specialist at its temperature (an index)."""
    return torch.stack([tokens.log_probs[positions, k, t] for k, t in enumerate(temperatures)], -1)


def fit_temperatures(tokens: Tokens, rows: Sequence[int]) -> list[int]:
    """For each specialist the index of the temperature with the lowest loss on its own domain's rows."""
    out = []
    for k, name in enumerate(DOMAINS):
        positions = tokens.of([i for i in rows if tokens.rows[i].domain == name])
        out.append(int(tokens.log_probs[positions, k].mean(0).argmax()))
    return out


def evenly(tokens: Tokens, rows: Sequence[int]) -> list[int]:
    """The rows, with those of small sources repeated, so that all sources of a domain count alike."""
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i in rows:
        groups[tokens.rows[i].domain, tokens.sources[i]].append(i)
    largest = {domain: max(len(g) for (d, _), g in groups.items() if d == domain) for domain, _ in groups}
    return [g[j % len(g)] for (domain, _), g in groups.items() for j in range(largest[domain])]


def train(
    gate: TransferGate, tokens: Tokens, rows: Sequence[int], temperatures: Sequence[int], seed: int
) -> TransferGate:
    """Train the gate on balanced batches of the rows."""
    domains = [tokens.rows[i].domain for i in rows]
    sampler = BalancedBatchSampler(domains, ROWS_PER_DOMAIN, STEPS, rows_per_device=None, seed=seed)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for batch in sampler:
        positions = tokens.of([rows[i] for i in batch])
        log_p = at_temperatures(tokens, positions, temperatures)
        loss = -(log_weights(gate, tokens, positions) + log_p).logsumexp(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return gate.eval()


@torch.no_grad()
def measure(gate: TransferGate, tokens: Tokens, rows: Sequence[int], temperatures: Sequence[int]) -> dict[int, tuple]:
    """Of each row: nats, and the mean weight of its domain's specialist (None for mixed rows)."""
    out = {}
    for i in rows:
        positions = tokens.of([i])
        weights = log_weights(gate, tokens, positions)
        nats = -(weights + at_temperatures(tokens, positions, temperatures)).logsumexp(-1).sum().item()
        home = DOMAINS.index(tokens.rows[i].domain) if tokens.rows[i].domain in DOMAINS else None
        out[i] = (nats, None if home is None else weights[:, home].exp().mean().item())
    return out


def read(data: Path) -> dict[str, tuple[list[Row], list[str]]]:
    """The rows and sources for training and measuring."""
    out = {}
    for split, zoo_split, own_split in (("train", "train", "validation"), ("test", "test", "held_out")):
        rows, sources = [], []
        for domain in (*DOMAINS, "mixed"):
            zoo_rows = load_rows(str(ZOO / f"{domain}.{zoo_split}.jsonl"))
            rows += zoo_rows
            sources += ["zoo"] * len(zoo_rows)
        for domain in DOMAINS:
            counts: dict[str, int] = defaultdict(int)
            for row in permissive_rows(data / f"{domain}.jsonl", own_split):
                counts[row.source] += 1
                if counts[row.source] <= ROWS_PER_SOURCE[split]:
                    rows.append(row)
                    sources.append(row.source)
        out[split] = (rows, sources)
    return out


def summary(tokens: Tokens, seeds: Sequence[dict[int, tuple]]) -> dict[str, dict]:
    """Losses by (own sources or zoo, domain), against the domain's specialist and the per-domain oracle."""
    out: dict[str, dict] = {}
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i in seeds[0]:
        groups["zoo" if tokens.sources[i] == "zoo" else "own sources", tokens.rows[i].domain].append(i)
    ours, bests = defaultdict(list), defaultdict(list)
    one = TEMPERATURES.index(1.0)
    for (kind, domain), rows in groups.items():
        sizes = {str(i): float(len(tokens.rows[i].labels)) for i in rows}
        fused = Stratum({str(i): sum(seed[i][0] for seed in seeds) / len(seeds) for i in rows}, sizes)
        singles = [
            Stratum({str(i): -tokens.log_probs[tokens.of([i]), k, one].sum().item() for i in rows}, sizes)
            for k in range(len(DOMAINS))
        ]
        best = min(singles, key=lambda stratum: stratum.value)
        ours[kind].append(fused)
        bests[kind].append(best)
        cell = _cell([fused], [best])
        if domain in DOMAINS:
            cell["home_weight"] = sum(seed[i][1] for seed in seeds for i in rows) / (len(rows) * len(seeds))
        out.setdefault(kind, {})[domain] = cell | {"rows": len(rows), "tokens": int(sum(sizes.values()))}
    for kind in out:
        out[kind]["mean"] = _cell(ours[kind], bests[kind])
    return out


def _cell(ours: list[Stratum], best: list[Stratum]) -> dict:
    pair = difference(ours, best)
    assert pair is not None
    return {
        "nats": round(estimate(ours)["value"], 5),
        "best_specialist": round(estimate(best)["value"], 5),
        "difference": round(pair["difference"], 5),
        "ci95": [round(bound, 5) for bound in pair["ci95"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/gate-transfer"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    progress = ConsoleProgress()
    recipe = load_recipe(ZOO.parent / "fuse.yaml", ["dtype=bfloat16"])
    model, tokenizer = fuse(recipe)
    renderer = make_renderer(model, tokenizer, recipe.data.max_length)
    splits = {}
    for split, (rows, sources) in read(args.data).items():
        rendered, _ = renderer.render_all(rows)
        store = FeatureStore.build(model, rendered, args.folder / split, progress=progress)
        source_of = {row.id: source for row, source in zip(rows, sources, strict=True)}
        splits[split] = Tokens(model, store, [source_of[row.row_id] for row in rendered])
    seen, unseen = splits["train"], splits["test"]
    widths = [states.shape[1] for states in seen.states]
    own = [i for i, source in enumerate(seen.sources) if source != "zoo"]
    zoo = [i for i, source in enumerate(seen.sources) if source == "zoo"]
    plain = [TEMPERATURES.index(1.0)] * len(DOMAINS)

    def trained(make, rows: Sequence[int], temperatures: Sequence[int], seed: int) -> TransferGate:
        torch.manual_seed(seed)
        return train(make(widths), seen, rows, temperatures, seed)

    everything = list(range(len(unseen.rows)))
    mixtures = {"zoo": zoo, "own sources": own, "both": zoo + own, "both, sources evenly": evenly(seen, zoo + own)}
    results = []
    for gate_name, make in GATES.items():
        for mixture, rows in mixtures.items():
            for calibrated in (False, True):
                temperatures = fit_temperatures(seen, rows) if calibrated else plain
                seeds = [
                    measure(trained(make, rows, temperatures, seed), unseen, everything, temperatures)
                    for seed in range(args.seeds)
                ]
                line = {"gate": gate_name, "rows": mixture, "temperatures": [TEMPERATURES[t] for t in temperatures]}
                results.append(line | {"calibrated": calibrated, "loss": summary(unseen, seeds)})
                _show(results[-1])
        if gate_name in ("with both",):
            continue
        seeds = []
        for seed in range(args.seeds):
            measured: dict[int, tuple] = {}
            for source in sorted(set(seen.sources)):
                gate = trained(make, [i for i, s in enumerate(seen.sources) if s != source], plain, seed)
                measured |= measure(gate, unseen, [i for i, s in enumerate(unseen.sources) if s == source], plain)
            seeds.append(measured)
        results.append(
            {"gate": gate_name, "rows": "leave one out", "calibrated": False, "loss": summary(unseen, seeds)}
        )
        _show(results[-1])
    if args.output:
        document = {
            "steps": STEPS,
            "seeds": args.seeds,
            "lr": LR,
            "training_rows": {name: len(rows) for name, rows in mixtures.items()},
            "results": results,
        }
        args.output.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _show(line: dict) -> None:
    cells = [
        f"{kind} {domain} {cell['nats']:.3f} ({cell['difference']:+.3f}, w {cell.get('home_weight', 0):.2f})"
        for kind, domains in line["loss"].items()
        for domain, cell in domains.items()
    ]
    print(f"{line['gate']} | {line['rows']} | T {line.get('temperatures')} | " + "; ".join(cells), flush=True)


if __name__ == "__main__":
    main()
