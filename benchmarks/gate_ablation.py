"""Compare gates with other inputs, shapes and temperatures, trained on the same cached features.

    python benchmarks/gate_ablation.py runs/compare-zoo --output docs/results/gate-ablation.json

The folder was written by `ultrafuser compare`. The script reuses the frozen specialists' states on its training and test
rows. Every variant trains on the same balanced batches, and nothing is chosen by the test rows. Each is compared with
the paper's gate on the same test rows, by a paired bootstrap. Probabilities are mixed, so that cached log-probabilities
suffice.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ultrafuser.compare.recipe import load_compare_recipe
from ultrafuser.compare.workspace import Workspace
from ultrafuser.data.balance import BalancedBatchSampler
from ultrafuser.evaluate.intervals import Stratum, difference, estimate
from ultrafuser.evaluate.losses import by_stratum, specialist_losses
from ultrafuser.model.gate import Gate, StaticGate
from ultrafuser.model.modeling_ultrafuser import UltraFuserForCausalLM
from ultrafuser.progress import ConsoleProgress
from ultrafuser.specialists import fuse
from ultrafuser.train.calibrate import calibrate
from ultrafuser.train.features import FeatureStore

STEPS, ROWS_PER_DOMAIN, LR = 60, 8, 1e-3
TEMPERATURES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.8)  # the grid of log-probabilities
TOKENS_PER_CHUNK = 1024
PAST_DECAY = 0.9


class Features:
    """Rows with the states of the specialists, their log-probabilities at several temperatures, and their confidence.

    Attributes:
        names: names of the specialists, equal to the names of their domains.
        grid: (N, K, T) log-probabilities of all response tokens, in nats.
        entropy: (N, K) of each specialist's distribution at each token, in nats.
        past: (N, K) decayed sum of each specialist's log-probabilities of the earlier response tokens, minus the mean of
            all specialists. The weight falls by PAST_DECAY per token. 0 at the first token.
    """

    def __init__(self, model: UltraFuserForCausalLM, store: FeatureStore) -> None:
        self.names, self.store, self.rows, self.states = model.config.names, store, store.rows, store.states
        labels = torch.tensor([label for row in store.rows for label in row.labels])
        self.grid = torch.empty(len(labels), len(store.states), len(TEMPERATURES))
        self.entropy = torch.empty(len(labels), len(store.states))
        with torch.no_grad():
            for k, (states, head) in enumerate(zip(store.states, model.heads(), strict=True)):
                for start in range(0, len(labels), TOKENS_PER_CHUNK):
                    chunk = slice(start, start + TOKENS_PER_CHUNK)
                    logits = head.logits(states[chunk]).float()
                    for t, temperature in enumerate(TEMPERATURES):
                        log_p = (logits / temperature).log_softmax(-1)
                        self.grid[chunk, k, t] = log_p.gather(-1, labels[chunk, None])[:, 0]
                        if temperature == 1.0:
                            self.entropy[chunk, k] = -(log_p.exp() * log_p).sum(-1)
        self.past = torch.zeros_like(self.entropy)
        log_probs = self.grid[..., TEMPERATURES.index(1.0)]
        relative = log_probs - log_probs.mean(-1, keepdim=True)
        for first, end in pairwise(store.offsets):
            for i in range(first + 1, end):
                self.past[i] = PAST_DECAY * self.past[i - 1] + relative[i - 1]

    def batch(self, indices: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """States of all response tokens of some rows, K x (N, D + 2), and their grid (N, K, T).

        The last two columns are entropy and past.
        """
        offsets = self.store.offsets
        tokens = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in indices])
        extra = torch.stack([self.entropy[tokens], self.past[tokens]], -1)  # (N, K, 2)
        states = [torch.cat([state[tokens].float(), extra[:, k]], -1) for k, state in enumerate(self.states)]
        return states, self.grid[tokens]


class WithExtraInputs(nn.Module):
    """The paper's gate with further inputs for each specialist.

    Args:
        extra: 0 for entropy, 1 for past.
    """

    def __init__(self, widths: Sequence[int], extra: Sequence[int]) -> None:
        super().__init__()
        self.columns = [[*range(width), *(width + i for i in extra)] for width in widths]
        self.gate = Gate([len(columns) for columns in self.columns])

    def forward(self, states):
        return self.gate([state[:, columns] for state, columns in zip(states, self.columns, strict=True)])


class LayerNormed(nn.Module):
    """A gate on layer-normed states, without learned scales."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.gate = Gate(widths)

    def forward(self, states):
        return self.gate([nn.functional.layer_norm(state, state.shape[-1:]) for state in states])


class Standardised(nn.Module):
    """A gate on states standardised by the training states' mean and deviation, per specialist and feature."""

    def __init__(self, widths: Sequence[int], store: Features) -> None:
        super().__init__()
        self.gate = Gate(widths)
        self.mean = [states.float().mean(0) for states in store.states]
        self.std = [states.float().std(0).clamp(min=1e-6) for states in store.states]

    def forward(self, states):
        return self.gate([(s - m) / d for s, m, d in zip(states, self.mean, self.std, strict=True)])


class Biased(nn.Module):
    """The paper's gate plus one learned bias for each specialist."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.gate, self.bias = Gate(widths), nn.Parameter(torch.zeros(len(widths)))

    def forward(self, states):
        return (self.gate(states) + self.bias).log_softmax(-1)


class Differences(nn.Module):
    """A gate on each specialist's state and its difference from the mean state."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.gate = Gate([2 * width for width in widths])

    def forward(self, states):
        mean = torch.stack(list(states)).mean(0)
        return self.gate([torch.cat([state, state - mean], -1) for state in states])


class Concatenated(nn.Module):
    """One network from the concatenated states to K scores (appendix E, R^D -> R^3)."""

    def __init__(self, widths: Sequence[int], hidden: int = 512) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(sum(widths), hidden), nn.ReLU(), nn.Linear(hidden, len(widths)))

    def forward(self, states):
        return self.net(torch.cat(list(states), -1)).log_softmax(-1)


class Separate(nn.Module):
    """A separate gate for each specialist."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(d, 512), nn.ReLU(), nn.Linear(512, 1)) for d in widths)

    def forward(self, states):
        return torch.cat([net(s) for net, s in zip(self.nets, states, strict=True)], -1).log_softmax(-1)


class Linear(nn.Module):
    """One shared linear layer."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.score = nn.Linear(widths[0], 1)

    def forward(self, states):
        return torch.cat([self.score(state) for state in states], -1).log_softmax(-1)


class Tempered(nn.Module):
    """The paper's gate, and a learned temperature for each specialist's probabilities."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.gate, self.tenths = Gate(widths), nn.Parameter(torch.zeros(len(widths)))

    def forward(self, states):
        return self.gate(states)

    def temper(self, grid: torch.Tensor) -> torch.Tensor:
        """(N, K, T) -> (N, K), interpolated between the two nearest temperatures of the grid."""
        knots = torch.tensor(TEMPERATURES).log()
        log_t = (10 * self.tenths).clamp(float(knots[0]), float(knots[-1]))
        upper = torch.searchsorted(knots, log_t.detach()).clamp(1, len(knots) - 1)
        share = (log_t - knots[upper - 1]) / (knots[upper] - knots[upper - 1])  # (K,)
        low, high = (grid.gather(-1, i.expand(len(grid), -1)[..., None])[..., 0] for i in (upper - 1, upper))
        return low + share * (high - low)


class Calibrated(Tempered):
    """The paper's gate over temperatures that minimise each specialist's loss on training rows.

    Args:
        own_domain: fit each temperature on the specialist's own domain alone.
    """

    def __init__(self, widths: Sequence[int], store: Features, own_domain: bool) -> None:
        super().__init__(widths)
        self.tenths.requires_grad_(False)
        token_domains = [row.domain for row in store.rows for _ in row.labels]
        for k, name in enumerate(store.names):
            domains = [name] if own_domain else sorted(set(token_domains))
            masks = [torch.tensor([token == domain for token in token_domains]) for domain in domains]
            mean = torch.stack([store.grid[mask, k].mean(0) for mask in masks]).mean(0)  # (T,)
            self.tenths[k] = math.log(TEMPERATURES[int(mean.argmax())]) / 10


class Dropped(nn.Module):
    """The paper's gate with dropout on its inputs."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.gate, self.dropout = Gate(widths), nn.Dropout(0.3)

    def forward(self, states):
        return self.gate([self.dropout(state) for state in states])


def log_likelihood(gate: nn.Module, states: list[torch.Tensor], grid: torch.Tensor) -> torch.Tensor:
    """(N,) log-probabilities of the response tokens under the mixture."""
    log_probs = gate.temper(grid) if isinstance(gate, Tempered) else grid[..., TEMPERATURES.index(1.0)]
    inputs = states if isinstance(gate, WithExtraInputs) else [state[:, :-2] for state in states]
    return torch.logsumexp(gate(inputs) + log_probs, -1)


def variants(widths: Sequence[int], store: Features) -> dict[str, Callable[[], nn.Module]]:
    return {
        "the paper's gate": lambda: Gate(widths),
        "static weights": lambda: StaticGate(len(widths)),
        "linear": lambda: Linear(widths),
        "hidden 64": lambda: Gate(widths, 64),
        "hidden 2048": lambda: Gate(widths, 2048),
        "layer norm": lambda: LayerNormed(widths),
        "standardised": lambda: Standardised(widths, store),
        "with a bias per specialist": lambda: Biased(widths),
        "with differences from the mean": lambda: Differences(widths),
        "concatenated states": lambda: Concatenated(widths),
        "a gate per specialist": lambda: Separate(widths),
        "a temperature per specialist": lambda: Tempered(widths),
        "temperatures set before, all rows": lambda: Calibrated(widths, store, own_domain=False),
        "temperatures set before, own rows": lambda: Calibrated(widths, store, own_domain=True),
        "dropout 0.3": lambda: Dropped(widths),
        "with each specialist's entropy": lambda: WithExtraInputs(widths, [0]),
        "with its past likelihoods": lambda: WithExtraInputs(widths, [1]),
        "with both": lambda: WithExtraInputs(widths, [0, 1]),
    }


def train(gate: nn.Module, store: Features, steps: int, lr: float, seed: int) -> nn.Module:
    sampler = BalancedBatchSampler([row.domain for row in store.rows], ROWS_PER_DOMAIN, steps, seed=seed)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch: list[int] = []
    size = ROWS_PER_DOMAIN * len({row.domain for row in store.rows})
    for micro_batch in sampler:
        batch += micro_batch
        if len(batch) < size:
            continue
        loss = -log_likelihood(gate, *store.batch(batch)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        batch = []
    return gate


@torch.no_grad()
def measure(gate: nn.Module, store: Features) -> dict[str, Stratum]:
    out: dict[str, Stratum] = {}
    gate.eval()
    for i, row in enumerate(store.rows):
        stratum = out.setdefault(row.domain, Stratum({}, {}))
        stratum.totals[row.row_id] = -log_likelihood(gate, *store.batch([i])).sum().item()
        stratum.weights[row.row_id] = len(row.labels)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    settings = load_compare_recipe(args.folder / "compare.yaml", [f"output={args.folder}"])
    workspace = Workspace(settings, ConsoleProgress())
    model, _ = fuse(settings.training())
    train_rows, test_rows = (Features(model, workspace.frozen_features(name)) for name in ("train", "test"))
    widths = [states.shape[1] for states in train_rows.states]
    results: dict[str, dict] = {}
    reference: list[dict[str, Stratum]] = []
    for name, make in variants(widths, train_rows).items():
        start, seed_losses = time.monotonic(), []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            lr = 0.05 if name.startswith("static") else LR
            gate = train(make(), train_rows, args.steps, lr, seed)
            seed_losses.append(measure(gate, test_rows))
        temperatures = (10 * gate.tenths).exp().tolist() if isinstance(gate, Tempered) else None
        reference = reference or seed_losses
        domains = list(seed_losses[0])
        mean = _mean_over_seeds(seed_losses)
        nll = {d: estimate([mean[d]]) for d in domains}
        nll["mean"] = estimate([mean[d] for d in domains])
        minus = {d: difference([mean[d]], [_mean_over_seeds(reference)[d]]) for d in domains}
        minus["mean"] = difference(list(mean.values()), list(_mean_over_seeds(reference).values()))
        results[name] = {
            "nll": nll,
            "minus_paper": minus,
            "temperatures": temperatures and [round(t, 3) for t in temperatures],
            "seconds": round((time.monotonic() - start) / args.seeds, 1),
        }
        line = " ".join(f"{d} {nll[d]['value']:.4f}" for d in nll)
        low, high = minus["mean"]["ci95"]
        print(
            f"{name:32} {line}  mean - paper's {minus['mean']['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
            + (f"  temperatures {' '.join(f'{t:.2f}' for t in temperatures)}" if temperatures else ""),
            flush=True,
        )
    if args.output:
        document = {
            "steps": args.steps,
            "seeds": args.seeds,
            "lr": LR,
            "rows": {"train": len(train_rows.rows), "test": len(test_rows.rows)},
        }
        document |= {"specialists": specialist_results(model, train_rows.store, test_rows.store), "variants": results}
        args.output.write_text(json.dumps(_rounded(document), indent=1) + "\n", encoding="utf-8")


def specialist_results(model: UltraFuserForCausalLM, train: FeatureStore, test: FeatureStore) -> dict[str, dict]:
    """Losses of every single specialist at temperature 1 and at its fitted temperature, to tell calibration from mixing."""
    temperatures = calibrate(model, train.rows)
    model.config.set_temperatures(temperatures)
    stores = {"as it is": test, "at its temperature": FeatureStore.build(model, test.rows, test.folder)}
    out: dict[str, dict] = {}
    for k, (name, temperature) in enumerate(zip(model.config.names, temperatures, strict=True)):
        out[name] = {"temperature": temperature}
        for variant, store in stores.items():
            losses = list(specialist_losses(store, model.config.names).values())[k]
            strata = list(by_stratum(store.rows, losses).items())
            out[name][variant] = {domain: estimate([stratum]) for domain, stratum in strata}
            out[name][variant]["mean"] = estimate([stratum for _, stratum in strata])
    return out


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_rounded(value) for value in tree]
    return round(tree, 6) if isinstance(tree, float) else tree


def _mean_over_seeds(seed_losses: Sequence[dict[str, Stratum]]) -> dict[str, Stratum]:
    """Each row's nats, averaged over the seeds."""
    return {
        domain: Stratum(
            {row: sum(losses[domain].totals[row] for losses in seed_losses) / len(seed_losses) for row in first.totals},
            first.weights,
        )
        for domain, first in seed_losses[0].items()
    }


if __name__ == "__main__":
    main()
